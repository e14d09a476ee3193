//! The program: accepts members, checks who they are, and does what the registry asks.
//!
//! One thread runs everything; the registry is its state. Each member has a task and a bounded
//! queue. A member that does not read loses reports of changes first, and its connection when its
//! queue is full, so that no other member waits for it; when all queues of a user are full
//! together, its largest one goes. Nothing here waits for a member.

mod access;
pub(crate) mod budget;
mod metrics;
mod session;
pub(crate) mod socket;

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use dispatch_protocol::relay::ticket::Key;
use dispatch_protocol::relay::{Change, Count, FromDirectory, Name};
use tokio::sync::Notify;

use crate::config::Config;
use crate::registry::{Effect, MemberIndex, Now, Registry};
use crate::sys;
use budget::{Budget, Full};
use session::{Pushed, Session};

/// Connections without a hello: all, and one user's.
const MAX_PENDING: usize = 256;
const MAX_PENDING_PER_USER: usize = 64;

/// How long accepting pauses when the process has no descriptors left.
const PAUSE: Duration = Duration::from_millis(200);

/// A running directory's state. One thread has it; no borrow lives across an `await`.
pub(crate) struct State {
    pub(crate) registry: Registry,
    pub(crate) config: Config,
    key: Option<Key>,
    pub(crate) start: Instant,
    sessions: HashMap<MemberIndex, Rc<Session>>,
    /// What waits for members that do not read.
    queued: Rc<Budget>,
    pending: usize,
    pending_of: HashMap<u32, usize>,
    /// Rung when a grace period may have begun.
    timer: Rc<Notify>,
    refused: u64,
    cut: u64,
    scrapes: u64,
    scrapes_refused: u64,
    #[cfg(feature = "nats")]
    pub(crate) cluster: Option<Rc<crate::cluster::Cluster>>,
}

/// A shared handle of the state.
pub(crate) type Handle = Rc<RefCell<State>>;

impl State {
    pub(crate) fn now(&self) -> Now {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Now {
            wall: u64::try_from(wall.as_millis()).unwrap_or(u64::MAX >> 16),
            steady: u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX),
        }
    }

    /// Performs what the registry asks.
    pub(crate) fn perform(&mut self) {
        self.perform_effects();
        self.timer.notify_one();
    }

    fn perform_effects(&mut self) {
        while let Some(effect) = self.registry.effect() {
            match effect {
                Effect::Send(to, record) => self.send(to, record, None),
                Effect::Link(a, b, number) => self.link(a, b, number),
                Effect::Cut(member, reason) => self.cut(member, reason),
                #[cfg(feature = "nats")]
                Effect::Share(record) => {
                    if let Some(cluster) = &self.cluster {
                        cluster.share(record);
                    }
                }
                #[cfg(not(feature = "nats"))]
                Effect::Share(_) => {}
            }
        }
    }

    fn send(&mut self, to: MemberIndex, record: FromDirectory, mut fd: Option<OwnedFd>) {
        let Some(session) = self.sessions.get(&to).map(Rc::clone) else { return };
        loop {
            let full = match session.queue.push(&record, fd) {
                Ok(()) => return,
                Err((full, back)) => {
                    fd = back;
                    full
                }
            };
            if let FromDirectory::Changed { id, group, .. } = record {
                // Told when there is room again.
                let change = Change::Missed;
                return session.queue.missed(FromDirectory::Changed { id, group, change });
            }
            let user = match full {
                Pushed::Ended => return,
                Pushed::Queue => return self.cut(to, "it does not read"),
                Pushed::Budget(Full::User) => Some(session.queue.user()),
                Pushed::Budget(Full::All) => self.queued.largest(),
            };
            // Each turn ends a queue that had bytes, so there is an end.
            let of_user = self
                .sessions
                .iter()
                .filter(|(_, one)| user == Some(one.queue.user()) && one.queue.bytes() > 0);
            let largest = of_user.max_by_key(|(_, one)| one.queue.bytes()).map(|(to, _)| *to);
            self.cut(
                largest.unwrap_or(to),
                match full {
                    Pushed::Budget(Full::All) => {
                        "it does not read, and max_queued_bytes are reached"
                    }
                    _ => "it does not read, and its user has max_queued_bytes_per_user",
                },
            );
        }
    }

    /// Ends the connection of a member.
    fn cut(&mut self, member: MemberIndex, reason: &'static str) {
        let Some(session) = self.sessions.get(&member) else { return };
        if session.queue.cut(reason) {
            self.cut += 1;
        }
    }

    fn link(&mut self, a: MemberIndex, b: MemberIndex, number: u64) {
        let numbers = (self.registry.number_of(a), self.registry.number_of(b));
        let (Some(number_a), Some(number_b)) = numbers else { return };
        // A queue full of links costs the member that asks its link, not the other one its
        // connection.
        let has_room = |to| self.sessions.get(&to).is_some_and(|one| one.queue.has_room_for_fd());
        if !has_room(a) || !has_room(b) {
            return self.registry.link_failed(a, b, "too many links wait for one of the two");
        }
        let max_message = self.config.max_message;
        match socket::link() {
            // The other end first: it knows the link before the first message arrives.
            Ok((end_a, end_b)) => {
                let record = FromDirectory::Link { member: number_a, number, max_message };
                self.send(b, record, Some(end_b));
                let record = FromDirectory::Link { member: number_b, number, max_message };
                self.send(a, record, Some(end_a));
            }
            Err(error) => {
                log::error!("event=link_failed error=\"{error}\"");
                self.registry.link_failed(a, b, "the directory has no file descriptor left");
            }
        }
    }

    #[cfg(feature = "nats")]
    fn gateway_bytes(&self) -> u64 {
        self.cluster.as_ref().map_or(0, |cluster| cluster.waiting.total() as u64)
    }

    #[cfg(not(feature = "nats"))]
    fn gateway_bytes(&self) -> u64 {
        0
    }

    /// Numbers of the server, for stats.
    fn own_counts(&self) -> [(&'static str, u64); 7] {
        let queued = self.queued.total() as u64;
        [
            ("queued_bytes", queued),
            ("gateway_bytes", self.gateway_bytes()),
            ("connections_waiting", self.pending as u64),
            ("refused_total", self.refused),
            ("cut_total", self.cut),
            ("scrapes_total", self.scrapes),
            ("scrapes_refused_total", self.scrapes_refused),
        ]
    }

    /// All numbers.
    fn counts(&self) -> Vec<Count> {
        let own = self.own_counts().into_iter();
        let own =
            own.filter_map(|(name, value)| Some(Count { name: Name::new(name).ok()?, value }));
        let mut counts = self.registry.counts();
        counts.extend(own);
        counts
    }
}

/// Serves until `stop` is done.
///
/// # Errors
/// The socket cannot be bound, the key cannot be read, or the runtime fails.
pub(crate) async fn serve(
    config: Config,
    ready: impl FnOnce(),
    stop: impl Future<Output = ()>,
) -> io::Result<()> {
    let named = |what: &str, path: &std::path::Path, error: io::Error| {
        io::Error::new(error.kind(), format!("{what} {}: {error}", path.display()))
    };
    let key = match &config.ticket_key {
        Some(path) => {
            Some(crate::ticket_key::open(path).map_err(|error| named("ticket_key", path, error))?)
        }
        None => None,
    };
    let listener = socket::listen_at(&config.socket, config.socket_mode)
        .map_err(|error| named("socket", &config.socket, error))?;
    let namespaces = config.namespaces.iter().map(|space| (space.name.clone(), space.receives));
    let shares = config.nats.is_some();
    let queued = Budget::new(config.max_queued_bytes, config.max_queued_bytes_per_user);
    let mut registry =
        Registry::new(config.host.clone(), namespaces, config.limits.clone(), shares);
    registry.settle(Now::default());
    let timer = Rc::new(Notify::new());
    let state = Rc::new(RefCell::new(State {
        registry,
        config,
        key,
        start: Instant::now(),
        sessions: HashMap::new(),
        queued,
        pending: 0,
        pending_of: HashMap::new(),
        timer: Rc::clone(&timer),
        refused: 0,
        cut: 0,
        scrapes: 0,
        scrapes_refused: 0,
        #[cfg(feature = "nats")]
        cluster: None,
    }));
    #[cfg(feature = "nats")]
    crate::cluster::start(&state).await?;
    #[cfg(not(feature = "nats"))]
    if shares {
        let problem = "nats is set, and this program was built without the feature nats";
        return Err(io::Error::other(problem));
    }
    let address = state.borrow().config.metrics_listen;
    if let Some(address) = address {
        let listener = metrics::listen(address).await?;
        tokio::task::spawn_local(metrics::serve(Rc::clone(&state), listener));
    }
    ready();
    let accepting = accept_all(&state, listener);
    let ticking = end_graces(&state, timer);
    tokio::select! {
        error = accepting => return Err(error),
        () = ticking => {}
        () = stop => {}
    }
    #[cfg(feature = "nats")]
    crate::cluster::stop(&state).await;
    Ok(())
}

/// Returns only if the socket fails.
async fn accept_all(state: &Handle, listener: socket::Listener) -> io::Error {
    let watched = listener.socket.try_clone().and_then(sys::watch);
    let watched = match watched {
        Ok(watched) => watched,
        Err(error) => return error,
    };
    loop {
        let mut ready = match watched.readable().await {
            Ok(ready) => ready,
            Err(error) => return error,
        };
        match socket::accept(watched.get_ref()) {
            Ok(connection) => session::start(state, connection),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
            // The peer has gone.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                log::error!("event=accept_failed error=\"{error}\"");
                tokio::time::sleep(PAUSE).await;
            }
        }
        tokio::task::yield_now().await;
    }
}

async fn end_graces(state: &Handle, changed: Rc<Notify>) {
    loop {
        let wait = {
            let mut state = state.borrow_mut();
            let now = state.now();
            let next = state.registry.tick(now);
            state.perform_effects();
            if next.is_some_and(|next| next <= now.steady) {
                Some(Duration::ZERO)
            } else {
                next.map(|next| Duration::from_millis(next - now.steady))
            }
        };
        match wait {
            Some(wait) => tokio::time::sleep(wait).await,
            None => changed.notified().await,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

    use super::*;

    #[test]
    fn every_number_has_a_meaning_and_no_gauge_the_name_of_a_counter() {
        let config = Config::parse("").unwrap();
        let names = config.namespaces.iter().map(|space| (space.name.clone(), space.receives));
        let registry = Registry::new(config.host.clone(), names, config.limits.clone(), false);
        let state = State {
            registry,
            queued: Budget::new(1, 1),
            config,
            key: None,
            start: Instant::now(),
            sessions: HashMap::new(),
            pending: 0,
            pending_of: HashMap::new(),
            timer: Rc::new(Notify::new()),
            refused: 0,
            cut: 0,
            scrapes: 0,
            scrapes_refused: 0,
            #[cfg(feature = "nats")]
            cluster: None,
        };
        let counts = state.counts();
        assert!(counts.len() > 20);
        let names: Vec<&str> = counts.iter().map(|count| count.name.as_str()).collect();
        for name in &names {
            assert!(metrics::has_help(name), "{name}");
            let family = name.strip_suffix("_total").filter(|family| names.contains(family));
            assert_eq!(family, None, "a gauge and a counter");
        }
    }
}
