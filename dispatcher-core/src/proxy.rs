//! Connections whose PROXY header is awaited, because the other end of the socket is a proxy and
//! the header names the client.
//!
//! Owns each listener's queue of them and the rules about it: whose header counts, how long it is
//! awaited, and what follows. The event loop reads the header and reports what it saw. The timeout
//! is the same for all connections of a listener, so the first in a queue is always the first to
//! time out. They count as queued, and together with those whose first bytes are awaited they are
//! at most `max_awaiting` in a pool: one more ends the wait of another one.

use std::time::Duration;

use dispatch_protocol::ClientAddr;
use ipnet::IpNet;

use super::access_control::{Addresses, UNTRACKED};
use super::discarded::Contents;
use super::ledger::{Place, Queue};
use super::policy::NEVER;
use super::types::*;
use super::{Core, Listener, WorkerWait};
use crate::snapshot::HeaderSnapshot;

/// A listener's rules about PROXY headers. `config` makes them. Clients of Unix sockets have no
/// address and are trusted: the permissions of the socket decide who they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProxyRules {
    /// Networks of proxies: they must send a header. Others must not, and are clients themselves.
    pub from: Vec<IpNet>,
    /// How long a header is awaited.
    pub timeout: Duration,
    /// The longest header of version 2, in bytes. The event loop keeps to it.
    pub max_header: u32,
}

impl ProxyRules {
    /// Default of `proxy_timeout`.
    pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(5);

    /// Default of `proxy_max_header`: what the specification expects of every receiver.
    pub const DEFAULT_MAX_HEADER: u32 = 536;
}

/// A listener's rules with its table of networks. It is made and dropped outside the hot thread.
#[derive(Debug)]
pub struct ProxyControl {
    rules: ProxyRules,
    trusted: Addresses,
}

impl ProxyControl {
    /// For these rules.
    pub fn new(rules: ProxyRules) -> Box<ProxyControl> {
        Box::new(ProxyControl { trusted: Addresses::new(&rules.from), rules })
    }

    fn trusts(&self, peer: &ClientAddr) -> bool {
        peer.ip().is_none_or(|ip| self.trusted.contain(ip.to_canonical()))
    }
}

/// What the first bytes of a connection are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeaderSeen {
    /// A whole header, which has been read from the socket. It names this client; `None` if the
    /// proxy connected for itself or does not know its client.
    Whole(Option<ClientAddr>),
    /// The beginning of a header.
    Begun,
    /// Something else.
    Nothing,
    /// A header that is not valid.
    Malformed,
    /// A header that is longer than `max_header`.
    TooLong,
}

/// A listener's connections whose PROXY header is awaited.
#[derive(Debug, Default)]
pub(super) struct Headers {
    /// `None`: new connections have no header.
    pub(super) control: Option<Box<ProxyControl>>,
    queue: Queue,
    /// The timeout of those in the queue, also after the rules were removed.
    timeout: Duration,
    /// Headers read since the start.
    read: u64,
}

impl Core {
    /// Sets a listener's rules about PROXY headers, also while it runs; `None` for no headers. What
    /// is awaited already stays so.
    pub fn set_proxy_control(&mut self, listener: ListenerId, control: Option<Box<ProxyControl>>) {
        let Some(entry) = self.listeners.get_mut(usize::from(listener.0)) else { return };
        if let Some(control) = &control {
            entry.headers.timeout = control.rules.timeout;
        }
        if let Some(old) = std::mem::replace(&mut entry.headers.control, control) {
            self.discard(Contents::ProxyControl(old));
        }
    }

    /// Whether the connection's PROXY header is awaited. If so, the event loop looks for it
    /// whenever bytes arrive, and reports with [`Core::header`].
    pub fn awaits_header(&self, conn: ConnId) -> bool {
        self.ledger.find(conn).is_some_and(|entry| entry.place == Place::Header)
    }

    /// The longest PROXY header of version 2 that a listener accepts, in bytes.
    pub fn max_header(&self, listener: ListenerId) -> u32 {
        let control = self.listeners.get(usize::from(listener.0));
        let control = control.and_then(|listener| listener.headers.control.as_ref());
        control.map_or(ProxyRules::DEFAULT_MAX_HEADER, |control| control.rules.max_header)
    }

    /// What the first bytes of a connection are whose PROXY header is awaited. The client that a
    /// header names is from now on the client of the connection: the listener's access rules apply
    /// to it, and its first bytes may be awaited next.
    pub fn header(&mut self, now: Time, conn: ConnId, seen: HeaderSeen) {
        let Some(entry) = self.ledger.find(conn).filter(|entry| entry.place == Place::Header)
        else {
            return;
        };
        let (listener, trusted) = (usize::from(entry.listener.0), entry.trusted);
        let refused = match (seen, trusted) {
            (HeaderSeen::Begun, true) => return,
            (HeaderSeen::Whole(_), true) | (HeaderSeen::Nothing, false) => None,
            (HeaderSeen::Nothing, true) => Some(CloseReason::ProxyMissing),
            (HeaderSeen::Malformed, true) => Some(CloseReason::ProxyMalformed),
            (HeaderSeen::TooLong, true) => Some(CloseReason::ProxyTooLong),
            (
                HeaderSeen::Whole(_)
                | HeaderSeen::Begun
                | HeaderSeen::Malformed
                | HeaderSeen::TooLong,
                false,
            ) => Some(CloseReason::ProxyUntrusted),
        };
        let p = self.listeners[listener].pool;
        self.end_header(conn.index);
        match (refused, seen) {
            (Some(reason), _) => self.close(conn.index, reason),
            (None, HeaderSeen::Whole(client)) => {
                self.listeners[listener].headers.read += 1;
                match client {
                    Some(client) => {
                        self.ledger.get_mut(conn.index).peer = client;
                        self.admit_client(now, p, conn.index);
                    }
                    None => self.proceed(now, p, conn.index),
                }
            }
            (None, _) => self.proceed(now, p, conn.index),
        }
        self.after(now, p);
    }

    /// Handles a new connection of a listener with `proxy_protocol`.
    pub(super) fn arrive_with_header(&mut self, now: Time, p: usize, conn: u32, read: HeaderRead) {
        if matches!(read, HeaderRead::Client | HeaderRead::Absent) {
            return self.admit_client(now, p, conn);
        }
        let entry = self.ledger.get_mut(conn);
        let listener = &mut self.listeners[usize::from(entry.listener.0)];
        let control = listener.headers.control.as_ref();
        entry.trusted = control.is_some_and(|control| control.trusts(&entry.peer));
        let admitted = match &mut listener.access_control {
            None => Ok(UNTRACKED),
            Some(rules) if entry.trusted => rules.admit_proxy(entry.peer).map(|()| UNTRACKED),
            Some(rules) => rules.admit(now, entry.peer),
        };
        match admitted {
            Ok(place) => entry.client = place,
            Err(reason) => return self.close(conn, reason),
        }
        if read == HeaderRead::Local {
            return self.proceed(now, p, conn);
        }
        if self.stop.is_some_and(|stop| stop.over) {
            return self.close(conn, CloseReason::Shutdown);
        }
        let pool = &self.pools[p];
        if pool.worker_wait == WorkerWait::Refusing && pool.usable == 0 {
            return self.close(conn, CloseReason::NoWorker);
        }
        let most = u64::from(pool.settings.peek.max_awaiting);
        self.limit_awaited(now, p, most.saturating_sub(1));
        let listener = self.ledger.get(conn).listener;
        let queue = &mut self.listeners[usize::from(listener.0)].headers.queue;
        self.ledger.await_header(queue, conn, now);
        self.pools[p].awaiting.headers += 1;
        self.totals.queued += 1;
    }

    /// The access rules for a client that is known.
    fn admit_client(&mut self, now: Time, p: usize, conn: u32) {
        let entry = self.ledger.get_mut(conn);
        let listener = &mut self.listeners[usize::from(entry.listener.0)];
        let admitted = match &mut listener.access_control {
            Some(rules) => rules.admit(now, entry.peer),
            None => Ok(UNTRACKED),
        };
        match admitted {
            Ok(place) => {
                entry.client = place;
                self.proceed(now, p, conn);
            }
            Err(reason) => self.close(conn, reason),
        }
    }

    /// The client is known: the connection goes on as one of any other listener.
    fn proceed(&mut self, now: Time, p: usize, conn: u32) {
        self.set_key(p, conn);
        self.arrive(now, p, conn);
    }

    fn set_key(&mut self, p: usize, conn: u32) {
        let entry = self.ledger.get_mut(conn);
        if entry.key.is_none() {
            entry.key = self.pools[p].settings.policy.key_of(&entry.peer);
        }
    }

    /// Removes the connection from the queue; the caller gives it another place at once.
    pub(super) fn end_header(&mut self, conn: u32) {
        let listener = usize::from(self.ledger.get(conn).listener.0);
        let entry = &mut self.listeners[listener];
        self.ledger.end_header(&mut entry.headers.queue, conn);
        self.pools[entry.pool].awaiting.headers -= 1;
        self.totals.queued -= 1;
    }

    /// Ends waits until at most `most` connections are awaited in the pool. A connection whose
    /// first bytes are awaited gives way first, because it is only placed without a key; then the
    /// oldest one of the listener that has most.
    pub(super) fn limit_awaited(&mut self, now: Time, p: usize, most: u64) {
        let headers = self.pools[p].awaiting.headers;
        self.await_at_most(now, p, most.saturating_sub(headers));
        while self.pools[p].awaiting.headers > most {
            let of_pool = self.listeners.iter().filter(|listener| listener.pool == p);
            let longest = of_pool.max_by_key(|listener| listener.headers.queue.len());
            let Some(conn) = longest.and_then(|listener| listener.headers.queue.first()) else {
                return;
            };
            self.end_header(conn);
            if self.ledger.get(conn).trusted {
                self.close(conn, CloseReason::ProxyTimeout);
            } else {
                self.set_key(p, conn);
                self.arrive_unawaited(now, p, conn);
            }
        }
    }

    /// When the first connection in a listener's queue times out.
    pub(super) fn headers_due(&self, listener: &Listener) -> Time {
        let first = listener.headers.queue.first();
        first.map_or(NEVER, |conn| self.ledger.get(conn).since + listener.headers.timeout)
    }

    /// Frees the tables of a closed listener, which may be large, once no client can need its
    /// rules: none arrives any more, and every header is read.
    pub(super) fn drop_rules_without_clients(&mut self, listener: ListenerId) {
        let Some(entry) = self.listeners.get(usize::from(listener.0)) else { return };
        let over = entry.retired && entry.closed_for_good && entry.headers.queue.len() == 0;
        if over && (entry.access_control.is_some() || entry.headers.control.is_some()) {
            self.set_access_control(listener, None);
            self.set_proxy_control(listener, None);
        }
    }

    /// Ends the waits that have lasted too long: a trusted proxy owes a header, another source has
    /// sent none and is served.
    pub(super) fn tick_headers(&mut self, now: Time) {
        for at in 0..self.listeners.len() {
            let p = self.listeners[at].pool;
            while let Some(conn) = self.listeners[at].headers.queue.first()
                && self.headers_due(&self.listeners[at]) <= now
            {
                self.end_header(conn);
                match self.ledger.get(conn).trusted {
                    true => self.close(conn, CloseReason::ProxyTimeout),
                    false => self.proceed(now, p, conn),
                }
            }
            self.drop_rules_without_clients(ListenerId(at as u16));
        }
    }

    /// Closes a pool's connections whose header is awaited, and returns their number.
    pub(super) fn close_unread(&mut self, p: usize, reason: CloseReason) -> u32 {
        let mut closed = 0;
        for at in 0..self.listeners.len() {
            if self.listeners[at].pool != p {
                continue;
            }
            while let Some(conn) = self.listeners[at].headers.queue.first() {
                self.end_header(conn);
                self.close(conn, reason);
                closed += 1;
            }
        }
        closed
    }

    /// Every connection whose header is awaited.
    pub(super) fn unread(&self) -> impl Iterator<Item = u32> + '_ {
        self.listeners.iter().flat_map(|it| self.ledger.walk_queue(&it.headers.queue))
    }

    /// Checks the queues' invariants, panics if one does not hold, and returns their length.
    pub(super) fn check_headers(&self) -> u64 {
        let mut all = 0;
        for listener in &self.listeners {
            let (mut count, mut last) = (0, Time::default());
            for conn in self.ledger.walk_queue(&listener.headers.queue) {
                let conn = self.ledger.get(conn);
                assert_eq!(conn.place, Place::Header);
                assert!(conn.since >= last, "the first runs out of time first");
                assert_eq!(conn.key, None, "no key before the client is known");
                (count, last) = (count + 1, conn.since);
            }
            assert_eq!(count, listener.headers.queue.len());
            all += count;
        }
        // Without a list: the event loop's test counts what its thread allocates.
        for (p, pool) in self.pools.iter().enumerate() {
            let own = self.listeners.iter().filter(|listener| listener.pool == p);
            let count: u64 = own.map(|listener| listener.headers.queue.len()).sum();
            assert_eq!(pool.awaiting.headers, count);
            let most = u64::from(pool.settings.peek.max_awaiting);
            assert!(pool.awaiting.len() + count <= most);
            assert!(count == 0 || self.stop.is_none_or(|stop| !stop.over));
        }
        all
    }
}

impl Headers {
    pub(super) fn snapshot(&self) -> Option<HeaderSnapshot> {
        let some = self.control.is_some() || self.queue.len() + self.read > 0;
        some.then_some(HeaderSnapshot { awaited: self.queue.len(), read: self.read })
    }
}
