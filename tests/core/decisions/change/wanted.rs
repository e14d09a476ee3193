//! What is wanted again after a change, and entries that are used again.

use super::*;

#[test]
fn workers_that_are_wanted_again_get_connections_again() {
    let mut desk = desk_with(|pool| pool.processes = 6);
    let workers: Vec<_> = (0..6)
        .map(|number| {
            let process = ProcessId { pool: PoolId(0), number };
            desk.core.spawned(desk.now, process, true);
            desk.join_as(hello(), Some(process)).unwrap()
        })
        .collect();
    let counts =
        |wanted, active, starting, draining| ProcessCounts { wanted, active, starting, draining };
    // An operator drains one; another says goodbye when it is drained.
    desk.drain(workers[4]);
    desk.core.scale(desk.now, PoolId(0), 2);
    assert_eq!(desk.core.processes(PoolId(0)), counts(2, 2, 0, 4));
    desk.goodbye(workers[3]);
    desk.core.scale(desk.now, PoolId(0), 6);
    desk.pump();
    assert_eq!(desk.core.processes(PoolId(0)), counts(6, 4, 0, 2));
    let states: Vec<_> = workers.iter().map(|&worker| desk.state(worker)).collect();
    let (active, draining) = (State::Active, State::Draining);
    assert_eq!(states, [active, active, active, draining, draining, active]);
    // The one that leaves ends, and its process is started again.
    desk.leave(workers[3], Departure::Disconnected);
    desk.core.exited(desk.now, ProcessId { pool: PoolId(0), number: 3 });
    assert_eq!(desk.core.processes(PoolId(0)), counts(6, 4, 1, 1));
    desk.log.clear();
    desk.wait(RESTART_MIN);
    let process = ProcessId { pool: PoolId(0), number: 3 };
    assert!(desk.log.contains(&Effect::Spawn { process }));
    // Said by a reload it is the same.
    desk.change_web(|pool| pool.processes = 1);
    assert_eq!(desk.core.processes(PoolId(0)).active, 1);
    desk.change_web(|pool| pool.processes = 3);
    assert_eq!(desk.core.processes(PoolId(0)), counts(3, 3, 0, 2));
}

#[test]
fn a_pool_that_refuses_waits_again_when_it_may_wait_longer() {
    let mut desk = desk_with(|pool| pool.wait_for_worker = ms(100));
    desk.wait(ms(150));
    assert_eq!(desk.core.accepting(WEB), Accepting::Refuse);
    desk.change_web(|pool| pool.wait_for_worker = ms(120));
    assert_eq!(desk.core.accepting(WEB), Accepting::Refuse, "it has waited longer than that");
    desk.change_web(|pool| pool.wait_for_worker = ms(1_000));
    assert_eq!(desk.core.accepting(WEB), Accepting::Pause);
    let conn = desk.accept(WEB);
    desk.wait(ms(849));
    assert_eq!(desk.closed(conn), None);
    desk.wait(ms(1));
    assert_eq!(desk.closed(conn), Some(CloseReason::NoWorker), "since it has been without one");
}

#[test]
fn more_workers_may_come_at_once() {
    let mut desk = desk_with(|pool| pool.max_workers = 1);
    desk.worker();
    assert!(desk.join(hello()).is_err());
    desk.change_web(|pool| pool.max_workers = 2);
    assert!(desk.join(hello()).is_ok());
}

#[test]
fn thousands_of_changes_leave_nothing_behind() {
    let mut desk = desk();
    desk.logging = false;
    let worker = desk.worker();
    for round in 0..2_000 {
        // Ever new names, as an orchestrator makes them.
        let name = format!("pool-{round}");
        let settings = PoolSettings { name: name.clone(), history: 4, ..settings() };
        let pool = desk.core.add_pool(desk.now, settings, round);
        let at = |name: String, pool| ListenerSettings { name, pool, ..listener() };
        let own = desk.core.add_listener(at(format!("own-{round}"), pool));
        let more = desk.core.add_listener(at(format!("more-{round}"), PoolId(0)));
        let guest = desk.join(Hello { pool: name, ..hello() }).unwrap();
        desk.accept(own);
        desk.accept(more);
        desk.take_all(guest);
        desk.take_all(worker);
        for listener in [own, more] {
            desk.core.retire_listener(listener);
            desk.core.listener_closed(desk.now, listener);
        }
        desk.core.retire_pool(desk.now, pool);
        desk.turn();
        desk.leave(guest, Departure::Disconnected);
        desk.turn();
        desk.core.discarded();
    }
    let (pools, listeners, workers) = desk.core.entries();
    assert!(pools <= 3, "{pools} pools");
    assert!(listeners <= 4, "{listeners} listeners");
    assert!(workers <= 3, "{workers} workers");
    assert_eq!(desk.core.totals().taken, 4_000);
    assert_eq!(desk.core.residual(), 0, "what was counted is not forgotten");
}

#[test]
fn a_worker_is_never_told_the_wrong_listener() {
    let mut desk = desk();
    desk.worker();
    let named = |name: &str| ListenerSettings { name: name.to_owned(), ..listener() };
    let close = |desk: &mut Desk, listener| {
        desk.core.retire_listener(listener);
        desk.core.listener_closed(desk.now, listener);
    };
    let first = desk.core.add_listener(named("first"));
    // This one is told of it.
    let knows = desk.worker();
    close(&mut desk, first);
    let second = desk.core.add_listener(named("second"));
    assert_ne!(first, second);
    close(&mut desk, second);
    assert_eq!(desk.core.add_listener(named("first")), first, "the same name is no mistake");
    close(&mut desk, first);
    assert_eq!(desk.core.add_listener(named("third")), second, "nobody was told of that one");
    close(&mut desk, second);
    desk.leave(knows, Departure::Died);
    assert_eq!(desk.core.add_listener(named("fourth")), first);
}

#[test]
fn what_connections_and_processes_refer_to_stays() {
    let (mut desk, worker) = two_pools();
    let conn = desk.accept(SECOND);
    desk.core.retire_listener(SECOND);
    desk.core.listener_closed(desk.now, SECOND);
    desk.core.retire_pool(desk.now, OTHER);
    desk.turn();
    let third = PoolSettings { name: "third".to_owned(), processes: 1, ..settings() };
    let next = desk.core.add_pool(desk.now, third, 1);
    let process = ProcessId { pool: next, number: 0 };
    assert_eq!(next, PoolId(2), "a connection waits for its worker");
    assert_eq!(desk.core.add_listener(second()), ListenerId(2));
    desk.take_all(worker);
    assert!(desk.is_served(conn));
    desk.leave(worker, Departure::Died);
    desk.core.spawned(desk.now, process, true);
    desk.core.retire_pool(desk.now, next);
    desk.turn();
    let more = |name: &str| PoolSettings { name: name.to_owned(), ..settings() };
    assert_eq!(desk.core.add_pool(desk.now, more("a"), 1), PoolId(3), "ids, while in use");
    desk.core.retire_listener(ListenerId(2));
    desk.core.listener_closed(desk.now, ListenerId(2));
    assert_eq!(desk.core.add_pool(desk.now, more("b"), 1), OTHER);
    desk.core.exited(desk.now, process);
    assert_eq!(desk.core.add_pool(desk.now, more("c"), 1), next);
    desk.core.check();
}

#[test]
fn what_an_operator_drained_stays_so_when_its_pool_comes_back() {
    let (mut desk, old) = two_pools();
    desk.drain(old);
    desk.core.retire_listener(SECOND);
    desk.core.listener_closed(desk.now, SECOND);
    desk.core.retire_pool(desk.now, OTHER);
    desk.turn();
    let settings = PoolSettings { wait_for_worker: ms(50), ..other() };
    let id = desk.core.add_pool(desk.now, settings, 7);
    let third = desk.core.add_listener(ListenerSettings { pool: id, ..second() });
    assert_eq!((desk.state(old), desk.core.accepting(third)), (State::Draining, Accepting::Pause));
    desk.wait(ms(50));
    assert_eq!(desk.core.accepting(third), Accepting::Refuse);
    let new = desk.join(Hello { pool: "other".to_owned(), ..hello() }).unwrap();
    assert_eq!((desk.core.accepting(third), desk.loads(&[old, new])), (Accepting::Yes, vec![0, 0]));
    assert_eq!(desk.resume(old), Ok(true));
    desk.core.check();
}
