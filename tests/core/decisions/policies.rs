//! Compares each policy with its definition over 100,000 decisions: exactly where it is
//! deterministic, by chi-squared with a fixed seed where it draws at random.

use core::net::{IpAddr, Ipv4Addr, SocketAddr};

use dispatch_protocol::ClientAddr;
use dispatch_protocol::scoreboard::slot;

use super::*;

pub(super) const DECISIONS: usize = 100_000;
/// For tests without weights.
const FEWER: usize = 20_000;

pub(super) fn driver_of(policy: Policy) -> Driver {
    driver_with(|pool| {
        pool.policy = policy;
        pool.max_untaken = 4_096;
    })
}

pub(super) fn client(number: u32) -> ClientAddr {
    ClientAddr::from(SocketAddr::new(IpAddr::V4(Ipv4Addr::from(0x0a00_0000 + number)), 40_000))
}

/// Short forms for these tests.
pub(super) trait PolicySteps {
    fn weighted(&mut self, weights: &[u16]) -> Vec<WorkerId>;
    fn named(&mut self, name: &str, weight: u16) -> WorkerId;
    fn with_priority(&mut self, priority: u16) -> WorkerId;
    fn next_from(&mut self, peer: ClientAddr) -> WorkerId;
    fn report(&mut self, worker: WorkerId);
    fn visit(&mut self, peer: ClientAddr) -> WorkerId;
}

impl PolicySteps for Driver {
    fn weighted(&mut self, weights: &[u16]) -> Vec<WorkerId> {
        let join = |&weight| self.trusted(Hello { weight, name: format!("w{weight}"), ..hello() });
        weights.iter().map(join).collect()
    }

    fn named(&mut self, name: &str, weight: u16) -> WorkerId {
        self.trusted(Hello { name: name.to_owned(), weight, ..hello() })
    }

    fn with_priority(&mut self, priority: u16) -> WorkerId {
        self.trusted(Hello { priority, ..hello() })
    }

    /// The worker of the next client; it takes the connection.
    fn next_from(&mut self, peer: ClientAddr) -> WorkerId {
        self.log.clear();
        self.accept_only_from(WEB, peer);
        self.pump();
        let sent = self.sends();
        let &[(worker, false)] = &sent[..] else { panic!("{sent:?}") };
        self.take(worker).unwrap();
        self.report(worker);
        worker
    }

    /// Reports only this worker to the core, because a whole turn is slower.
    fn report(&mut self, worker: WorkerId) {
        let finished = self.link(worker).finished;
        let tickets: Vec<_> = self.core.tickets(worker).collect();
        for ticket in tickets {
            let state = slot::state(&self.link(worker).board[ticket.slot as usize], ticket.seq);
            self.core.slot(self.now, worker, ticket, state, self.now);
        }
        self.core.finished(self.now, worker, finished);
        self.pump();
    }

    /// Like `next_from`; the connection ends at once, so that loads do not change.
    fn visit(&mut self, peer: ClientAddr) -> WorkerId {
        let worker = self.next_from(peer);
        self.link(worker).finished += 1;
        self.report(worker);
        worker
    }
}

/// The worker of each of `count` visitors, as a position in `workers`.
pub(super) fn visits(driver: &mut Driver, workers: &[WorkerId], count: usize) -> Vec<usize> {
    let mut visit = || {
        let worker = driver.visit(ClientAddr::Unix);
        workers.iter().position(|&w| w == worker).unwrap()
    };
    (0..count).map(|_| visit()).collect()
}

pub(super) fn counts(visits: &[usize], workers: usize) -> Vec<usize> {
    (0..workers).map(|w| visits.iter().filter(|&&v| v == w).count()).collect()
}

/// Pearson's statistic of these counts for these shares.
pub(super) fn chi_squared(counts: &[usize], shares: &[f64]) -> f64 {
    let all: usize = counts.iter().sum();
    let sum: f64 = shares.iter().sum();
    let term = |(&count, share): (&usize, &f64)| {
        let expected = all as f64 * share / sum;
        (count as f64 - expected).powi(2) / expected
    };
    counts.iter().zip(shares).map(term).sum()
}

fn assert_within_one_percent(counts: &[usize], weights: &[u16]) {
    let all: usize = counts.iter().sum();
    let sum: u16 = weights.iter().sum();
    for (&count, &weight) in counts.iter().zip(weights) {
        let (is, should) = (count as f64 / all as f64, f64::from(weight) / f64::from(sum));
        assert!((is - should).abs() < 0.01, "{counts:?} for {weights:?}");
    }
}

/// The value that chi-squared exceeds with probability 1/1000, for 1 to 8 degrees of freedom.
pub(super) const ONCE_IN_1000: [f64; 8] = [10.83, 13.82, 16.27, 18.47, 20.52, 22.46, 24.32, 26.12];

#[test]
fn least_connections_by_weight() {
    let mut driver = driver_of(Policy::LeastConnections);
    let workers = driver.weighted(&[1, 2, 5]);
    for taken in 1..=DECISIONS {
        driver.next_from(ClientAddr::Unix);
        if taken % 8 == 0 {
            let loads = driver.loads(&workers);
            let part = taken as u64 / 8;
            assert_eq!(loads, [part, 2 * part, 5 * part]);
        }
    }
}

#[test]
fn round_robin_is_each_in_turn() {
    let mut driver = driver_of(Policy::RoundRobin);
    let workers: Vec<_> = (0..7).map(|_| driver.worker()).collect();
    let order = visits(&mut driver, &workers, FEWER);
    for (i, &worker) in order.iter().enumerate() {
        assert_eq!(worker, (order[0] + i) % 7);
    }
}

#[test]
fn round_robin_starts_at_a_random_worker() {
    let first = |seed| {
        let mut driver = driver_of(Policy::RoundRobin);
        driver.core.set_seed(seed);
        let workers = driver.weighted(&[1, 2, 5]);
        visits(&mut driver, &workers, 1)[0]
    };
    let firsts: Vec<usize> = (0..600).map(first).collect();
    let counts = counts(&firsts, 3);
    assert!(chi_squared(&counts, &[1.0, 1.0, 1.0]) < ONCE_IN_1000[1], "{counts:?}");
}

#[test]
fn round_robin_gives_turns_by_weight_and_spreads_them() {
    let mut driver = driver_of(Policy::RoundRobin);
    let weights = [1, 2, 5];
    let workers = driver.weighted(&weights);
    let order = visits(&mut driver, &workers, DECISIONS);
    for round in order.chunks(8) {
        assert_eq!(counts(round, 3), [1, 2, 5]);
    }
    // A worker is never more than one and a half turns away from its share.
    let mut had = [0usize; 3];
    for (i, &worker) in order.iter().enumerate() {
        had[worker] += 1;
        for (&had, weight) in had.iter().zip(weights) {
            let share = (i + 1) as f64 * f64::from(weight) / 8.0;
            assert!((had as f64 - share).abs() < 1.5, "{had} turns, {share} are its share");
        }
    }
}

#[test]
fn round_robin_skips_full_workers_and_owes_them_nothing() {
    let mut driver = driver_of(Policy::RoundRobin);
    let small = driver.trusted(Hello { max_connections: 1, ..hello() });
    let large = driver.worker();
    for _ in 0..10 {
        driver.next_from(ClientAddr::Unix);
    }
    assert_eq!(driver.loads(&[small, large]), [1, 9]);
    driver.finish(small, 1);
    let workers = [small, large];
    let order = visits(&mut driver, &workers, 10);
    assert_eq!(counts(&order, 2), [5, 5]);
}

#[test]
fn random_is_as_likely_as_the_weight_says() {
    let mut driver = driver_of(Policy::Random);
    let workers = driver.weighted(&[1, 2, 5]);
    let order = visits(&mut driver, &workers, DECISIONS);
    let counts = counts(&order, 3);
    assert_within_one_percent(&counts, &[1, 2, 5]);
    assert!(chi_squared(&counts, &[1.0, 2.0, 5.0]) < ONCE_IN_1000[1], "{counts:?}");
    // Draws are independent.
    let mut pairs = [0; 9];
    order.windows(2).for_each(|pair| pairs[3 * pair[0] + pair[1]] += 1);
    let shares = [1.0, 2.0, 5.0, 2.0, 4.0, 10.0, 5.0, 10.0, 25.0];
    assert!(chi_squared(&pairs, &shares) < ONCE_IN_1000[7], "{pairs:?}");
}

#[test]
fn two_choices_is_the_less_loaded_of_two() {
    let mut driver = driver_of(Policy::TwoChoices);
    // With constant loads 0 to 7, the worker with rank r is the lesser of 7 − r of all 28 pairs.
    let workers: Vec<_> =
        (0..8).map(|load| driver.trusted(Hello { base: load, finished: 0, ..hello() })).collect();
    let order = visits(&mut driver, &workers, FEWER);
    let counts = counts(&order, 8);
    assert_eq!(counts[7], 0, "the most loaded one is never the lesser");
    let shares: Vec<f64> = (1..8).rev().map(f64::from).collect();
    assert!(chi_squared(&counts[..7], &shares) < ONCE_IN_1000[5], "{counts:?}");
}

#[test]
fn two_choices_draws_by_weight() {
    // With equal loads relative to weight, the first drawn worker is chosen.
    let mut driver = driver_of(Policy::TwoChoices);
    let join =
        |driver: &mut Driver, weight, base| driver.trusted(Hello { weight, base, ..hello() });
    let workers = [join(&mut driver, 1, 0), join(&mut driver, 2, 1), join(&mut driver, 5, 4)];
    let order = visits(&mut driver, &workers, DECISIONS);
    let found = counts(&order, 3);
    assert_within_one_percent(&found, &[1, 2, 5]);
    assert!(chi_squared(&found, &[1.0, 2.0, 5.0]) < ONCE_IN_1000[1], "{found:?}");

    // Lighter workers are less loaded, so the result depends on the second draw too.
    let mut driver = driver_of(Policy::TwoChoices);
    let workers = [join(&mut driver, 1, 0), join(&mut driver, 2, 100), join(&mut driver, 5, 1_000)];
    let order = visits(&mut driver, &workers, FEWER);
    let found = counts(&order, 3);
    // The lightest is chosen unless no draw selects it; between the others always the middle one.
    let lightest = 1.0 / 8.0 + 2.0 / 8.0 * 1.0 / 6.0 + 5.0 / 8.0 * 1.0 / 3.0;
    assert_eq!(found[2], 0);
    assert!(chi_squared(&found[..2], &[lightest, 1.0 - lightest]) < ONCE_IN_1000[0], "{found:?}");
}

#[test]
fn two_choices_keeps_loads_close_to_their_shares() {
    let mut driver = driver_of(Policy::TwoChoices);
    let workers = driver.weighted(&[1, 2, 5]);
    for _ in 0..DECISIONS {
        driver.next_from(ClientAddr::Unix);
    }
    let loads: Vec<usize> = driver.loads(&workers).iter().map(|&load| load as usize).collect();
    assert_within_one_percent(&loads, &[1, 2, 5]);
}

#[test]
fn hash_gives_each_client_its_worker_by_weight() {
    let mut driver = driver_of(Policy::Hash);
    let workers = driver.weighted(&[1, 2, 5]);
    let order: Vec<usize> = (0..DECISIONS as u32)
        .map(|number| {
            let worker = driver.visit(client(number));
            workers.iter().position(|&w| w == worker).unwrap()
        })
        .collect();
    let counts = counts(&order, 3);
    assert_within_one_percent(&counts, &[1, 2, 5]);
    assert!(chi_squared(&counts, &[1.0, 2.0, 5.0]) < ONCE_IN_1000[1], "{counts:?}");
    // The port does not matter.
    for (number, &worker) in order.iter().enumerate().step_by(100) {
        assert_eq!(driver.visit(client(number as u32)), workers[worker]);
    }
}

#[test]
fn hash_moves_only_the_keys_of_a_leaving_worker() {
    const CLIENTS: u32 = 2_000;
    let mut driver = driver_of(Policy::Hash);
    let mut workers: Vec<_> = (0..5).map(|n| driver.named(&format!("web-{n}"), 1)).collect();
    let all =
        |driver: &mut Driver| (0..CLIENTS).map(|n| driver.visit(client(n))).collect::<Vec<_>>();
    let before = all(&mut driver);
    driver.leave(workers[2], Departure::Died);
    let without = all(&mut driver);
    let mut heirs = [0; 5];
    for (&was, &is) in before.iter().zip(&without) {
        if was == workers[2] {
            heirs[workers.iter().position(|&w| w == is).unwrap()] += 1;
        } else {
            assert_eq!(was, is, "its worker is still there");
        }
    }
    heirs.swap(2, 4);
    let chi = chi_squared(&heirs[..4], &[1.0; 4]);
    assert!(chi < ONCE_IN_1000[2], "all others inherit alike: {heirs:?}");
    // Another process joins under its name.
    workers[2] = driver.named("web-2", 1);
    let again = all(&mut driver);
    let places = |list: &[WorkerId], workers: &[WorkerId]| -> Vec<Option<usize>> {
        list.iter().map(|id| workers.iter().position(|w| w == id)).collect()
    };
    let mut old = workers.clone();
    old[2] = before.iter().copied().find(|id| !workers.contains(id)).unwrap();
    assert_eq!(places(&before, &old), places(&again, &workers));
}

#[test]
fn hash_distinguishes_workers_of_one_name() {
    let mut driver = driver_of(Policy::Hash);
    let workers: Vec<_> = (0..3).map(|_| driver.named("", 1)).collect();
    let mut counts = [0; 3];
    for n in 0..3_000 {
        let worker = driver.visit(client(n));
        counts[workers.iter().position(|&w| w == worker).unwrap()] += 1;
    }
    assert!(chi_squared(&counts, &[1.0; 3]) < ONCE_IN_1000[1], "{counts:?}");
}

#[test]
fn a_key_and_its_worker_are_the_same_in_every_process() {
    // A change of these values would move every client of every dispatcher.
    assert_eq!(AffinityKey::of(b"session-1"), AffinityKey(15_927_381_246_406_458_741));
    let mut driver = driver_of(Policy::Hash);
    let workers: Vec<_> = (0..5).map(|n| driver.named(&format!("web-{n}"), 1)).collect();
    let places: Vec<usize> = (0..10)
        .map(|n| {
            let worker = driver.visit(client(n));
            workers.iter().position(|&w| w == worker).unwrap()
        })
        .collect();
    assert_eq!(places, [2, 1, 3, 2, 0, 3, 2, 4, 3, 1]);
}

#[test]
fn hash_without_a_key_is_least_connections() {
    let mut driver = driver_of(Policy::Hash);
    let workers = driver.weighted(&[1, 2, 5]);
    for _ in 0..800 {
        driver.next_from(ClientAddr::Unix);
    }
    assert_eq!(driver.loads(&workers), [100, 200, 500]);
}

#[test]
fn failover_gives_all_to_the_highest_that_is_up() {
    let mut driver = driver_of(Policy::Failover);
    let low = driver.with_priority(1);
    let standby = driver.with_priority(5);
    let primaries = [driver.with_priority(9), driver.with_priority(9)];
    let all = [low, standby, primaries[0], primaries[1]];
    for _ in 0..100 {
        driver.next_from(ClientAddr::Unix);
    }
    assert_eq!(driver.loads(&all), [0, 0, 50, 50], "least connections among equals");
    driver.leave(primaries[0], Departure::Died);
    for _ in 0..50 {
        driver.next_from(ClientAddr::Unix);
    }
    assert_eq!(driver.loads(&[low, standby, primaries[1]]), [0, 0, 100]);
    driver.goodbye(primaries[1]);
    for _ in 0..10 {
        driver.next_from(ClientAddr::Unix);
    }
    assert_eq!(driver.loads(&[low, standby]), [0, 10]);
    // It returns and gets all connections.
    let back = driver.with_priority(9);
    for _ in 0..10 {
        driver.next_from(ClientAddr::Unix);
    }
    assert_eq!(driver.loads(&[low, standby, back]), [0, 10, 10]);
}

#[test]
fn failover_shares_by_weight_and_leaves_the_standby_idle() {
    let mut driver = driver_of(Policy::Failover);
    let join = |driver: &mut Driver, priority, weight| {
        driver.trusted(Hello { priority, weight, ..hello() })
    };
    let primaries = [1, 2, 5].map(|weight| join(&mut driver, 9, weight));
    let standby = join(&mut driver, 1, 8);
    for _ in 0..DECISIONS {
        driver.next_from(ClientAddr::Unix);
    }
    assert_eq!(driver.loads(&primaries), [12_500, 25_000, 62_500]);
    assert_eq!(driver.loads(&[standby]), [0]);
}

#[test]
fn full_is_not_down() {
    let mut driver = driver_of(Policy::Failover);
    let primary = driver.trusted(Hello { priority: 9, max_connections: 2, ..hello() });
    let standby = driver.with_priority(0);
    for _ in 0..2 {
        driver.next_from(ClientAddr::Unix);
    }
    assert_eq!(driver.core.accepting(WEB), Accepting::Pause);
    driver.accept(WEB);
    assert_eq!(driver.loads(&[primary, standby]), [2, 0]);
    driver.finish(primary, 1);
    assert_eq!(driver.loads(&[primary, standby]), [2, 0]);
    assert_eq!(driver.core.totals().queued, 0);
}

#[test]
fn a_primary_that_hangs_is_down_until_it_is_trusted_again() {
    let mut driver = driver_of(Policy::Failover);
    let primary = driver.with_priority(1);
    let standby = driver.with_priority(0);
    driver.accept(WEB);
    driver.wait(ms(1_000));
    assert_eq!(driver.state(primary), State::Suspect);
    assert_eq!(driver.loads(&[primary, standby]), [0, 1], "what it left goes to the standby");
    driver.take_all(standby);
    driver.next_from(ClientAddr::Unix);
    assert_eq!(driver.loads(&[primary, standby]), [0, 2]);
    // It answers its probe, gets a trial, and takes the connection.
    assert!(driver.answer(primary));
    driver.turn();
    driver.next_from(ClientAddr::Unix);
    assert_eq!(driver.state(primary), State::Active);
    driver.next_from(ClientAddr::Unix);
    assert_eq!(driver.loads(&[primary, standby]), [2, 2]);
}
