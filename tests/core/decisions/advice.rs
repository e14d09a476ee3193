//! What a pool can offer to clients, as one server: the figures behind advice.

use super::*;
use dispatcher_core::advice::{PoolLoad, ServerState};

fn load(driver: &Driver) -> PoolLoad {
    let loads = driver.core.pool_loads(driver.now);
    assert_eq!(loads.len(), 1);
    loads.into_iter().next().unwrap()
}

fn small(weight: u16, max_connections: u32) -> Hello {
    Hello { weight, max_connections, ..hello() }
}

#[test]
fn the_sums_are_those_of_all_workers() {
    let mut driver = driver();
    assert_eq!(load(&driver).state, ServerState::Unserved, "no worker");
    let workers = [driver.trusted(small(1, 100)), driver.trusted(small(3, 50))];
    (0..8).for_each(|_| _ = driver.accept(WEB));
    let PoolLoad { name, state, load, capacity, weight, workers: counted, .. } = load(&driver);
    assert_eq!((&*name, state, load, capacity, weight), ("web", ServerState::Ok, 8, 150, 4.0));
    let mut counted: Vec<_> =
        counted.iter().map(|&(worker, weight)| (worker.serial, weight)).collect();
    counted.sort_by_key(|&(worker, _)| worker);
    assert_eq!(counted, [(workers[0].serial, 1.0), (workers[1].serial, 3.0)]);
}

#[test]
fn a_draining_worker_is_no_part_of_the_capacity() {
    let mut driver = driver();
    let (drained, other) = (driver.trusted(small(1, 10)), driver.trusted(small(1, 10)));
    (0..4).for_each(|_| _ = driver.accept(WEB));
    driver.drain(drained);
    let half = load(&driver);
    assert_eq!((half.state, half.load, half.capacity, half.weight), (ServerState::Ok, 2, 10, 1.0));
    driver.drain(other);
    assert_eq!(load(&driver).state, ServerState::Draining);
    driver.resume(drained).unwrap();
    assert_eq!(load(&driver).state, ServerState::Ok);
}

#[test]
fn a_pool_without_room_is_full() {
    let mut driver = driver();
    let workers = [driver.trusted(small(1, 2)), driver.trusted(small(1, 2))];
    (0..3).for_each(|_| _ = driver.accept(WEB));
    assert_eq!(load(&driver).state, ServerState::Ok);
    driver.accept(WEB);
    assert_eq!(load(&driver).state, ServerState::Full);
    workers.iter().for_each(|&worker| _ = driver.take_all(worker));
    driver.finish(workers[0], 1);
    assert_eq!(load(&driver).state, ServerState::Ok);
}

#[test]
fn a_pool_of_suspects_is_full() {
    let mut driver = driver();
    let (hung, other) = (driver.worker(), driver.worker());
    driver.accept(WEB);
    driver.accept(WEB);
    driver.take_all(other);
    driver.wait(ms(1_000));
    assert_eq!(driver.state(hung), State::Suspect);
    let healthy = load(&driver);
    assert_eq!((healthy.state, healthy.workers.len()), (ServerState::Ok, 1));
    driver.leave(other, Departure::Died);
    assert_eq!(driver.state(hung), State::Suspect);
    assert_eq!(load(&driver).state, ServerState::Full);
}

#[test]
fn a_pool_that_refuses_or_stops_says_so() {
    let mut driver = driver();
    let worker = driver.worker();
    driver.leave(worker, Departure::Died);
    assert_eq!(load(&driver).state, ServerState::Unserved);
    driver.wait(ms(5_000));
    assert_eq!(load(&driver).state, ServerState::Refusing);
    driver.worker();
    assert_eq!(load(&driver).state, ServerState::Ok);
    driver.core.stop(driver.now, driver.now + ms(10_000));
    assert_eq!(load(&driver).state, ServerState::Draining);
}

#[test]
fn standby_workers_count_when_they_serve() {
    let mut driver = driver_with(|pool| pool.policy = Policy::Failover);
    let primary = driver.trusted(Hello { priority: 5, ..small(1, 10) });
    driver.trusted(Hello { priority: 1, ..small(7, 100) });
    let first = load(&driver);
    assert_eq!((first.state, first.capacity, first.weight), (ServerState::Ok, 10, 1.0));
    driver.leave(primary, Departure::Died);
    let second = load(&driver);
    assert_eq!((second.state, second.capacity, second.weight), (ServerState::Ok, 100, 7.0));
}
