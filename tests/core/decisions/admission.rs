//! Admission of workers, and the texts of refusals.

use super::*;
use dispatch_protocol::wire::RefusedCode;

fn join(change: impl FnOnce(&mut Join)) -> Join {
    let mut join = Join { pid: 4_321, uid: 0, gids: vec![100], hello: hello(), spawned: None };
    change(&mut join);
    join
}

fn refusal(driver: &mut Driver, change: impl FnOnce(&mut Join)) -> Refusal {
    driver.core.join(driver.now, &join(change)).unwrap_err()
}

#[test]
fn another_version() {
    let refusal = refusal(&mut driver(), |join| join.hello.version = 9);
    assert_eq!(refusal.code, RefusedCode::Version);
    assert!(refusal.reason.contains("version 1") && refusal.reason.contains('9'));
}

#[test]
fn unknown_pool_names_the_known_ones() {
    let refusal = refusal(&mut driver(), |join| join.hello.pool = "wbe".to_owned());
    assert_eq!(refusal.code, RefusedCode::UnknownPool);
    assert!(refusal.reason.contains("`wbe`") && refusal.reason.contains("web"));
}

#[test]
fn a_refusal_names_the_account_and_the_deciding_key() {
    let refusal = refusal(&mut driver(), |join| join.uid = 1_234);
    assert_eq!(refusal.code, RefusedCode::NotAllowed);
    assert_eq!(refusal.key.as_deref(), Some("pool.web.allow_users"));
    for word in ["1234", "100", "4321"] {
        assert!(refusal.reason.contains(word), "{}", refusal.reason);
    }
}

#[test]
fn groups_and_spawned_processes_may_join() {
    let mut driver = driver_with(|pool| pool.access.groups = vec![100]);
    let by_group = join(|join| join.uid = 7);
    assert!(driver.core.join(driver.now, &by_group).is_ok());
    let process = |pool| Some(ProcessId { pool: PoolId(pool), place: 0, start: 1 });
    let mut by_token = join(|join| (join.uid, join.gids) = (7, vec![7]));
    by_token.spawned = process(0);
    assert!(driver.core.join(driver.now, &by_token).is_ok());
    by_token.spawned = process(1);
    assert!(driver.core.join(driver.now, &by_token).is_err());
}

#[test]
fn a_full_pool() {
    let mut driver = driver_with(|pool| pool.max_workers = 1);
    let worker = driver.worker();
    let full = refusal(&mut driver, |_| {});
    assert_eq!(full.code, RefusedCode::TooManyWorkers);
    assert_eq!(full.key.as_deref(), Some("pool.web.max_workers"));
    driver.leave(worker, Departure::Died);
    assert!(driver.join(hello()).is_ok());
}

#[test]
fn stopping() {
    let mut driver = driver();
    driver.core.stop(driver.now, driver.now + ms(1_000));
    driver.core.listener_closed(driver.now, WEB);
    driver.turn();
    assert_eq!(refusal(&mut driver, |_| {}).code, RefusedCode::Stopping);
}

#[test]
fn a_stopping_dispatcher_admits_workers_for_waiting_clients() {
    let mut driver = driver();
    let conns: Vec<_> = (0..3).map(|_| driver.accept(WEB)).collect();
    driver.core.stop(driver.now, driver.now + ms(1_000));
    driver.core.listener_closed(driver.now, WEB);
    driver.wait(ms(500));
    let worker = driver.worker();
    assert_eq!(driver.take_all(worker), 3);
    assert!(driver.core.stopped() && conns.iter().all(|&conn| driver.is_served(conn)));
    // No client waits now.
    driver.turn();
    assert_eq!(refusal(&mut driver, |_| {}).code, RefusedCode::Stopping);
}

#[test]
fn after_the_deadline_of_a_stop_no_worker_may_join() {
    let mut driver = driver();
    let worker = driver.worker();
    driver.accept(WEB);
    driver.core.stop(driver.now, driver.now + ms(500));
    driver.wait(ms(500));
    assert_eq!(driver.core.untaken(worker), 1);
    assert_eq!(refusal(&mut driver, |_| {}).code, RefusedCode::Stopping);
}

#[test]
fn an_index_is_reused_only_after_forget_was_seen() {
    let mut driver = driver();
    let first = driver.worker();
    driver.core.leave(driver.now, first, Departure::Died);
    // The effects are not performed: the event loop's tables may still have the worker.
    let second = driver.core.join(driver.now, &join(|_| {})).unwrap();
    assert_ne!(first.index, second.index);
    while driver.core.effect() != Some(Effect::Forget { worker: first }) {}
    let third = driver.core.join(driver.now, &join(|_| {})).unwrap();
    assert_eq!(first.index, third.index);
    assert_ne!(first.serial, third.serial);
    // The old id is ignored.
    driver.core.goodbye(driver.now, first);
    assert_eq!(driver.core.worker_state(third), Some(State::Active));
    assert_eq!(driver.core.worker_name(first), "");
}
