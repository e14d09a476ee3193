//! Changing the configuration of a core at work: no connection notices, and every invariant holds all the while.

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
fn two_pools() -> (Desk, WorkerId) {
    let mut desk = Desk::new(vec![settings(), other()], vec![listener(), second()]);
    let worker = desk.trusted(Hello { pool: "other".to_owned(), ..hello() });
    (desk, worker)
}

fn cookie(ttl: u64) -> Option<Affinity> {
    let key = KeySource::Cookie("ID".to_owned());
    Some(Affinity { key, ttl: ms(ttl), max_entries: 100 })
}

/// Short forms for what these tests do.
pub(super) trait ChangeSteps {
    fn change_web(&mut self, change: impl FnOnce(&mut PoolSettings));
    fn shown_pools(&self) -> Vec<(String, String)>;
}

impl ChangeSteps for Desk {
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
    let mut desk = desk();
    let workers: Vec<_> = (0..3).map(|_| desk.worker()).collect();
    let mut live = 0;
    for policy in Policy::ALL.into_iter().chain([Policy::LeastConnections]) {
        desk.change_web(|pool| pool.policy = policy);
        assert_eq!(desk.core.snapshot().pools[0].policy, policy);
        for _ in 0..3 {
            desk.accept(WEB);
        }
        live += 3;
        for &worker in &workers {
            desk.take_all(worker);
        }
        assert_eq!(desk.loads(&workers).iter().sum::<u64>(), live);
    }
    assert_eq!(desk.core.totals().taken, live);
}

#[test]
fn a_new_policy_knows_of_priorities_and_loads() {
    let mut desk = desk();
    let (first, standby) = (desk.with_priority(9), desk.with_priority(1));
    for _ in 0..4 {
        desk.accept(WEB);
    }
    assert_eq!(desk.loads(&[first, standby]), [2, 2]);
    desk.change_web(|pool| pool.policy = Policy::Failover);
    for _ in 0..4 {
        desk.accept(WEB);
    }
    assert_eq!(desk.loads(&[first, standby]), [6, 2]);
    desk.change_web(|pool| pool.policy = Policy::LeastConnections);
    for _ in 0..4 {
        desk.accept(WEB);
    }
    assert_eq!(desk.loads(&[first, standby]), [6, 6]);
}

#[test]
fn limits_count_at_once() {
    let mut desk = desk();
    let modest = desk.trusted(Hello { max_connections: 3, ..hello() });
    for _ in 0..2 {
        desk.accept(WEB);
    }
    assert_eq!(desk.core.accepting(WEB), Accepting::Yes);
    desk.change_web(|pool| pool.max_connections_per_worker = 2);
    assert_eq!(desk.core.max_connections_of(modest), Some(2));
    assert_eq!(desk.core.accepting(WEB), Accepting::Pause);
    desk.change_web(|pool| pool.max_connections_per_worker = 50);
    assert_eq!(desk.core.max_connections_of(modest), Some(3), "its own limit counts too");
    assert_eq!(desk.core.accepting(WEB), Accepting::Yes);
    // What is out already has less time now.
    desk.change_web(|pool| pool.handoff_timeout = ms(10));
    desk.wait(ms(10));
    assert_eq!(desk.state(modest), State::Suspect);
}

#[test]
fn the_history_keeps_as_many_as_it_is_told() {
    let mut desk = desk_with(|pool| pool.history = 4);
    desk.worker();
    for _ in 0..6 {
        desk.accept(WEB);
    }
    let numbers = |desk: &Desk| {
        let decisions = desk.core.history(PoolId(0), 0);
        decisions.iter().map(|decision| decision.number).collect::<Vec<_>>()
    };
    assert_eq!(numbers(&desk), [3, 4, 5, 6]);
    assert!(desk.core.discarded().is_none());
    desk.change_web(|pool| pool.history = 2);
    assert_eq!(numbers(&desk), [5, 6]);
    assert!(desk.core.discarded().is_some(), "what is forgotten is dropped by somebody else");
    desk.change_web(|pool| pool.history = 0);
    desk.accept(WEB);
    assert_eq!(numbers(&desk), [0u64; 0]);
    desk.change_web(|pool| pool.history = 3);
    desk.accept(WEB);
    assert_eq!(numbers(&desk).len(), 1);
}

#[test]
fn another_affinity_starts_afresh_and_nobody_waits_for_the_old_one() {
    let mut desk = desk_with(|pool| pool.affinity = cookie(60_000));
    let workers = [desk.worker(), desk.worker()];
    let id = KeySource::Cookie(String::new()).of_value(b"somebody");
    let entries = |desk: &Desk| desk.core.snapshot().pools[0].affinity.clone().map(|a| a.entries);
    let conn = desk.accept(WEB);
    desk.core.first_bytes(desk.now, conn, id);
    desk.pump();
    assert_eq!(entries(&desk), Some(1));
    let awaited = desk.accept(WEB);
    assert!(desk.core.awaits_bytes(awaited));
    desk.core.discarded();
    desk.change_web(|pool| pool.affinity = cookie(1_000));
    assert!(desk.core.discarded().is_some(), "a table to be dropped by somebody else");
    assert_eq!(entries(&desk), Some(0));
    assert!(!desk.core.awaits_bytes(awaited));
    assert_eq!(desk.loads(&workers), [1, 1]);
    desk.change_web(|pool| pool.affinity = None);
    assert_eq!(entries(&desk), None);
    desk.accept(WEB);
    // Workers that were here before have homes again, and lose them when they go.
    desk.change_web(|pool| pool.affinity = cookie(1_000));
    let conn = desk.accept(WEB);
    desk.core.first_bytes(desk.now, conn, id);
    desk.pump();
    assert_eq!(entries(&desk), Some(1));
    assert_eq!(desk.loads(&workers), [2, 2]);
    desk.take_all(workers[0]);
    desk.leave(workers[0], Departure::Died);
    desk.core.check();
}

#[test]
fn fewer_first_bytes_are_awaited_at_once() {
    let mut desk = desk_with(|pool| pool.affinity = cookie(60_000));
    let worker = desk.worker();
    let conns: Vec<_> = (0..4).map(|_| desk.accept(WEB)).collect();
    desk.change_web(|pool| pool.peek.max_awaiting = 1);
    assert_eq!(desk.loads(&[worker]), [3]);
    assert!(desk.core.awaits_bytes(conns[3]), "the oldest go first");
}

#[test]
fn a_pool_and_its_listener_that_are_taken_out_serve_whoever_came() {
    let (mut desk, worker) = two_pools();
    desk.accept(SECOND);
    desk.events();
    desk.core.retire_listener(SECOND);
    desk.core.retire_pool(desk.now, OTHER);
    desk.turn();
    assert_eq!(desk.core.accepting(SECOND), Accepting::Finish);
    assert_eq!(desk.core.accepting(WEB), Accepting::Pause, "the other listener is as before");
    let late = desk.accept(SECOND);
    desk.turn();
    assert_eq!(desk.state(worker), State::Active, "more may come");
    desk.core.listener_closed(desk.now, SECOND);
    desk.turn();
    assert_eq!(desk.state(worker), State::Active, "what it leaves untaken must find another");
    let refusal = desk.join(Hello { pool: "other".to_owned(), ..hello() }).unwrap_err();
    assert_eq!(refusal.reason, "there is no pool `other`: the configuration has web");
    assert_eq!(desk.take_all(worker), 2);
    assert!(desk.is_served(late));
    assert_eq!(desk.state(worker), State::Draining);
    let names = |pools: &[(&str, &str)]| -> Vec<(String, String)> {
        pools.iter().map(|(name, state)| ((*name).to_owned(), (*state).to_owned())).collect()
    };
    assert_eq!(desk.shown_pools(), names(&[("web", "no-worker"), ("other", "removed")]));
    assert_eq!(desk.core.listeners().collect::<Vec<_>>(), [WEB]);
    desk.finish(worker, 2);
    desk.leave(worker, Departure::Disconnected);
    assert_eq!(desk.shown_pools(), names(&[("web", "no-worker")]));
    let told = desk.events();
    let missed = Event::NoUsableWorker { pool: OTHER };
    assert!(!told.contains(&missed), "nobody expects a worker there: {told:?}");
    assert_eq!((desk.core.totals().accepted, desk.core.totals().taken), (2, 2));
    desk.core.check();
}

#[test]
fn without_a_worker_those_that_came_are_turned_away_in_time() {
    let mut desk = Desk::new(vec![settings(), other()], vec![listener(), second()]);
    desk.core.retire_listener(SECOND);
    desk.core.retire_pool(desk.now, OTHER);
    let late = desk.accept(SECOND);
    desk.core.listener_closed(desk.now, SECOND);
    desk.turn();
    assert_eq!(desk.closed(late), None);
    desk.wait(ms(5_000));
    assert_eq!(desk.closed(late), Some(CloseReason::NoWorker));
    assert_eq!(desk.shown_pools().len(), 1);
}

#[test]
fn a_pool_that_was_taken_out_needs_no_turn_and_no_line_any_more() {
    for with_worker in [false, true] {
        let mut desk = Desk::new(vec![settings(), other()], vec![listener(), second()]);
        if with_worker {
            desk.trusted(Hello { pool: "other".to_owned(), ..hello() });
        }
        desk.core.retire_listener(SECOND);
        desk.core.retire_pool(desk.now, OTHER);
        desk.core.listener_closed(desk.now, SECOND);
        desk.turn();
        desk.events();
        // The time that clients wait for a worker ends, and what else is due with it.
        desk.wait(ms(5_000));
        for _ in 0..20 {
            desk.wait(ms(60_000));
        }
        let refused =
            |event: &Event| matches!(event, Event::StillRefusing { pool, .. } if *pool == OTHER);
        let told = desk.events();
        assert!(!told.iter().any(refused), "{told:?}");
        let due = desk.core.deadline();
        assert!(due.is_none_or(|due| due > desk.now), "{due:?} at {:?}", desk.now);
    }
}

#[test]
fn a_pool_that_comes_back_has_its_workers() {
    let (mut desk, old) = two_pools();
    desk.accept(SECOND);
    desk.take_all(old);
    desk.core.retire_listener(SECOND);
    desk.core.listener_closed(desk.now, SECOND);
    desk.core.retire_pool(desk.now, OTHER);
    desk.turn();
    assert_eq!(desk.state(old), State::Draining);
    // Under other settings: it has forgotten what it knew, and nobody is turned away before the new time.
    let settings = PoolSettings { affinity: cookie(1000), wait_for_worker: ms(50), ..other() };
    let id = desk.core.add_pool(desk.now, settings.clone(), 7);
    let third = desk.core.add_listener(ListenerSettings { pool: id, ..second() });
    desk.pump();
    assert_eq!((id, third), (OTHER, SECOND), "nothing referred to the old ones");
    assert_eq!(desk.core.pool_settings(id), Some(&settings));
    let shown: Vec<(String, String)> = desk.shown_pools();
    assert_eq!(shown[1], ("other".to_owned(), "ready".to_owned()));
    let workers = &desk.core.snapshot().pools[1].workers;
    assert_eq!((workers.len(), workers[0].load, workers[0].state), (1, 1, State::Active));
    assert_eq!(desk.core.accepting(third), Accepting::Yes);
    desk.core.check();
}

#[test]
fn a_pool_that_comes_back_at_once_was_never_gone() {
    let (mut desk, worker) = two_pools();
    // Its listener is not emptied yet, so its workers are not drained yet.
    desk.core.retire_listener(SECOND);
    desk.core.retire_pool(desk.now, OTHER);
    desk.turn();
    assert_eq!(desk.core.add_pool(desk.now, other(), 7), OTHER);
    desk.core.listener_closed(desk.now, SECOND);
    desk.turn();
    assert_eq!(desk.state(worker), State::Active);
    assert_eq!(desk.shown_pools()[1].1, "ready");
}

#[test]
fn a_listener_that_is_added_leads_to_the_workers_that_are_there() {
    let mut desk = desk();
    let worker = desk.worker();
    let id = desk.core.add_listener(ListenerSettings { name: "more".to_owned(), ..listener() });
    assert_eq!(desk.core.accepting(id), Accepting::Yes);
    desk.accept(id);
    assert_eq!(desk.take_all(worker), 1);
    assert_eq!(desk.core.snapshot().listeners[1].accepted, 1);
}

#[test]
fn processes_come_and_are_not_started_again() {
    let spawns = |desk: &mut Desk| -> Vec<u32> {
        let number = |effect: Effect| match effect {
            Effect::Spawn { process } => Some(process.number),
            _ => None,
        };
        desk.log.drain(..).filter_map(number).collect()
    };
    let process = |number| ProcessId { pool: PoolId(0), number };
    let mut desk = desk_with(|pool| pool.processes = 1);
    assert_eq!(spawns(&mut desk), [0]);
    desk.change_web(|pool| pool.processes = 3);
    assert_eq!(spawns(&mut desk), [1, 2]);
    for number in 0..3 {
        desk.core.spawned(desk.now, process(number), true);
    }
    desk.change_web(|pool| pool.processes = 1);
    desk.core.exited(desk.now, process(2));
    desk.wait(RESTART_MAX);
    assert!(spawns(&mut desk).is_empty(), "nobody wants it any more");
    // The second never ended.
    desk.core.scale(desk.now, PoolId(0), 4);
    desk.wait(ms(0));
    assert_eq!(spawns(&mut desk), [2, 3], "scaling is the same");
}

#[test]
fn workers_of_processes_that_are_too_many_are_drained() {
    let pool = |processes| PoolSettings { processes, ..settings() };
    let mut core = Core::new(vec![pool(2)], vec![listener()], Time(1));
    let mut join = |number| {
        let spawned = Some(ProcessId { pool: PoolId(0), number });
        let join = Join { pid: 1, uid: 0, gids: vec![0], hello: hello(), spawned };
        core.join(Time(2), &join).unwrap()
    };
    let (first, second) = (join(0), join(1));
    core.change_pool(Time(3), PoolId(0), pool(1), 7);
    assert_eq!(core.worker_state(first), Some(State::Active));
    assert_eq!(core.worker_state(second), Some(State::Draining));
}

#[test]
fn a_process_that_is_too_many_when_it_comes_gets_nothing() {
    let mut desk = desk_with(|pool| pool.processes = 8);
    let join = |desk: &mut Desk, number| {
        let process = ProcessId { pool: PoolId(0), number };
        desk.core.spawned(desk.now, process, true);
        desk.join_as(hello(), Some(process)).unwrap()
    };
    let wanted = [join(&mut desk, 0), join(&mut desk, 1)];
    desk.core.scale(desk.now, PoolId(0), 2);
    desk.events();
    let late = join(&mut desk, 7);
    let draining = Event::Draining { worker: late, live: 0, deadline: None };
    assert!(desk.events().contains(&draining), "it is told, so that it ends");
    for _ in 0..4 {
        desk.accept(WEB);
    }
    assert_eq!(desk.loads(&wanted), [2, 2]);
    assert_eq!(desk.state(late), State::Draining);
    assert_eq!(desk.resume(late), Err(CannotResume::Surplus));
    assert_eq!(desk.state(late), State::Draining);
    desk.core.scale(desk.now, PoolId(0), 8);
    assert_eq!(desk.state(late), State::Active, "wanted again");
    // A service that came by itself is nobody's process.
    desk.core.scale(desk.now, PoolId(0), 1);
    let own = desk.worker();
    assert_eq!(desk.state(own), State::Active);
}

#[test]
fn nobody_is_resumed_in_a_pool_that_was_taken_out() {
    let (mut desk, worker) = two_pools();
    desk.core.retire_listener(SECOND);
    desk.core.listener_closed(desk.now, SECOND);
    desk.core.retire_pool(desk.now, OTHER);
    desk.turn();
    assert_eq!(desk.state(worker), State::Draining);
    assert_eq!(desk.resume(worker), Err(CannotResume::PoolRemoved));
    assert_eq!(desk.state(worker), State::Draining);
}

#[test]
fn another_slow_start_counts_at_once() {
    let mut desk = desk_with(|pool| pool.slow_start = ms(10_000));
    let old = desk.worker();
    desk.wait(ms(10_000));
    let new = desk.worker();
    desk.wait(ms(5_000));
    let warm = |desk: &Desk| {
        let status = desk.core.snapshot();
        status.pools[0].workers.iter().map(|worker| worker.warm_percent).collect::<Vec<_>>()
    };
    assert_eq!(warm(&desk), [100, 51]);
    desk.change_web(|pool| pool.slow_start = ms(20_000));
    assert_eq!(warm(&desk), [100, 26]);
    desk.change_web(|pool| pool.slow_start = ms(0));
    assert_eq!(warm(&desk), [100, 100]);
    for _ in 0..10 {
        desk.accept(WEB);
    }
    assert_eq!(desk.loads(&[old, new]), [5, 5]);
}

#[test]
fn changes_at_any_moment_break_nothing() {
    for seed in 0..40 {
        let mut random = Random::new(seed);
        let mut desk = desk();
        desk.logging = false;
        let mut workers = vec![desk.worker()];
        let mut listeners = vec![WEB];
        for _ in 0..300 {
            let listener = listeners[random.below(listeners.len() as u64) as usize];
            let place = random.below(workers.len() as u64) as usize;
            let worker = workers[place];
            match random.below(15) {
                0..4 if desk.core.accepting(listener) != Accepting::Pause => {
                    let conn = desk.accept(listener);
                    if !random.once_in(4) {
                        desk.say(conn, known(&random.below(6).to_string()));
                    }
                }
                4 | 5 => {
                    desk.take(worker);
                }
                // Of a few names, so that some come again, beside those that drain and in place of those that are gone.
                6 => {
                    let new = desk.called(&format!("w{}", random.below(2)));
                    if workers.len() < 6 {
                        workers.push(new);
                    } else {
                        desk.leave(worker, Departure::Died);
                        workers[place] = new;
                    }
                }
                7 if random.once_in(3) => desk.leave(worker, Departure::Died),
                12 => drop(desk.drain(worker)),
                13 => drop(desk.resume(worker)),
                14 if random.once_in(3) => desk.goodbye(worker),
                8 => desk.change_web(|pool| {
                    pool.policy = Policy::ALL[random.below(7) as usize];
                    pool.max_connections_per_worker = 1 + random.below(20) as u32;
                    pool.history = random.below(4) as u32;
                    pool.peek.max_awaiting = 1 + random.below(4) as u32;
                    pool.affinity = if random.once_in(2) { cookie(500) } else { None };
                }),
                9 if listeners.len() < 5 => listeners.push(desk.core.add_listener(listener_at(0))),
                10 if listeners.len() > 1 => {
                    let gone = listeners.swap_remove(1);
                    desk.core.retire_listener(gone);
                    desk.accept(gone);
                    desk.core.listener_closed(desk.now, gone);
                }
                _ => desk.wait(ms(random.below(400))),
            }
            desk.core.check();
        }
    }
}

fn listener_at(pool: u16) -> ListenerSettings {
    ListenerSettings { pool: PoolId(pool), ..listener() }
}
