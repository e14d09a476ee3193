//! Processes that the dispatcher starts, replaces and ends.

mod random;
mod replacing;
mod rolls;

use super::*;

/// Short forms for processes.
pub(super) trait ProcessSteps {
    /// The processes that were to be started since the last call.
    fn starts(&mut self) -> Vec<ProcessId>;
    /// The same, as places.
    fn started_places(&mut self) -> Vec<u32>;
    /// The processes that were to be ended since the last call of any of these.
    fn stops(&mut self) -> Vec<ProcessId>;
    /// The process was started.
    fn runs(&mut self, process: ProcessId);
    /// The process was started, and its worker has joined.
    fn serves(&mut self, process: ProcessId) -> WorkerId;
    /// Its worker is gone, and the process has ended.
    fn dies(&mut self, process: ProcessId, worker: Option<WorkerId>);
    fn counts(&self) -> (u32, u32, u32, u32);
}

impl ProcessSteps for Driver {
    fn starts(&mut self) -> Vec<ProcessId> {
        let started = |effect: Effect| match effect {
            Effect::Spawn { process } => Some(process),
            _ => None,
        };
        self.log.drain(..).filter_map(started).collect()
    }

    fn started_places(&mut self) -> Vec<u32> {
        self.starts().into_iter().map(|process| process.place).collect()
    }

    fn stops(&mut self) -> Vec<ProcessId> {
        let stopped = |effect: &Effect| match effect {
            Effect::StopProcess { process, .. } => Some(*process),
            _ => None,
        };
        self.log.iter().filter_map(stopped).collect()
    }

    fn runs(&mut self, process: ProcessId) {
        self.core.spawned(self.now, process, true);
        self.pump();
    }

    fn serves(&mut self, process: ProcessId) -> WorkerId {
        self.runs(process);
        self.join_as(hello(), Some(process)).unwrap()
    }

    fn dies(&mut self, process: ProcessId, worker: Option<WorkerId>) {
        if let Some(worker) = worker {
            self.core.leave(self.now, worker, Departure::Died);
        }
        self.core.exited(self.now, process);
        self.pump();
    }

    fn counts(&self) -> (u32, u32, u32, u32) {
        let ProcessCounts { wanted, active, starting, leaving } = self.core.processes(PoolId(0));
        (wanted, active, starting, leaving)
    }
}

fn one() -> (Driver, ProcessId) {
    let mut driver = driver_with(|pool| pool.processes = 1);
    let first = driver.starts()[0];
    (driver, first)
}

#[test]
fn all_processes_are_started_before_anything_else() {
    let mut driver = driver_with(|pool| pool.processes = 3);
    assert_eq!(driver.started_places(), [0, 1, 2]);
    assert_eq!(driver.counts(), (3, 0, 3, 0));
}

#[test]
fn restarts_back_off_to_a_bound_and_recover() {
    let mut driver = driver_with(|pool| {
        pool.processes = 1;
        pool.wait_for_worker = ms(1_000_000_000);
        pool.supervision.crash_loop_after = 100;
    });
    let mut delays = Vec::new();
    for _ in 0..11 {
        let process = driver.starts()[0];
        driver.core.spawned(driver.now, process, false);
        driver.pump();
        let delay = driver.core.deadline().unwrap() - driver.now;
        driver.wait(delay - ms(1));
        assert!(driver.starts().is_empty());
        driver.wait(ms(1));
        delays.push(delay.as_millis());
    }
    assert_eq!(delays, [100, 200, 400, 800, 1_600, 3_200, 6_400, 12_800, 25_600, 30_000, 30_000]);
    let process = driver.starts()[0];
    let worker = driver.serves(process);
    driver.wait(RESTART_RESET);
    driver.events();
    driver.dies(process, Some(worker));
    let again = Event::Restarting { process, delay: RESTART_MIN };
    assert!(driver.events().contains(&again));
}

#[test]
fn no_restarts_while_stopping() {
    let mut driver = driver_with(|pool| pool.processes = 2);
    let processes = driver.starts();
    processes.iter().for_each(|&process| driver.runs(process));
    driver.dies(processes[0], None);
    driver.core.stop(driver.now, driver.now + ms(60_000));
    driver.dies(processes[1], None);
    driver.starts();
    driver.wait(ms(50_000));
    assert!(driver.starts().is_empty());
}

#[test]
fn a_stopping_pool_restarts_a_process_for_waiting_clients() {
    let (mut driver, process) = one();
    driver.runs(process);
    driver.accept(WEB);
    driver.core.stop(driver.now, driver.now + ms(60_000));
    driver.core.listener_closed(driver.now, WEB);
    driver.dies(process, None);
    driver.wait(RESTART_MIN);
    let next = driver.starts()[0];
    let worker = driver.serves(next);
    driver.take_all(worker);
    driver.turn();
    // Now no client waits for it.
    driver.dies(next, None);
    driver.wait(RESTART_MAX);
    assert!(driver.starts().is_empty());
}

#[test]
fn a_change_of_the_command_ends_the_delay() {
    let mut driver = driver_with(|pool| pool.processes = 2);
    let mut first = driver.starts();
    let second = first.pop().unwrap();
    driver.runs(second);
    let mut process = first[0];
    for _ in 0..5 {
        driver.core.spawned(driver.now, process, false);
        driver.pump();
        driver.wait(driver.core.deadline().unwrap() - driver.now);
        process = driver.starts()[0];
    }
    driver.core.spawned(driver.now, process, false);
    driver.wait(RESTART_MIN * 2);
    driver.starts();
    driver.core.renew_processes(driver.now, PoolId(0));
    driver.pump();
    let started = driver.starts();
    assert_eq!((started.len(), started[0].place), (1, 0), "at once; the other one goes on");
    // The delay begins anew.
    driver.core.spawned(driver.now, started[0], false);
    driver.wait(RESTART_MIN);
    assert_eq!(driver.started_places(), [0]);
    // A process that is not wanted is not started.
    driver.core.scale(driver.now, PoolId(0), 1);
    driver.dies(second, None);
    driver.core.renew_processes(driver.now, PoolId(0));
    driver.pump();
    assert!(driver.starts().is_empty());
}

#[test]
fn unknown_processes_are_ignored() {
    let mut driver = driver();
    for pool in [0, 7] {
        let unknown = ProcessId { pool: PoolId(pool), place: 7, start: 1 };
        driver.core.spawned(driver.now, unknown, true);
        driver.core.exceeds_memory(driver.now, unknown);
        let rolled = driver.core.roll_one(driver.now, unknown, None, false);
        assert_eq!(rolled, Err(RollRefusal::NotServing));
        driver.core.exited(driver.now, unknown);
    }
}

#[test]
fn a_process_that_does_not_join_in_time_is_ended() {
    let (mut driver, process) = one();
    driver.runs(process);
    let timeout = Supervision::default().start_timeout;
    driver.wait(timeout - ms(1));
    assert_eq!(driver.stops(), []);
    driver.wait(ms(1));
    assert_eq!(driver.stops(), [process]);
    let stopped = Event::ProcessStopped { process, reason: EndReason::Late };
    assert!(driver.log.contains(&Effect::Event(stopped)));
    // It still runs: the next one starts beside it after a delay, and no third one.
    driver.starts();
    driver.wait(RESTART_MIN);
    let next = driver.starts();
    assert_eq!(next.len(), 1);
    driver.runs(next[0]);
    driver.wait(timeout);
    assert_eq!(driver.stops(), next);
    driver.wait(RESTART_MAX * 2);
    assert_eq!(driver.starts(), [], "two processes of one place are about to end");
    driver.dies(process, None);
    assert_eq!(driver.starts().len(), 1);
    assert_eq!(driver.core.snapshot().pools[0].processes.clone().unwrap().totals.ended_late, 2);
}

/// A worker that gets no more connections and has one left.
fn one_that_leaves() -> (Driver, ProcessId, WorkerId) {
    let (mut driver, process) = one();
    let worker = driver.serves(process);
    driver.wait(RESTART_RESET);
    driver.accept(WEB);
    driver.take_all(worker);
    driver.goodbye(worker);
    (driver, process, worker)
}

#[test]
fn a_worker_that_leaves_frees_its_place_at_once() {
    let (mut driver, process, worker) = one_that_leaves();
    let next = driver.starts();
    assert_eq!(next.len(), 1, "the replacement starts beside it");
    assert_eq!(driver.counts(), (1, 0, 1, 1));
    let second = driver.serves(next[0]);
    assert_eq!(driver.counts(), (1, 1, 0, 1));
    // The limit of processes beyond the wanted ones.
    driver.wait(RESTART_RESET);
    driver.goodbye(second);
    driver.wait(RESTART_MAX);
    assert_eq!(driver.starts(), []);
    driver.finish(worker, 1);
    driver.dies(process, Some(worker));
    assert_eq!(driver.starts().len(), 1);
}

#[test]
fn a_worker_that_leaves_as_soon_as_it_comes_waits_for_the_delay() {
    let mut driver = driver_with(|pool| {
        pool.processes = 1;
        pool.supervision.max_surge = Surge::Processes(100);
    });
    for round in 0..5 {
        let process = driver.starts()[0];
        let worker = driver.serves(process);
        driver.goodbye(worker);
        assert_eq!(driver.starts(), []);
        driver.wait((RESTART_MIN * 2u32.pow(round)) - ms(1));
        assert_eq!(driver.starts(), [], "round {round}");
        driver.wait(ms(1));
    }
}

#[test]
fn a_process_that_left_and_does_not_end_is_ended() {
    let (mut driver, process, worker) = one_that_leaves();
    driver.starts();
    // Its connection may last for any time.
    driver.wait(ms(10_000_000));
    assert_eq!(driver.stops(), []);
    driver.finish(worker, 1);
    let patience = Supervision::default().stop_timeout;
    driver.wait(ms(250));
    driver.wait(patience - ms(250));
    assert_eq!(driver.stops(), []);
    driver.wait(ms(500));
    assert_eq!(driver.stops(), [process]);
    // The same without a worker: it has closed its connection to the dispatcher.
    let (mut driver, process) = one();
    let worker = driver.serves(process);
    driver.goodbye(worker);
    driver.leave(worker, Departure::Disconnected);
    driver.wait(patience);
    driver.wait(ms(500));
    assert!(driver.stops().contains(&process));
}

#[test]
fn a_process_whose_worker_vanishes_is_to_join_again() {
    let (mut driver, process) = one();
    let worker = driver.serves(process);
    driver.leave(worker, Departure::Disconnected);
    assert_eq!(driver.counts(), (1, 0, 1, 0));
    let timeout = Supervision::default().start_timeout;
    driver.wait(timeout - ms(1));
    driver.join_as(hello(), Some(process)).unwrap();
    driver.wait(timeout);
    assert_eq!((driver.stops(), driver.counts()), (vec![], (1, 1, 0, 0)));
}

#[test]
fn a_hung_process_is_replaced() {
    let mut driver = driver_with(|pool| {
        pool.processes = 2;
        pool.supervision.kill_hung_after = Some(ms(20_000));
    });
    let processes = driver.starts();
    let workers: Vec<_> = processes.iter().map(|&process| driver.serves(process)).collect();
    for _ in 0..2 {
        driver.accept(WEB);
    }
    workers.iter().for_each(|&worker| assert_eq!(driver.take_all(worker), 1));
    driver.finish(workers[0], 1);
    driver.finish(workers[1], 1);
    driver.wait(RESTART_RESET);
    // The first one takes nothing any more.
    for _ in 0..6 {
        driver.accept(WEB);
    }
    for _ in 0..100 {
        driver.take_all(workers[1]);
        driver.wait(ms(100));
    }
    assert_eq!(driver.state(workers[0]), State::Suspect);
    assert_eq!(driver.stops(), []);
    for _ in 0..200 {
        driver.take_all(workers[1]);
        driver.wait(ms(100));
    }
    assert_eq!(driver.stops(), [processes[0]]);
    let next = driver.starts();
    assert_eq!((next.len(), next[0].place), (1, 0), "beside it");
    driver.serves(next[0]);
    driver.dies(processes[0], Some(workers[0]));
    assert_eq!(driver.counts(), (2, 2, 0, 0));
    let totals = driver.core.snapshot().pools[0].processes.clone().unwrap().totals;
    assert_eq!((totals.ended_hung, totals.restarts), (1, 1));
}

#[test]
fn a_crash_loop_is_visible_bounded_and_ends() {
    let mut driver = driver_with(|pool| {
        pool.processes = 8;
        pool.wait_for_worker = ms(1_000_000_000);
    });
    let crash_loop =
        |driver: &Driver| driver.core.snapshot().pools[0].processes.clone().unwrap().crash_loop;
    // Every process ends as soon as it was started.
    let run = |driver: &mut Driver, time: Duration| {
        let end = driver.now + time;
        let mut count = 0;
        while driver.now < end {
            for process in driver.starts() {
                count += 1;
                driver.core.spawned(driver.now, process, true);
                driver.core.exited(driver.now, process);
            }
            driver.pump();
            let next = driver.core.deadline().map_or(end, |next| next.min(end));
            driver.wait((next - driver.now).max(ms(1)));
        }
        count
    };
    // 100 ms, 200 ms … 6.4 s: seven delays, so the eighth failure is at 12.7 s.
    assert!(run(&mut driver, ms(12_600)) >= 7 * 8);
    assert!(!crash_loop(&driver));
    run(&mut driver, ms(40_000));
    assert!(crash_loop(&driver));
    assert!(driver.core.snapshot().pools[0].processes.clone().unwrap().next_start_in.is_some());
    let tries = run(&mut driver, ms(600_000));
    assert!((19..=21).contains(&tries), "one process of the pool every 30 s: {tries}");
    // What made them fail is over: the next try stays, and then all others follow.
    let process = loop {
        if let Some(&process) = driver.starts().first() {
            break process;
        }
        driver.wait(ms(1_000));
    };
    driver.serves(process);
    driver.wait(RESTART_RESET - ms(1));
    assert!(driver.starts().is_empty() && crash_loop(&driver));
    driver.wait(ms(1));
    assert!(!crash_loop(&driver));
    assert_eq!(driver.starts().len(), 7);
}

#[test]
fn an_operator_ends_a_crash_loop_at_once() {
    for restart in [true, false] {
        let (mut driver, mut process) = one();
        for _ in 0..7 {
            driver.dies(process, None);
            driver.starts();
            process = loop {
                driver.wait(driver.core.deadline().unwrap() - driver.now);
                if let [process] = driver.starts()[..] {
                    break process;
                }
            };
        }
        driver.dies(process, None);
        assert!(driver.core.snapshot().pools[0].processes.clone().unwrap().crash_loop);
        match restart {
            true => {
                let begun = driver.core.roll(driver.now, PoolId(0), false).unwrap();
                assert_eq!((begun.generation, begun.processes), (Generation(2), 1));
            }
            false => {
                let renewed = driver.core.renew_processes(driver.now, PoolId(0));
                assert_eq!(renewed, Generation(2));
            }
        }
        driver.pump();
        assert!(!driver.core.snapshot().pools[0].processes.clone().unwrap().crash_loop);
        let over = Event::CrashLoopOver { pool: PoolId(0) };
        assert!(driver.log.contains(&Effect::Event(over)));
    }
}

#[test]
fn processes_of_an_earlier_dispatcher_keep_their_places() {
    let mut pool = PoolSettings { processes: 3, ..settings() };
    pool.supervision.drain_timeout = Some(ms(5_000));
    let mut core = Core::new(vec![pool], vec![listener()], Time(1));
    let first = core.adopt(Time(1), PoolId(0), (0, 7), false, Generation::FIRST).unwrap();
    let leaving = core.adopt(Time(1), PoolId(0), (1, 5), true, Generation::FIRST).unwrap();
    // The configuration has fewer processes than before.
    let surplus = core.adopt(Time(1), PoolId(0), (5, 8), false, Generation::FIRST).unwrap();
    core.tick(Time(2));
    let mut started = Vec::new();
    while let Some(effect) = core.effect() {
        if let Effect::Spawn { process } = effect {
            started.push(process);
        }
    }
    let places: Vec<_> = started.iter().map(|process| process.place).collect();
    assert_eq!(places, [1, 2], "only free places are filled");
    assert!(started.iter().all(|process| process.start > 8), "no start has the same number");
    let mut join = |process| {
        let join = Join { pid: 1, uid: 0, gids: vec![0], hello: hello(), spawned: Some(process) };
        let worker = core.join(Time(3), &join).unwrap();
        core.worker_state(worker)
    };
    assert_eq!(join(first), Some(State::Active));
    assert_eq!(join(leaving), Some(State::Draining));
    assert_eq!(join(surplus), Some(State::Draining));
    let mut deadlines = Vec::new();
    while let Some(effect) = core.effect() {
        if let Effect::Event(Event::Draining { deadline, .. }) = effect {
            deadlines.push(deadline);
        }
    }
    assert_eq!(deadlines, [Some(ms(5_000)), None], "a surplus process may be wanted again");
    core.check();
}

#[test]
fn an_adopted_process_that_was_leaving_keeps_its_connections() {
    for drain_timeout in [None, Some(ms(60_000))] {
        let mut pool = PoolSettings { processes: 1, ..settings() };
        pool.supervision.drain_timeout = drain_timeout;
        pool.supervision.stop_timeout = ms(1_000);
        let mut core = Core::new(vec![pool], vec![listener()], Time(1));
        let leaving = core.adopt(Time(1), PoolId(0), (0, 1), true, Generation::FIRST).unwrap();
        let mut ends = |at: Time| {
            core.tick(at);
            std::iter::from_fn(|| core.effect())
                .any(|it| matches!(it, Effect::StopProcess { process, .. } if process == leaving))
        };
        // Nothing says how many connections it has: its worker does not join again.
        assert!(!ends(Time(1) + ms(1_000)) && !ends(Time(1) + ms(60_000)));
        assert_eq!(ends(Time(1) + ms(62_000)), drain_timeout.is_some());
    }
}

/// It ends after its last connection, which only its own dispatcher has counted.
#[test]
fn an_adopted_process_that_has_closed_its_listeners_is_replaced_and_keeps_its_connections() {
    let mut pool = PoolSettings { processes: 1, ..settings() };
    pool.supervision.start_timeout = ms(1_000);
    pool.supervision.stop_timeout = ms(1_000);
    let mut core = Core::new(vec![pool], vec![listener()], Time(1));
    let closed = core.adopt(Time(1), PoolId(0), (0, 1), false, Generation::FIRST).unwrap();
    core.tick(Time(2));
    assert_eq!(core.effect(), None, "it may serve clients");
    core.process_has_closed(Time(2), closed);
    let effects: Vec<Effect> = std::iter::from_fn(|| core.effect()).collect();
    let starts = |it: &Effect| matches!(it, Effect::Spawn { process } if process.place == 0);
    assert!(effects.iter().any(starts), "without a delay: its start did not fail");
    core.tick(Time(2) + ms(600_000));
    let ends =
        |it: &Effect| matches!(it, Effect::StopProcess { process, .. } if *process == closed);
    assert!(!std::iter::from_fn(|| core.effect()).any(|it| ends(&it)));
    core.exited(Time(2) + ms(600_000), closed);
    core.check();
}

#[test]
fn adopted_processes_with_the_same_number_are_told_apart() {
    let pool = PoolSettings { processes: 2, ..settings() };
    let mut core = Core::new(vec![pool], vec![listener()], Time(1));
    // Two pools that had the same name one after the other, and the largest number.
    let starts = [1, 1, 2, u32::MAX, u32::MAX];
    let adopted: std::collections::BTreeSet<u32> = starts
        .iter()
        .map(|&start| {
            core.adopt(Time(1), PoolId(0), (0, start), false, Generation::FIRST).unwrap().start
        })
        .collect();
    assert_eq!(adopted.len(), starts.len());
    core.tick(Time(2));
    let mut started = Vec::new();
    while let Some(effect) = core.effect() {
        if let Effect::Spawn { process } = effect {
            started.push(process);
        }
    }
    let [started] = started[..] else { panic!("only place 1 is free: {started:?}") };
    assert!(started.place == 1 && !adopted.contains(&started.start), "{started:?}");
    core.check();
}
