//! Balance: exactness, weights, bounds.

use std::collections::{BTreeSet, VecDeque};

use super::*;

fn assert_even(loads: &[u64]) {
    let (min, max) = (loads.iter().min().unwrap(), loads.iter().max().unwrap());
    assert!(max - min <= 1, "{loads:?}");
}

#[test]
fn loads_of_equal_workers_never_differ_by_more_than_one() {
    let mut driver = driver();
    driver.logging = false;
    let workers: Vec<_> = (0..4).map(|_| driver.worker()).collect();
    for i in 0..10_000 {
        driver.accept(WEB);
        assert_even(&driver.loads(&workers));
        if i % 7 == 0 {
            let worker = workers[i % 4];
            driver.take_all(worker);
        }
        if driver.loads(&workers).iter().sum::<u64>() >= 900 {
            workers.iter().for_each(|&worker| {
                driver.take_all(worker);
            });
        }
    }
    assert_eq!(driver.loads(&workers), [2_500; 4]);
}

#[test]
fn weights_are_shares() {
    let mut driver = driver_with(|pool| pool.max_untaken = 4_096);
    let workers: Vec<_> =
        [1, 2, 5].into_iter().map(|weight| driver.trusted(Hello { weight, ..hello() })).collect();
    for _ in 0..800 {
        driver.accept_only(WEB);
    }
    assert_eq!(driver.loads(&workers), [100, 200, 500]);
}

#[test]
fn a_burst_before_the_first_take_does_not_herd() {
    let mut driver = driver();
    let workers: Vec<_> = (0..8).map(|_| driver.worker()).collect();
    for _ in 0..2_000 {
        driver.accept_only(WEB);
        assert_even(&driver.loads(&workers));
    }
    driver.pump();
    assert_eq!(driver.loads(&workers), [250; 8]);
}

#[test]
fn churn_stays_even() {
    let mut driver = driver();
    driver.logging = false;
    let workers: Vec<_> = (0..8).map(|_| driver.worker()).collect();
    for _ in 0..800 {
        driver.accept(WEB);
    }
    workers.iter().for_each(|&worker| {
        driver.take_all(worker);
    });
    // A worker that closes a connection gets the next.
    for i in 0..2_000 {
        let worker = workers[i * 5 % 8];
        driver.finish(worker, 1);
        driver.accept(WEB);
        assert_eq!(driver.take_all(worker), 1);
        assert_eq!(driver.loads(&workers), [100; 8]);
    }
}

#[test]
fn ties_rotate() {
    let mut driver = driver();
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
}

#[test]
fn no_worker_gets_more_than_its_maximum() {
    let mut driver = driver_with(|pool| pool.max_connections_per_worker = 3);
    let small = driver.trusted(Hello { max_connections: 2, ..hello() });
    let large = driver.worker();
    assert_eq!(driver.core.max_connections_of(small), Some(2));
    assert_eq!(driver.core.max_connections_of(large), Some(3));
    for _ in 0..5 {
        assert_eq!(driver.core.accepting(WEB), Accepting::Yes);
        driver.accept(WEB);
    }
    assert_eq!(driver.loads(&[small, large]), [2, 3]);
    assert_eq!(driver.core.accepting(WEB), Accepting::Pause);
    driver.take_all(small);
    driver.finish(small, 1);
    assert_eq!(driver.core.accepting(WEB), Accepting::Yes);
}

#[test]
fn no_worker_has_more_untaken_than_slots() {
    let mut driver = driver_with(|pool| pool.max_untaken = 2);
    let worker = driver.worker();
    for _ in 0..3 {
        driver.accept(WEB);
    }
    assert_eq!(driver.core.totals().in_flight, 2);
    assert_eq!(driver.core.totals().queued, 1);
    assert!(driver.take(worker).is_some());
    driver.turn();
    assert_eq!(driver.core.totals().in_flight, 2);
    assert_eq!(driver.core.totals().queued, 0);
}

#[test]
fn what_a_worker_holds_already_counts() {
    let mut driver = driver();
    let busy = driver.trusted(Hello { base: 100, finished: 95, ..hello() });
    assert!(driver.events().contains(&Event::Joined { worker: busy, live: 5 }));
    let idle = driver.worker();
    for _ in 0..5 {
        driver.accept(WEB);
    }
    assert_eq!(driver.loads(&[busy, idle]), [5, 5]);
}

#[test]
fn impossible_counters_are_clamped_and_reported_once() {
    let mut driver = driver();
    let worker = driver.worker();
    for _ in 0..4 {
        driver.accept(WEB);
    }
    driver.take_all(worker);
    driver.events();
    driver.link(worker).finished = 1_000;
    driver.turn();
    driver.turn();
    let clamped = |what, said, used| Event::Clamped { worker, what, said, used };
    assert_eq!(driver.events(), [clamped("finished", 1_000, 4)]);
    assert_eq!(driver.core.load(worker), Some(0));
    driver.link(worker).finished = 1;
    driver.turn();
    driver.turn();
    assert_eq!(driver.events(), [clamped("finished went back", 1, 4)]);
    assert_eq!(driver.core.load(worker), Some(0));
}

#[test]
fn an_absurd_base_does_no_harm() {
    let mut driver = driver();
    let worker = driver.trusted(Hello { base: u64::MAX, finished: u64::MAX, ..hello() });
    for _ in 0..3 {
        driver.accept(WEB);
    }
    assert_eq!(driver.core.load(worker), Some(3));
    driver.take_all(worker);
    driver.finish(worker, 0);
}

#[test]
fn entries_and_slots_are_reused() {
    let mut driver = driver();
    let worker = driver.worker();
    let first = driver.accept(WEB);
    let (mut used, mut last) = (BTreeSet::new(), VecDeque::new());
    for _ in 0..1_000 {
        driver.take_all(worker);
        driver.finish(worker, 1);
        assert_eq!(driver.accept(WEB).index, first.index);
        let slot = driver.core.tickets(worker).next().unwrap().slot;
        used.insert(slot);
        // RELEASED is written into a slot after it is freed, so it is not reused at once.
        assert!(!last.contains(&slot));
        last.push_front(slot);
        last.truncate(SPARE_SLOTS as usize);
    }
    assert_eq!(used.len() as u32, SPARE_SLOTS + 1);
}
