//! Who gets a connection: exactness, weights, bounds.

use std::collections::{BTreeSet, VecDeque};

use super::*;

fn assert_even(loads: &[u64]) {
    let (min, max) = (loads.iter().min().unwrap(), loads.iter().max().unwrap());
    assert!(max - min <= 1, "{loads:?}");
}

#[test]
fn loads_of_equal_workers_never_differ_by_more_than_one() {
    let mut desk = desk();
    desk.logging = false;
    let workers: Vec<_> = (0..4).map(|_| desk.worker()).collect();
    for i in 0..10_000 {
        desk.accept(WEB);
        assert_even(&desk.loads(&workers));
        if i % 7 == 0 {
            let worker = workers[i % 4];
            desk.take_all(worker);
        }
        if desk.loads(&workers).iter().sum::<u64>() >= 900 {
            workers.iter().for_each(|&worker| {
                desk.take_all(worker);
            });
        }
    }
    assert_eq!(desk.loads(&workers), [2_500; 4]);
}

#[test]
fn weights_are_shares() {
    let mut desk = desk_with(|pool| pool.max_untaken = 4_096);
    let workers: Vec<_> =
        [1, 2, 5].into_iter().map(|weight| desk.trusted(Hello { weight, ..hello() })).collect();
    for _ in 0..800 {
        desk.accept_only(WEB);
    }
    assert_eq!(desk.loads(&workers), [100, 200, 500]);
}

#[test]
fn a_burst_before_anybody_takes_does_not_herd() {
    let mut desk = desk();
    let workers: Vec<_> = (0..8).map(|_| desk.worker()).collect();
    for _ in 0..2_000 {
        desk.accept_only(WEB);
        assert_even(&desk.loads(&workers));
    }
    desk.pump();
    assert_eq!(desk.loads(&workers), [250; 8]);
}

#[test]
fn churn_stays_even() {
    let mut desk = desk();
    desk.logging = false;
    let workers: Vec<_> = (0..8).map(|_| desk.worker()).collect();
    for _ in 0..800 {
        desk.accept(WEB);
    }
    workers.iter().for_each(|&worker| {
        desk.take_all(worker);
    });
    // Whoever closes one gets the next.
    for i in 0..2_000 {
        let worker = workers[i * 5 % 8];
        desk.finish(worker, 1);
        desk.accept(WEB);
        assert_eq!(desk.take_all(worker), 1);
        assert_eq!(desk.loads(&workers), [100; 8]);
    }
}

#[test]
fn ties_rotate() {
    let mut desk = desk();
    let workers: Vec<_> = (0..3).map(|_| desk.worker()).collect();
    let mut order = Vec::new();
    for _ in 0..6 {
        desk.log.clear();
        desk.accept(WEB);
        let worker = desk.sends()[0].0;
        order.push(worker);
        desk.take_all(worker);
        desk.finish(worker, 1);
    }
    assert_eq!(order, [&workers[..], &workers[..]].concat());
}

#[test]
fn nobody_gets_more_than_its_maximum() {
    let mut desk = desk_with(|pool| pool.max_connections_per_worker = 3);
    let small = desk.trusted(Hello { max_connections: 2, ..hello() });
    let large = desk.worker();
    assert_eq!(desk.core.max_connections_of(small), Some(2));
    assert_eq!(desk.core.max_connections_of(large), Some(3));
    for _ in 0..5 {
        assert_eq!(desk.core.accepting(WEB), Accepting::Yes);
        desk.accept(WEB);
    }
    assert_eq!(desk.loads(&[small, large]), [2, 3]);
    assert_eq!(desk.core.accepting(WEB), Accepting::Pause);
    desk.take_all(small);
    desk.finish(small, 1);
    assert_eq!(desk.core.accepting(WEB), Accepting::Yes);
}

#[test]
fn nobody_has_more_untaken_than_slots() {
    let mut desk = desk_with(|pool| pool.max_untaken = 2);
    let worker = desk.worker();
    for _ in 0..3 {
        desk.accept(WEB);
    }
    assert_eq!(desk.core.totals().custody, 2);
    assert_eq!(desk.core.totals().held, 1);
    assert!(desk.take(worker).is_some());
    desk.turn();
    assert_eq!(desk.core.totals().custody, 2);
    assert_eq!(desk.core.totals().held, 0);
}

#[test]
fn what_a_worker_holds_already_counts() {
    let mut desk = desk();
    let busy = desk.trusted(Hello { base: 100, finished: 95, ..hello() });
    assert!(desk.events().contains(&Event::Joined { worker: busy, live: 5 }));
    let idle = desk.worker();
    for _ in 0..5 {
        desk.accept(WEB);
    }
    assert_eq!(desk.loads(&[busy, idle]), [5, 5]);
}

#[test]
fn impossible_counters_are_clamped_and_told_once() {
    let mut desk = desk();
    let worker = desk.worker();
    for _ in 0..4 {
        desk.accept(WEB);
    }
    desk.take_all(worker);
    desk.events();
    desk.link(worker).finished = 1_000;
    desk.turn();
    desk.turn();
    let clamped = |what, said, used| Event::Clamped { worker, what, said, used };
    assert_eq!(desk.events(), [clamped("finished", 1_000, 4)]);
    assert_eq!(desk.core.load(worker), Some(0));
    desk.link(worker).finished = 1;
    desk.turn();
    desk.turn();
    assert_eq!(desk.events(), [clamped("finished went back", 1, 4)]);
    assert_eq!(desk.core.load(worker), Some(0));
}

#[test]
fn an_absurd_base_does_no_harm() {
    let mut desk = desk();
    let worker = desk.trusted(Hello { base: u64::MAX, finished: u64::MAX, ..hello() });
    for _ in 0..3 {
        desk.accept(WEB);
    }
    assert_eq!(desk.core.load(worker), Some(3));
    desk.take_all(worker);
    desk.finish(worker, 0);
}

#[test]
fn entries_and_slots_are_used_again() {
    let mut desk = desk();
    let worker = desk.worker();
    let first = desk.accept(WEB);
    let (mut used, mut last) = (BTreeSet::new(), VecDeque::new());
    for _ in 0..1_000 {
        desk.take_all(worker);
        desk.finish(worker, 1);
        assert_eq!(desk.accept(WEB).index, first.index);
        let slot = desk.core.tickets(worker).next().unwrap().slot;
        used.insert(slot);
        // RELEASED is written into it some time after it is free: it rests.
        assert!(!last.contains(&slot));
        last.push_front(slot);
        last.truncate(SPARE_SLOTS as usize);
    }
    assert_eq!(used.len() as u32, SPARE_SLOTS + 1);
}
