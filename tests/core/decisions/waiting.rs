//! Clients without a worker: queued, refused, relieved.

use super::*;
use dispatch_protocol::scoreboard::slot::want;

#[test]
fn only_a_pool_with_workers_wants_room() {
    let other = PoolSettings { name: "other".to_owned(), ..settings() };
    let mut driver = Driver::new(vec![settings(), other], vec![listener()]);
    assert!(!driver.core.wants_room(), "no worker is there that could make any");
    let worker = driver.trusted(Hello { max_connections: 1, ..hello() });
    assert!(!driver.core.wants_room(), "and the other pool's workers do not count");
    driver.accept(WEB);
    driver.take_all(worker);
    assert!(driver.core.wants_room(), "it is full");
    assert_eq!(driver.core.wants(worker), want::ROOM);
    driver.finish(worker, 1);
    assert!(!driver.core.wants_room());
    driver.drain(worker);
    assert!(!driver.core.wants_room());
    driver.core.retire_pool(driver.now, PoolId(1));
    driver.turn();
    assert!(!driver.core.wants_room(), "not even when it was removed");
}

#[test]
fn no_client_is_accepted_until_a_worker_joins() {
    let mut driver = driver();
    assert_eq!(driver.core.accepting(WEB), Accepting::Pause);
    assert_eq!(driver.core.snapshot().pools[0].state, PoolState::NoWorker);
    driver.worker();
    assert_eq!(driver.core.accepting(WEB), Accepting::Yes);
}

#[test]
fn after_the_wait_clients_are_refused_until_a_worker_joins() {
    let mut driver = driver();
    let worker = driver.worker();
    let conn = driver.accept(WEB);
    driver.events();
    driver.leave(worker, Departure::Died);
    let pool = PoolId(0);
    assert_eq!(driver.events()[0], Event::NoUsableWorker { pool });
    assert_eq!(driver.core.totals().queued, 1);
    driver.wait(ms(4_999));
    assert_eq!(driver.core.accepting(WEB), Accepting::Pause);
    driver.wait(ms(1));
    assert_eq!(driver.events(), [Event::Refusing { pool, closed: 1, unserved: false }]);
    assert_eq!(driver.closed(conn), Some(CloseReason::NoWorker));
    assert_eq!(driver.core.accepting(WEB), Accepting::Refuse);
    let refused = driver.accept(WEB);
    assert_eq!(driver.closed(refused), Some(CloseReason::NoWorker));
    assert_eq!(driver.core.snapshot().pools[0].state, PoolState::Refusing);
    // The log repeats it at growing intervals.
    driver.wait(ms(10_000));
    let since =
        |seconds: u64| Event::StillRefusing { pool, unserved: false, since: ms(seconds * 1_000) };
    assert_eq!(driver.events(), [since(10)]);
    driver.wait(ms(19_999));
    assert_eq!(driver.events(), []);
    driver.wait(ms(1));
    assert_eq!(driver.events(), [since(30)]);
    driver.worker();
    assert_eq!(driver.core.accepting(WEB), Accepting::Yes);
}

#[test]
fn queued_connections_are_placed_in_order_at_a_join() {
    let mut driver = driver();
    let conns: Vec<_> = (0..5).map(|_| driver.accept(WEB)).collect();
    driver.core.client_gone(driver.now, conns[2]);
    driver.pump();
    assert_eq!(driver.closed(conns[2]), Some(CloseReason::ClientGone));
    let worker = driver.worker();
    let order: Vec<_> = std::iter::from_fn(|| driver.take(worker)).collect();
    assert_eq!(order, [conns[0], conns[1], conns[3], conns[4]]);
    // Once a worker has it, a reset is the worker's business; a stale id is ignored.
    driver.core.client_gone(driver.now, conns[0]);
    driver.turn();
    driver.core.client_gone(driver.now, conns[0]);
    driver.core.client_gone(driver.now, conns[2]);
    assert_eq!(driver.core.effect(), None);
}

#[test]
fn returned_connections_go_before_new_ones() {
    let mut driver = driver_with(|pool| pool.max_connections_per_worker = 2);
    let first = driver.worker();
    let conns: Vec<_> = (0..4).map(|_| driver.accept(WEB)).collect();
    assert_eq!(driver.core.totals().queued, 2);
    driver.leave(first, Departure::Died);
    let second = driver.worker();
    assert_eq!(driver.take(second), Some(conns[0]));
    assert_eq!(driver.take(second), Some(conns[1]));
}

#[test]
fn back_pressure_is_reported_once_a_second_at_most() {
    let mut driver = driver_with(|pool| pool.max_connections_per_worker = 1);
    let worker = driver.worker();
    driver.events();
    for _ in 0..10 {
        driver.accept(WEB);
        driver.take_all(worker);
        driver.wait(ms(10));
        driver.finish(worker, 1);
    }
    let pool = PoolId(0);
    assert_eq!(driver.events(), [Event::BackPressure { pool }, Event::Relieved { pool }]);
    driver.wait(ms(1_000));
    driver.accept(WEB);
    assert_eq!(driver.events(), [Event::BackPressure { pool }]);
    assert_eq!(driver.core.snapshot().pools[0].state, PoolState::BackPressure);
}

#[test]
fn pools_do_not_share_workers() {
    let other = PoolSettings { name: "other".to_owned(), ..settings() };
    let second = ListenerSettings { pool: PoolId(1), ..listener() };
    let mut driver = Driver::new(vec![settings(), other], vec![listener(), second]);
    let worker = driver.worker();
    driver.accept(ListenerId(1));
    assert_eq!(driver.core.load(worker), Some(0));
    assert_eq!(driver.core.accepting(ListenerId(1)), Accepting::Pause);
    assert_eq!(driver.core.accepting(WEB), Accepting::Yes);
    assert_eq!(driver.core.pool_name(PoolId(1)), "other");
    assert_eq!(driver.core.pool_of_worker(worker), Some(PoolId(0)));
    assert_eq!(driver.core.listener_name(WEB), "http");
}
