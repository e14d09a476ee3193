//! Changes of the configuration while the core runs: they affect no connection, and every invariant
//! holds.

mod wanted;

use super::affinity::known;
use super::*;
use dispatcher_core::KeySource;

const SECOND: ListenerId = ListenerId(1);
const OTHER: PoolId = PoolId(1);

fn other() -> PoolSettings {
    PoolSettings { name: "other".to_owned(), ..settings() }
}

fn second() -> ListenerSettings {
    ListenerSettings { name: "second".to_owned(), pool: OTHER, ..listener() }
}

/// Two pools, each with a listener, and a worker of the second one.
fn two_pools() -> (Driver, WorkerId) {
    let mut driver = Driver::new(vec![settings(), other()], vec![listener(), second()]);
    let worker = driver.trusted(Hello { pool: "other".to_owned(), ..hello() });
    (driver, worker)
}

fn cookie(ttl: u64) -> Option<Affinity> {
    let key = KeySource::Cookie("ID".to_owned());
    Some(Affinity { key, ttl: ms(ttl), max_entries: 100 })
}

/// Short forms for these tests.
pub(super) trait ChangeSteps {
    fn change_web(&mut self, change: impl FnOnce(&mut PoolSettings));
    fn shown_pools(&self) -> Vec<(String, String)>;
}

impl ChangeSteps for Driver {
    fn change_web(&mut self, change: impl FnOnce(&mut PoolSettings)) {
        let mut settings = self.core.pool_settings(PoolId(0)).unwrap().clone();
        change(&mut settings);
        self.core.change_pool(self.now, PoolId(0), settings, 7);
        self.pump();
        self.core.check();
    }

    fn shown_pools(&self) -> Vec<(String, String)> {
        self.core
            .snapshot()
            .pools
            .into_iter()
            .map(|pool| (pool.name, pool.state.name().to_owned()))
            .collect()
    }
}

#[test]
fn the_policy_changes_and_every_load_stays() {
    let mut driver = driver();
    let workers: Vec<_> = (0..3).map(|_| driver.worker()).collect();
    let mut live = 0;
    for policy in Policy::ALL.into_iter().chain([Policy::LeastConnections]) {
        driver.change_web(|pool| pool.policy = policy);
        assert_eq!(driver.core.snapshot().pools[0].policy, policy);
        for _ in 0..3 {
            driver.accept(WEB);
        }
        live += 3;
        for &worker in &workers {
            driver.take_all(worker);
        }
        assert_eq!(driver.loads(&workers).iter().sum::<u64>(), live);
    }
    assert_eq!(driver.core.totals().taken, live);
}

#[test]
fn a_new_policy_knows_of_priorities_and_loads() {
    let mut driver = driver();
    let (first, standby) = (driver.with_priority(9), driver.with_priority(1));
    for _ in 0..4 {
        driver.accept(WEB);
    }
    assert_eq!(driver.loads(&[first, standby]), [2, 2]);
    driver.change_web(|pool| pool.policy = Policy::Failover);
    for _ in 0..4 {
        driver.accept(WEB);
    }
    assert_eq!(driver.loads(&[first, standby]), [6, 2]);
    driver.change_web(|pool| pool.policy = Policy::LeastConnections);
    for _ in 0..4 {
        driver.accept(WEB);
    }
    assert_eq!(driver.loads(&[first, standby]), [6, 6]);
}

#[test]
fn limits_count_at_once() {
    let mut driver = driver();
    let modest = driver.trusted(Hello { max_connections: 3, ..hello() });
    for _ in 0..2 {
        driver.accept(WEB);
    }
    assert_eq!(driver.core.accepting(WEB), Accepting::Yes);
    driver.change_web(|pool| pool.max_connections_per_worker = 2);
    assert_eq!(driver.core.max_connections_of(modest), Some(2));
    assert_eq!(driver.core.accepting(WEB), Accepting::Pause);
    driver.change_web(|pool| pool.max_connections_per_worker = 50);
    assert_eq!(driver.core.max_connections_of(modest), Some(3), "its own limit counts too");
    assert_eq!(driver.core.accepting(WEB), Accepting::Yes);
    // Connections in flight have less time now.
    driver.change_web(|pool| pool.handoff_timeout = ms(10));
    driver.wait(ms(10));
    assert_eq!(driver.state(modest), State::Suspect);
}

#[test]
fn the_history_keeps_the_configured_number() {
    let mut driver = driver_with(|pool| pool.history = 4);
    driver.worker();
    for _ in 0..6 {
        driver.accept(WEB);
    }
    let numbers = |driver: &Driver| {
        let decisions = driver.core.history(PoolId(0), 0);
        decisions.iter().map(|decision| decision.number).collect::<Vec<_>>()
    };
    assert_eq!(numbers(&driver), [3, 4, 5, 6]);
    assert!(driver.core.discarded().is_none());
    driver.change_web(|pool| pool.history = 2);
    assert_eq!(numbers(&driver), [5, 6]);
    assert!(driver.core.discarded().is_some(), "the caller drops what is forgotten");
    driver.change_web(|pool| pool.history = 0);
    driver.accept(WEB);
    assert_eq!(numbers(&driver), [0u64; 0]);
    driver.change_web(|pool| pool.history = 3);
    driver.accept(WEB);
    assert_eq!(numbers(&driver).len(), 1);
}

#[test]
fn a_changed_affinity_starts_with_an_empty_table() {
    let mut driver = driver_with(|pool| pool.affinity = cookie(60_000));
    let workers = [driver.worker(), driver.worker()];
    let id = KeySource::Cookie(String::new()).of_value(b"somebody");
    let entries =
        |driver: &Driver| driver.core.snapshot().pools[0].affinity.clone().map(|a| a.entries);
    let conn = driver.accept(WEB);
    driver.core.first_bytes(driver.now, conn, id);
    driver.pump();
    assert_eq!(entries(&driver), Some(1));
    let awaited = driver.accept(WEB);
    assert!(driver.core.awaits_bytes(awaited));
    driver.core.discarded();
    driver.change_web(|pool| pool.affinity = cookie(1_000));
    assert!(driver.core.discarded().is_some(), "a table for the caller to drop");
    assert_eq!(entries(&driver), Some(0));
    assert!(!driver.core.awaits_bytes(awaited));
    assert_eq!(driver.loads(&workers), [1, 1]);
    driver.change_web(|pool| pool.affinity = None);
    assert_eq!(entries(&driver), None);
    driver.accept(WEB);
    // Existing workers have bindings in the new table, and lose them when they leave.
    driver.change_web(|pool| pool.affinity = cookie(1_000));
    let conn = driver.accept(WEB);
    driver.core.first_bytes(driver.now, conn, id);
    driver.pump();
    assert_eq!(entries(&driver), Some(1));
    assert_eq!(driver.loads(&workers), [2, 2]);
    driver.take_all(workers[0]);
    driver.leave(workers[0], Departure::Died);
    driver.core.check();
}

#[test]
fn fewer_first_bytes_are_awaited_at_once() {
    let mut driver = driver_with(|pool| pool.affinity = cookie(60_000));
    let worker = driver.worker();
    let conns: Vec<_> = (0..4).map(|_| driver.accept(WEB)).collect();
    driver.change_web(|pool| pool.peek.max_awaiting = 1);
    assert_eq!(driver.loads(&[worker]), [3]);
    assert!(driver.core.awaits_bytes(conns[3]), "the oldest go first");
}

#[test]
fn a_removed_pool_and_listener_serve_accepted_clients() {
    let (mut driver, worker) = two_pools();
    driver.accept(SECOND);
    driver.events();
    driver.core.retire_listener(SECOND);
    driver.core.retire_pool(driver.now, OTHER);
    driver.turn();
    assert_eq!(driver.core.accepting(SECOND), Accepting::Finish);
    assert_eq!(driver.core.accepting(WEB), Accepting::Pause, "the other listener is as before");
    let late = driver.accept(SECOND);
    driver.turn();
    assert_eq!(driver.state(worker), State::Active, "more may come");
    driver.core.listener_closed(driver.now, SECOND);
    driver.turn();
    assert_eq!(driver.state(worker), State::Active, "what it leaves untaken must find another");
    let refusal = driver.join(Hello { pool: "other".to_owned(), ..hello() }).unwrap_err();
    assert_eq!(refusal.reason, "there is no pool `other`: the configuration has web");
    assert_eq!(driver.take_all(worker), 2);
    assert!(driver.is_served(late));
    assert_eq!(driver.state(worker), State::Draining);
    let names = |pools: &[(&str, &str)]| -> Vec<(String, String)> {
        pools.iter().map(|(name, state)| ((*name).to_owned(), (*state).to_owned())).collect()
    };
    assert_eq!(driver.shown_pools(), names(&[("web", "no-worker"), ("other", "removed")]));
    assert_eq!(driver.core.listeners().collect::<Vec<_>>(), [WEB]);
    driver.finish(worker, 2);
    driver.leave(worker, Departure::Disconnected);
    assert_eq!(driver.shown_pools(), names(&[("web", "no-worker")]));
    let told = driver.events();
    let missed = Event::NoUsableWorker { pool: OTHER };
    assert!(!told.contains(&missed), "no worker is expected there: {told:?}");
    assert_eq!((driver.core.totals().accepted, driver.core.totals().taken), (2, 2));
    driver.core.check();
}

#[test]
fn without_a_worker_accepted_clients_are_refused_in_time() {
    let mut driver = Driver::new(vec![settings(), other()], vec![listener(), second()]);
    driver.core.retire_listener(SECOND);
    driver.core.retire_pool(driver.now, OTHER);
    let late = driver.accept(SECOND);
    driver.core.listener_closed(driver.now, SECOND);
    driver.turn();
    assert_eq!(driver.closed(late), None);
    driver.wait(ms(5_000));
    assert_eq!(driver.closed(late), Some(CloseReason::NoWorker));
    assert_eq!(driver.shown_pools().len(), 1);
}

#[test]
fn a_removed_pool_needs_no_turn_and_no_log_line() {
    for with_worker in [false, true] {
        let mut driver = Driver::new(vec![settings(), other()], vec![listener(), second()]);
        if with_worker {
            driver.trusted(Hello { pool: "other".to_owned(), ..hello() });
        }
        driver.core.retire_listener(SECOND);
        driver.core.retire_pool(driver.now, OTHER);
        driver.core.listener_closed(driver.now, SECOND);
        driver.turn();
        driver.events();
        // `wait_for_worker` ends, with all other timers.
        driver.wait(ms(5_000));
        for _ in 0..20 {
            driver.wait(ms(60_000));
        }
        let refused =
            |event: &Event| matches!(event, Event::StillRefusing { pool, .. } if *pool == OTHER);
        let told = driver.events();
        assert!(!told.iter().any(refused), "{told:?}");
        let due = driver.core.deadline();
        assert!(due.is_none_or(|due| due > driver.now), "{due:?} at {:?}", driver.now);
    }
}

#[test]
fn a_pool_that_comes_back_has_its_workers() {
    let (mut driver, old) = two_pools();
    driver.accept(SECOND);
    driver.take_all(old);
    driver.core.retire_listener(SECOND);
    driver.core.listener_closed(driver.now, SECOND);
    driver.core.retire_pool(driver.now, OTHER);
    driver.turn();
    assert_eq!(driver.state(old), State::Draining);
    // With other settings: its table is empty, and no client is refused before the new time.
    let settings = PoolSettings { affinity: cookie(1000), wait_for_worker: ms(50), ..other() };
    let id = driver.core.add_pool(driver.now, settings.clone(), 7);
    let third = driver.core.add_listener(ListenerSettings { pool: id, ..second() });
    driver.pump();
    assert_eq!((id, third), (OTHER, SECOND), "nothing referred to the old ones");
    assert_eq!(driver.core.pool_settings(id), Some(&settings));
    let shown: Vec<(String, String)> = driver.shown_pools();
    assert_eq!(shown[1], ("other".to_owned(), "ready".to_owned()));
    let workers = &driver.core.snapshot().pools[1].workers;
    assert_eq!((workers.len(), workers[0].load, workers[0].state), (1, 1, State::Active));
    assert_eq!(driver.core.accepting(third), Accepting::Yes);
    driver.core.check();
}

#[test]
fn a_pool_that_comes_back_at_once_was_never_gone() {
    let (mut driver, worker) = two_pools();
    // Its listener's queue is not empty yet, so its workers are not drained yet.
    driver.core.retire_listener(SECOND);
    driver.core.retire_pool(driver.now, OTHER);
    driver.turn();
    assert_eq!(driver.core.add_pool(driver.now, other(), 7), OTHER);
    driver.core.listener_closed(driver.now, SECOND);
    driver.turn();
    assert_eq!(driver.state(worker), State::Active);
    assert_eq!(driver.shown_pools()[1].1, "ready");
}

#[test]
fn a_listener_that_is_added_leads_to_the_workers_that_are_there() {
    let mut driver = driver();
    let worker = driver.worker();
    let id = driver.core.add_listener(ListenerSettings { name: "more".to_owned(), ..listener() });
    assert_eq!(driver.core.accepting(id), Accepting::Yes);
    driver.accept(id);
    assert_eq!(driver.take_all(worker), 1);
    assert_eq!(driver.core.snapshot().listeners[1].accepted, 1);
}

#[test]
fn processes_come_and_are_not_started_again() {
    let spawns = |driver: &mut Driver| -> Vec<u32> {
        let number = |effect: Effect| match effect {
            Effect::Spawn { process } => Some(process.place),
            _ => None,
        };
        driver.log.drain(..).filter_map(number).collect()
    };
    let process = |place| ProcessId { pool: PoolId(0), place, start: place + 1 };
    let mut driver = driver_with(|pool| pool.processes = 1);
    assert_eq!(spawns(&mut driver), [0]);
    driver.change_web(|pool| pool.processes = 3);
    assert_eq!(spawns(&mut driver), [1, 2]);
    for number in 0..3 {
        driver.core.spawned(driver.now, process(number), true);
    }
    driver.change_web(|pool| pool.processes = 1);
    driver.core.exited(driver.now, process(2));
    driver.wait(RESTART_MAX);
    assert!(spawns(&mut driver).is_empty(), "no pool wants it any more");
    // The second one was told to end and has not ended yet.
    driver.core.scale(driver.now, PoolId(0), 4);
    driver.wait(ms(0));
    assert_eq!(spawns(&mut driver), [1, 2, 3], "scaling is the same");
}

#[test]
fn workers_of_surplus_processes_are_drained() {
    let pool = |processes| PoolSettings { processes, ..settings() };
    let mut core = Core::new(vec![pool(2)], vec![listener()], Time(1));
    let mut join = |number| {
        let spawned = Some(ProcessId { pool: PoolId(0), place: number, start: number + 1 });
        let join = Join { pid: 1, uid: 0, gids: vec![0], hello: hello(), spawned };
        core.join(Time(2), &join).unwrap()
    };
    let (first, second) = (join(0), join(1));
    core.change_pool(Time(3), PoolId(0), pool(1), 7);
    assert_eq!(core.worker_state(first), Some(State::Active));
    assert_eq!(core.worker_state(second), Some(State::Draining));
}

#[test]
fn a_surplus_process_that_joins_gets_nothing() {
    let mut driver = driver_with(|pool| pool.processes = 8);
    let join = |driver: &mut Driver, number| {
        let process = ProcessId { pool: PoolId(0), place: number, start: number + 1 };
        driver.core.spawned(driver.now, process, true);
        driver.join_as(hello(), Some(process)).unwrap()
    };
    let wanted = [join(&mut driver, 0), join(&mut driver, 1)];
    driver.core.scale(driver.now, PoolId(0), 2);
    driver.events();
    // It joins before the dispatcher knows that it was started.
    let process = ProcessId { pool: PoolId(0), place: 7, start: 8 };
    let late = driver.join_as(hello(), Some(process)).unwrap();
    let draining = Event::Draining { worker: late, live: 0, deadline: None };
    assert!(driver.events().contains(&draining), "it gets a notice, so that it ends");
    for _ in 0..4 {
        driver.accept(WEB);
    }
    assert_eq!(driver.loads(&wanted), [2, 2]);
    assert_eq!(driver.state(late), State::Draining);
    assert_eq!(driver.resume(late), Err(CannotResume::Surplus));
    assert_eq!(driver.state(late), State::Draining);
    driver.core.scale(driver.now, PoolId(0), 8);
    assert_eq!(driver.state(late), State::Active, "wanted again");
    // A worker that was started by itself is no process of the dispatcher.
    driver.core.scale(driver.now, PoolId(0), 1);
    let own = driver.worker();
    assert_eq!(driver.state(own), State::Active);
}

#[test]
fn no_worker_is_resumed_in_a_removed_pool() {
    let (mut driver, worker) = two_pools();
    driver.core.retire_listener(SECOND);
    driver.core.listener_closed(driver.now, SECOND);
    driver.core.retire_pool(driver.now, OTHER);
    driver.turn();
    assert_eq!(driver.state(worker), State::Draining);
    assert_eq!(driver.resume(worker), Err(CannotResume::PoolRemoved));
    assert_eq!(driver.state(worker), State::Draining);
}

#[test]
fn another_slow_start_counts_at_once() {
    let mut driver = driver_with(|pool| pool.slow_start = ms(10_000));
    let old = driver.worker();
    driver.wait(ms(10_000));
    let new = driver.worker();
    driver.wait(ms(5_000));
    let warm = |driver: &Driver| {
        let status = driver.core.snapshot();
        status.pools[0].workers.iter().map(|worker| worker.warm_percent).collect::<Vec<_>>()
    };
    assert_eq!(warm(&driver), [100, 51]);
    driver.change_web(|pool| pool.slow_start = ms(20_000));
    assert_eq!(warm(&driver), [100, 26]);
    driver.change_web(|pool| pool.slow_start = ms(0));
    assert_eq!(warm(&driver), [100, 100]);
    for _ in 0..10 {
        driver.accept(WEB);
    }
    assert_eq!(driver.loads(&[old, new]), [5, 5]);
}

#[test]
fn changes_at_any_moment_break_nothing() {
    for seed in 0..40 {
        let mut random = Random::new(seed);
        let mut driver = driver();
        driver.logging = false;
        let mut workers = vec![driver.worker()];
        let mut listeners = vec![WEB];
        for _ in 0..300 {
            let listener = listeners[random.below(listeners.len() as u64) as usize];
            let place = random.below(workers.len() as u64) as usize;
            let worker = workers[place];
            match random.below(15) {
                0..4 if driver.core.accepting(listener) != Accepting::Pause => {
                    let conn = driver.accept(listener);
                    if !random.once_in(4) {
                        driver.say(conn, known(&random.below(6).to_string()));
                    }
                }
                4 | 5 => {
                    driver.take(worker);
                }
                // Few names, so that some repeat, both beside draining workers and after gone ones.
                6 => {
                    let new = driver.called(&format!("w{}", random.below(2)));
                    if workers.len() < 6 {
                        workers.push(new);
                    } else {
                        driver.leave(worker, Departure::Died);
                        workers[place] = new;
                    }
                }
                7 if random.once_in(3) => driver.leave(worker, Departure::Died),
                12 => drop(driver.drain(worker)),
                13 => drop(driver.resume(worker)),
                14 if random.once_in(3) => driver.goodbye(worker),
                8 => driver.change_web(|pool| {
                    pool.policy = Policy::ALL[random.below(7) as usize];
                    pool.max_connections_per_worker = 1 + random.below(20) as u32;
                    pool.history = random.below(4) as u32;
                    pool.peek.max_awaiting = 1 + random.below(4) as u32;
                    pool.affinity = if random.once_in(2) { cookie(500) } else { None };
                }),
                9 if listeners.len() < 5 => {
                    listeners.push(driver.core.add_listener(listener_at(0)))
                }
                10 if listeners.len() > 1 => {
                    let gone = listeners.swap_remove(1);
                    driver.core.retire_listener(gone);
                    driver.accept(gone);
                    driver.core.listener_closed(driver.now, gone);
                }
                _ => driver.wait(ms(random.below(400))),
            }
            driver.core.check();
        }
    }
}

fn listener_at(pool: u16) -> ListenerSettings {
    ListenerSettings { pool: PoolId(pool), ..listener() }
}
