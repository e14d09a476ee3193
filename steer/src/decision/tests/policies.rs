//! What each policy promises, decision after decision.

use super::*;

/// A pool whose state goes on from one decision to the next.
struct Run {
    policy: Policy,
    settings: Vec<WorkerSettings>,
    counts: Vec<WorkerCounts>,
    totals: Totals,
}

impl Run {
    fn new(policy: Policy, settings: &[WorkerSettings]) -> Run {
        let counts = pool(settings, &vec![0; settings.len()]);
        Run { policy, settings: settings.into(), counts, totals: Totals::default() }
    }

    fn pool(&self, key: u64) -> Pool<'_> {
        let (policy, totals) = (self.policy, self.totals);
        Pool { policy, totals, key, seed: 7, ..of(&self.settings, &self.counts) }
    }

    /// Decides, with the effects that the programs have.
    fn choose(&mut self, key: u64) -> Choice {
        let pool = self.pool(key);
        let choice = pool.choose();
        if let Choice::Worker(worker) = choice {
            let turn = pool.turn(worker);
            let counts = &mut self.counts[worker as usize];
            counts.live += 1;
            if self.policy == Policy::RoundRobin {
                (counts.last_turn, self.totals.clock) = (turn, turn);
            }
            self.totals.last = worker;
        }
        self.totals.turn += 1;
        choice
    }

    /// How many of these decisions went to each worker.
    fn share(&mut self, decisions: u64) -> Vec<u64> {
        let mut share = vec![0; self.settings.len()];
        for n in 0..decisions {
            let Choice::Worker(worker) = self.choose(mixed(n)) else { panic!("no worker") };
            share[worker as usize] += 1;
        }
        share
    }

    /// Ends all connections.
    fn clear(&mut self) {
        self.counts.iter_mut().for_each(|counts| counts.live = 0);
    }
}

fn weights<const N: usize>(weights: [u16; N]) -> [WorkerSettings; N] {
    weights.map(WorkerSettings::new)
}

/// Whether the shares are those of the weights, as far as chance allows (5 standard deviations).
fn is_in_proportion(share: &[u64], weights: &[u64]) -> bool {
    let (decisions, all) = (share.iter().sum::<u64>() as f64, weights.iter().sum::<u64>() as f64);
    share.iter().zip(weights).all(|(&share, &weight)| {
        let part = weight as f64 / all;
        let deviation = (decisions * part * (1.0 - part)).sqrt();
        (share as f64 - decisions * part).abs() <= 5.0 * deviation
    })
}

#[test]
fn round_robin_gives_turns_by_weight() {
    let mut run = Run::new(Policy::RoundRobin, &weights([1, 1, 1]));
    assert_eq!(run.share(300), [100; 3]);
    let mut run = Run::new(Policy::RoundRobin, &weights([1, 2, 4]));
    // Loads do not matter.
    run.counts[0].live = 1_000;
    for _ in 0..10 {
        assert_eq!(run.share(7), [1, 2, 4]);
    }
    run.settings[2].slow_start = FULL_SPEED / 2;
    run.share(5);
    assert_eq!(run.share(50), [10, 20, 20]);
}

#[test]
fn round_robin_does_not_let_a_worker_catch_up() {
    let mut run = Run::new(Policy::RoundRobin, &weights([1, 1, 1]));
    run.settings[1].draining = 1;
    assert_eq!(run.share(1000), [500, 0, 500]);
    run.settings[1].draining = 0;
    assert_eq!(run.share(30), [10, 10, 10]);
    // A worker that joins.
    run.settings.push(WorkerSettings::new(1));
    run.counts.extend(pool(&weights([1]), &[0]));
    let share = run.share(12);
    assert!(share.iter().all(|&turns| (2..=4).contains(&turns)), "{share:?}");
    assert_eq!(run.share(40), [10; 4]);
    // The greatest times.
    run.totals.clock = u64::MAX - 3;
    run.counts.iter_mut().for_each(|counts| counts.last_turn = u64::MAX - 3);
    assert_eq!(run.share(400), [100; 4]);
    // A weight that shrinks and grows again.
    run.settings[0].weight = 10;
    run.settings[1].slow_start = 1;
    run.share(1_000);
    run.settings[0].weight = 1;
    run.settings[1].slow_start = FULL_SPEED;
    run.share(4);
    assert_eq!(run.share(400), [100; 4]);
}

#[test]
fn random_is_in_proportion_to_weights() {
    let mut run = Run::new(Policy::Random, &weights([1, 2, 5, 1]));
    run.settings[3].slow_start = 500;
    let share = run.share(40_000);
    assert!(is_in_proportion(&share, &[10, 20, 50, 5]), "{share:?}");
    // Two decisions in a row are independent: 5 / 8.5 of those after the third one, too.
    let mut after = vec![0; 4];
    let mut before = 0;
    for n in 0..40_000 {
        let Choice::Worker(worker) = run.choose(n) else { panic!("no worker") };
        if before == 2 {
            after[worker as usize] += 1;
        }
        before = worker;
    }
    assert!(is_in_proportion(&after, &[10, 20, 50, 5]), "{after:?}");
}

#[test]
fn two_choices_are_even_and_differ_from_one() {
    let mut run = Run::new(Policy::TwoChoices, &weights([1; 100]));
    let share = run.share(10_000);
    let (least, most) = (share.iter().min().unwrap(), share.iter().max().unwrap());
    assert!(*least >= 94 && *most <= 106, "{share:?}");
    let mut one = Run::new(Policy::Random, &weights([1; 100]));
    let share = one.share(10_000);
    assert!(share.iter().max() > Some(&115), "one choice is less even: {share:?}");
    // With two workers the draw decides nothing.
    let mut two = Run::new(Policy::TwoChoices, &weights([1, 3]));
    assert_eq!(two.share(400), [100, 300]);
    assert_eq!(Run::new(Policy::TwoChoices, &weights([1])).share(5), [5]);
}

#[test]
fn hash_returns_clients_and_moves_no_more_than_it_must() {
    const KEYS: u64 = 20_000;
    let mut settings = weights([1, 2, 3, 4]);
    for (settings, name) in settings.iter_mut().zip(["a", "b", "c", "d"]) {
        settings.node = crate::policy::node(name, 0);
    }
    let mut run = Run::new(Policy::Hash, &settings);
    let owners = |run: &mut Run| -> Vec<Choice> {
        let owners = (0..KEYS).map(|n| run.choose(mixed(n))).collect();
        run.clear();
        owners
    };
    let before = owners(&mut run);
    let share: Vec<u64> = (0..4)
        .map(|worker| before.iter().filter(|&&of| of == Choice::Worker(worker)).count() as u64)
        .collect();
    assert!(is_in_proportion(&share, &[1, 2, 3, 4]), "{share:?}");
    assert_eq!(owners(&mut run), before, "neither loads nor the last choice matter");
    run.settings[3].draining = 1;
    let without = owners(&mut run);
    for (before, after) in before.iter().zip(&without) {
        assert!(before == after || *before == Choice::Worker(3), "{before:?} to {after:?}");
        assert_ne!(*after, Choice::Worker(3));
    }
    run.settings[3].draining = 0;
    run.settings[0].weight = 2;
    for (before, after) in before.iter().zip(&owners(&mut run)) {
        assert!(before == after || *after == Choice::Worker(0), "{before:?} to {after:?}");
    }
    // Another order, as after a restart: the names decide.
    let mut turned = Run::new(Policy::Hash, &[settings[3], settings[2], settings[1], settings[0]]);
    let turned = owners(&mut turned);
    for (before, after) in before.iter().zip(&turned) {
        let (Choice::Worker(before), Choice::Worker(after)) = (before, after) else {
            panic!("no worker")
        };
        assert_eq!(3 - before, *after);
    }
}

#[test]
fn hash_without_nodes_uses_numbers() {
    let mut run = Run::new(Policy::Hash, &weights([1; 8]));
    let share = run.share(16_000);
    assert!(is_in_proportion(&share, &[1; 8]), "{share:?}");
    // A full worker is left out.
    let maximum = run.counts[5].live as u32;
    run.settings[5].maximum = maximum;
    assert_eq!(run.share(1_000)[5], 0);
}

#[test]
fn failover_uses_the_highest_priority_that_is_up() {
    let mut settings = weights([1, 1, 1, 1]);
    for (settings, priority) in settings.iter_mut().zip([5, 9, 9, 0]) {
        settings.priority = priority;
    }
    let mut run = Run::new(Policy::Failover, &settings);
    assert_eq!(run.share(100), [0, 50, 50, 0]);
    run.settings[1].suspect = 1;
    assert_eq!(run.share(10), [0, 0, 10, 0], "one of that priority is up");
    run.settings[2].maximum = 60;
    assert_eq!(run.share(10), [0, 10, 0, 0], "a full worker is up; a suspect one has room");
    run.settings[1].suspect = 0;
    run.settings[1].maximum = 60;
    assert_eq!(run.choose(0), Choice::Full, "clients wait for the highest priority");
    run.settings[1].draining = 1;
    run.settings[2].draining = 1;
    assert_eq!(run.share(10), [10, 0, 0, 0]);
    run.settings[0].suspect = 1;
    assert_eq!(run.share(10), [0, 0, 0, 10], "a suspect worker is down");
    run.settings[3].suspect = 1;
    assert_eq!(run.share(2), [1, 0, 0, 1], "no worker is up, so none stands by");
}

#[test]
fn suspects_get_connections_only_if_no_other_has_room() {
    for policy in Policy::ALL {
        let mut settings = weights([1, 1, 1]);
        settings[0].suspect = 1;
        settings[1].maximum = 20;
        settings[2].draining = 1;
        let mut run = Run::new(policy, &settings);
        assert_eq!(run.share(30), [10, 20, 0], "{policy:?}");
        run.settings[0].maximum = 10;
        assert_eq!(run.choose(1), Choice::Full, "{policy:?}");
        run.settings[0].draining = 1;
        run.settings[1].draining = 1;
        assert_eq!(run.choose(1), Choice::NoWorker, "{policy:?}");
    }
}
