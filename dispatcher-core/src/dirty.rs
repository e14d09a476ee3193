//! Who may have changed something on a scoreboard, and which slots to look at: what every turn of the event loop asks, of all
//! workers. Owns no state; answers from what is cached beside the workers.

use dispatch_protocol::scoreboard::slot::want;

use super::{Core, Pool, Ticket, WorkerId};

impl Pool {
    /// Whether connections wait for a worker that can be given one, so that a close or an idle thread is worth ringing the doorbell.
    pub(super) fn wants_room(&self) -> bool {
        self.usable > 0 && (self.candidates.opens() == 0 || !self.queued.is_empty())
    }
}

impl Core {
    /// Bits of the `want` word for this worker: TAKEN when something is out, ROOM when its pool cannot place a connection.
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

    /// Whether the worker with this index has tickets out. Much cheaper than to ask for them.
    #[inline]
    pub fn has_tickets(&self, index: u32) -> bool {
        self.out.get(index as usize).is_some_and(|&out| out > 0)
    }

    /// Whether an honest worker with this index can have changed anything on its scoreboard: it has connections, or
    /// something was sent to it. Of a thousand workers most have none, most of the time.
    #[inline]
    pub fn may_be_dirty(&self, index: u32) -> bool {
        self.live.get(index as usize).is_some_and(|&live| live) || self.has_tickets(index)
    }

    /// Whether some pool cannot place a connection, so that [`Core::wants`] may ask for ROOM of workers without tickets.
    pub fn wants_room(&self) -> bool {
        self.pools.iter().any(Pool::wants_room)
    }

    /// The tickets a worker has not yet resolved (SENT as far as we know), oldest first. A ticket whose Send or Probe
    /// the event loop has not seen yet is not among them: its slot still has the word of an earlier one.
    pub fn tickets(&self, worker: WorkerId) -> impl Iterator<Item = Ticket> + '_ {
        self.find(worker).into_iter().flat_map(|w| self.workers[w].ring.offered_tickets())
    }
}
