//! Lowest score: a weighted sum of live connections and gauges.
//!
//! `score = connections × (load + 1) ÷ weight + Σ multiplier × gauge`. The load is exact and counts
//! from the instant a connection is sent, so that a burst does not herd on the worker that had the
//! best gauges a moment ago. A worker with an expired gauge is ineligible; if that excludes all
//! workers, the fewest connections win.
//!
//! Owns the readings of every candidate and their sums. It has no access to shared memory; the
//! caller has rejected impossible readings.

use dispatch_protocol::scoreboard::gauge::Reading;

use super::{Candidate, FULL_WEIGHT, UNAVAILABLE};
use crate::types::{Scored, Scores, Time};

/// Expiry time of a gauge that was never set.
const NEVER_SET: Time = Time(0);

/// The readings of the candidates, in the same order.
#[derive(Debug)]
pub(crate) struct LeastScore {
    scores: Scores,
    sums: Vec<Sum>,
    /// For each candidate one reading per scored gauge.
    readings: Vec<Option<Reading>>,
}

/// The sum over the gauges of one candidate.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Sum {
    value: f64,
    /// When the first of them expires.
    until: Time,
}

impl LeastScore {
    pub(super) fn new(scores: Scores) -> LeastScore {
        LeastScore { scores, sums: Vec::new(), readings: Vec::new() }
    }

    /// Adds a candidate whose gauges have not been read.
    pub(super) fn add(&mut self) {
        self.readings.resize(self.readings.len() + self.scores.gauges.len(), None);
        self.sums.push(Sum { value: 0.0, until: NEVER_SET });
        self.sum_up(self.sums.len() - 1);
    }

    /// Removes the candidate at `at`; the last one takes its place.
    pub(super) fn remove(&mut self, at: usize) {
        let (many, last) = (self.scores.gauges.len(), self.sums.len() - 1);
        self.readings.copy_within(last * many..(last + 1) * many, at * many);
        self.readings.truncate(last * many);
        self.sums.swap_remove(at);
    }

    /// Sets the reading of the gauge with this position in the settings; `None` if it was never
    /// set.
    pub(super) fn set(&mut self, at: usize, gauge: usize, reading: Option<Reading>) {
        self.readings[at * self.scores.gauges.len() + gauge] = reading;
        self.sum_up(at);
    }

    /// Whether one of its gauges was never set.
    pub(super) fn lacks_some(&self, at: usize) -> bool {
        self.sums[at].until == NEVER_SET
    }

    fn readings(&self, at: usize) -> &[Option<Reading>] {
        let many = self.scores.gauges.len();
        &self.readings[at * many..(at + 1) * many]
    }

    fn sum_up(&mut self, at: usize) {
        let mut sum = Sum { value: 0.0, until: super::NEVER };
        for (gauge, reading) in self.scores.gauges.iter().zip(self.readings(at)) {
            match reading {
                Some(reading) => {
                    sum.value += gauge.multiplier * reading.value;
                    sum.until = sum.until.min(Time(reading.at) + self.scores.valid_for);
                }
                None => sum.until = NEVER_SET,
            }
        }
        self.sums[at] = sum;
    }

    fn score(&self, at: usize, candidate: Candidate) -> f64 {
        // Full weights divide without a remainder, so that equal workers have exactly equal scores.
        let shared =
            (candidate.cost / 2) as f64 * f64::from(FULL_WEIGHT) / f64::from(candidate.weight);
        self.sums[at].value + self.scores.connections * shared
    }

    fn is_fresh(&self, at: usize, now: Time) -> bool {
        now < self.sums[at].until
    }

    /// The position of the candidate with the lowest score; among equals the first from `start` on,
    /// cyclically. `None` if no worker has fresh gauges.
    #[inline]
    pub(super) fn pick(&self, list: &[Candidate], start: usize, now: Time) -> Option<usize> {
        let start = if start < list.len() { start } else { 0 };
        let mut best: Option<(f64, usize)> = None;
        for at in (start..list.len()).chain(0..start) {
            let candidate = list[at];
            if candidate.cost >= UNAVAILABLE || !self.is_fresh(at, now) {
                continue;
            }
            let score = self.score(at, candidate);
            if best.is_none_or(|(least, _)| score < least) {
                best = Some((score, at));
            }
        }
        best.map(|(_, at)| at)
    }

    /// The score of the candidate at `at`, or the first gauge that makes it ineligible. `candidate`
    /// has its load after one more connection and its weight, even if it is unavailable.
    pub(super) fn standing(&self, at: usize, candidate: Candidate, now: Time) -> Scored {
        if self.is_fresh(at, now) {
            return Scored::Score(self.score(at, candidate));
        }
        for (gauge, reading) in self.scores.gauges.iter().zip(self.readings(at)) {
            match reading {
                None => return Scored::NeverSet(gauge.name),
                Some(reading) => {
                    let at = Time(reading.at);
                    if at + self.scores.valid_for <= now {
                        return Scored::Stale(gauge.name, now - at);
                    }
                }
            }
        }
        // Not reached: one of the gauges above has expired.
        Scored::Score(self.score(at, candidate))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::super::super::types::ScoredGauge;
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn scores(connections: f64, multipliers: &[f64]) -> Scores {
        let gauge = |(n, &multiplier): (usize, &f64)| ScoredGauge {
            name: format!("g{n}").parse().unwrap(),
            multiplier,
        };
        Scores {
            connections,
            gauges: multipliers.iter().enumerate().map(gauge).collect(),
            valid_for: Duration::from_secs(5),
            interval: None,
        }
    }

    fn candidate(cost: u64, weight: u32) -> Candidate {
        Candidate { cost: 2 * cost, weight: weight * FULL_WEIGHT, worker: 0 }
    }

    fn reading(value: f64, at: u64) -> Option<Reading> {
        Some(Reading { value, at })
    }

    /// Candidates with a load, a weight of 1 and gauges set at second 1.
    fn made(scores: Scores, workers: &[(u64, &[f64])]) -> (LeastScore, Vec<Candidate>) {
        let mut policy = LeastScore::new(scores);
        let mut list = Vec::new();
        for (at, (load, gauges)) in workers.iter().enumerate() {
            policy.add();
            list.push(candidate(load + 1, 1));
            for (gauge, &value) in gauges.iter().enumerate() {
                policy.set(at, gauge, reading(value, SECOND));
            }
        }
        (policy, list)
    }

    #[test]
    fn the_lowest_sum_wins() {
        let workers: [(u64, &[f64]); 3] = [(3, &[0.0, 8.0]), (0, &[0.5, 8.0]), (9, &[0.0, 2.0])];
        // 4 + 0 + 8, 1 + 10 + 8, 10 + 0 + 2: the first and the last are equal.
        let (policy, list) = made(scores(1.0, &[20.0, 1.0]), &workers);
        assert_eq!(policy.pick(&list, 0, Time(SECOND)), Some(0));
        assert_eq!(policy.pick(&list, 1, Time(SECOND)), Some(2));
        assert_eq!(policy.standing(1, list[1], Time(SECOND)), Scored::Score(19.0));
        // Free memory is good: a negative multiplier.
        let (policy, list) = made(scores(1.0, &[20.0, -1.0]), &workers);
        assert_eq!(policy.pick(&list, 0, Time(SECOND)), Some(0));
        assert_eq!(policy.standing(0, list[0], Time(SECOND)), Scored::Score(-4.0));
        // Without connections only gauges count.
        let (policy, list) = made(scores(0.0, &[0.0, 1.0]), &workers);
        assert_eq!(policy.pick(&list, 0, Time(SECOND)), Some(2));
    }

    #[test]
    fn the_weight_divides_the_connections_only() {
        let (mut policy, _) = made(scores(1.0, &[1.0]), &[(0, &[7.0]), (0, &[7.0])]);
        let list = [candidate(3, 1), candidate(5, 2)];
        assert_eq!(policy.standing(0, list[0], Time(SECOND)), Scored::Score(10.0));
        assert_eq!(policy.standing(1, list[1], Time(SECOND)), Scored::Score(9.5));
        policy.set(1, 0, reading(8.0, SECOND));
        assert_eq!(policy.pick(&list, 0, Time(SECOND)), Some(0));
    }

    #[test]
    fn an_old_gauge_takes_its_worker_out_until_it_is_set_again() {
        let (mut policy, list) =
            made(scores(1.0, &[1.0, 1.0]), &[(0, &[0.0, 0.0]), (9, &[0.0, 0.0])]);
        policy.set(1, 0, reading(0.0, 3 * SECOND));
        policy.set(1, 1, reading(0.0, 3 * SECOND));
        let name = |n: usize| policy.scores.gauges[n].name;
        let (g0, g1) = (name(0), name(1));
        assert_eq!(policy.pick(&list, 0, Time(6 * SECOND - 1)), Some(0));
        assert_eq!(policy.pick(&list, 0, Time(6 * SECOND)), Some(1), "valid for 5 s and no longer");
        let stale = Scored::Stale(g0, Duration::from_secs(5));
        assert_eq!(policy.standing(0, list[0], Time(6 * SECOND)), stale);
        assert_eq!(stale.to_string(), "gauge g0 stale: set 5s ago");
        policy.set(0, 0, reading(0.0, 6 * SECOND));
        let stale = Scored::Stale(g1, Duration::from_secs(5));
        assert_eq!(policy.standing(0, list[0], Time(6 * SECOND)), stale, "the other one");
        policy.set(0, 1, reading(0.0, 6 * SECOND));
        assert_eq!(policy.pick(&list, 0, Time(6 * SECOND)), Some(0));
        assert_eq!(policy.pick(&list, 0, Time(60 * SECOND)), None, "no worker is fresh");
        policy.set(0, 1, None);
        let never = Scored::NeverSet(g1);
        assert_eq!(policy.standing(0, list[0], Time(6 * SECOND)), never);
        assert_eq!(never.to_string(), "gauge g1 never set");
    }

    #[test]
    fn without_gauges_every_worker_is_fresh_for_ever() {
        let (policy, list) = made(scores(1.0, &[]), &[(2, &[]), (1, &[])]);
        assert_eq!(policy.pick(&list, 0, Time(u64::MAX - 1)), Some(1));
        assert_eq!(policy.pick(&[], 3, Time(0)), None);
    }

    #[test]
    fn the_largest_numbers_are_still_numbers() {
        let most = crate::MAX_GAUGE_VALUE;
        let (policy, list) =
            made(scores(1e9, &[1e9; 24]), &[(1 << 32, &[most; 24]), (1 << 32, &[-most; 24])]);
        assert_eq!(policy.pick(&list, 0, Time(SECOND)), Some(1));
        match policy.standing(0, list[0], Time(SECOND)) {
            Scored::Score(score) => assert!(score.is_finite()),
            other => panic!("{other}"),
        }
    }

    /// A worker in the naive model.
    #[derive(Clone, Debug)]
    struct Naive {
        load: Option<u64>,
        weight: u32,
        gauges: [Option<(i8, u8)>; 2],
    }

    fn naive() -> impl Strategy<Value = Naive> {
        let gauge = || proptest::option::weighted(0.9, (-4..5i8, 1..10u8));
        (proptest::option::weighted(0.9, 0..5u64), 1..4u32, gauge(), gauge())
            .prop_map(|(load, weight, a, b)| Naive { load, weight, gauges: [a, b] })
    }

    /// The definition, worker by worker.
    fn define(workers: &[Naive], m: [i8; 3], now: u8, start: usize) -> Option<usize> {
        let score = |worker: &Naive| {
            let mut score = f64::from(m[0]) * (worker.load? + 1) as f64 / f64::from(worker.weight);
            let mut gauges = 0.0;
            for (gauge, multiplier) in worker.gauges.iter().zip(&m[1..]) {
                let (value, at) = (*gauge)?;
                if now >= at + 5 {
                    return None;
                }
                gauges += f64::from(*multiplier) * f64::from(value);
            }
            score += gauges;
            Some(score)
        };
        let many = workers.len();
        let order = |at: usize| (at + many - start % many) % many;
        let scored =
            workers.iter().enumerate().filter_map(|(at, w)| Some((score(w)?, order(at), at)));
        scored.min_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1))).map(|(_, _, at)| at)
    }

    proptest! {
        #[test]
        fn as_defined(
            mut workers in proptest::collection::vec(naive(), 1..12),
            m in [-3..4i8, -3..4i8, -3..4i8],
            changes in proptest::collection::vec((0usize..12, naive(), 0u8..16, 0usize..12, any::<bool>()), 1..40),
        ) {
            let mut policy = LeastScore::new(scores(f64::from(m[0]), &[f64::from(m[1]), f64::from(m[2])]));
            let write = |policy: &mut LeastScore, at: usize, worker: &Naive| {
                for (gauge, said) in worker.gauges.iter().enumerate() {
                    let said = said.and_then(|(value, at)| reading(f64::from(value), u64::from(at) * SECOND));
                    policy.set(at, gauge, said);
                }
            };
            for (at, worker) in workers.iter().enumerate() {
                policy.add();
                write(&mut policy, at, worker);
            }
            for (at, worker, now, start, leaves) in changes {
                let at = at % workers.len();
                if leaves && workers.len() > 1 {
                    policy.remove(at);
                    workers.swap_remove(at);
                } else {
                    write(&mut policy, at, &worker);
                    workers[at] = worker;
                }
                let list: Vec<Candidate> = workers
                    .iter()
                    .map(|w| match w.load {
                        Some(load) => candidate(load + 1, w.weight),
                        None => Candidate { cost: UNAVAILABLE, weight: 1, worker: 0 },
                    })
                    .collect();
                let start = start % workers.len();
                let chosen = policy.pick(&list, start, Time(u64::from(now) * SECOND));
                prop_assert_eq!(chosen, define(&workers, m, now, start));
            }
        }
    }
}
