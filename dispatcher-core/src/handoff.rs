//! Decides when a connection in flight moves to another worker.
//!
//! Guarantees: a connection moves only to a worker that is likely to take it sooner, and each move
//! doubles its patience, so moves settle; trust comes from takes ([`super::trust`]); a worker
//! without trust gets one connection at a time, for a short time; if no trusted worker has room,
//! the others are used; while a thread of a trusted worker waits in `accept`, no connection waits
//! at a worker whose threads are all busy. With the policy `hash` and with affinity the key
//! decides: such a connection leaves its worker only when that is suspect or leaves.
//!
//! A worker that reports its idle threads is a *reporter* here, all others are *event loops*.
//! `docs/HANDOFF.md` has the rule, its parameters and the alternatives that were measured.

use std::time::Duration;

use super::ledger::Redispatch;
use super::policy::NEVER;
use super::redispatch::{is_target, is_untested};
use super::ring::Item;
use super::trust::PROOF;
use super::types::*;
use super::worker::{Round, Worker};
use super::{Core, Effect, Pool, WorkerWait};

/// Limits of the patience of a worker's first trial, which is `handoff_timeout` divided by the
/// number of the pool's workers.
const TRIAL_MIN: Duration = Duration::from_millis(2);
const TRIAL_MAX: Duration = Duration::from_millis(20);

/// Patience of a repeated trial of a worker that never took anything, and the minimum time between
/// two such trials in a pool.
const RETRIAL: Duration = Duration::from_millis(5);
const RETRIAL_SPACING: Duration = Duration::from_secs(1);

/// Minimum time until a connection whose patience has ended without a better worker is examined
/// again; older connections wait a sixteenth of their age.
const RECHECK: Duration = Duration::from_millis(10);

/// Minimum age of an untaken connection before it moves to an idle thread of another worker: until
/// then its own worker may be about to take it.
const IDLE_AFTER: Duration = Duration::from_micros(100);

/// A worker's part of the pool's sums. Stored with the worker, so that the sums are updated by
/// differences.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Shares {
    /// 1 for a trusted reporter that is open.
    pub(super) reporter: u32,
    /// 1 for a trusted reporter with a thread that waits in `accept` and has no connection in
    /// flight to it.
    pub(super) idle: u32,
    /// 1 for a reporter with more untaken connections than waiting threads.
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

    /// Whether keys decide where connections go, and not the worker that is free first.
    pub(super) fn is_keyed(&self) -> bool {
        self.settings.policy == Policy::Hash
    }

    /// Whether a worker that failed every trial may get another one.
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
    /// The number of a worker's threads that wait in `accept`; `None`, the initial value, if the
    /// worker does not report it. The event loop reads it after the slots.
    pub fn threads(&mut self, now: Time, worker: WorkerId, threads: Option<Threads>) {
        let Some(w) = self.find(worker) else { return };
        if std::mem::replace(&mut self.workers[w].threads, threads) != threads {
            self.refresh(w);
            self.after(now, self.workers[w].pool);
        }
    }

    /// The connection goes to `w`: returns when its patience ends, and records whether it is a
    /// trial.
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
        entry.redispatch = Redispatch::New;
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
        // A trial as long as the best trusted worker's peak costs the client little.
        let trusted = self.open_workers(p).map(|w| &self.workers[w]).filter(|w| w.is_trusted());
        let usual = trusted.map(|w| w.trust.peak).min().unwrap_or_default();
        // All trials of one connection together last about as long as one `handoff_timeout`.
        let timeout = self.pools[p].settings.handoff_timeout;
        let most = timeout.max(usual).saturating_sub(now - self.ledger.get(conn).accepted);
        let mut patience = (2 * answer).min(most).max(least).min(timeout.max(usual));
        if worker.trust.ever {
            patience = patience.max(usual);
        }
        // While clients are refused, the worker gets the ordinary patience.
        if self.pools[p].worker_wait == WorkerWait::Refusing {
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

    /// Refreshes the workers that failed every trial, because whether they may be tested has
    /// changed.
    fn refresh_doubtful(&mut self, p: usize) {
        for at in 0..self.pools[p].candidates.len() {
            let w = self.pools[p].candidates.get(at).worker as usize;
            if self.workers[w].is_doubtful() {
                self.refresh(w);
            }
        }
    }

    /// Whether to wait for the outcome of trials instead of choosing the worker at `at`: while no
    /// worker of the pool is known well, the first that takes would get the whole burst.
    pub(super) fn awaits_first_takes(&self, now: Time, p: usize, at: usize) -> bool {
        let pool = &self.pools[p];
        let worker = |w: u32| &self.workers[w as usize];
        now < pool.first_until
            && worker(pool.candidates.get(at).worker).trust.proven
            && pool.candidates.workers().any(|w| worker(w).untaken() > 0 && is_untested(worker(w)))
            && !pool.candidates.workers().any(|w| worker(w).trust.batches >= PROOF)
    }

    /// Runs the timers of a pool as a whole.
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

    /// The earliest timer of [`Core::tick_handoffs`], or the time when queued connections may be
    /// placed.
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
            // Moving an earlier connection may have moved this one too.
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
        let refusing = self.pools[p].worker_wait == WorkerWait::Refusing;
        if worker.is_busy() && !refusing {
            // Busy threads are no reason for suspicion. Another worker may be free sooner, unless
            // the key decides.
            match entry.bound {
                true => self.workers[w].ring.postpone(ticket, now + timeout),
                false => self.move_away(w, ticket, conn, Redispatch::Busy),
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
        let redispatch = match failed {
            true => Redispatch::Failed { from },
            false => Redispatch::Slow { from, limit },
        };
        let suspect = worker.state != State::Active;
        let target = self.has_target(p, conn, redispatch)
            || (suspect && self.best(p, conn, |w| self.may_prove_itself(w, from)).is_some());
        if target {
            self.count_move(conn);
            self.move_away(w, ticket, conn, redispatch);
            self.take_along(now, w);
        } else if self.pools[p].shares.reporter > 0 || refusing {
            self.count_move(conn);
            self.move_away(w, ticket, conn, Redispatch::Busy);
        } else if entry.trial {
            // There is no better worker: the connection stays, with ordinary patience.
            self.ledger.get_mut(conn).trial = false;
            self.workers[w].ring.postpone(ticket, now + timeout);
        } else {
            self.workers[w].ring.postpone(ticket, now + RECHECK.max(age / 16));
        }
    }

    /// Whether a better worker exists for a connection that leaves its worker.
    fn has_target(&self, p: usize, conn: u32, redispatch: Redispatch) -> bool {
        match redispatch {
            Redispatch::Slow { from, limit } => {
                self.best(p, conn, |w| w.id.index != from && is_target(w, limit)).is_some()
            }
            Redispatch::Failed { from } => self.after_failed_trial(p, conn, from).is_some(),
            Redispatch::New | Redispatch::Busy | Redispatch::Idle => true,
        }
    }

    /// The other connections of a suspect worker move too, if a better worker exists for them.
    fn take_along(&mut self, now: Time, w: usize) {
        let others: Vec<(Ticket, u32)> = self.workers[w].ring.connections().collect();
        let p = self.workers[w].pool;
        for (ticket, conn) in others {
            let worker = &self.workers[w];
            let age = now - worker.ring.sent_at(ticket);
            let stall = worker.trust.stall.map_or(age, |since| age.max(now - since));
            let (from, failed) = (worker.id.index, worker.trust.failed > 0);
            let redispatch = match failed {
                // This connection is not itself the trial: only a trusted worker is better.
                true => Redispatch::Slow { from, limit: Duration::MAX },
                false => Redispatch::Slow { from, limit: stall / 2 },
            };
            // A connection that has just come to a failing worker may be taken there as soon as at
            // another.
            let waits = !failed
                || self
                    .best(p, conn, |w| {
                        w.id.index != from && is_target(w, Duration::MAX) && w.trust.peak <= age
                    })
                    .is_some();
            if worker.state != State::Active && waits && self.has_target(p, conn, redispatch) {
                self.move_away(w, ticket, conn, redispatch);
            }
        }
    }

    fn count_move(&mut self, conn: u32) {
        let entry = self.ledger.get_mut(conn);
        entry.moves = entry.moves.saturating_add(u8::from(!entry.trial));
    }

    /// Revokes a connection, for this reason.
    fn move_away(&mut self, w: usize, ticket: Ticket, conn: u32, redispatch: Redispatch) {
        self.ledger.get_mut(conn).redispatch = redispatch;
        let worker = &mut self.workers[w];
        if worker.ring.revoke(ticket) {
            worker.round.get_or_insert(Round::Quiet);
            let worker = worker.id;
            self.effects.push_back(Effect::Revoke { worker, ticket });
        }
    }

    /// While a thread of a trusted worker waits, the oldest connection at a worker whose threads
    /// are all busy moves to it.
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
        self.move_away(w, ticket, conn, Redispatch::Idle);
        self.refresh(w);
    }

    /// Gives a worker full trust, as if it had often taken connections at once. For tests.
    #[doc(hidden)]
    pub fn vouch(&mut self, now: Time, worker: WorkerId) {
        let Some(w) = self.find(worker) else { return };
        (self.workers[w].trust.proven, self.workers[w].trust.ever) = (true, true);
        self.workers[w].trust.batches = PROOF;
        self.trust(now, w);
        self.refresh(w);
        self.after(now, self.workers[w].pool);
    }

    /// Whether a worker has full trust. For tests.
    #[doc(hidden)]
    pub fn is_trusted(&self, worker: WorkerId) -> bool {
        self.find(worker)
            .is_some_and(|w| self.workers[w].is_trusted() && self.workers[w].trust.batches >= PROOF)
    }

    /// The worker's channel is empty: it has no revoked records any more.
    pub fn purged(&mut self, now: Time, worker: WorkerId) {
        let Some(w) = self.find(worker) else { return };
        let entry = &mut self.workers[w];
        if !std::mem::take(&mut entry.purging) {
            return;
        }
        entry.stale = 0;
        // The channel may have contained a notice.
        self.repeat_notice(w);
        self.probe(now, w);
        self.refresh(w);
        self.after(now, self.workers[w].pool);
    }
}
