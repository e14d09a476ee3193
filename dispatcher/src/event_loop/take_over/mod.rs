//! Hands everything to a new dispatcher that was started with `--take-over`.
//!
//! A thread of its own (`giver`) speaks with the new dispatcher and asks the hot thread two things:
//! copies of the listening sockets, and then the commit. The commit is one step of the hot thread:
//! it passes the connections that no worker has, sends `commit`, and waits for the answer, all
//! within [`COMMIT`]. Nothing else happens meanwhile, so nothing has to be undone if the new
//! dispatcher fails: the old one continues with its own copies. After `commit` the old dispatcher
//! stops; its workers look for a dispatcher and find the new one at the same socket.

mod giver;
mod taker;

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{Receiver, SyncSender};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use rustix::net::Shutdown;

use super::handshake::HandshakeCommand;
use super::line::LineCommand;
use super::{EventLoop, clock};
use crate::background::logger::quoted;
use crate::listen::bind::{Listening, identity, identity_of_path};
use crate::listen::files::SocketFile;
use crate::listen::take_over::{
    About, Broken, Channel, FileId, Kind, MAX_DESCRIPTORS, MAX_PROXIED, PassedClient, PassedHeader,
    Record,
};
use crate::wake::Wake;
use dispatcher_core::{ConnId, ListenerId, PoolId};

pub(super) use giver::Giver;
pub(super) use taker::Taken;

/// The longest time that the commit may take. The hot thread does nothing else meanwhile.
const COMMIT: Duration = Duration::from_secs(5);

/// How long connections that were sent to workers before the commit may stay untaken. Then the
/// workers are released: they find these connections in their channels.
const UNTAKEN: Duration = Duration::from_secs(2);

/// What the thread asks of the hot thread.
pub(super) enum Ask {
    /// Copies of the listening sockets; an error is the reason of a refusal.
    Sockets { peer: Peer, channel: Weak<Channel>, answer: SyncSender<Result<Offer, String>> },
    /// The new dispatcher is ready.
    Commit(Box<Commit>),
}

/// The new dispatcher.
#[derive(Clone, Copy, Debug)]
pub(super) struct Peer {
    pub(super) pid: i32,
    pub(super) uid: u32,
}

/// Copies of the listening sockets.
pub(super) struct Offer {
    pub(super) sockets: Vec<Passed>,
    /// The number of reloads before.
    generation: u64,
}

/// A copy of a listening socket.
pub(super) struct Passed {
    pub(super) about: About,
    pub(super) fd: OwnedFd,
    pub(super) file: Option<SocketFile>,
    /// Its position in `Listeners`.
    position: Option<usize>,
}

/// Everything that the commit needs.
pub(super) struct Commit {
    pub(super) peer: Peer,
    pub(super) channel: Arc<Channel>,
    pub(super) offer: Offer,
    /// The sockets that the new dispatcher does not use.
    pub(super) unused: HashSet<u32>,
    pub(super) answer: SyncSender<Result<(), String>>,
}

/// The hot thread's side.
pub(super) struct TakeOver {
    /// The socket, until the thread is started.
    offered: Option<Listening>,
    wake: Wake,
    /// `None` where take-overs are not offered.
    giver: Option<Giver>,
    asks: Option<Receiver<Ask>>,
    /// The connection to the new dispatcher, while a take-over is under way.
    current: Weak<Channel>,
    /// Sockets that other threads serve, for a new dispatcher.
    pub(super) shared: SharedSockets,
}

/// Copies of sockets that other threads serve.
#[derive(Debug, Default)]
pub(super) struct SharedSockets {
    pub(super) dispatch: Option<OwnedFd>,
    pub(super) admin: Option<OwnedFd>,
    /// With the address as it is configured.
    pub(super) admin_http: Option<(String, Listening)>,
    /// The same, of `advice_listen`.
    pub(super) advice: Option<(String, Listening)>,
}

impl TakeOver {
    pub(super) fn new(shared: SharedSockets, offered: Option<Listening>, wake: Wake) -> TakeOver {
        TakeOver { offered, wake, giver: None, asks: None, current: Weak::new(), shared }
    }

    /// Ends a take-over that is under way: this dispatcher stops.
    pub(super) fn refuse(&mut self) {
        if let Some(channel) = self.current.upgrade() {
            let reason = "the running dispatcher is being stopped".to_owned();
            let _ = channel.send(&Record::Refused { reason }, &[], Instant::now());
            let _ = rustix::net::shutdown(channel.socket(), Shutdown::Both);
        }
    }

    /// The dispatcher ends: closes the copies, and ends the thread.
    pub(super) fn end(&mut self) {
        self.refuse();
        self.shared = SharedSockets::default();
        if let Some(giver) = self.giver.take() {
            giver.end();
        }
    }
}

impl EventLoop {
    /// Lets another dispatcher take over from now on.
    pub(super) fn start_giver(&mut self) {
        let Some(listening) = self.take_over.offered.take() else { return };
        match Giver::start(listening, Arc::clone(&self.take_over.wake)) {
            Ok((giver, asks)) => {
                self.take_over.giver = Some(giver);
                self.take_over.asks = Some(asks);
            }
            Err(error) => {
                log::warn!("event=take_over_not_offered error={}", quoted(error));
            }
        }
    }

    /// Answers the thread.
    pub(super) fn handle_take_over(&mut self) {
        while let Some(ask) = self.take_over.asks.as_ref().and_then(|asks| asks.try_recv().ok()) {
            match ask {
                Ask::Sockets { peer, channel, answer } => {
                    let offer = self.offer(peer);
                    if offer.is_ok() {
                        self.take_over.current = channel;
                    }
                    let _ = answer.send(offer);
                }
                Ask::Commit(commit) => {
                    let result = self.commit(&commit);
                    let _ = commit.answer.send(result);
                }
            }
        }
    }

    /// Why this peer may not take over, if it may not.
    fn refusal(&self, peer: Peer) -> Option<String> {
        let own = rustix::process::geteuid().as_raw();
        if self.run.stop_deadline.is_some() || self.run.stop_asked.is_some() {
            return Some("the running dispatcher is being stopped".to_owned());
        }
        if peer.uid != 0 && peer.uid != own {
            return Some(format!(
                "user {} may not take over: only root and user {own} may",
                peer.uid
            ));
        }
        // A worker that the dispatcher has started could take the listeners away.
        if own != 0 && peer.uid != 0 && self.pools.iter().any(|pool| pool.spawn.is_some()) {
            return Some(format!(
                "the running dispatcher starts workers as its own user {own}, and any of them \
                 could take its listeners in this way; run the dispatcher as root, or start the \
                 workers as services of their own"
            ));
        }
        let inherited = |listening: &Listening| listening.inherited;
        let sockets = self.listeners.sockets.iter();
        let passed = sockets.filter_map(|socket| socket.listening.as_ref()).any(inherited);
        let agents = self.agents.iter().any(|socket| inherited(&socket.listening));
        if passed || agents || !self.listeners.unused.is_empty() {
            return Some(
                "the running dispatcher has sockets of a service manager, which passes them to \
                 the next dispatcher itself; use systemctl restart"
                    .to_owned(),
            );
        }
        None
    }

    fn offer(&self, peer: Peer) -> Result<Offer, String> {
        if let Some(refusal) = self.refusal(peer) {
            return Err(refusal);
        }
        let failed = |error: std::io::Error| format!("a copy of a socket: {error}");
        let copy = |fd: &OwnedFd| fd.try_clone().map_err(failed);
        let mut sockets = Vec::new();
        let mut endpoint = |kind, fd: &Option<OwnedFd>, file: Option<SocketFile>| {
            let (Some(fd), Some(file)) = (fd, file) else {
                return Err("a socket has no file".to_owned());
            };
            let address = identity_of_path(&file.path);
            let about = about(kind, "", &address, &address, Some(&file));
            sockets.push(Passed { about, fd: copy(fd)?, file: Some(file), position: None });
            Ok(())
        };
        let file =
            |path: &Option<crate::listen::bind::OwnedPath>| path.as_ref().map(|it| it.file());
        let shared = &self.take_over.shared;
        endpoint(Kind::Dispatch, &shared.dispatch, file(&self.endpoints.dispatch_path))?;
        endpoint(Kind::Admin, &shared.admin, file(&self.endpoints.admin_path))?;
        if let Some(giver) = &self.take_over.giver {
            endpoint(Kind::TakeOver, &Some(copy(&giver.socket)?), file(&giver.path))?;
        }
        for socket in &self.lines.sockets {
            endpoint(Kind::Line, &socket.copy, file(&socket.path))?;
        }
        let http = [(Kind::AdminHttp, &shared.admin_http), (Kind::Advice, &shared.advice)];
        for (kind, shared) in http {
            let Some((configured, listening)) = shared else { continue };
            let about = about(kind, "", configured, &listening.address, None);
            sockets.push(Passed { about, fd: copy(&listening.fd)?, file: None, position: None });
        }
        for socket in &self.agents {
            let configured = socket.configured.to_string();
            let about = about(Kind::Agent, &socket.pool, &configured, socket.address(), None);
            let fd = copy(&socket.listening.fd)?;
            sockets.push(Passed { about, fd, file: None, position: None });
        }
        for (position, socket) in self.listeners.sockets.iter().enumerate() {
            let current = socket.leaving.is_none() && !socket.is_retiring();
            let (true, Some(listening)) = (current, &socket.listening) else { continue };
            let Some(resources) = self.listeners.resources(socket.id) else { continue };
            let Some(configured) = identity(&resources.address) else { continue };
            let (name, file) = (self.core.listener_name(socket.id), listening.file());
            let about = about(Kind::Listener, name, &configured, &listening.address, file.as_ref());
            let position = Some(position);
            sockets.push(Passed { about, fd: copy(&listening.fd)?, file, position });
        }
        Ok(Offer { sockets, generation: self.run.generation })
    }

    /// Passes the connections that no worker has, and makes the new dispatcher the dispatcher. An
    /// error means that this one continues as before.
    fn commit(&mut self, commit: &Commit) -> Result<(), String> {
        let Commit { peer, channel, offer, unused, .. } = commit;
        if let Some(refusal) = self.refusal(*peer) {
            return Err(refusal);
        }
        if offer.generation != self.run.generation {
            return Err("the running dispatcher was reloaded meanwhile: try again".to_owned());
        }
        self.perform();
        let used = (0..).zip(&offer.sockets).filter(|(number, _)| !unused.contains(number));
        let numbers: HashMap<ListenerId, u32> = used
            .clone()
            .filter_map(|(number, socket)| {
                Some((self.listeners.sockets.get(socket.position?)?.id, number))
            })
            .collect();
        let clients = self.waiting_clients(&numbers);
        self.hold(true);
        if let Err(broken) = self.pass(channel, &clients) {
            self.hold(false);
            return Err(broken.to_string());
        }
        let used: Vec<&Passed> = used.map(|(_, socket)| socket).collect();
        for file in used.iter().filter_map(|socket| socket.file.as_ref()) {
            file.lock.share();
        }
        for (conn, _) in &clients {
            self.connections.unwatch(self.wakeup.registry(), *conn);
            self.core.handed_over(self.now, *conn);
        }
        let positions: HashSet<usize> = used.iter().filter_map(|socket| socket.position).collect();
        log::info!(
            "event=handed_over to={} listeners={} connections={}",
            peer.pid,
            positions.len(),
            clients.len()
        );
        self.leave_all(&positions);
        Ok(())
    }

    /// The connections that no worker has, and that have a listener of the new dispatcher.
    fn waiting_clients(&self, numbers: &HashMap<ListenerId, u32>) -> Vec<(ConnId, PassedClient)> {
        let waiting = self.core.waiting().filter_map(|id| {
            let conn = self.connections.get(id.index).filter(|conn| conn.serial == id.serial)?;
            let client = PassedClient {
                socket: *numbers.get(&conn.listener)?,
                peer: conn.peer.socket_addr(),
                waited: clock() - conn.accepted,
                resent: conn.at_worker.is_some(),
                awaits_header: self.core.awaits_header(id),
                proxy: conn.proxy.as_ref().map(|header| PassedHeader {
                    address: header.address.socket_addr(),
                    local: header.local,
                    tlvs: header.tlvs.clone(),
                }),
            };
            Some((id, client))
        });
        waiting.collect()
    }

    /// Speaks with the new dispatcher until it has committed.
    fn pass(&self, channel: &Channel, clients: &[(ConnId, PassedClient)]) -> Result<(), Broken> {
        let deadline = Instant::now() + COMMIT;
        let unexpected = |record| Broken::Other(format!("unexpected: {record:?}"));
        let proxied = clients.iter().any(|(_, client)| client.proxy.is_some());
        for part in clients.chunks(if proxied { MAX_PROXIED } else { MAX_DESCRIPTORS }) {
            let known = part.iter().filter_map(|(id, client)| {
                Some((self.connections.get(id.index)?.fd.as_fd(), client.clone()))
            });
            let (fds, clients): (Vec<_>, Vec<_>) = known.unzip();
            let count = clients.len() as u32;
            channel.send(&Record::Clients { clients }, &fds, deadline)?;
            match channel.receive(deadline)?.0 {
                Record::Received { clients } if clients == count => {}
                record => return Err(unexpected(record)),
            }
        }
        channel.send(&Record::Commit, &[], deadline)?;
        match channel.receive(deadline) {
            Ok((Record::Committed, _)) => Ok(()),
            Ok((record, _)) => Err(unexpected(record)),
            // It is alive and has the record: it will act on it as soon as it runs again.
            Err(Broken::Late) => {
                log::warn!("event=commit_not_confirmed error={}", quoted(Broken::Late));
                Ok(())
            }
            Err(broken) => Err(broken),
        }
    }

    /// Begins or ends the time in which the other threads accept nothing.
    pub(super) fn hold(&self, held: bool) {
        self.handshakes.send(HandshakeCommand::Hold(held));
        self.line_command(LineCommand::Hold(held));
        self.side.accepting.send_replace(!held);
    }

    /// The new dispatcher serves: this one stops.
    fn leave_all(&mut self, positions: &HashSet<usize>) {
        self.side.files.set(Vec::new());
        self.begin_handed_over_stop(UNTAKEN, positions);
        for pool in (0..self.pools.len() as u16).map(PoolId) {
            if self.leaves(pool) {
                self.side.spawner.leave_pool(pool);
            }
        }
        self.side.spawner.give_up_journal();
        self.take_over.shared = SharedSockets::default();
    }

    /// Closes the sockets that the new dispatcher has, and empties the others.
    pub(super) fn give_listeners_away(&mut self, positions: &HashSet<usize>) {
        let mut closed = Vec::new();
        for &position in positions {
            let Some(listener) = self.listeners.sockets.get_mut(position) else { continue };
            closed.push(listener.id);
            listener.close(
                self.wakeup.registry(),
                &mut self.background.cleaner,
                &mut self.background.closers,
            );
        }
        closed.sort();
        closed.dedup();
        closed.into_iter().for_each(|id| self.closed(id));
        self.finish_listeners();
    }
}

fn about(
    kind: Kind,
    name: &str,
    configured: &str,
    address: &str,
    file: Option<&SocketFile>,
) -> About {
    let file = file.map(|file| FileId {
        path: std::path::absolute(&file.path).unwrap_or_else(|_| file.path.clone()),
        device: file.device,
        inode: file.inode,
    });
    let (name, configured) = (name.to_owned(), configured.to_owned());
    About { kind, name, configured, address: address.to_owned(), file }
}
