//! When a connection that was sent and is not yet taken moves, and where to.
//!
//! Guarantees: a connection moves only to a worker that is likely to take it sooner, and each move doubles its patience, so
//! moves settle; trust comes from takes ([`super::trust`]); a worker that has to prove itself gets one connection at a
//! time, for a short time; if no trusted worker has room, the others are used; while a thread of a trusted worker waits in
//! `accept`, no connection waits at one whose threads are all busy. With the policy `hash` and with affinity the key decides:
//! such a connection leaves its worker only when that is suspect or leaves.
//!
//! A worker that reports its idle threads is a *reporter* here, all others are *event loops*. The rule, its parameters
//! and what it was compared with: `docs/HANDOFF.md`.

use std::time::Duration;

use super::again::{is_target, is_untested};
use super::ledger::Again;
use super::policy::NEVER;
use super::ring::Item;
use super::trust::PROOF;
use super::types::*;
use super::worker::{Round, Worker};
use super::{Clock, Core, Effect, Pool};

/// Patience of a trial: the first one of a worker has `handoff_timeout` divided by the workers of the pool, within these.
const TRIAL_MIN: Duration = Duration::from_millis(2);
const TRIAL_MAX: Duration = Duration::from_millis(20);

/// Patience of a repeated trial of a worker that never took anything, and how far apart these are in a pool.
const RETRIAL: Duration = Duration::from_millis(5);
const RETRIAL_SPACING: Duration = Duration::from_secs(1);

/// A connection whose patience has ended and that has nowhere better to go: looked at again after this, or a sixteenth of its
/// age.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// An untaken connection is this old before an idle thread of another worker gets it: until then its own worker may just
/// be on its way.
const IDLE_AFTER: Duration = Duration::from_micros(100);

/// What a worker counts for in its pool. Kept beside it, so that the pool's sums are changed by differences.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Shares {
    /// A trusted reporter that may have one more connection at some time.
    pub(super) reporter: u32,
    /// A trusted reporter with a thread that waits in `accept` and has nothing on its way.
    pub(super) idle: u32,
    /// A reporter that has more untaken connections than threads that wait.
    pub(super) crowded: u32,
}

impl Shares {
    pub(super) fn of(worker: &Worker) -> Shares {
        let Some(threads) = worker.threads else { return Shares::default() };
        let open = worker.is_trusted() && worker.is_open();
        Shares {
            reporter: u32::from(open),
            idle: u32::from(open && worker.idle_threads() > 0),
            crowded: u32::from(worker.is_usable() && worker.untaken() > threads.idle),
        }
    }
}

impl Pool {
    pub(super) fn share(&mut self, old: Shares, new: Shares) {
        let sums = &mut self.shares;
        sums.reporter = sums.reporter + new.reporter - old.reporter;
        sums.idle = sums.idle + new.idle - old.idle;
        sums.crowded = sums.crowded + new.crowded - old.crowded;
    }

    /// Whether keys decide where connections go, rather than the soonest free worker.
    pub(super) fn is_keyed(&self) -> bool {
        self.settings.policy == Policy::Hash
    }

    /// Whether a worker that failed every test may be tested again.
    pub(super) fn is_spaced(&self) -> bool {
        self.retrial_wait.is_none()
    }

    /// How long the first trial of a worker may last.
    fn trial(&self) -> Duration {
        let workers = u32::try_from(self.candidates.len()).unwrap_or(u32::MAX).max(1);
        (self.settings.handoff_timeout / workers).clamp(TRIAL_MIN, TRIAL_MAX)
    }
}

impl Core {
    /// A worker says how many of its threads wait in `accept`, or that it does not report this, which is what is assumed
    /// of a worker that joins. Read after its slots.
    pub fn threads(&mut self, now: Time, worker: WorkerId, threads: Option<Threads>) {
        let Some(w) = self.find(worker) else { return };
        if std::mem::replace(&mut self.workers[w].threads, threads) != threads {
            self.refresh(w);
            self.after(now, self.workers[w].pool);
        }
    }

    /// The connection goes to `w`: says when its patience ends, and whether it is a trial.
    pub(super) fn begin_patience(&mut self, now: Time, w: usize, conn: u32) -> Time {
        let worker = &self.workers[w];
        let p = worker.pool;
        let settings = &self.pools[p].settings;
        let trial = worker.is_trialable(self.pools[p].is_spaced())
            && !(worker.state == State::Active && self.pools[p].is_keyed());
        let moves = self.ledger.get(conn).moves;
        let usual =
            worker.trust.patience(settings.handoff_timeout, settings.max_handoff_timeout, moves);
        let patience = if trial { self.begin_trial(now, w, conn) } else { usual };
        let entry = self.ledger.get_mut(conn);
        entry.trial = trial;
        entry.again = Again::New;
        match self.stop {
            Some(stop) if stop.over => NEVER,
            _ => now + patience,
        }
    }

    fn begin_trial(&mut self, now: Time, w: usize, conn: u32) -> Duration {
        let worker = &self.workers[w];
        let p = worker.pool;
        let first = self.pools[p].trial();
        let least = if worker.is_doubtful() { RETRIAL } else { first };
        let answer = worker.trust.answer.unwrap_or_default();
        // As long as the best trusted worker may need, the client loses little.
        let trusted = self.open_workers(p).map(|w| &self.workers[w]).filter(|w| w.is_trusted());
        let usual = trusted.map(|w| w.trust.peak).min().unwrap_or_default();
        // All trials of one client together last about as long as one.
        let timeout = self.pools[p].settings.handoff_timeout;
        let most = timeout.max(usual).saturating_sub(now - self.ledger.get(conn).accepted);
        let mut patience = (2 * answer).min(most).max(least).min(timeout.max(usual));
        if worker.trust.ever {
            patience = patience.max(usual);
        }
        // While clients are refused, this is all the worker is asked for.
        if self.pools[p].clock == Clock::Refusing {
            let settings = &self.pools[p].settings;
            patience =
                worker.trust.patience(settings.handoff_timeout, settings.max_handoff_timeout, 0);
        }
        let doubtful = worker.is_doubtful();
        let pool = &mut self.pools[p];
        pool.trial_until = pool.trial_until.max(now + first);
        pool.first_until = now + TRIAL_MIN;
        if doubtful {
            pool.retrial_wait = Some(now + RETRIAL_SPACING);
            self.refresh_doubtful(p);
        }
        patience
    }

    /// Tests of workers that failed every one before are possible again, or not any more.
    fn refresh_doubtful(&mut self, p: usize) {
        for at in 0..self.pools[p].candidates.len() {
            let w = self.pools[p].candidates.get(at).worker as usize;
            if self.workers[w].is_doubtful() {
                self.refresh(w);
            }
        }
    }

    /// Whether it is better to wait for the outcome of trials than to choose the worker at `at`: no worker of the pool is known
    /// well yet, and whichever takes first would get the whole burst.
    pub(super) fn awaits_first_takes(&self, now: Time, p: usize, at: usize) -> bool {
        let pool = &self.pools[p];
        let worker = |w: u32| &self.workers[w as usize];
        now < pool.first_until
            && worker(pool.candidates.get(at).worker).trust.proven
            && pool.candidates.workers().any(|w| worker(w).untaken() > 0 && is_untested(worker(w)))
            && !pool.candidates.workers().any(|w| worker(w).trust.batches >= PROOF)
    }

    /// What is due for a pool as a whole.
    pub(super) fn tick_handoffs(&mut self, now: Time, p: usize) {
        let pool = &mut self.pools[p];
        if pool.retrial_wait.is_some_and(|until| until <= now) {
            pool.retrial_wait = None;
            self.refresh_doubtful(p);
        }
        let pool = &mut self.pools[p];
        if pool.idle_at.is_some_and(|at| at <= now) {
            pool.idle_at = None;
        }
    }

    /// When [`Core::tick_handoffs`] has something to do at the latest, or the queue may move on.
    pub(super) fn handoffs_due(&self, pool: &Pool) -> Time {
        let running = |until: &Time| !pool.queued.is_empty() && *until > pool.ticked;
        let trial = Some(pool.trial_until).filter(running);
        let first = Some(pool.first_until).filter(running);
        [trial, first, pool.retrial_wait, pool.idle_at].into_iter().flatten().min().unwrap_or(NEVER)
    }

    /// The patience of some of a worker's connections has ended.
    pub(super) fn end_patience(&mut self, now: Time, w: usize) {
        if !self.has_timeouts() || self.workers[w].ring.due() > now {
            return;
        }
        for (ticket, conn) in self.workers[w].ring.overdue(now) {
            // An earlier one may have taken this one along.
            if self.workers[w].ring.item(ticket) == Some(Item::Conn(conn)) {
                self.overdue(now, w, ticket, conn);
            }
        }
        self.end_round(now, w);
        self.refresh(w);
    }

    fn overdue(&mut self, now: Time, w: usize, ticket: Ticket, conn: u32) {
        let worker = &self.workers[w];
        let p = worker.pool;
        let entry = *self.ledger.get(conn);
        let settings = &self.pools[p].settings;
        let (timeout, longest) = (settings.handoff_timeout, settings.max_handoff_timeout);
        let sent = worker.ring.sent_at(ticket);
        let age = now - sent;
        let refusing = self.pools[p].clock == Clock::Refusing;
        if worker.is_busy() && !refusing {
            // It is not suspicious. Any other may be free sooner, unless the key decides.
            match entry.bound {
                true => self.workers[w].ring.postpone(ticket, now + timeout),
                false => self.move_away(w, ticket, conn, Again::Busy),
            }
            return;
        }
        let patience = worker.trust.patience(timeout, longest, entry.moves);
        let stalled = now - sent.max(worker.trust.last_take) >= patience;
        if entry.trial {
            let until = self.workers[w].trust.trial_failed(now);
            let wait = &mut self.workers[w].trial_wait;
            *wait = Some(wait.map_or(until, |wait| wait.max(until)));
        }
        if entry.trial || stalled {
            self.suspect(now, w, sent, age);
        }
        let worker = &self.workers[w];
        let failed = worker.trust.failed > 0;
        let stall = worker.trust.stall.map_or(age, |since| age.max(now - since));
        let (from, limit) = (worker.id.index, stall / 2);
        let again = match failed {
            true => Again::Failed { from },
            false => Again::Slow { from, limit },
        };
        let suspect = worker.state != State::Active;
        let target = self.has_target(p, conn, again)
            || (suspect && self.best(p, conn, |w| self.may_prove_itself(w, from)).is_some());
        if target {
            self.count_move(conn);
            self.move_away(w, ticket, conn, again);
            self.take_along(now, w);
        } else if self.pools[p].shares.reporter > 0 || refusing {
            self.count_move(conn);
            self.move_away(w, ticket, conn, Again::Busy);
        } else if entry.trial {
            // There is no better place: it stays, with ordinary patience.
            self.ledger.get_mut(conn).trial = false;
            self.workers[w].ring.postpone(ticket, now + timeout);
        } else {
            self.workers[w].ring.postpone(ticket, now + LOOK_AGAIN.max(age / 16));
        }
    }

    /// Whether a connection that leaves its worker finds a better one.
    fn has_target(&self, p: usize, conn: u32, again: Again) -> bool {
        match again {
            Again::Slow { from, limit } => {
                self.best(p, conn, |w| w.id.index != from && is_target(w, limit)).is_some()
            }
            Again::Failed { from } => self.after_failed_trial(p, conn, from).is_some(),
            Again::New | Again::Busy | Again::Idle => true,
        }
    }

    /// Everything else at a suspect worker that has a better place moves too.
    fn take_along(&mut self, now: Time, w: usize) {
        let others: Vec<(Ticket, u32)> = self.workers[w].ring.connections().collect();
        let p = self.workers[w].pool;
        for (ticket, conn) in others {
            let worker = &self.workers[w];
            let age = now - worker.ring.sent_at(ticket);
            let stall = worker.trust.stall.map_or(age, |since| age.max(now - since));
            let (from, failed) = (worker.id.index, worker.trust.failed > 0);
            let again = match failed {
                // Not a trial of its own: only a trusted worker is better.
                true => Again::Slow { from, limit: Duration::MAX },
                false => Again::Slow { from, limit: stall / 2 },
            };
            // One that has just come to a worker that fails may be taken there as soon as elsewhere.
            let waits = !failed
                || self
                    .best(p, conn, |w| {
                        w.id.index != from && is_target(w, Duration::MAX) && w.trust.peak <= age
                    })
                    .is_some();
            if worker.state != State::Active && waits && self.has_target(p, conn, again) {
                self.move_away(w, ticket, conn, again);
            }
        }
    }

    fn count_move(&mut self, conn: u32) {
        let entry = self.ledger.get_mut(conn);
        entry.moves = entry.moves.saturating_add(u8::from(!entry.trial));
    }

    /// Asks for a connection back, for this reason.
    fn move_away(&mut self, w: usize, ticket: Ticket, conn: u32, again: Again) {
        self.ledger.get_mut(conn).again = again;
        let worker = &mut self.workers[w];
        if worker.ring.revoke(ticket) {
            worker.round.get_or_insert(Round::Quiet);
            let worker = worker.id;
            self.effects.push_back(Effect::Revoke { worker, ticket });
        }
    }

    /// While a thread of a trusted worker waits, the oldest connection at one whose threads are all busy goes there.
    pub(super) fn use_idle_threads(&mut self, now: Time, p: usize) {
        let Pool { shares, .. } = &self.pools[p];
        if shares.idle == 0 || shares.crowded == 0 || self.out_of_resources.is_some() {
            self.pools[p].idle_at = None;
            return;
        }
        let idle = |w: usize| self.workers[w].is_trusted() && self.workers[w].idle_threads() > 0;
        if !self.open_workers(p).any(idle) {
            return;
        }
        let candidates = &self.pools[p].candidates;
        let crowded = candidates.workers().map(|w| w as usize).filter(|&w| {
            let worker = &self.workers[w];
            Shares::of(worker).crowded > 0 && worker.ring.revoking() == 0
        });
        let oldest = crowded
            .filter_map(|w| {
                let mut free = self.workers[w].ring.connections();
                let (ticket, conn) = free.find(|&(_, conn)| !self.ledger.get(conn).bound)?;
                Some((self.workers[w].ring.sent_at(ticket), w, ticket, conn))
            })
            .min_by_key(|&(sent, ..)| sent);
        let Some((sent, w, ticket, conn)) = oldest else {
            self.pools[p].idle_at = None;
            return;
        };
        if sent + IDLE_AFTER > now {
            self.pools[p].idle_at = Some(sent + IDLE_AFTER);
            return;
        }
        self.pools[p].idle_at = None;
        self.move_away(w, ticket, conn, Again::Idle);
        self.refresh(w);
    }

    /// As if a worker had shown often that it takes connections at once.
    #[doc(hidden)]
    pub fn vouch(&mut self, now: Time, worker: WorkerId) {
        let Some(w) = self.find(worker) else { return };
        (self.workers[w].trust.proven, self.workers[w].trust.ever) = (true, true);
        self.workers[w].trust.batches = PROOF;
        self.trust(now, w);
        self.refresh(w);
        self.after(now, self.workers[w].pool);
    }

    /// Whether a worker is known to take connections.
    #[doc(hidden)]
    pub fn is_trusted(&self, worker: WorkerId) -> bool {
        self.find(worker)
            .is_some_and(|w| self.workers[w].is_trusted() && self.workers[w].trust.batches >= PROOF)
    }

    /// The worker's channel is empty: what was revoked is gone from it.
    pub fn purged(&mut self, now: Time, worker: WorkerId) {
        let Some(w) = self.find(worker) else { return };
        let entry = &mut self.workers[w];
        if !std::mem::take(&mut entry.purging) {
            return;
        }
        entry.stale = 0;
        // A notice may have been among what was in it.
        self.repeat_notice(w);
        self.probe(now, w);
        self.refresh(w);
        self.after(now, self.workers[w].pool);
    }
}
