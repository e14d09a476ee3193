//! Connections whose first bytes are awaited, because these identify the client.
//!
//! Owns their queue, its bounds and its deadline. Every connection of a pool is awaited equally long, so the first in the
//! queue is always the first to run out of time. They count as queued: no worker has them yet.

use super::ledger::{Place, Queue};
use super::policy::NEVER;
use super::types::*;
use super::{Clock, Core, Pool};
use crate::affinity::key::Known;
use crate::snapshot::AffinitySnapshot;

/// A pool's connections whose first bytes are awaited.
#[derive(Debug, Default)]
pub(super) struct Awaiting {
    queue: Queue,
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
    /// Whether the connection's first bytes are awaited. If so, the event loop looks at what is there, and goes on looking
    /// whenever there is more, until it can say what they say: [`Core::first_bytes`].
    pub fn awaits_bytes(&self, conn: ConnId) -> bool {
        self.ledger.find(conn).is_some_and(|entry| entry.place == Place::Awaiting)
    }

    /// What the first bytes of a connection say; `None`: nothing, and more would not either.
    pub fn first_bytes(&mut self, now: Time, conn: ConnId, known: Option<Known>) {
        if self.awaits_bytes(conn) {
            let pool = self.pool_of(self.ledger.get(conn.index).listener);
            self.end_await(pool, conn.index);
            self.identified(now, pool, conn.index, known);
            self.after(now, pool);
        }
    }

    /// Handles a new connection whose client is not yet identified.
    pub(super) fn arrive(&mut self, now: Time, p: usize, conn: u32) {
        let refusing = self.pools[p].clock == Clock::Refusing;
        let pool = &mut self.pools[p];
        let Some(affinity) = pool.settings.affinity.as_ref().filter(|_| !refusing) else {
            return self.put(now, p, conn, false);
        };
        if !affinity.key.is_peeked() {
            let known = affinity.key.of_peer(&self.ledger.get(conn).peer);
            return self.identified(now, p, conn, known);
        }
        let over = self.stop.is_some_and(|stop| stop.over);
        let full = pool.awaiting.len() >= u64::from(pool.settings.peek.max_awaiting);
        if full || over {
            pool.awaiting.not_awaited += u64::from(full);
            return self.identified(now, p, conn, None);
        }
        self.ledger.await_bytes(&mut pool.awaiting.queue, conn, now);
        self.totals.queued += 1;
    }

    fn identified(&mut self, now: Time, pool: usize, conn: u32, known: Option<Known>) {
        let entry = self.ledger.get_mut(conn);
        entry.known = known;
        match known {
            Some(known) => entry.key = Some(known.key),
            None => self.pools[pool].awaiting.unknown += 1,
        }
        self.put(now, pool, conn, false);
    }

    /// Takes a connection out of the queue, to be given another place at once.
    pub(super) fn end_await(&mut self, pool: usize, conn: u32) {
        self.ledger.end_await(&mut self.pools[pool].awaiting.queue, conn);
        self.totals.queued -= 1;
    }

    /// When the first in the queue has been awaited long enough.
    pub(super) fn awaiting_due(&self, pool: &Pool) -> Time {
        let first = pool.awaiting.queue.first();
        first.map_or(NEVER, |conn| self.ledger.get(conn).since + pool.settings.peek.timeout)
    }

    /// Gives up on those that have been awaited long enough.
    pub(super) fn tick_awaiting(&mut self, now: Time, p: usize) {
        while let Some(conn) = self.pools[p].awaiting.queue.first()
            && self.awaiting_due(&self.pools[p]) <= now
        {
            self.end_await(p, conn);
            self.pools[p].awaiting.timed_out += 1;
            self.identified(now, p, conn, None);
        }
    }

    /// Gives up on the oldest that are more than `most`.
    pub(super) fn await_at_most(&mut self, now: Time, p: usize, most: u64) {
        while self.pools[p].awaiting.len() > most
            && let Some(conn) = self.pools[p].awaiting.queue.first()
        {
            self.end_await(p, conn);
            self.pools[p].awaiting.not_awaited += 1;
            self.identified(now, p, conn, None);
        }
    }

    /// At the deadline of a stop no first bytes are awaited any more.
    pub(super) fn empty_awaiting(&mut self, now: Time, p: usize) {
        while let Some(conn) = self.pools[p].awaiting.queue.first() {
            self.end_await(p, conn);
            self.identified(now, p, conn, None);
        }
    }

    /// No worker joined to serve them: closes them and returns their number.
    pub(super) fn refuse_awaiting(&mut self, p: usize) -> u32 {
        let mut closed = 0;
        while let Some(conn) = self.pools[p].awaiting.queue.first() {
            self.end_await(p, conn);
            self.close(conn, CloseReason::NoWorker);
            closed += 1;
        }
        closed
    }

    /// Panics if the queue is not as it must be; answers how many are in it.
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
        assert!(count == 0 || pool.clock != Clock::Refusing);
        assert!(count == 0 || self.stop.is_none_or(|stop| !stop.over));
        count
    }
}
