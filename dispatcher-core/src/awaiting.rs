//! Connections whose first bytes are awaited, because the bytes identify the client.
//!
//! Owns their queue, its bound and its deadline. The timeout is the same for all connections of a
//! pool, so the first in the queue is always the first to time out. Awaited connections count as
//! queued.

use super::ledger::{Place, Queue};
use super::policy::NEVER;
use super::types::*;
use super::{Core, Pool, WorkerWait};
use crate::affinity::key::ClientIdentity;
use crate::snapshot::AffinitySnapshot;

/// A pool's connections whose first bytes are awaited.
#[derive(Debug, Default)]
pub(super) struct Awaiting {
    queue: Queue,
    /// Connections of the pool's listeners whose PROXY header is awaited: see `proxy.rs`.
    pub(super) headers: u64,
    /// Connections without a key, since the start.
    unknown: u64,
    timed_out: u64,
    not_awaited: u64,
}

impl Awaiting {
    pub(super) fn len(&self) -> u64 {
        self.queue.len()
    }
}

impl Pool {
    /// The pool's connections that no worker has.
    pub(super) fn held(&self) -> u64 {
        self.queued.len() + self.awaiting.len() + self.awaiting.headers
    }

    pub(super) fn affinity_snapshot(&self) -> Option<AffinitySnapshot> {
        let (memory, affinity) = (self.memory.as_ref()?, self.settings.affinity.as_ref()?);
        Some(AffinitySnapshot {
            awaiting: self.awaiting.len(),
            unknown: self.awaiting.unknown,
            timed_out: self.awaiting.timed_out,
            not_awaited: self.awaiting.not_awaited,
            ..memory.snapshot(&affinity.key)
        })
    }
}

impl Core {
    /// Whether the connection's first bytes are awaited. If so, the event loop peeks at them
    /// whenever more arrive, until it can report the result with [`Core::first_bytes`].
    pub fn awaits_bytes(&self, conn: ConnId) -> bool {
        self.ledger.find(conn).is_some_and(|entry| entry.place == Place::Awaiting)
    }

    /// Reports the identity that a connection's first bytes contain; `None` if they contain none
    /// and more bytes would not help.
    pub fn first_bytes(&mut self, now: Time, conn: ConnId, identity: Option<ClientIdentity>) {
        if self.awaits_bytes(conn) {
            let pool = self.pool_of(self.ledger.get(conn.index).listener);
            self.end_await(pool, conn.index);
            self.identified(now, pool, conn.index, identity);
            self.after(now, pool);
        }
    }

    /// Handles a new connection whose client is not yet identified.
    pub(super) fn arrive(&mut self, now: Time, p: usize, conn: u32) {
        let refusing = self.pools[p].worker_wait == WorkerWait::Refusing;
        let pool = &mut self.pools[p];
        let Some(affinity) = pool.settings.affinity.as_ref().filter(|_| !refusing) else {
            return self.put(now, p, conn, false);
        };
        if !affinity.key.is_peeked() {
            let identity = affinity.key.of_peer(&self.ledger.get(conn).peer);
            return self.identified(now, p, conn, identity);
        }
        let over = self.stop.is_some_and(|stop| stop.over);
        let awaited = pool.awaiting.len() + pool.awaiting.headers;
        let full = awaited >= u64::from(pool.settings.peek.max_awaiting);
        if full || over {
            pool.awaiting.not_awaited += u64::from(full);
            return self.identified(now, p, conn, None);
        }
        self.ledger.await_bytes(&mut pool.awaiting.queue, conn, now);
        self.totals.queued += 1;
    }

    /// Handles a connection that must not be awaited any more.
    pub(super) fn arrive_unawaited(&mut self, now: Time, p: usize, conn: u32) {
        let pool = &mut self.pools[p];
        let refusing = pool.worker_wait == WorkerWait::Refusing;
        match pool.settings.affinity.as_ref().filter(|_| !refusing) {
            Some(affinity) if affinity.key.is_peeked() => {
                pool.awaiting.not_awaited += 1;
                self.identified(now, p, conn, None);
            }
            Some(_) | None => self.arrive(now, p, conn),
        }
    }

    fn identified(&mut self, now: Time, pool: usize, conn: u32, identity: Option<ClientIdentity>) {
        let entry = self.ledger.get_mut(conn);
        entry.identity = identity;
        match identity {
            Some(identity) => entry.key = Some(identity.key),
            None => self.pools[pool].awaiting.unknown += 1,
        }
        self.put(now, pool, conn, false);
    }

    /// The indices of a pool's awaited connections.
    pub(super) fn awaited<'a>(&'a self, pool: &'a Pool) -> impl Iterator<Item = u32> + 'a {
        self.ledger.walk_queue(&pool.awaiting.queue)
    }

    /// Removes a connection from the queue; the caller gives it another place at once.
    pub(super) fn end_await(&mut self, pool: usize, conn: u32) {
        self.ledger.end_await(&mut self.pools[pool].awaiting.queue, conn);
        self.totals.queued -= 1;
    }

    /// When the first connection in the queue times out.
    pub(super) fn awaiting_due(&self, pool: &Pool) -> Time {
        let first = pool.awaiting.queue.first();
        first.map_or(NEVER, |conn| self.ledger.get(conn).since + pool.settings.peek.timeout)
    }

    /// Places the connections that have timed out without an identity.
    pub(super) fn tick_awaiting(&mut self, now: Time, p: usize) {
        while let Some(conn) = self.pools[p].awaiting.queue.first()
            && self.awaiting_due(&self.pools[p]) <= now
        {
            self.end_await(p, conn);
            self.pools[p].awaiting.timed_out += 1;
            self.identified(now, p, conn, None);
        }
    }

    /// Shortens the queue to `most`: places the oldest connections without an identity.
    pub(super) fn await_at_most(&mut self, now: Time, p: usize, most: u64) {
        while self.pools[p].awaiting.len() > most
            && let Some(conn) = self.pools[p].awaiting.queue.first()
        {
            self.end_await(p, conn);
            self.pools[p].awaiting.not_awaited += 1;
            self.identified(now, p, conn, None);
        }
    }

    /// At the deadline of a stop: places every awaited connection without an identity, and closes
    /// those whose PROXY header is unread.
    pub(super) fn empty_awaiting(&mut self, now: Time, p: usize) {
        while let Some(conn) = self.pools[p].awaiting.queue.first() {
            self.end_await(p, conn);
            self.identified(now, p, conn, None);
        }
        self.close_unread(p, CloseReason::Shutdown);
    }

    /// The pool refuses clients: closes the awaited connections and returns their number.
    pub(super) fn refuse_awaiting(&mut self, p: usize) -> u32 {
        let mut closed = 0;
        while let Some(conn) = self.pools[p].awaiting.queue.first() {
            self.end_await(p, conn);
            self.close(conn, CloseReason::NoWorker);
            closed += 1;
        }
        // A worker may still be tested with the others, once their headers are read.
        if self.pools[p].usable == 0 {
            closed += self.close_unread(p, CloseReason::NoWorker);
        }
        closed
    }

    /// Checks the queue's invariants, panics if one does not hold, and returns its length.
    pub(super) fn check_awaiting(&self, p: usize) -> u64 {
        let pool = &self.pools[p];
        let (mut count, mut last) = (0, Time::default());
        for conn in self.ledger.walk_queue(&pool.awaiting.queue) {
            let conn = self.ledger.get(conn);
            assert_eq!(conn.place, Place::Awaiting);
            assert_eq!(self.pool_of(conn.listener), p, "awaited in its own pool");
            assert!(conn.since >= last, "the first runs out of time first");
            (count, last) = (count + 1, conn.since);
        }
        assert_eq!(count, pool.awaiting.len());
        assert!(count <= u64::from(pool.settings.peek.max_awaiting));
        assert!(count == 0 || pool.worker_wait != WorkerWait::Refusing);
        assert!(count == 0 || self.stop.is_none_or(|stop| !stop.over));
        count
    }
}
