//! Processes and pools that a later change restores, and reuse of entries.

use super::*;

#[test]
fn workers_that_are_wanted_again_are_resumed() {
    let mut driver = driver_with(|pool| pool.processes = 6);
    let workers: Vec<_> = (0..6)
        .map(|number| {
            let process = ProcessId { pool: PoolId(0), place: number, start: number + 1 };
            driver.core.spawned(driver.now, process, true);
            driver.join_as(hello(), Some(process)).unwrap()
        })
        .collect();
    let counts =
        |wanted, active, starting, leaving| ProcessCounts { wanted, active, starting, leaving };
    // An operator drains one worker; another says goodbye when it is drained.
    driver.drain(workers[4]);
    driver.core.scale(driver.now, PoolId(0), 2);
    assert_eq!(driver.core.processes(PoolId(0)), counts(2, 2, 0, 4));
    driver.goodbye(workers[3]);
    driver.core.scale(driver.now, PoolId(0), 6);
    driver.pump();
    assert_eq!(driver.core.processes(PoolId(0)), counts(6, 4, 1, 2));
    let states: Vec<_> = workers.iter().map(|&worker| driver.state(worker)).collect();
    let (active, draining) = (State::Active, State::Draining);
    assert_eq!(states, [active, active, active, draining, draining, active]);
    // Another process starts beside the one that leaves.
    let process = ProcessId { pool: PoolId(0), place: 3, start: 7 };
    assert!(driver.log.contains(&Effect::Spawn { process }));
    driver.leave(workers[3], Departure::Disconnected);
    driver.core.exited(driver.now, ProcessId { pool: PoolId(0), place: 3, start: 4 });
    assert_eq!(driver.core.processes(PoolId(0)), counts(6, 4, 1, 1));
    // A reload has the same effect.
    driver.change_web(|pool| pool.processes = 1);
    assert_eq!(driver.core.processes(PoolId(0)).active, 1);
    driver.change_web(|pool| pool.processes = 3);
    assert_eq!(driver.core.processes(PoolId(0)), counts(3, 3, 0, 2));
}

#[test]
fn a_pool_that_refuses_waits_again_when_it_may_wait_longer() {
    let mut driver = driver_with(|pool| pool.wait_for_worker = ms(100));
    driver.wait(ms(150));
    assert_eq!(driver.core.accepting(WEB), Accepting::Refuse);
    driver.change_web(|pool| pool.wait_for_worker = ms(120));
    assert_eq!(driver.core.accepting(WEB), Accepting::Refuse, "it has waited longer than that");
    driver.change_web(|pool| pool.wait_for_worker = ms(1_000));
    assert_eq!(driver.core.accepting(WEB), Accepting::Pause);
    let conn = driver.accept(WEB);
    driver.wait(ms(849));
    assert_eq!(driver.closed(conn), None);
    driver.wait(ms(1));
    assert_eq!(driver.closed(conn), Some(CloseReason::NoWorker), "since it has been without one");
}

#[test]
fn more_workers_may_come_at_once() {
    let mut driver = driver_with(|pool| pool.max_workers = 1);
    driver.worker();
    assert!(driver.join(hello()).is_err());
    driver.change_web(|pool| pool.max_workers = 2);
    assert!(driver.join(hello()).is_ok());
}

#[test]
fn thousands_of_changes_leave_nothing_behind() {
    let mut driver = driver();
    driver.logging = false;
    let worker = driver.worker();
    for round in 0..2_000 {
        // Always new names, as an orchestrator makes them.
        let name = format!("pool-{round}");
        let settings = PoolSettings { name: name.clone(), history: 4, ..settings() };
        let pool = driver.core.add_pool(driver.now, settings, round);
        let at = |name: String, pool| ListenerSettings { name, pool, ..listener() };
        let own = driver.core.add_listener(at(format!("own-{round}"), pool));
        let more = driver.core.add_listener(at(format!("more-{round}"), PoolId(0)));
        let guest = driver.join(Hello { pool: name, ..hello() }).unwrap();
        driver.accept(own);
        driver.accept(more);
        driver.take_all(guest);
        driver.take_all(worker);
        for listener in [own, more] {
            driver.core.retire_listener(listener);
            driver.core.listener_closed(driver.now, listener);
        }
        driver.core.retire_pool(driver.now, pool);
        driver.turn();
        driver.leave(guest, Departure::Disconnected);
        driver.turn();
        driver.core.discarded();
    }
    let (pools, listeners, workers) = driver.core.entries();
    assert!(pools <= 3, "{pools} pools");
    assert!(listeners <= 4, "{listeners} listeners");
    assert!(workers <= 3, "{workers} workers");
    assert_eq!(driver.core.totals().taken, 4_000);
    assert_eq!(driver.core.residual(), 0, "what was counted is not forgotten");
}

#[test]
fn a_worker_never_learns_a_wrong_listener_name() {
    let mut driver = driver();
    driver.worker();
    let named = |name: &str| ListenerSettings { name: name.to_owned(), ..listener() };
    let close = |driver: &mut Driver, listener| {
        driver.core.retire_listener(listener);
        driver.core.listener_closed(driver.now, listener);
    };
    let first = driver.core.add_listener(named("first"));
    // This worker learns the name.
    let knows = driver.worker();
    close(&mut driver, first);
    let second = driver.core.add_listener(named("second"));
    assert_ne!(first, second);
    close(&mut driver, second);
    assert_eq!(driver.core.add_listener(named("first")), first, "the same name is no mistake");
    close(&mut driver, first);
    assert_eq!(driver.core.add_listener(named("third")), second, "no worker knows that one");
    close(&mut driver, second);
    driver.leave(knows, Departure::Died);
    assert_eq!(driver.core.add_listener(named("fourth")), first);
}

#[test]
fn referenced_entries_stay() {
    let (mut driver, worker) = two_pools();
    let conn = driver.accept(SECOND);
    driver.core.retire_listener(SECOND);
    driver.core.listener_closed(driver.now, SECOND);
    driver.core.retire_pool(driver.now, OTHER);
    driver.turn();
    let third = PoolSettings { name: "third".to_owned(), processes: 1, ..settings() };
    let next = driver.core.add_pool(driver.now, third, 1);
    let process = ProcessId { pool: next, place: 0, start: 1 };
    assert_eq!(next, PoolId(2), "a connection waits for its worker");
    assert_eq!(driver.core.add_listener(second()), ListenerId(2));
    driver.take_all(worker);
    assert!(driver.is_served(conn));
    driver.leave(worker, Departure::Died);
    driver.core.spawned(driver.now, process, true);
    driver.core.retire_pool(driver.now, next);
    driver.turn();
    let more = |name: &str| PoolSettings { name: name.to_owned(), ..settings() };
    assert_eq!(driver.core.add_pool(driver.now, more("a"), 1), PoolId(3), "ids, while in use");
    driver.core.retire_listener(ListenerId(2));
    driver.core.listener_closed(driver.now, ListenerId(2));
    assert_eq!(driver.core.add_pool(driver.now, more("b"), 1), OTHER);
    driver.core.exited(driver.now, process);
    assert_eq!(driver.core.add_pool(driver.now, more("c"), 1), next);
    driver.core.check();
}

#[test]
fn an_operators_drain_survives_the_return_of_its_pool() {
    let (mut driver, old) = two_pools();
    driver.drain(old);
    driver.core.retire_listener(SECOND);
    driver.core.listener_closed(driver.now, SECOND);
    driver.core.retire_pool(driver.now, OTHER);
    driver.turn();
    let settings = PoolSettings { wait_for_worker: ms(50), ..other() };
    let id = driver.core.add_pool(driver.now, settings, 7);
    let third = driver.core.add_listener(ListenerSettings { pool: id, ..second() });
    assert_eq!(
        (driver.state(old), driver.core.accepting(third)),
        (State::Draining, Accepting::Pause)
    );
    driver.wait(ms(50));
    assert_eq!(driver.core.accepting(third), Accepting::Refuse);
    let new = driver.join(Hello { pool: "other".to_owned(), ..hello() }).unwrap();
    assert_eq!(
        (driver.core.accepting(third), driver.loads(&[old, new])),
        (Accepting::Yes, vec![0, 0])
    );
    assert_eq!(driver.resume(old), Ok(true));
    driver.core.check();
}
