//! Other hosts, through NATS: directories find each other, tell each other what changes, and pass
//! on messages between members of different hosts.
//!
//! Subjects are `PREFIX.all`, which every directory reads, and `PREFIX.to.HOST` for one host. Every
//! second a directory says on `all` that it is there. Updates are numbered: a directory that has
//! missed one asks for a snapshot and keeps later updates until it has come.
//!
//! NATS delivers at most once. What is lost on the way shows as a gap in the numbers of a link,
//! which the two members then begin again, so nothing arrives twice or out of order. While NATS is
//! away each host continues by itself; messages to other hosts are answered with *unreachable* at
//! once.

mod gateway;
mod peers;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

use async_nats::connection::State as Connection;
use async_nats::{Client, ConnectOptions, Subscriber};
use dispatch_protocol::relay::{Name, Shared, VERSION, frame, host_number};
use futures_core::Stream;
use tokio::sync::Notify;

use crate::config::Nats;
use crate::server::Handle;
use crate::server::budget::Budget;
use gateway::Gateway;
use peers::Peers;

/// How often a directory says that it is there.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// Bytes of one message to other directories; NATS allows 1 MiB by default.
const PIECE: usize = 256 * 1024;

/// Bytes of updates that may wait; with more, the others are given a snapshot.
const MAX_OUTBOX: usize = 16 * 1024 * 1024;

/// The kinds of messages.
const SHARED: u8 = 1;
const FORWARD: u8 = 2;
const UNREACHABLE: u8 = 3;

/// The connection to the other directories.
pub(crate) struct Cluster {
    client: Client,
    prefix: String,
    name: Name,
    number: u64,
    /// The largest message of the own members.
    max_message: usize,
    /// What waits for NATS and for members.
    pub(crate) waiting: Rc<Budget>,
    run: u64,
    /// The number of the last update.
    sequence: Cell<u64>,
    /// Encoded updates that were not sent, each after its length.
    outbox: RefCell<Vec<u8>>,
    changed: Notify,
    /// By namespace and number of the member.
    gateways: RefCell<HashMap<(Name, u64), Rc<Gateway>>>,
    peers: RefCell<Peers>,
    next_piece: Cell<u64>,
    start: std::time::Instant,
}

/// Connects, if NATS is configured; it may also come later.
pub(crate) async fn start(state: &Handle) -> io::Result<()> {
    let (nats, name, start, max_message, waiting) = {
        let state = state.borrow();
        let Some(nats) = state.config.nats.clone() else { return Ok(()) };
        let config = &state.config;
        let waiting = Budget::new(config.max_gateway_bytes, config.max_gateway_bytes_per_user);
        (nats, config.host.clone(), state.start, config.max_message, waiting)
    };
    let client = connect(&nats, &name).await?;
    let number = host_number(&name);
    let prefix = nats.subject;
    let failed = |error: async_nats::SubscribeError| io::Error::other(format!("nats: {error}"));
    let all = client.subscribe(format!("{prefix}.all")).await.map_err(failed)?;
    let own = client.subscribe(format!("{prefix}.to.{number:016x}")).await.map_err(failed)?;
    let cluster = Rc::new(Cluster {
        client,
        prefix,
        name,
        number,
        max_message: max_message as usize,
        waiting,
        run: RandomState::new().hash_one(0) | 1,
        sequence: Cell::new(0),
        outbox: RefCell::new(Vec::new()),
        changed: Notify::new(),
        gateways: RefCell::new(HashMap::new()),
        peers: RefCell::new(Peers::default()),
        next_piece: Cell::new(0),
        start,
    });
    state.borrow_mut().cluster = Some(Rc::clone(&cluster));
    for subscription in [all, own] {
        tokio::task::spawn_local(read(Rc::clone(state), Rc::clone(&cluster), subscription));
    }
    tokio::task::spawn_local(send_updates(Rc::clone(&cluster)));
    tokio::task::spawn_local(beat(Rc::clone(state), cluster));
    Ok(())
}

/// Says that this directory leaves.
pub(crate) async fn stop(state: &Handle) {
    let cluster = state.borrow().cluster.clone();
    let Some(cluster) = cluster else { return };
    cluster.publish_all(&[Shared::Leaving { run: cluster.run }]).await;
    let _ = tokio::time::timeout(HEARTBEAT, cluster.client.flush()).await;
}

async fn connect(nats: &Nats, name: &Name) -> io::Result<Client> {
    let mut options = ConnectOptions::new()
        .name(format!("dispatch-directory {name}"))
        // A dead connection is noticed after two of these.
        .ping_interval(Duration::from_secs(2))
        .reconnect_delay_callback(|attempts| Duration::from_millis(50 * attempts.min(20) as u64))
        .max_reconnects(None)
        .retry_on_initial_connect()
        // What this directory says on `all` is not for itself.
        .no_echo()
        .event_callback(|event| async move { log::info!("event=nats state=\"{event}\"") });
    if let Some(path) = &nats.tls_ca {
        options = options.add_root_certificates(path.clone()).require_tls(true);
    }
    if let Some((certificate, key)) = &nats.tls_client {
        options = options.add_client_certificate(certificate.clone(), key.clone());
    }
    if let Some(path) = &nats.credentials {
        options = options.credentials_file(path).await.map_err(|error| {
            io::Error::new(error.kind(), format!("nats_credentials {}: {error}", path.display()))
        })?;
    }
    let servers: Vec<&str> = nats.servers.split(',').map(str::trim).collect();
    let problem = |error: &dyn std::error::Error| io::Error::other(format!("nats: {error}"));
    options.connect(&servers[..]).await.map_err(|error| problem(&error))
}

impl Cluster {
    /// The steady clock of the server.
    fn steady(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Whether the members of a host accept messages as long as those in `frames`.
    fn accepts(&self, host: u64, frames: &[u8]) -> bool {
        let most = self.peers.borrow().max_message(host).unwrap_or(usize::MAX);
        // Nearly always, and then there is nothing to look at.
        most >= self.max_message || frame::longest_message(frames).is_some_and(|one| one <= most)
    }

    fn is_connected(&self) -> bool {
        self.client.connection_state() == Connection::Connected
    }

    /// A change of this host, for the others.
    pub(crate) fn share(&self, record: Shared) {
        let mut outbox = self.outbox.borrow_mut();
        if outbox.len() > MAX_OUTBOX {
            // The gap in the numbers makes the others ask for a snapshot.
            outbox.clear();
            self.sequence.set(self.sequence.get() + 1);
        }
        append(&mut outbox, &record);
        self.changed.notify_one();
    }

    fn head(&self) -> Vec<u8> {
        self.numbered_head(self.sequence.get())
    }

    fn numbered_head(&self, sequence: u64) -> Vec<u8> {
        let wall = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let wall = wall.map_or(0, |wall| u64::try_from(wall.as_millis()).unwrap_or(u64::MAX));
        let (host, run) = (self.name.clone(), self.run);
        let mut message = vec![SHARED];
        let max_message = u32::try_from(self.max_message).unwrap_or(u32::MAX);
        let version = VERSION;
        let record = Shared::Host { version, host, run, sequence, wall, max_message };
        append(&mut message, &record);
        message
    }

    async fn publish(&self, subject: String, message: Vec<u8>) {
        // NATS would keep it and deliver it when no member expects it any more.
        if self.is_connected()
            && let Err(error) = self.client.publish(subject, message.into()).await
        {
            log::warn!("event=nats_publish_failed error=\"{error}\"");
        }
    }

    async fn publish_all(&self, records: &[Shared]) {
        let mut message = self.head();
        records.iter().for_each(|record| append(&mut message, record));
        self.publish(format!("{}.all", self.prefix), message).await;
    }

    async fn publish_to(&self, host: u64, message: Vec<u8>) {
        self.publish(format!("{}.to.{host:016x}", self.prefix), message).await;
    }

    /// Everything of this host, for one other.
    async fn send_snapshot(&self, host: u64, records: Vec<Shared>) {
        let serial = self.sequence.get();
        // All parts have the number of the last update before, whatever is sent meanwhile.
        let mut message = self.numbered_head(serial);
        append(&mut message, &Shared::SnapshotBegin { serial });
        for record in records {
            append(&mut message, &record);
            if message.len() > PIECE {
                let next = self.numbered_head(serial);
                self.publish_to(host, std::mem::replace(&mut message, next)).await;
            }
        }
        append(&mut message, &Shared::SnapshotEnd { serial });
        self.publish_to(host, message).await;
    }
}

/// Appends a record after its length.
fn append(message: &mut Vec<u8>, record: &Shared) {
    let start = message.len();
    message.extend_from_slice(&[0, 0]);
    record.encode(message);
    let len = u16::try_from(message.len() - start - 2).unwrap_or(u16::MAX);
    message[start..start + 2].copy_from_slice(&len.to_le_bytes());
}

/// The records of a message; stops at the first that is malformed.
fn records(mut rest: &[u8]) -> Vec<Shared> {
    let mut records = Vec::new();
    while let Some((len, after)) = rest.split_first_chunk::<2>() {
        let len = usize::from(u16::from_le_bytes(*len));
        let Some((record, after)) = after.split_at_checked(len) else { break };
        let Ok(record) = Shared::decode(record) else { break };
        records.push(record);
        rest = after;
    }
    records
}

async fn send_updates(cluster: Rc<Cluster>) {
    loop {
        cluster.changed.notified().await;
        loop {
            let mut outbox = cluster.outbox.take();
            if outbox.is_empty() {
                break;
            }
            // Whole records, as many as fit.
            let mut end = 0;
            while let Some((len, _)) = outbox[end..].split_first_chunk::<2>() {
                let next = end + 2 + usize::from(u16::from_le_bytes(*len));
                if end > 0 && next > PIECE {
                    break;
                }
                end = next;
            }
            let later = outbox.split_off(end);
            {
                let mut current = cluster.outbox.borrow_mut();
                let added = std::mem::replace(&mut *current, later);
                current.extend_from_slice(&added);
            }
            cluster.sequence.set(cluster.sequence.get() + 1);
            let mut message = cluster.head();
            message.extend_from_slice(&outbox);
            cluster.publish(format!("{}.all", cluster.prefix), message).await;
        }
    }
}

async fn beat(state: Handle, cluster: Rc<Cluster>) {
    let mut interval = tokio::time::interval(HEARTBEAT);
    loop {
        interval.tick().await;
        cluster.publish_all(&[]).await;
        let mut state = state.borrow_mut();
        let now = state.now();
        for host in cluster.peers.borrow_mut().forgotten(now.steady) {
            log::warn!("event=host_forgotten");
            state.registry.forget_host(now, host);
        }
        state.perform();
    }
}

async fn read(state: Handle, cluster: Rc<Cluster>, mut subscription: Subscriber) {
    loop {
        let next = std::future::poll_fn(|context| Pin::new(&mut subscription).poll_next(context));
        let Some(message) = next.await else { return };
        match message.payload.split_first() {
            Some((&SHARED, rest)) => {
                let mut asked = Vec::new();
                let wanted = {
                    let mut state = state.borrow_mut();
                    let state = &mut *state;
                    let now = state.now();
                    let mut peers = cluster.peers.borrow_mut();
                    let own = (cluster.number, cluster.run);
                    let wanted =
                        peers.take(&mut state.registry, now, own, records(rest), &mut asked);
                    state.perform();
                    wanted
                };
                for host in asked {
                    let records = state.borrow().registry.snapshot();
                    cluster.send_snapshot(host, records).await;
                }
                if let Some(host) = wanted {
                    let mut message = cluster.head();
                    append(&mut message, &Shared::AskSnapshot { host });
                    cluster.publish_to(host, message).await;
                }
            }
            Some((&FORWARD, rest)) => gateway::arrived(&cluster, rest).await,
            Some((&UNREACHABLE, rest)) => gateway::unreachable(&cluster, rest),
            _ => log::warn!("event=nats_message_malformed"),
        }
    }
}

impl Cluster {
    /// A new link between a member and this directory; the member's end.
    pub(crate) fn gateway(
        self: &Rc<Self>,
        namespace: &Name,
        member: u64,
        user: u32,
    ) -> Option<OwnedFd> {
        gateway::open(self, namespace, member, user)
    }
}
