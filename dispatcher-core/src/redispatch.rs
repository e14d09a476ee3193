//! The choice of a worker without the policy: for a connection that was at another worker, or that
//! no worker is likely to take soon.
//!
//! Scans every worker of the pool, which is expensive and seldom needed. This module decides where
//! a connection goes; `handoff.rs` decides when.

use std::time::Duration;

use super::Core;
use super::handoff::Shares;
use super::ledger::{Conn, Redispatch};
use super::policy::By;
use super::trust::PROOF;
use super::types::*;
use super::worker::Worker;

/// A connection that has waited for twice this time goes to any trusted worker, even to one with
/// few takes.
const PATIENT_LIMIT: Duration = Duration::from_millis(400);

impl Core {
    /// A worker for a connection that is placed again. Unlike the policy this scans every worker.
    pub(super) fn choose_redispatch(&mut self, now: Time, p: usize, conn: u32) -> Option<usize> {
        let Conn { redispatch, .. } = *self.ledger.get(conn);
        let chosen = match redispatch {
            Redispatch::New => None,
            Redispatch::Busy => {
                self.best(p, conn, |w| w.is_trusted() && w.has_room()).or_else(|| {
                    let spaced = self.pools[p].is_spaced();
                    let fresh = self.ledger.get(conn).moves == 0;
                    self.best(p, conn, |w| fresh && w.is_trialable(spaced))
                })
            }
            Redispatch::Idle => self.best(p, conn, |w| w.is_trusted() && w.idle_threads() > 0),
            Redispatch::Slow { from, limit } => {
                let other = |w: &Worker| w.id.index != from && w.is_trusted() && w.has_room();
                self.best(p, conn, |w| other(w) && is_target(w, limit))
                    .or_else(|| self.best(p, conn, other))
                    .or_else(|| self.best(p, conn, |w| self.may_prove_itself(w, from)))
            }
            Redispatch::Failed { from } => self.after_failed_trial(p, conn, from),
        };
        let chosen = chosen.or_else(|| match redispatch {
            Redispatch::Idle => self.best(p, conn, |w| w.is_trusted() && w.has_room()),
            _ => None,
        })?;
        self.commit_handoff(now, p, conn, chosen);
        Some(chosen)
    }

    /// Whether a worker without trust may be tested with a connection that the worker `from` left
    /// untaken.
    pub(super) fn may_prove_itself(&self, worker: &Worker, from: u32) -> bool {
        let spaced = self.pools[worker.pool].is_spaced();
        worker.id.index != from && worker.is_trialable(spaced)
    }

    /// A trusted worker; else one that may be tested; else one that was never tested.
    pub(super) fn after_failed_trial(&self, p: usize, conn: u32, from: u32) -> Option<usize> {
        let spaced = self.pools[p].is_spaced();
        self.best(p, conn, |w| w.id.index != from && w.is_trusted() && w.has_room())
            .or_else(|| self.best(p, conn, |w| w.id.index != from && w.is_trialable(spaced)))
            .or_else(|| self.best(p, conn, |w| w.id.index != from && is_untested(w)))
    }

    /// A worker for a connection that no worker is likely to take soon; `None` if it should be
    /// queued.
    pub(super) fn choose_any(&mut self, now: Time, p: usize, conn: u32) -> Option<usize> {
        let pool = &self.pools[p];
        if pool.candidates.opens() == 0 {
            return None;
        }
        // Trusted reporters are only busy: the connection waits in the queue for the first free
        // thread.
        let failover = pool.settings.policy == Policy::Failover;
        if pool.shares.reporter > 0
            && (!failover
                || self.open_workers(p).any(|w| Shares::of(&self.workers[w]).reporter > 0))
        {
            return None;
        }
        if now < pool.trial_until {
            return None;
        }
        let timeout = pool.settings.handoff_timeout;
        let rank = |w: &usize| {
            let worker = &self.workers[*w];
            let priority = if failover { u16::MAX - worker.priority } else { 0 };
            let failed = worker.trust.failed > 0;
            (
                (failed, priority, worker.is_silent(now, timeout)),
                burden(worker),
                !worker.trust.proven,
            )
        };
        let chosen = self.open_workers(p).min_by(|a, b| {
            let (a, b) = (rank(a), rank(b));
            a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)).then(a.2.cmp(&b.2))
        })?;
        self.commit_handoff(now, p, conn, chosen);
        Some(chosen)
    }

    pub(super) fn open_workers(&self, p: usize) -> impl Iterator<Item = usize> + '_ {
        let candidates = &self.pools[p].candidates;
        // The scan starts where the last decision ended, so that ties rotate.
        let len = candidates.len();
        let start = candidates.start() % len.max(1);
        (start..len)
            .chain(0..start)
            .filter(|&at| candidates.is_open(at))
            .map(|at| candidates.get(at).worker as usize)
    }

    /// Of the open workers for which `fit` holds, the one that the pool's policy prefers: with
    /// `hash` the key's owner, else the least loaded.
    pub(super) fn best(&self, p: usize, conn: u32, fit: impl Fn(&Worker) -> bool) -> Option<usize> {
        let pool = &self.pools[p];
        let fitting = || self.open_workers(p).filter(|&w| fit(&self.workers[w]));
        if let Some(key) = self.ledger.get(conn).key.filter(|_| pool.is_keyed()) {
            let among = fitting().map(|w| (self.workers[w].at, self.workers[w].effective_weight()));
            let at = pool.candidates.owner(key, among)?;
            return Some(pool.candidates.get(at).worker as usize);
        }
        fitting().min_by(|&a, &b| burden(&self.workers[a]).total_cmp(&burden(&self.workers[b])))
    }

    /// Records the decision.
    pub(super) fn commit_handoff(&mut self, now: Time, p: usize, conn: u32, w: usize) {
        let at = self.workers[w].at;
        let choice = self.pools[p].candidates.choice(now, at, By::Handoff);
        if self.pools[p].history.is_on() {
            self.record(now, p, conn, &choice);
        }
        self.pools[p].candidates.advance(at);
    }
}

/// Live connections, divided by the worker's weight.
pub(super) fn burden(worker: &Worker) -> f64 {
    (worker.load() + 1) as f64 / f64::from(worker.effective_weight())
}

/// Whether the worker is likely to take a connection within `limit`.
pub(super) fn is_target(worker: &Worker, limit: Duration) -> bool {
    worker.is_trusted()
        && worker.has_room()
        && worker.trust.peak <= limit
        // With few takes a worker still qualifies for a connection that has waited long.
        && (worker.trust.batches >= PROOF || limit >= PATIENT_LIMIT.max(2 * worker.trust.peak))
}

/// Whether the worker has neither taken a connection nor failed a trial.
pub(super) fn is_untested(worker: &Worker) -> bool {
    worker.state == State::Active && !worker.trust.proven && worker.trust.failed == 0
}
