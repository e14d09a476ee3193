//! Reads the scoreboards of workers, and asks workers to ring before the loop sleeps.

use std::time::Duration;

use dispatch_protocol::scoreboard::slot::{self, SlotState};

use super::EventLoop;
use super::rate_limit::Cause;
use super::time::{Stamps, clock};
use super::token::Key;
use super::wakeup::WAKEUP_GRACE;
use dispatcher_core::Threads;

impl EventLoop {
    /// Reads the scoreboards: which connections were taken, lost and finished.
    ///
    /// Under load it reads only those of workers from which the core expects changes, and all of
    /// them from time to time: a worker without connections can only report false changes.
    pub(super) fn scan_all(&mut self) {
        let all = self.workers.begin_scan(self.now);
        for index in 0..self.workers.len() {
            if all || self.core.may_be_dirty(index) {
                self.scan(index);
            }
        }
    }

    /// Reads one scoreboard and reports the changes to the core; true if there were any.
    ///
    /// `finished` is read first: the slots then show every connection that it counts as taken, so
    /// an honest worker never seems to have finished more than it took.
    fn scan(&mut self, index: u32) -> bool {
        let place = self.workers.table.get_mut(index as usize);
        let Some(io) = place.and_then(Option::as_mut) else { return false };
        let id = io.id;
        let finished = io.lane.board.finished();
        // The usual case with many workers.
        if finished == io.finished
            && !self.core.has_tickets(id.index)
            && io.lane.board.idle_threads() == io.threads
        {
            return false;
        }
        let mut stamps = None;
        for ticket in self.core.tickets(id) {
            if let Some(slot) = io.lane.board.slot(ticket.slot) {
                let state = slot::state(slot, ticket.seq);
                if state != SlotState::Sent {
                    let stamp = io.lane.board.stamped(ticket.slot);
                    let stamps = stamps.get_or_insert_with(Stamps::now);
                    self.workers.seen.push((ticket, state, stamps.time(stamp)));
                }
            }
        }
        let mut changed = !self.workers.seen.is_empty();
        let threads = io.lane.board.idle_threads();
        let reported = std::mem::replace(&mut io.threads, threads);
        for (ticket, state, at) in self.workers.seen.drain(..) {
            self.core.slot(self.now, id, ticket, state, at);
        }
        if threads != reported {
            let threads = threads.map(|(idle, turnaround)| Threads { idle, turnaround });
            self.core.threads(self.now, id, threads);
            changed = true;
        }
        if finished != io.finished {
            io.finished = finished;
            self.core.finished(self.now, id, finished);
            changed = true;
        }
        if changed && let Some(io) = self.workers.at_mut(index) {
            io.doorbell_limit.note_change();
        }
        changed
    }

    /// A worker has written to its doorbell. A worker that rings without a reason is muted for a
    /// while.
    pub(super) fn rang(&mut self, key: Key) {
        let registry = self.wakeup.registry();
        let Some(id) = self.workers.rang(registry, key, self.now) else { return };
        let pool = self.core.pool_of_worker(id);
        if let Some(suppressed) = self.observation.allow(self.now, pool, Cause::Broken) {
            log::warn!("event=worker_rings_idly {} suppressed={suppressed}", self.worker(id));
        }
    }

    /// Asks workers to ring the doorbell, scans their scoreboards once more, and returns how long
    /// to sleep.
    ///
    /// While there is work, no worker is asked to ring: the next turn reads the scoreboards anyway.
    pub(super) fn before_sleep(&mut self) -> Option<Duration> {
        self.watch_queued();
        let clients = self.watch_listeners();
        let threads = self.handshakes.ready || self.lines.ready || self.steers.ready;
        if clients || threads || self.wakeup.side_ready {
            return Some(Duration::ZERO);
        }
        let mut changed = false;
        // Some workers have tickets and are not asked.
        let mut grace_applies = false;
        let room = self.core.wants_room();
        for index in 0..self.workers.len() {
            let has_tickets = self.core.has_tickets(index);
            if !room && (!has_tickets || self.wakeup.in_grace) {
                grace_applies |= has_tickets;
                continue;
            }
            let Some(io) = self.workers.at(index) else { continue };
            let wants = self.core.wants(io.id);
            // The scoreboard of a muted worker is read after each grace period instead.
            if io.doorbell_limit.muted_until.is_some() {
                grace_applies |= has_tickets;
                continue;
            }
            // In the grace period only workers of full pools are asked.
            if self.wakeup.in_grace && wants & slot::want::ROOM == 0 {
                grace_applies |= has_tickets;
            } else if wants != 0 {
                slot::arm(io.lane.board.want(), wants);
                changed |= self.scan(index);
            }
        }
        if changed {
            return Some(Duration::ZERO);
        }
        self.observation.suppressed_due = self.observation.rate_limits.due();
        let deadlines = [
            self.core.deadline(),
            self.listeners.deadline(),
            self.workers.deadline(self.now),
            self.background.closing_due,
            self.observation.suppressed_due,
            grace_applies.then(|| self.now + WAKEUP_GRACE),
        ];
        let next = deadlines.into_iter().flatten().min()?;
        Some(next - clock())
    }
}
