//! Changes of weights: by an operator at any time, and during a slow start.

use dispatch_protocol::ClientAddr;
use dispatch_protocol::wire::Update;

use super::policies::{ONCE_IN_1000, chi_squared, counts, driver_of, visits};
use super::*;

#[test]
fn weights_can_be_changed_at_any_time() {
    for policy in [Policy::LeastConnections, Policy::RoundRobin] {
        let mut driver = driver_of(policy);
        let workers = [driver.worker(), driver.worker()];
        for _ in 0..100 {
            driver.next_from(ClientAddr::Unix);
        }
        assert_eq!(driver.loads(&workers), [50, 50]);
        assert!(driver.core.set_weight(driver.now, workers[0], 3));
        for _ in 0..100 {
            driver.next_from(ClientAddr::Unix);
        }
        let expected = if policy == Policy::RoundRobin { [125, 75] } else { [150, 50] };
        assert_eq!(driver.loads(&workers), expected, "{policy:?}");
    }
    let mut driver = driver_of(Policy::Random);
    let workers = [driver.worker(), driver.worker()];
    driver.core.set_weight(driver.now, workers[0], 9);
    let order = visits(&mut driver, &workers, 10_000);
    let counts = counts(&order, 2);
    assert!(chi_squared(&counts, &[9.0, 1.0]) < ONCE_IN_1000[0], "{counts:?}");
}

#[test]
fn a_weight_of_a_gone_worker_has_no_effect() {
    let mut driver = driver_of(Policy::LeastConnections);
    let worker = driver.worker();
    driver.leave(worker, Departure::Died);
    assert!(!driver.core.set_weight(driver.now, worker, 3));
}

fn update(weight: u16, paused: bool, max_connections: u32) -> Update {
    Update { weight, paused, max_connections }
}

#[test]
fn a_worker_may_change_its_weight_until_an_operator_does() {
    let mut driver = driver();
    let workers = [driver.worker(), driver.worker()];
    driver.core.update(driver.now, workers[0], update(3, false, 1000));
    for _ in 0..100 {
        driver.next_from(ClientAddr::Unix);
    }
    assert_eq!(driver.loads(&workers), [75, 25]);
    assert!(driver.core.set_weight(driver.now, workers[0], 1));
    driver.core.update(driver.now, workers[0], update(9, false, 1000));
    assert_eq!(driver.core.weight(workers[0]), Some(1), "the operator's");
    driver.core.update(driver.now, workers[1], update(9, false, 1000));
    assert_eq!(driver.core.weight(workers[1]), Some(9));
}

#[test]
fn a_worker_may_change_its_maximum_within_the_pools() {
    let mut driver = driver_with(|pool| pool.max_connections_per_worker = 5);
    let worker = driver.worker();
    for (asked, has) in [(3, 3), (1000, 5), (1, 1)] {
        driver.core.update(driver.now, worker, update(1, false, asked));
        assert_eq!(driver.core.max_connections_of(worker), Some(has));
    }
}

#[test]
fn untaken_connections_of_a_paused_worker_move() {
    let mut driver = driver();
    let workers = [driver.worker(), driver.worker()];
    for _ in 0..4 {
        driver.accept(WEB);
    }
    assert_eq!(driver.loads(&workers), [2, 2]);
    driver.take(workers[0]).unwrap();
    driver.turn();
    driver.events();
    driver.core.update(driver.now, workers[0], update(1, true, 1000));
    driver.pump();
    assert_eq!(driver.loads(&workers), [1, 3], "what it has taken stays");
    let paused = Event::Paused { worker: workers[0], resent: 1, live: 1 };
    assert!(driver.events().contains(&paused));
    for _ in 0..4 {
        driver.accept(WEB);
    }
    assert_eq!(driver.loads(&workers), [1, 7]);
    assert_eq!(driver.state(workers[0]), State::Active, "not suspect");
    driver.core.update(driver.now, workers[1], update(1, true, 1000));
    driver.pump();
    assert!(driver.events().iter().any(|event| matches!(event, Event::BackPressure { .. })));
    driver.core.update(driver.now, workers[0], update(1, false, 1000));
    driver.pump();
    assert_eq!(driver.loads(&workers), [8, 0], "what was taken back from the other has waited");
    driver.goodbye(workers[0]);
    driver.core.update(driver.now, workers[0], update(7, true, 1));
    assert_eq!(driver.core.weight(workers[0]), Some(1), "after goodbye it says nothing");
}

fn slow(policy: Policy) -> Driver {
    driver_with(|pool| {
        pool.policy = policy;
        pool.max_untaken = 4_096;
        pool.slow_start = ms(10_000);
    })
}

#[test]
fn a_new_worker_starts_slowly_by_least_connections() {
    let mut driver = slow(Policy::LeastConnections);
    let old = driver.worker();
    driver.wait(ms(10_000));
    for _ in 0..6_400 {
        driver.next_from(ClientAddr::Unix);
    }
    let new = driver.worker();
    // After each quarter of the slow start it has its share, and never more.
    for quarter in 1..=4 {
        for _ in 0..16 {
            driver.wait(Duration::from_micros(156_250));
            for _ in 0..400 {
                if driver.core.load(old) > Some(0) {
                    driver.finish(old, 1);
                }
                driver.next_from(ClientAddr::Unix);
            }
        }
        let loads = driver.loads(&[old, new]);
        let most = loads[0] * (16 * quarter + 1).min(64) / 64 + 1;
        assert!(loads[1] <= most, "{loads:?} after quarter {quarter}");
        assert!(loads[1] * 10 >= most * 8, "{loads:?} after quarter {quarter}");
    }
}

#[test]
fn a_new_worker_starts_slowly_by_turns_and_draws() {
    for policy in [Policy::RoundRobin, Policy::Random] {
        let mut driver = slow(policy);
        let old = driver.worker();
        driver.wait(ms(10_000));
        let workers = [old, driver.worker()];
        let mut shares = Vec::new();
        for _ in 0..10 {
            let mut had = 0;
            for _ in 0..100 {
                driver.wait(ms(10));
                had += visits(&mut driver, &workers, 10).iter().sum::<usize>();
            }
            shares.push(had);
        }
        // With the fraction p of its weight it gets p / (1 + p) of 1,000, measured in the middle of
        // each second.
        for (second, &had) in shares.iter().enumerate() {
            let part = (second as f64 + 0.5) / 10.0;
            let expected = 1_000.0 * part / (1.0 + part);
            assert!((had as f64 - expected).abs() < 60.0, "{policy:?}: {shares:?}");
        }
        let order = visits(&mut driver, &workers, 1_000);
        let counts = counts(&order, 2);
        assert!(chi_squared(&counts, &[1.0, 1.0]) < ONCE_IN_1000[0], "{policy:?}: {counts:?}");
    }
}

fn warm(driver: &Driver, worker: WorkerId) -> u32 {
    let status = driver.core.snapshot();
    let mut workers = status.pools[0].workers.iter();
    workers.find(|w| w.id == worker).unwrap().warm_percent
}

#[test]
fn a_resumed_worker_starts_slowly() {
    let mut driver = slow(Policy::LeastConnections);
    let (worker, other) = (driver.worker(), driver.worker());
    driver.wait(ms(10_000));
    assert_eq!((warm(&driver, worker), warm(&driver, other)), (100, 100));
    driver.drain(worker);
    driver.wait(ms(1_000));
    driver.resume(worker).unwrap();
    assert_eq!((warm(&driver, worker), warm(&driver, other)), (1, 100));
    for _ in 0..60 {
        driver.next_from(ClientAddr::Unix);
    }
    assert_eq!(driver.loads(&[worker]), [0], "60 for the other are not yet 64 times one for it");
    driver.wait(ms(5_000));
    assert_eq!(warm(&driver, worker), 51);
}

#[test]
fn a_worker_that_was_suspect_starts_slowly() {
    let mut driver = slow(Policy::LeastConnections);
    let worker = driver.worker();
    driver.wait(ms(10_000));
    driver.accept(WEB);
    driver.wait(ms(1_000));
    assert_eq!((driver.state(worker), warm(&driver, worker)), (State::Suspect, 100));
    assert_eq!(driver.take_all(worker), 1);
    assert_eq!((driver.state(worker), warm(&driver, worker)), (State::Active, 1));
    driver.wait(ms(5_000));
    assert_eq!(warm(&driver, worker), 51);
}

#[test]
fn a_single_worker_in_slow_start_gets_all() {
    let mut driver = slow(Policy::LeastConnections);
    let worker = driver.worker();
    for _ in 0..100 {
        driver.next_from(ClientAddr::Unix);
    }
    assert_eq!(driver.loads(&[worker]), [100]);
    let status = driver.core.snapshot();
    assert_eq!(status.pools[0].workers[0].warm_percent, 1);
    driver.wait(ms(5_000));
    assert_eq!(driver.core.snapshot().pools[0].workers[0].warm_percent, 51);
    driver.wait(ms(5_000));
    assert_eq!(driver.core.snapshot().pools[0].workers[0].warm_percent, 100);
    assert_eq!(driver.core.deadline(), None, "no timer is left");
}
