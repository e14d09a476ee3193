//! The stop of the dispatcher: when pools are released, and when the stop is complete.
//!
//! A pool is released when its listeners are closed, none of its connections is queued or in
//! flight, and none can come back from a line worker that has left. Its workers are released with
//! it, independently of other pools. Until then workers may join it, because its clients may wait
//! for them.

use super::types::*;
use super::{Core, Effect};

/// A stop in progress.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stop {
    pub(super) deadline: Time,
    /// The deadline has passed: from then on nothing is queued.
    pub(super) over: bool,
}

impl Core {
    /// Stops: nothing new is accepted. Until `deadline` connections are placed and taken as usual;
    /// then queued connections go to any worker with a free slot, and the rest is closed. After a
    /// second call the earlier deadline applies.
    pub fn stop(&mut self, now: Time, deadline: Time) {
        if let Some(stop) = &mut self.stop {
            // The operator stops a second time.
            stop.deadline = stop.deadline.min(deadline);
            return;
        }
        self.stop = Some(Stop { deadline, over: false });
        for pool in 0..self.pools.len() {
            // Processes that clients wait for are still started.
            if !self.has_clients(pool) {
                self.pools[pool].processes.set_stopped(true);
            }
        }
        self.after_all(now);
    }

    /// Whether a stop is complete: nothing is queued or in flight and nothing can come back from a
    /// worker that has left, or the deadline has passed.
    pub fn stopped(&self) -> bool {
        let held = || self.totals.queued + self.totals.in_flight;
        let done = || held() == 0 && self.pools.iter().all(|pool| pool.unrecovered == 0);
        self.stop.is_some_and(|stop| stop.over || done())
    }

    /// Every connection that no worker has: those in queues, and those whose PROXY header or first
    /// bytes are awaited.
    pub fn waiting(&self) -> impl Iterator<Item = ConnId> + '_ {
        let awaited = self.pools.iter().flat_map(|pool| self.awaited(pool));
        self.queued().chain(awaited.chain(self.unread()).map(|index| self.ledger.id(index)))
    }

    /// Another dispatcher serves this queued or awaited connection from now on. Ignored for a
    /// connection in flight.
    pub fn handed_over(&mut self, now: Time, conn: ConnId) {
        self.withdraw(now, conn, CloseReason::HandedOver);
    }

    /// Ends the stop at its deadline; before that, releases each pool that has nothing left to do.
    pub(super) fn tick_stop(&mut self, now: Time) {
        let Some(stop) = &mut self.stop else { return };
        if stop.over {
            return;
        }
        if stop.deadline <= now {
            stop.over = true;
            self.empty_queues(now);
            return;
        }
        for p in 0..self.pools.len() {
            if !self.pools[p].released && !self.has_clients(p) && !self.has_open_listeners(p) {
                self.release(now, p);
            }
        }
    }

    /// Releases a pool's workers; they need not wait for other pools.
    fn release(&mut self, now: Time, p: usize) {
        let pool = &mut self.pools[p];
        pool.released = true;
        pool.processes.set_stopped(true);
        let workers: Vec<u32> = pool.candidates.workers().collect();
        let processes = self.process_ids(PoolId(p as u16));
        let ends: Vec<Effect> = processes
            .map(|(process, _)| Effect::EndProcess {
                process,
                has_connections: self.has_connections(process),
            })
            .collect();
        for w in workers {
            self.remove(now, w as usize, Departure::Released);
        }
        self.effects.extend(ends);
    }

    /// Whether a pool has connections that no worker has taken, or that may come back from a worker
    /// that has left.
    pub(super) fn has_clients(&self, p: usize) -> bool {
        let pool = &self.pools[p];
        pool.held() > 0
            || pool.unrecovered > 0
            || self.workers.iter().any(|worker| worker.pool == p && worker.untaken() > 0)
    }

    /// Whether more clients may come to a pool.
    pub(super) fn has_open_listeners(&self, p: usize) -> bool {
        self.listeners.iter().any(|listener| listener.pool == p && !listener.closed_for_good)
    }
}
