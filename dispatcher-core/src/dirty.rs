//! Which workers may have changed their scoreboards, and which slots to read. Every turn of the
//! event loop asks this for all workers, so the answers come from caches beside the workers. Owns
//! no state.

use dispatch_protocol::scoreboard::slot::want;

use super::{Core, Pool, Ticket, WorkerId};

impl Pool {
    /// Whether connections wait for room, so that a worker should ring the doorbell at a close or
    /// an idle thread.
    pub(super) fn wants_room(&self) -> bool {
        self.usable > 0 && (self.candidates.opens() == 0 || !self.queued.is_empty())
    }
}

impl Core {
    /// Bits of the `want` word for this worker: TAKEN if it has open tickets, ROOM if its pool
    /// cannot place a connection, IDLE if its pool waits for an idle thread.
    pub fn wants(&self, worker: WorkerId) -> u32 {
        let Some(w) = self.find(worker) else { return 0 };
        let worker = &self.workers[w];
        let pool = &self.pools[worker.pool];
        let mut bits = 0;
        if worker.ring.len() > 0 {
            bits |= want::TAKEN;
        }
        if worker.is_usable() && pool.wants_room() {
            bits |= want::ROOM;
        }
        let waits = pool.wants_room() || pool.shares.crowded > 0;
        if worker.threads.is_some() && worker.is_usable() && waits {
            bits |= want::IDLE;
        }
        bits
    }

    /// Whether the worker with this index has open tickets. Much cheaper than [`Core::tickets`].
    #[inline]
    pub fn has_tickets(&self, index: u32) -> bool {
        self.out.get(index as usize).is_some_and(|&out| out > 0)
    }

    /// Whether a correct worker with this index can have changed its scoreboard: it has connections
    /// or open tickets. Most workers of a large pool have neither most of the time.
    #[inline]
    pub fn may_be_dirty(&self, index: u32) -> bool {
        self.live.get(index as usize).is_some_and(|&live| live) || self.has_tickets(index)
    }

    /// Whether some pool cannot place a connection, so that [`Core::wants`] may include ROOM for
    /// workers without tickets.
    pub fn wants_room(&self) -> bool {
        self.pools.iter().any(Pool::wants_room)
    }

    /// The tickets of a worker that are still SENT as far as the core knows, oldest first. A ticket
    /// whose `Send` or `Probe` the event loop has not seen is not included: its slot still has the
    /// word of an earlier ticket.
    pub fn tickets(&self, worker: WorkerId) -> impl Iterator<Item = Ticket> + '_ {
        self.find(worker).into_iter().flat_map(|w| self.workers[w].ring.offered_tickets())
    }
}
