//! The outcomes of connections in flight. Every ticket ends in exactly one of these functions, and
//! only here.

use dispatch_protocol::scoreboard::slot::SlotState;

use super::health::BAD_SLOT;
use super::ring::Item;
use super::types::*;
use super::{Core, Effect, Event};

impl Core {
    /// A slot no longer reads SENT: the worker has taken the connection, has lost it, or wrote an
    /// impossible state.
    pub(super) fn resolve(
        &mut self,
        now: Time,
        w: usize,
        ticket: Ticket,
        state: SlotState,
        taken_at: Time,
    ) {
        let Some(item) = self.workers[w].ring.item(ticket) else {
            return;
        };
        match (state, item) {
            (SlotState::Taken, Item::Conn(conn)) => self.taken(now, w, ticket, conn, taken_at),
            (SlotState::Taken, Item::Probe | Item::Nothing) => {
                self.probe_taken(now, w, ticket, taken_at);
            }
            (SlotState::Taken, Item::Check) => self.check_taken(now, w, ticket, taken_at),
            (SlotState::Lost, Item::Conn(conn)) => self.lost(now, w, ticket, conn),
            (SlotState::Lost, Item::Check) => self.check_over(w, ticket),
            (SlotState::Lost, Item::Probe | Item::Nothing) => {
                self.settle(w, ticket);
                self.remove(now, w, Departure::Expelled(BAD_SLOT));
            }
            // After a revocation that failed, SENT is as impossible as any other word.
            (SlotState::Sent | SlotState::Invalid, item) => {
                if item == Item::Check {
                    self.check_over(w, ticket);
                } else {
                    self.settle(w, ticket);
                }
                if let Item::Conn(conn) = item {
                    // The departure of the worker starts now; this connection counts among those
                    // that it sends to other workers.
                    let first = self.workers[w].round.is_none();
                    self.give_back(now, w, conn);
                    self.workers[w].resent += u32::from(first);
                }
                self.remove(now, w, Departure::Expelled(BAD_SLOT));
            }
        }
        self.end_round(now, w);
        self.refresh(w);
    }

    /// A revocation succeeded.
    pub(super) fn take_back(&mut self, now: Time, w: usize, ticket: Ticket) {
        let Some(item) = self.workers[w].ring.item(ticket) else {
            return;
        };
        match item {
            Item::Check => self.check_over(w, ticket),
            Item::Conn(_) | Item::Probe | Item::Nothing => self.settle(w, ticket),
        }
        if let Item::Conn(conn) = item {
            self.give_back(now, w, conn);
        }
        self.end_round(now, w);
        self.refresh(w);
    }

    /// A connection could not be sent at all.
    pub(super) fn not_sent(&mut self, now: Time, w: usize, ticket: Ticket, why: SendFailure) {
        let Some(Item::Conn(conn)) = self.workers[w].ring.item(ticket) else {
            return;
        };
        let blocked = self.workers[w].blocked;
        self.settle(w, ticket);
        let worker = &mut self.workers[w];
        let (id, pool) = (worker.id, worker.pool);
        worker.sent -= 1;
        self.pools[pool].untaken -= 1;
        // Settling a ticket ends the pause of a full channel, but this one does not show that the
        // worker reads.
        worker.blocked = blocked;
        self.totals.in_flight -= 1;
        match why {
            SendFailure::Full => {
                worker.channel_full += 1;
                self.pools[pool].counts.channel_full += 1;
                let until = now + self.pools[pool].settings.handoff_timeout;
                if worker.blocked.replace(until).is_none() {
                    self.event(Event::ChannelFull { worker: id });
                }
            }
            SendFailure::Closed => self.closed(now, w),
            SendFailure::Resources => self.note_out_of_resources(now),
            SendFailure::Client => {}
        }
        self.refresh(w);
        match why {
            // No other worker can be sent it either.
            SendFailure::Client => self.close(conn, CloseReason::Unsendable),
            SendFailure::Full | SendFailure::Closed | SendFailure::Resources => {
                self.ledger.get_mut(conn).trial = false;
                self.put(now, pool, conn, true);
            }
        }
        self.end_round(now, w);
        self.refresh(w);
    }

    /// A probe could not be sent.
    pub(super) fn probe_not_sent(&mut self, now: Time, w: usize, ticket: Ticket, why: SendFailure) {
        let Some(Item::Probe) = self.workers[w].ring.item(ticket) else {
            return;
        };
        self.settle(w, ticket);
        match why {
            SendFailure::Full | SendFailure::Resources | SendFailure::Client => {
                let worker = &mut self.workers[w];
                if worker.is_usable() && !worker.trust.proven {
                    let pool = &self.pools[worker.pool];
                    worker.probe_again = Some(now + pool.settings.handoff_timeout);
                }
            }
            SendFailure::Closed => self.closed(now, w),
        }
        self.end_round(now, w);
        self.refresh(w);
    }

    /// The worker's application took the connection at `taken_at`.
    fn taken(&mut self, now: Time, w: usize, ticket: Ticket, conn: u32, taken_at: Time) {
        let worker = &self.workers[w];
        // The time comes from the worker; it is clamped between the handoff and now.
        let sent = worker.ring.sent_at(ticket);
        let at = taken_at.clamp(sent, now.max(sent));
        let p = worker.pool;
        let timeout = self.pools[p].settings.handoff_timeout;
        self.settle(w, ticket);
        self.uncount(conn);
        let worker = &mut self.workers[w];
        worker.taken += 1;
        self.totals.in_flight -= 1;
        self.totals.taken += 1;
        let pool = &mut self.pools[p];
        pool.untaken -= 1;
        pool.counts.taken += 1;
        let entry = self.ledger.get_mut(conn);
        pool.handoff.record(at - entry.accepted);
        entry.place = super::ledger::Place::Leaving;
        self.effects.push_back(Effect::Release {
            worker: worker.id,
            conn: self.ledger.id(conn),
            ticket,
        });
        if worker.trust.took(sent, at, timeout) {
            self.trust(now, w);
        }
        self.served(p);
    }

    /// The connection did not reach the worker, which is short of descriptors and gets none for a
    /// while.
    fn lost(&mut self, now: Time, w: usize, ticket: Ticket, conn: u32) {
        self.settle(w, ticket);
        self.starve(now, w);
        self.refresh(w);
        let worker = &self.workers[w];
        self.pools[worker.pool].counts.lost += 1;
        let worker = worker.id;
        self.event(Event::Lost { worker });
        self.give_back(now, w, conn);
    }

    /// Frees the slot of a resolved ticket.
    pub(super) fn settle(&mut self, w: usize, ticket: Ticket) {
        let worker = &mut self.workers[w];
        worker.ring.settle(ticket);
        worker.blocked = None;
    }

    /// Places a connection again that was sent and that the worker does not have.
    fn give_back(&mut self, now: Time, w: usize, conn: u32) {
        let worker = &mut self.workers[w];
        worker.revoked += 1;
        if worker.round.is_some() {
            worker.resent += 1;
        }
        worker.stale += 1;
        let pool = worker.pool;
        self.pools[pool].untaken -= 1;
        self.pools[pool].counts.revoked += 1;
        self.totals.in_flight -= 1;
        let entry = self.ledger.get_mut(conn);
        (entry.resent, entry.trial, entry.bound) = (true, false, false);
        self.put(now, pool, conn, true);
    }
}
