//! Gauges of workers: what they say is checked here before a policy goes by it.
//!
//! Owns what is possible and what is not, and says once for each worker what was not. Which words of which memory a
//! reading comes from is the event loop's business; what it is worth, the policy's.

use std::time::Duration;

use dispatch_protocol::scoreboard::gauge::{GaugeName, Reading};

use super::types::*;
use super::{Core, Event};

/// Larger values, and smaller ones than its negative, are taken for it: sums stay numbers.
pub const MAX_GAUGE_VALUE: f64 = 1e15;

/// A worker may have written after we looked at the clock; but not long after.
const AHEAD: Duration = Duration::from_secs(1);

impl Core {
    /// What a pool scores by; nothing unless its policy is `least-score`.
    pub fn scored_gauges(&self, pool: PoolId) -> &[ScoredGauge] {
        match self.pools.get(usize::from(pool.0)) {
            Some(pool) if pool.settings.policy == Policy::LeastScore => {
                &pool.settings.scores.gauges
            }
            Some(_) | None => &[],
        }
    }

    /// Whether the gauges of all of a pool's workers are to be read now. With an interval, once for each.
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

    /// Whether the pool scores by a gauge of this worker that has said nothing yet. Such a worker is looked at in every turn,
    /// whatever the interval: it would get nothing until the next one, as if it had been silent for long.
    pub fn lacks_gauges(&self, worker: WorkerId) -> bool {
        let Some(worker) = self.find(worker).map(|w| &self.workers[w]) else { return false };
        worker.state != State::Gone && self.pools[worker.pool].candidates.lacks_gauges(worker.at)
    }

    /// What the gauge with this position in [`Core::scored_gauges`] says; `None` if the worker has none of that name or has
    /// never set it. Said again only when it has changed.
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

    /// A worker gave a gauge a name that is none, or one that another of its gauges has.
    pub fn misnamed_gauge(&mut self, worker: WorkerId, name: Option<GaugeName>) {
        if let Some(w) = self.find(worker) {
            let problem = match name {
                Some(_) => GaugeProblem::NameTwice,
                None => GaugeProblem::NoName,
            };
            self.bad_gauge(w, name, problem);
        }
    }

    /// How a worker stands in a pool that scores; `None` in any other.
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
        let told = &mut worker.told_gauges[problem as usize];
        if !std::mem::replace(told, true) {
            let worker = worker.id;
            self.event(Event::BadGauge { worker, gauge, problem });
        }
    }
}

/// What a policy may go by; otherwise what was wrong, and what is used instead.
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
