//! Clients without a worker: held, refused, relieved.

use super::*;
use dispatch_protocol::scoreboard::slot::want;

#[test]
fn only_a_pool_with_workers_wants_room() {
    let other = PoolSettings { name: "other".to_owned(), ..settings() };
    let mut desk = Desk::new(vec![settings(), other], vec![listener()]);
    assert!(!desk.core.wants_room(), "nobody is there who could make any");
    let worker = desk.trusted(Hello { max_connections: 1, ..hello() });
    assert!(!desk.core.wants_room(), "and the other pool's workers are nobody's business");
    desk.accept(WEB);
    desk.take_all(worker);
    assert!(desk.core.wants_room(), "it is full");
    assert_eq!(desk.core.wants(worker), want::ROOM);
    desk.finish(worker, 1);
    assert!(!desk.core.wants_room());
    desk.drain(worker);
    assert!(!desk.core.wants_room());
    desk.core.retire_pool(desk.now, PoolId(1));
    desk.turn();
    assert!(!desk.core.wants_room(), "not even when it was taken out");
}

#[test]
fn nobody_is_accepted_until_somebody_joins() {
    let mut desk = desk();
    assert_eq!(desk.core.accepting(WEB), Accepting::Pause);
    assert_eq!(desk.core.snapshot().pools[0].state, PoolState::NoWorker);
    desk.worker();
    assert_eq!(desk.core.accepting(WEB), Accepting::Yes);
}

#[test]
fn after_the_wait_clients_are_refused_until_somebody_joins() {
    let mut desk = desk();
    let worker = desk.worker();
    let conn = desk.accept(WEB);
    desk.events();
    desk.leave(worker, Departure::Died);
    let pool = PoolId(0);
    assert_eq!(desk.events()[0], Event::NoUsableWorker { pool });
    assert_eq!(desk.core.totals().held, 1);
    desk.wait(ms(4_999));
    assert_eq!(desk.core.accepting(WEB), Accepting::Pause);
    desk.wait(ms(1));
    assert_eq!(desk.events(), [Event::Refusing { pool, closed: 1, unserved: false }]);
    assert_eq!(desk.closed(conn), Some(CloseReason::NoWorker));
    assert_eq!(desk.core.accepting(WEB), Accepting::Refuse);
    let refused = desk.accept(WEB);
    assert_eq!(desk.closed(refused), Some(CloseReason::NoWorker));
    assert_eq!(desk.core.snapshot().pools[0].state, PoolState::Refusing);
    // The log says it again, at growing intervals.
    desk.wait(ms(10_000));
    let since =
        |seconds: u64| Event::StillRefusing { pool, unserved: false, since: ms(seconds * 1_000) };
    assert_eq!(desk.events(), [since(10)]);
    desk.wait(ms(19_999));
    assert_eq!(desk.events(), []);
    desk.wait(ms(1));
    assert_eq!(desk.events(), [since(30)]);
    desk.worker();
    assert_eq!(desk.core.accepting(WEB), Accepting::Yes);
}

#[test]
fn held_connections_are_placed_in_order_when_somebody_joins() {
    let mut desk = desk();
    let conns: Vec<_> = (0..5).map(|_| desk.accept(WEB)).collect();
    desk.core.client_gone(desk.now, conns[2]);
    desk.pump();
    assert_eq!(desk.closed(conns[2]), Some(CloseReason::ClientGone));
    let worker = desk.worker();
    let order: Vec<_> = std::iter::from_fn(|| desk.take(worker)).collect();
    assert_eq!(order, [conns[0], conns[1], conns[3], conns[4]]);
    // Once somebody has it, a reset is the worker's business; so is a stale id.
    desk.core.client_gone(desk.now, conns[0]);
    desk.turn();
    desk.core.client_gone(desk.now, conns[0]);
    desk.core.client_gone(desk.now, conns[2]);
    assert_eq!(desk.core.effect(), None);
}

#[test]
fn what_comes_back_goes_before_what_is_new() {
    let mut desk = desk_with(|pool| pool.max_connections_per_worker = 2);
    let first = desk.worker();
    let conns: Vec<_> = (0..4).map(|_| desk.accept(WEB)).collect();
    assert_eq!(desk.core.totals().held, 2);
    desk.leave(first, Departure::Died);
    let second = desk.worker();
    assert_eq!(desk.take(second), Some(conns[0]));
    assert_eq!(desk.take(second), Some(conns[1]));
}

#[test]
fn back_pressure_is_told_once_a_second_at_most() {
    let mut desk = desk_with(|pool| pool.max_connections_per_worker = 1);
    let worker = desk.worker();
    desk.events();
    for _ in 0..10 {
        desk.accept(WEB);
        desk.take_all(worker);
        desk.wait(ms(10));
        desk.finish(worker, 1);
    }
    let pool = PoolId(0);
    assert_eq!(desk.events(), [Event::BackPressure { pool }, Event::Relieved { pool }]);
    desk.wait(ms(1_000));
    desk.accept(WEB);
    assert_eq!(desk.events(), [Event::BackPressure { pool }]);
    assert_eq!(desk.core.snapshot().pools[0].state, PoolState::BackPressure);
}

#[test]
fn pools_do_not_share_workers() {
    let other = PoolSettings { name: "other".to_owned(), ..settings() };
    let second = ListenerSettings { pool: PoolId(1), ..listener() };
    let mut desk = Desk::new(vec![settings(), other], vec![listener(), second]);
    let worker = desk.worker();
    desk.accept(ListenerId(1));
    assert_eq!(desk.core.load(worker), Some(0));
    assert_eq!(desk.core.accepting(ListenerId(1)), Accepting::Pause);
    assert_eq!(desk.core.accepting(WEB), Accepting::Yes);
    assert_eq!(desk.core.pool_name(PoolId(1)), "other");
    assert_eq!(desk.core.pool_of_worker(worker), Some(PoolId(0)));
    assert_eq!(desk.core.listener_name(WEB), "http");
}
