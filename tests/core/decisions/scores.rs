//! `least-score`: choices when gauges rise, fall, expire and lie.

use dispatch_protocol::ClientAddr;
use dispatch_protocol::scoreboard::gauge::{GaugeName, Reading};

use super::policies::DECISIONS;
use super::*;

fn name(text: &str) -> GaugeName {
    text.parse().unwrap()
}

fn scores(connections: f64, gauges: &[(&str, f64)]) -> Scores {
    let gauge = |&(text, multiplier): &(&str, f64)| ScoredGauge { name: name(text), multiplier };
    let gauges = gauges.iter().map(gauge).collect();
    Scores { connections, gauges, valid_for: ms(1_000), interval: None }
}

fn driver_scoring(scores: Scores) -> Driver {
    driver_with(|pool| {
        pool.policy = Policy::LeastScore;
        pool.scores = scores;
        pool.max_untaken = 4_096;
        // The tests let time pass while connections are in flight.
        pool.handoff_timeout = ms(1_000_000);
    })
}

/// Short forms for these tests.
pub(super) trait ScoreSteps {
    fn set(&mut self, worker: WorkerId, gauge: usize, value: f64);
    fn shares(&mut self, workers: &[WorkerId], count: usize) -> Vec<u64>;
}

impl ScoreSteps for Driver {
    fn set(&mut self, worker: WorkerId, gauge: usize, value: f64) {
        let at = self.now.0;
        self.link(worker).gauges[gauge] = Some(Reading { value, at });
    }

    /// Accepts `count` connections in one turn; returns how many each worker got.
    fn shares(&mut self, workers: &[WorkerId], count: usize) -> Vec<u64> {
        self.turn();
        let before = self.loads(workers);
        for _ in 0..count {
            self.accept_only(WEB);
        }
        self.pump();
        self.loads(workers).iter().zip(before).map(|(after, before)| after - before).collect()
    }
}

#[test]
fn a_share_falls_at_the_next_decision_after_a_gauge_rises() {
    let mut driver = driver_scoring(scores(1.0, &[("queue_wait", 100.0)]));
    let workers: Vec<_> = (0..3).map(|_| driver.worker()).collect();
    for &worker in &workers {
        driver.set(worker, 0, 0.1);
    }
    assert_eq!(driver.shares(&workers, 30), [10, 10, 10]);
    // A wait that is 60 ms longer costs as much as 6 connections.
    driver.set(workers[0], 0, 0.16);
    assert_eq!(driver.shares(&workers, 1)[0], 0, "from the very next one on");
    assert_eq!(driver.shares(&workers, 11)[0], 0);
    assert_eq!(driver.loads(&workers), [10, 16, 16]);
    assert_eq!(driver.shares(&workers, 3), [1, 1, 1], "level again: 10 and a wait, 16, 16");
    driver.set(workers[0], 0, 0.1);
    assert_eq!(driver.shares(&workers, 6), [6, 0, 0], "and back");
}

#[test]
fn more_memory_is_better_by_a_negative_multiplier() {
    let mut driver = driver_scoring(scores(1.0, &[("free_memory", -0.01)]));
    let workers: Vec<_> = (0..2).map(|_| driver.worker()).collect();
    driver.set(workers[0], 0, 1_000.0);
    driver.set(workers[1], 0, 2_000.0);
    assert_eq!(driver.shares(&workers, 10), [0, 10]);
    assert_eq!(driver.shares(&workers, 10), [5, 5]);
}

#[test]
fn a_worker_with_an_old_gauge_gets_no_connection() {
    let mut driver = driver_scoring(scores(1.0, &[("a", 1.0), ("b", 1.0)]));
    let workers: Vec<_> = (0..2).map(|_| driver.worker()).collect();
    for gauge in 0..2 {
        driver.set(workers[0], gauge, 0.0);
        driver.set(workers[1], gauge, 5.0);
    }
    assert_eq!(driver.shares(&workers, 4), [4, 0]);
    driver.wait(ms(999));
    driver.set(workers[0], 0, 0.0);
    driver.set(workers[1], 0, 5.0);
    driver.set(workers[1], 1, 5.0);
    assert_eq!(driver.shares(&workers, 4), [4, 0], "at the edge");
    driver.wait(ms(1));
    let stale = Scored::Stale(name("b"), ms(1_000));
    assert_eq!(driver.core.score(driver.now, workers[0]), Some(stale));
    assert_eq!(stale.to_string(), "gauge b stale: set 1s ago");
    assert_eq!(driver.core.score(driver.now, workers[1]), Some(Scored::Score(11.0)));
    assert_eq!(driver.shares(&workers, 20), [0, 20], "one old gauge is enough");
    driver.set(workers[0], 1, 0.0);
    assert_eq!(driver.shares(&workers, 4), [4, 0], "it is back by itself");
}

#[test]
fn without_fresh_gauges_the_fewest_connections_win() {
    let mut driver = driver_scoring(scores(1.0, &[("a", 1.0)]));
    let workers: Vec<_> = (0..2).map(|_| driver.worker()).collect();
    assert_eq!(driver.core.score(driver.now, workers[0]), Some(Scored::NeverSet(name("a"))));
    assert_eq!(driver.shares(&workers, 4), [2, 2], "no worker has set any");
    driver.set(workers[0], 0, 100.0);
    assert_eq!(
        driver.shares(&workers, 4),
        [4, 0],
        "a worker that sets one is preferred, however bad its value"
    );
    driver.wait(ms(1_000));
    assert_eq!(driver.shares(&workers, 4), [0, 4], "as if there were no gauges");
    assert_eq!(driver.shares(&workers, 4), [2, 2]);
}

/// A full worker with fresh gauges does not make the policy fall back to connections for the
/// others.
#[test]
fn a_worker_without_gauges_is_used_when_others_are_full() {
    let mut driver = driver_scoring(scores(1.0, &[("a", 1.0)]));
    let small = driver.trusted(Hello { max_connections: 2, ..hello() });
    let old = driver.worker();
    driver.set(small, 0, 0.0);
    assert_eq!(driver.shares(&[small, old], 5), [2, 3]);
}

#[test]
fn a_burst_over_idle_workers_on_one_machine_does_not_herd() {
    // The same machine, sampled at slightly different times: the readings differ by half of the
    // multiplier.
    let mut driver = driver_scoring(scores(1.0, &[("system_cpu", 10.0), ("free_memory", -0.001)]));
    let workers: Vec<_> = (0..8).map(|_| driver.worker()).collect();
    for (n, &worker) in workers.iter().enumerate() {
        driver.set(worker, 0, 0.05 * n as f64);
        driver.set(worker, 1, 4_000.0 - n as f64);
    }
    let shares = driver.shares(&workers, 1_000);
    let spread = shares.iter().max().unwrap() - shares.iter().min().unwrap();
    assert!(spread <= 4, "{shares:?}");
    // The result without the exact load in the sum.
    let mut driver = driver_scoring(scores(0.0, &[("system_cpu", 10.0)]));
    let workers: Vec<_> = (0..8).map(|_| driver.worker()).collect();
    for (n, &worker) in workers.iter().enumerate() {
        driver.set(worker, 0, 0.05 * n as f64);
    }
    // The first worker gets all that its channel holds.
    let shares = driver.shares(&workers, 250);
    assert_eq!(shares, [250, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn ties_rotate_and_weights_share_the_connections() {
    let mut driver = driver_scoring(scores(1.0, &[]));
    let workers: Vec<_> = (0..3).map(|_| driver.worker()).collect();
    let mut order = Vec::new();
    for _ in 0..6 {
        driver.log.clear();
        driver.accept(WEB);
        let worker = driver.sends()[0].0;
        order.push(worker);
        driver.take_all(worker);
        driver.finish(worker, 1);
    }
    assert_eq!(order, [&workers[..], &workers[..]].concat());

    let mut driver = driver_scoring(scores(1.0, &[("a", 1.0)]));
    let join = |weight| driver.trusted(Hello { weight, ..hello() });
    let workers: Vec<_> = [1, 2, 5].map(join).into();
    for &worker in &workers {
        driver.set(worker, 0, 3.0);
    }
    driver.turn();
    for _ in 0..DECISIONS {
        driver.next_from(ClientAddr::Unix);
    }
    assert_eq!(driver.loads(&workers), [12_500, 25_000, 62_500]);
}

#[test]
fn gauges_are_read_at_every_turn_or_once_in_an_interval() {
    let mut driver = driver_scoring(scores(1.0, &[("a", 1.0)]));
    assert!((0..3).all(|_| driver.core.reads_gauges(driver.now, PoolId(0))));

    let interval = Some(ms(100));
    let mut driver = driver_scoring(Scores { interval, ..scores(1.0, &[("a", 1.0)]) });
    let workers: Vec<_> = (0..2).map(|_| driver.worker()).collect();
    workers.iter().for_each(|&worker| driver.set(worker, 0, 0.0));
    assert_eq!(driver.shares(&workers, 4), [2, 2]);
    driver.now = driver.now + ms(99);
    driver.set(workers[0], 0, 50.0);
    assert_eq!(
        driver.shares(&workers, 4),
        [2, 2],
        "gauges were not read; the load is exact all the same"
    );
    driver.now = driver.now + ms(1);
    assert_eq!(driver.shares(&workers, 4), [0, 4]);
    assert!(!driver.core.reads_gauges(driver.now, PoolId(0)), "once");
    // A worker that joins between two readings does not wait for the next one, even if it sets its
    // gauge after the join.
    let late = driver.worker();
    assert_eq!(driver.shares(&[workers[1], late], 1), [1, 0]);
    assert!(driver.core.lacks_gauges(late) && !driver.core.lacks_gauges(workers[1]));
    driver.set(late, 0, 0.0);
    assert_eq!(driver.shares(&[workers[1], late], 4), [0, 4]);
    driver.set(late, 0, 50.0);
    assert_eq!(driver.shares(&[workers[1], late], 2), [0, 2], "from then on like the others");
}

#[test]
fn a_pool_that_does_not_score_reads_nothing() {
    let gauges = scores(1.0, &[("a", 1.0)]);
    let mut driver = driver_with(|pool| pool.scores = gauges);
    let worker = driver.worker();
    assert!(!driver.core.reads_gauges(driver.now, PoolId(0)));
    assert_eq!(driver.core.scored_gauges(PoolId(0)), []);
    assert_eq!(driver.core.score(driver.now, worker), None);
    assert!(!driver.core.reads_gauges(driver.now, PoolId(7)));
}

#[test]
fn impossible_readings_cost_only_their_worker() {
    let mut driver = driver_scoring(scores(1.0, &[("a", 1.0)]));
    let (liar, honest) = (driver.worker(), driver.worker());
    driver.turn();
    driver.events();
    let now = driver.now.0;
    let ahead = now + 1_000_000_001;
    for (value, at, problem) in [
        (f64::NAN, now, GaugeProblem::NoNumber),
        (f64::INFINITY, now, GaugeProblem::NoNumber),
        (f64::NEG_INFINITY, now, GaugeProblem::NoNumber),
        (-1.0, ahead, GaugeProblem::Future),
        (-1.0, u64::MAX, GaugeProblem::Future),
    ] {
        driver.set(honest, 0, 1.0);
        driver.link(liar).gauges[0] = Some(Reading { value: 0.0, at: now });
        driver.turn();
        driver.link(liar).gauges[0] = Some(Reading { value, at });
        assert_eq!(driver.shares(&[liar, honest], 3), [0, 3], "{value} {at}");
        assert_eq!(driver.core.score(driver.now, liar), Some(Scored::NeverSet(name("a"))));
        let told = driver.events();
        let expected = Event::BadGauge { worker: liar, gauge: Some(name("a")), problem };
        assert!(told.is_empty() || told == [expected], "{told:?}");
    }
    // Too large a value is clamped: the worst score, but still eligible.
    driver.link(liar).gauges[0] = Some(Reading { value: 1e300, at: now });
    driver.turn();
    let clamped = Some(Scored::Score(MAX_GAUGE_VALUE + 1.0));
    assert_eq!(driver.core.score(driver.now, liar), clamped);
    driver.link(liar).gauges[0] = Some(Reading { value: -1e300, at: now });
    driver.turn();
    let told = driver.events();
    let problem = GaugeProblem::TooLarge;
    assert_eq!(told, [Event::BadGauge { worker: liar, gauge: Some(name("a")), problem }]);
    // A time slightly ahead is accepted, and does not make the gauge valid for longer.
    driver.link(liar).gauges[0] = Some(Reading { value: 0.0, at: now + 900_000_000 });
    driver.turn();
    driver.wait(ms(1_000));
    assert!(
        matches!(driver.core.score(driver.now, liar), Some(Scored::Stale(_, age)) if age == ms(1_000))
    );
    assert_eq!(driver.events(), []);
    // Names.
    driver.core.misnamed_gauge(liar, None);
    driver.core.misnamed_gauge(liar, None);
    driver.core.misnamed_gauge(liar, Some(name("a")));
    driver.pump();
    assert_eq!(driver.events().len(), 2);
    // Each problem is reported once for each worker.
    driver.link(honest).gauges[0] = Some(Reading { value: f64::NAN, at: 1 });
    driver.turn();
    assert_eq!(driver.events().len(), 1);
}

#[test]
fn readings_of_unknown_workers_and_gauges_are_ignored() {
    let mut driver = driver_scoring(scores(1.0, &[("a", 1.0)]));
    let (gone, here) = (driver.worker(), driver.worker());
    driver.leave(gone, Departure::Died);
    let said = Some(Reading { value: 1.0, at: driver.now.0 });
    driver.core.gauge(driver.now, gone, 0, said);
    driver.core.gauge(driver.now, here, 1, said);
    driver.core.misnamed_gauge(gone, None);
    assert_eq!(driver.core.score(driver.now, gone), None);
    assert_eq!(driver.core.score(driver.now, here), Some(Scored::NeverSet(name("a"))));
}

#[test]
fn explanations_agree_with_decisions() {
    let mut driver = driver_scoring(scores(1.0, &[("queue_wait", 10.0)]));
    let workers: Vec<_> = (0..3).map(|_| driver.worker()).collect();
    driver.set(workers[0], 0, 0.5);
    driver.set(workers[1], 0, 0.1);
    driver.turn();
    let explained = driver.core.explain(driver.now, PoolId(0), ClientAddr::Unix).unwrap();
    let seen = |worker: WorkerId| {
        let mut candidates = explained.decision.candidates.iter();
        candidates.find(|seen| seen.worker == worker.serial).unwrap()
    };
    assert_eq!(explained.decision.chosen, Some(workers[1].serial));
    assert_eq!((seen(workers[1]).score, seen(workers[1]).why), (Some(2.0), Why::Chosen));
    assert_eq!((seen(workers[0]).score, seen(workers[0]).why), (Some(6.0), Why::HigherScore));
    assert_eq!((seen(workers[2]).score, seen(workers[2]).why), (None, Why::StaleGauge));
    assert_eq!(seen(workers[2]).out, Some(Scored::NeverSet(name("queue_wait"))));
    // If no worker has fresh gauges, it shows the fallback.
    driver.wait(ms(1_000));
    let explained = driver.core.explain(driver.now, PoolId(0), ClientAddr::Unix).unwrap();
    let first = &explained.decision.candidates[0];
    assert_eq!((first.score, first.why), (Some(1.0), Why::Chosen));
    assert!(first.out.is_some_and(|out| out.to_string().contains("queue_wait stale")));
}

/// Compares each decision with the definition: loads from the core, gauges as the workers set them.
#[test]
fn exactly_as_defined_over_5_000_decisions() {
    let rules = Scores { valid_for: ms(400), ..scores(1.0, &[("a", 3.0), ("b", -0.5)]) };
    let mut driver = driver_scoring(rules.clone());
    driver.logging = true;
    let mut random = Random::new(20);
    let mut workers: Vec<(WorkerId, u16)> = Vec::new();
    let mut stale = 0;
    for decision in 0..5_000 {
        if workers.len() < 3 || (workers.len() < 12 && random.once_in(300)) {
            let weight = 1 + random.below(3) as u16;
            workers.push((driver.trusted(Hello { weight, ..hello() }), weight));
        } else if random.once_in(500) {
            let at = random.below(workers.len() as u64) as usize;
            let (worker, _) = workers.swap_remove(at);
            driver.leave(worker, Departure::Died);
        }
        driver.now = driver.now + Duration::from_micros(random.below(40_000));
        for &(worker, _) in &workers {
            for gauge in 0..2 {
                if random.once_in(30) {
                    driver.set(worker, gauge, random.below(16) as f64 / 4.0);
                }
            }
        }
        driver.turn();
        driver.log.clear();

        let fresh = |worker: WorkerId| -> Option<f64> {
            let gauges = &driver.links[worker.serial as usize - 1].gauges;
            let mut sum = 0.0;
            for (rule, reading) in rules.gauges.iter().zip(gauges) {
                let reading = (*reading)?;
                if driver.now - Time(reading.at) >= rules.valid_for {
                    return None;
                }
                sum += rule.multiplier * reading.value;
            }
            Some(sum)
        };
        let by_load = |&(worker, weight): &(WorkerId, u16)| {
            (driver.core.load(worker).unwrap() + 1) as f64 / f64::from(weight)
        };
        let scored: Vec<Option<f64>> = workers
            .iter()
            .map(|w| fresh(w.0).map(|sum| sum + rules.connections * by_load(w)))
            .collect();
        let costs: Vec<Option<f64>> = if scored.iter().any(Option::is_some) {
            scored
        } else {
            stale += 1;
            workers.iter().map(|w| Some(by_load(w))).collect()
        };
        let least = costs.iter().flatten().copied().fold(f64::INFINITY, f64::min);

        driver.accept(WEB);
        let sent = driver.sends();
        let &[(chosen, _)] = &sent[..] else { panic!("{sent:?}") };
        let at = workers.iter().position(|&(worker, _)| worker == chosen).unwrap();
        assert_eq!(costs[at], Some(least), "decision {decision}: {costs:?}, not {at}");

        driver.take_all(chosen);
        let (victim, _) = workers[random.below(workers.len() as u64) as usize];
        if driver.core.load(victim).unwrap() > random.below(8) {
            driver.finish(victim, 1);
        }
    }
    assert!((50..4_000).contains(&stale), "{stale} decisions without fresh gauges");
}
