//! Connections of ready checks: the dispatcher itself connects, to see whether a worker takes a
//! connection, and answers on it.
//!
//! Such a connection has a slot like any other, but no entry in the ledger: it counts in no total,
//! is never sent to another worker, and its deadline is that of the check. While a worker is being
//! checked it gets no clients.

use super::ring::Item;
use super::types::*;
use super::{Core, Effect};

use super::policy::NEVER;

impl Core {
    /// A connection for the ready check of this worker is there: it is sent. False if the worker
    /// cannot be sent one now.
    pub fn send_check(&mut self, now: Time, worker: WorkerId) -> bool {
        let Some(w) = self.find(worker) else { return false };
        let entry = &mut self.workers[w];
        let busy = entry.ring.len() - entry.ring.conns() > 1 || entry.ring.revoking() > 0;
        if entry.state == State::Gone || entry.closed || entry.purging || busy {
            return false;
        }
        if !entry.ring.has_room() || entry.ring.tickets().any(|it| is_check(entry.ring.item(it))) {
            return false;
        }
        let ticket = entry.ring.issue(now, Item::Check, NEVER);
        self.effects.push_back(Effect::SendCheck { worker, ticket });
        self.refresh(w);
        self.after(now, self.workers[w].pool);
        true
    }

    /// An [`Effect::SendCheck`] failed. The event loop has already taken the slot back, and closes
    /// the connection.
    pub fn check_failed(&mut self, now: Time, worker: WorkerId, ticket: Ticket, why: SendFailure) {
        let Some(w) = self.find(worker) else { return };
        if is_check(self.workers[w].ring.item(ticket)) {
            self.settle(w, ticket);
            if why == SendFailure::Closed {
                self.closed(now, w);
            }
            self.end_round(now, w);
            self.refresh(w);
        }
        self.after(now, self.workers[w].pool);
    }

    /// The worker's application took it. It counts as a take: the worker is trusted.
    pub(super) fn check_taken(&mut self, now: Time, w: usize, ticket: Ticket, taken_at: Time) {
        let entry = &self.workers[w];
        let sent = entry.ring.sent_at(ticket);
        let at = taken_at.clamp(sent, now.max(sent));
        let timeout = self.pools[entry.pool].settings.handoff_timeout;
        self.settle(w, ticket);
        let entry = &mut self.workers[w];
        // The worker counts it among those that it has taken, and will count its end.
        entry.base = entry.base.saturating_add(1);
        let worker = entry.id;
        self.effects.push_back(Effect::CheckOver { worker, ticket, taken: true });
        if self.workers[w].trust.took(sent, at, timeout) {
            self.trust(now, w);
        }
    }

    /// It was revoked, or did not reach the worker.
    pub(super) fn check_over(&mut self, w: usize, ticket: Ticket) {
        self.settle(w, ticket);
        let worker = self.workers[w].id;
        self.effects.push_back(Effect::CheckOver { worker, ticket, taken: false });
    }
}

fn is_check(item: Option<Item>) -> bool {
    item == Some(Item::Check)
}
