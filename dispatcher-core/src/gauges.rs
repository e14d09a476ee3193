//! Gauges of workers: checks every reading before a policy uses it.
//!
//! Guarantees that policies get only possible readings, and reports each problem once for each
//! worker. The event loop reads the shared memory; the policy computes scores.

use std::time::Duration;

use dispatch_protocol::scoreboard::gauge::{GaugeName, Reading};

use super::types::*;
use super::{Core, Event};

/// Values are clamped to this magnitude, so that sums stay finite.
pub const MAX_GAUGE_VALUE: f64 = 1e15;

/// How far a reading's time may be ahead: a worker may write after the event loop read the clock.
const AHEAD: Duration = Duration::from_secs(1);

impl Core {
    /// The gauges that a pool's policy scores; empty unless the policy is `least-score`.
    pub fn scored_gauges(&self, pool: PoolId) -> &[ScoredGauge] {
        match self.pools.get(usize::from(pool.0)) {
            Some(pool) if pool.settings.policy == Policy::LeastScore => {
                &pool.settings.scores.gauges
            }
            Some(_) | None => &[],
        }
    }

    /// Whether the gauges of all of a pool's workers are read now. With an interval, true once per
    /// interval.
    pub fn reads_gauges(&mut self, now: Time, pool: PoolId) -> bool {
        if self.scored_gauges(pool).is_empty() {
            return false;
        }
        let Some(pool) = self.pools.get_mut(usize::from(pool.0)) else { return false };
        let Some(interval) = pool.settings.scores.interval else { return true };
        let due = pool.sample_at <= now;
        if due {
            pool.sample_at = now + interval;
        }
        due
    }

    /// Whether the pool scores a gauge that this worker has never set. The event loop reads such a
    /// worker in every turn, whatever the interval, because it would get nothing until the next
    /// reading.
    pub fn lacks_gauges(&self, worker: WorkerId) -> bool {
        let Some(worker) = self.find(worker).map(|w| &self.workers[w]) else { return false };
        worker.state != State::Gone && self.pools[worker.pool].candidates.lacks_gauges(worker.at)
    }

    /// Reports the reading of the gauge with this position in [`Core::scored_gauges`]; `None` if
    /// the worker has none of that name or has never set it. The event loop reports only changes.
    pub fn gauge(&mut self, now: Time, worker: WorkerId, gauge: usize, said: Option<Reading>) {
        let Some(w) = self.find(worker) else { return };
        let (pool, at) = (self.workers[w].pool, self.workers[w].at);
        let gauges = self.scored_gauges(PoolId(pool as u16));
        let Some(name) = gauges.get(gauge).map(|gauge| gauge.name) else { return };
        if self.workers[w].state == State::Gone {
            return;
        }
        let reading = match said.map(|said| plausible(now, said)) {
            None => None,
            Some(Ok(reading)) => Some(reading),
            Some(Err((problem, reading))) => {
                self.bad_gauge(w, Some(name), problem);
                reading
            }
        };
        self.pools[pool].candidates.set_gauge(at, gauge, reading);
    }

    /// A worker gave a gauge an invalid name, or the name of another of its gauges.
    pub fn misnamed_gauge(&mut self, worker: WorkerId, name: Option<GaugeName>) {
        if let Some(w) = self.find(worker) {
            let problem = match name {
                Some(_) => GaugeProblem::NameTwice,
                None => GaugeProblem::NoName,
            };
            self.bad_gauge(w, name, problem);
        }
    }

    /// A worker's score in a pool with `least-score`; `None` in any other.
    pub fn score(&self, now: Time, worker: WorkerId) -> Option<Scored> {
        let worker = &self.workers[self.find(worker)?];
        if worker.state == State::Gone {
            return None;
        }
        let candidates = &self.pools[worker.pool].candidates;
        candidates.score(worker.at, worker.load(), worker.effective_weight(), now)
    }

    fn bad_gauge(&mut self, w: usize, gauge: Option<GaugeName>, problem: GaugeProblem) {
        let worker = &mut self.workers[w];
        let reported = &mut worker.reported_gauges[problem as usize];
        if !std::mem::replace(reported, true) {
            let worker = worker.id;
            self.event(Event::BadGauge { worker, gauge, problem });
        }
    }
}

/// The reading that a policy may use; if it is impossible, the problem and what is used instead.
fn plausible(now: Time, said: Reading) -> Result<Reading, (GaugeProblem, Option<Reading>)> {
    if !said.value.is_finite() {
        return Err((GaugeProblem::NoNumber, None));
    }
    if Time(said.at) > now + AHEAD {
        return Err((GaugeProblem::Future, None));
    }
    let at = said.at.min(now.0);
    let value = said.value.clamp(-MAX_GAUGE_VALUE, MAX_GAUGE_VALUE);
    let reading = Reading { value, at };
    if value == said.value { Ok(reading) } else { Err((GaugeProblem::TooLarge, Some(reading))) }
}
