//! Workers of the line protocol: they report how many connections they have, and cannot claim.
//!
//! A connection counts as taken as soon as it is sent. The event loop keeps its copy until the
//! worker has read the descriptor; if the worker leaves before, the connection can be given to
//! another worker ([`Core::recovered`]).
//!
//! A worker's load is the sum of three parts, and exact as far as the facts are:
//! - `tracked`: connections sent by this dispatcher whose end the kernel will tell, by the socket's
//!   cookie, and has not told yet;
//! - `untracked`: other connections sent since its last report, or still unread then;
//! - `foreign`: what its last report counts beyond the first part: connections from elsewhere, and
//!   untracked ones sent before.
//!
//! A report says less than is known if the worker wrote it before it read a connection, and more if
//! connections have ended since. So `foreign` is what the report exceeds the largest number of
//! tracked connections by that the worker can have had since the report before.
//!
//! The general counters express the same: `base` is `foreign`, `finished` is what `taken` exceeds
//! the first two parts by.

use std::collections::{HashMap, HashSet};

use dispatch_protocol::line::Report;
use dispatch_protocol::wire::{Features, Hello, VERSION};

use super::ledger::{Conn, Place};
use super::ring::Item;
use super::types::*;
use super::worker::Peer;
use super::{Core, Effect, Event};

/// More live connections than `max_connections_per_worker` can be.
const MOST_LIVE: u64 = 10_000_000;

/// Most tracked connections of all workers. Further ones are untracked.
const MOST_TRACKED: usize = 1 << 20;

/// The name of a worker without a type.
const NO_TYPE: &str = "line";

/// Longest type in a name: a name has at most 64 bytes, and its number up to 6.
const MAX_TYPE_IN_NAME: usize = 57;

/// A worker that has written its first report.
#[derive(Clone, Debug)]
pub struct LineJoin {
    /// From `SO_PEERCRED`.
    pub pid: i32,
    /// From `SO_PEERCRED`.
    pub uid: u32,
    /// Primary group from `SO_PEERCRED` and supplementary ones from `SO_PEERGROUPS`.
    pub gids: Vec<u32>,
    /// The pool that its socket or its type selects.
    pub pool: String,
    /// The report.
    pub report: Report,
}

/// What became of a connection that was in the socket of a worker that has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recovery {
    /// The worker had read it.
    Read,
    /// No process has touched it.
    Untouched,
    /// Unknown: the worker may have it.
    Unknown,
}

/// A worker's part that other workers do not have.
#[derive(Clone, Debug)]
pub(super) struct Line {
    /// Its last report.
    report: Report,
    tracked: u32,
    untracked: u32,
    /// Tracked and untracked connections that it has not read yet.
    unread: [u32; 2],
    /// The largest and the smallest number of tracked connections that it had read, since its last
    /// report.
    peak: u32,
    low: u32,
    reported_clamped: bool,
    /// Why it has left, once it has.
    pub(super) left: Option<Departure>,
}

/// The tracked connections of all workers.
#[derive(Debug, Default)]
pub(super) struct Tracked {
    /// By the socket's cookie.
    sockets: HashMap<u64, Socket>,
}

#[derive(Clone, Copy, Debug)]
struct Socket {
    worker: WorkerId,
    sent: Time,
}

impl Line {
    fn new(report: Report) -> Line {
        Line {
            report,
            tracked: 0,
            untracked: 0,
            unread: [0; 2],
            peak: 0,
            low: 0,
            reported_clamped: false,
            left: None,
        }
    }

    /// Connections that the worker has not read.
    pub(super) fn unread(&self) -> u32 {
        self.unread[0].saturating_add(self.unread[1])
    }

    /// Tracked connections that the worker has read.
    fn has_read(&self) -> u32 {
        self.tracked.saturating_sub(self.unread[1])
    }

    /// The state for the status.
    pub(super) fn snapshot(&self) -> LineSnapshot {
        LineSnapshot {
            report: self.report.clone(),
            tracked: u64::from(self.tracked),
            unread: u64::from(self.unread()),
        }
    }
}

/// A worker of the line protocol, for the status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LineSnapshot {
    /// Its last report.
    pub report: Report,
    /// Connections whose end the kernel tells.
    pub tracked: u64,
    /// Connections that it has not read yet.
    pub unread: u64,
}

impl LineJoin {
    /// A join of the native protocol, for the checks that both have.
    fn as_join(&self, name: String) -> Join {
        let live = self.report.count.min(MOST_LIVE);
        let hello = Hello {
            version: VERSION,
            features: Features::NONE,
            pool: self.pool.clone(),
            name,
            weight: 1,
            max_connections: u32::MAX,
            base: live,
            finished: 0,
            ..Hello::default()
        };
        let LineJoin { pid, uid, gids, .. } = self;
        Join { pid: *pid, uid: *uid, gids: gids.clone(), hello, spawned: None }
    }
}

impl Core {
    /// A worker of the line protocol joins.
    ///
    /// # Errors
    /// Why it may not, as for other workers.
    pub fn join_line(&mut self, now: Time, join: &LineJoin) -> Result<WorkerId, Refusal> {
        let pool = self.admit(&join.as_join(String::new()))?;
        let name = self.line_name(pool, &join.report.kind);
        let line = Box::new(Line::new(join.report.clone()));
        let id = self.add_worker(now, pool, &join.as_join(name), Peer::Line(line));
        self.drain_with_host(now, id);
        self.note_count(id.index as usize, join.report.count);
        self.after(now, pool);
        Ok(id)
    }

    /// The name of a new worker: its type and the smallest number that is free, so that the name is
    /// the same after its restart.
    fn line_name(&self, pool: usize, kind: &str) -> String {
        let clean = |c: char| if c.is_whitespace() || c == '/' { '_' } else { c };
        let mut base = String::new();
        for c in kind.chars().map(clean) {
            if base.len() + c.len_utf8() > MAX_TYPE_IN_NAME {
                break;
            }
            base.push(c);
        }
        let base = if base.is_empty() { NO_TYPE } else { &base };
        let workers = self.pools[pool].candidates.workers().map(|w| &self.workers[w as usize]);
        let used: HashSet<&str> = workers
            .filter(|worker| !worker.closed && !worker.said_goodbye)
            .map(|worker| &*worker.name)
            .collect();
        let mut names = (1u64..).map(|number| format!("{base}-{number}"));
        names.find(|name| !used.contains(name.as_str())).unwrap_or_default()
    }

    /// A worker of the line protocol has reported.
    pub fn line_report(&mut self, now: Time, worker: WorkerId, report: Report) {
        let Some(w) = self.find(worker).filter(|&w| self.workers[w].state != State::Gone) else {
            return;
        };
        let Some(line) = &mut self.workers[w].line else { return };
        let (said, count) = (report.count, report.count);
        let kind = std::mem::replace(&mut line.report, report).kind;
        if line.report.kind.is_empty() {
            line.report.kind = kind;
        }
        line.peak = line.peak.max(line.has_read());
        line.low = line.low.min(line.has_read());
        // When it wrote the report, it had between `low` and `peak` of them. Within that, the
        // number of others is the one of before, so that a burst between two reports does not
        // change it.
        let said = said.min(MOST_LIVE);
        let least = said.saturating_sub(u64::from(line.peak));
        let most = said.saturating_sub(u64::from(line.low));
        (line.peak, line.low) = (line.has_read(), line.has_read());
        line.untracked = line.unread[0];
        let worker = &mut self.workers[w];
        worker.base = worker.base.clamp(least, most);
        self.note_count(w, count);
        self.recount(w);
        self.after(now, self.workers[w].pool);
    }

    /// Reports an impossible count, once.
    fn note_count(&mut self, w: usize, said: u64) {
        let worker = &mut self.workers[w];
        let Some(line) = worker.line.as_mut().filter(|_| said > MOST_LIVE) else { return };
        if !std::mem::replace(&mut line.reported_clamped, true) {
            let (worker, used) = (worker.id, MOST_LIVE);
            self.event(Event::Clamped { worker, what: "count", said, used });
        }
    }

    /// Brings the general counters up to date.
    fn recount(&mut self, w: usize) {
        let worker = &mut self.workers[w];
        if let Some(line) = &worker.line {
            worker.finished = worker.taken - u64::from(line.tracked) - u64::from(line.untracked);
        }
        self.refresh(w);
    }

    /// An [`Effect::Send`] to a worker of the line protocol succeeded: the connection counts as
    /// taken. The event loop keeps its copy until it calls [`Core::line_read`] or
    /// [`Core::recovered`]. `cookie`: the kernel will tell the end of this socket.
    pub fn line_sent(&mut self, now: Time, worker: WorkerId, ticket: Ticket, cookie: Option<u64>) {
        let Some(w) = self.find(worker) else { return };
        let Some(Item::Conn(conn)) = self.workers[w].ring.item(ticket) else { return };
        if self.workers[w].line.is_none() {
            return;
        }
        let socket = Socket { worker, sent: now };
        let tracked = cookie.is_some_and(|cookie| self.tracked.insert(cookie, socket));
        let blocked = self.workers[w].blocked;
        self.settle(w, ticket);
        self.uncount(conn);
        let worker = &mut self.workers[w];
        worker.blocked = blocked;
        worker.taken += 1;
        if let Some(line) = &mut worker.line {
            line.tracked += u32::from(tracked);
            line.untracked += u32::from(!tracked);
            line.unread[usize::from(tracked)] += 1;
            self.pools[worker.pool].unrecovered += u32::from(line.left.is_some());
        }
        let p = worker.pool;
        self.totals.in_flight -= 1;
        self.totals.taken += 1;
        let pool = &mut self.pools[p];
        pool.untaken -= 1;
        pool.counts.taken += 1;
        let entry = self.ledger.get_mut(conn);
        pool.handoff.record(now - entry.accepted);
        entry.place = Place::Kept { tracked };
        self.recount(w);
        // The worker may have left in the same turn, before the send was carried out.
        self.end_round(now, w);
        self.refresh(w);
        self.served(p);
        self.after(now, p);
    }

    /// The worker has read this connection: the event loop closes its copy.
    pub fn line_read(&mut self, now: Time, worker: WorkerId, conn: ConnId) {
        let Some(entry) = self.ledger.find(conn) else { return };
        let Place::Kept { tracked } = entry.place else { return };
        let p = self.pool_of(entry.listener);
        if let Some(w) = self.find(worker)
            && let Some(line) = &mut self.workers[w].line
        {
            let unread = &mut line.unread[usize::from(tracked)];
            *unread = unread.saturating_sub(1);
            line.peak = line.peak.max(line.has_read());
            self.refresh(w);
        }
        self.end_unrecovered(worker, conn);
        self.release_kept(worker, conn);
        self.after(now, p);
    }

    /// It is known of this connection whether its worker had read it. Counts if that has left.
    fn end_unrecovered(&mut self, worker: WorkerId, conn: ConnId) {
        let line = self.find(worker).and_then(|w| self.workers[w].line.as_ref());
        if line.is_none_or(|line| line.left.is_some()) {
            let p = self.pool_of(self.ledger.get(conn.index).listener);
            let pool = &mut self.pools[p];
            pool.unrecovered = pool.unrecovered.saturating_sub(1);
        }
    }

    fn release_kept(&mut self, worker: WorkerId, conn: ConnId) {
        self.ledger.get_mut(conn.index).place = Place::Leaving;
        let ticket = Ticket { slot: 0, seq: 0 };
        self.effects.push_back(Effect::Release { worker, conn, ticket });
    }

    /// The worker that this connection was sent to has left, and had perhaps not read it. Unless it
    /// had, the connection is placed again or closed.
    pub fn recovered(&mut self, now: Time, worker: WorkerId, conn: ConnId, recovery: Recovery) {
        let Some(entry) = self.ledger.find(conn) else { return };
        if !matches!(entry.place, Place::Kept { .. }) {
            return;
        }
        let p = self.pool_of(entry.listener);
        self.end_unrecovered(worker, conn);
        if recovery == Recovery::Read {
            self.release_kept(worker, conn);
            return self.after(now, p);
        }
        self.totals.returned += 1;
        self.pools[p].counts.returned += 1;
        if recovery == Recovery::Untouched {
            let entry = self.ledger.get_mut(conn.index);
            (entry.resent, entry.trial, entry.bound) = (true, false, false);
            entry.place = Place::Leaving;
            self.put(now, p, conn.index, true);
        } else {
            self.close(conn.index, CloseReason::Unread);
        }
        self.after(now, p);
    }

    /// The worker's socket has room again.
    pub fn line_room(&mut self, now: Time, worker: WorkerId) {
        let Some(w) = self.find(worker) else { return };
        if self.workers[w].line.is_some() && self.workers[w].blocked.take().is_some() {
            self.refresh(w);
            self.after(now, self.workers[w].pool);
        }
    }

    /// The kernel has told the ends of these sockets; others than tracked ones are ignored.
    pub fn sockets_ended(&mut self, now: Time, cookies: &[u64]) {
        let mut any = false;
        for cookie in cookies {
            if let Some(socket) = self.tracked.sockets.remove(cookie) {
                any = true;
                self.connection_ended(socket);
            }
        }
        if any {
            self.after_all(now);
        }
    }

    fn connection_ended(&mut self, socket: Socket) {
        let Some(w) = self.find(socket.worker) else { return };
        if let Some(line) = &mut self.workers[w].line {
            line.tracked = line.tracked.saturating_sub(1);
            line.low = line.low.min(line.has_read());
        }
        self.recount(w);
    }

    /// Ends were perhaps not told. `alive` has the cookies of all TCP sockets that were open after
    /// `began`: tracked sockets that were sent before and are not among them have ended.
    pub fn sockets_alive(&mut self, now: Time, began: Time, alive: &HashSet<u64>) {
        let ended = |(cookie, socket): (&u64, &Socket)| {
            (socket.sent < began && !alive.contains(cookie)).then_some(*cookie)
        };
        let ended: Vec<u64> = self.tracked.sockets.iter().filter_map(ended).collect();
        self.sockets_ended(now, &ended);
    }

    /// The kernel tells no ends any more: from now on the reports count.
    pub fn tracking_ended(&mut self, now: Time) {
        self.tracked.sockets.clear();
        for w in 0..self.workers.len() {
            let Some(line) = &mut self.workers[w].line else { continue };
            line.untracked += std::mem::take(&mut line.tracked);
            line.unread[0] += std::mem::take(&mut line.unread[1]);
            (line.peak, line.low) = (0, 0);
            self.recount(w);
        }
        for conn in self.ledger.entries_mut() {
            if let Place::Kept { tracked } = &mut conn.place {
                *tracked = false;
            }
        }
        self.after_all(now);
    }

    /// Why a worker of the line protocol has left. Valid until the event loop has seen its
    /// `Forget`.
    pub fn line_departure(&self, worker: WorkerId) -> Option<Departure> {
        let worker = self.workers.get(worker.index as usize).filter(|it| it.id == worker)?;
        worker.line.as_ref()?.left
    }

    /// Number of tracked connections, of workers that have left too.
    pub fn tracked_sockets(&self) -> usize {
        self.tracked.sockets.len()
    }

    /// The invariants of workers of the line protocol.
    pub(super) fn check_lines(&self) {
        let mut tracked: HashMap<WorkerId, u32> = HashMap::new();
        for socket in self.tracked.sockets.values() {
            *tracked.entry(socket.worker).or_default() += 1;
        }
        for worker in self.workers.iter().filter(|worker| !worker.forgotten) {
            let Some(line) = &worker.line else { continue };
            let known = tracked.get(&worker.id).copied().unwrap_or_default();
            assert_eq!(line.tracked, known, "tracked connections of {}", worker.name);
            let live = u64::from(line.tracked) + u64::from(line.untracked);
            assert_eq!(worker.finished + live, worker.taken, "{}", worker.name);
            assert!(worker.load() >= live + u64::from(worker.untaken()));
            assert!(line.unread[0] <= line.untracked, "{}", worker.name);
        }
        let here = self.workers.iter().filter_map(|worker| worker.line.as_deref());
        let here = here.filter(|line| line.left.is_none()).map(Line::unread).sum::<u32>();
        let unrecovered: u32 = self.pools.iter().map(|pool| pool.unrecovered).sum();
        let kept = |conn: &&Conn| matches!(conn.place, Place::Kept { .. });
        let kept = self.ledger.entries().iter().filter(kept).count();
        assert_eq!(kept, (here + unrecovered) as usize, "connections of which there is a copy");
    }
}

impl Tracked {
    /// Adds a socket; false if the table is full.
    fn insert(&mut self, cookie: u64, socket: Socket) -> bool {
        let room = self.sockets.len() < MOST_TRACKED || self.sockets.contains_key(&cookie);
        if room {
            self.sockets.insert(cookie, socket);
        }
        room
    }

    /// Number of entries, for the budget of the checks.
    #[cfg(any(test, debug_assertions))]
    pub(super) fn len(&self) -> usize {
        self.sockets.len()
    }
}
