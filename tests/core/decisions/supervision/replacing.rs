//! Processes that are replaced: `max_age`, `max_connections_served`, `max_memory`, `restart`.

use super::*;

fn supervised(processes: u32, change: impl FnOnce(&mut Supervision)) -> (Driver, Vec<ProcessId>) {
    let mut driver = driver_with(|pool| {
        pool.processes = processes;
        change(&mut pool.supervision);
    });
    let processes = driver.starts();
    (driver, processes)
}

/// Lets time pass until a process is to be started.
fn next_start(driver: &mut Driver, most: Duration) -> ProcessId {
    let end = driver.now + most;
    while driver.now < end {
        if let [process] = driver.starts()[..] {
            return process;
        }
        driver.wait(ms(100));
    }
    panic!("no process is started in {most:?}");
}

#[test]
fn old_processes_are_replaced_one_after_the_other() {
    let age = ms(1_000_000);
    let (mut driver, processes) = supervised(4, |supervision| {
        supervision.max_age = Some(age);
        supervision.max_surge = Surge::Processes(4);
        supervision.jitter = 0;
    });
    let workers: Vec<_> = processes.iter().map(|&process| driver.serves(process)).collect();
    driver.wait(age - ms(1));
    assert_eq!(driver.starts(), []);
    driver.wait(ms(1));
    let next = driver.starts();
    assert_eq!(next.len(), 1, "one of the pool at a time");
    assert_eq!(driver.counts(), (4, 4, 0, 0), "the old one serves until the new one does");
    driver.serves(next[0]);
    let old = next[0].place as usize;
    assert_eq!(driver.state(workers[old]), State::Draining);
    assert_eq!(driver.counts(), (4, 4, 0, 1));
    driver.turn();
    assert_eq!(driver.starts().len(), 1, "the next one");
    // The drained worker ends by itself.
    driver.dies(processes[old], Some(workers[old]));
    assert_eq!(driver.core.snapshot().pools[0].processes.clone().unwrap().totals.replaced, 1);
    assert_eq!(driver.core.snapshot().pools[0].processes.clone().unwrap().totals.restarts, 0);
}

#[test]
fn the_jitter_spreads_ages() {
    let age = ms(100_000);
    let (mut driver, processes) = supervised(16, |supervision| {
        supervision.max_age = Some(age);
        supervision.jitter = 50;
        supervision.max_surge = Surge::Percent(100);
    });
    for &process in &processes {
        driver.serves(process);
    }
    let begin = driver.now;
    let mut ages = Vec::new();
    for _ in 0..16 {
        let next = next_start(&mut driver, age);
        ages.push((driver.now - begin).as_millis());
        let old = processes[next.place as usize];
        driver.serves(next);
        driver.dies(old, None);
    }
    assert!(ages[0] >= 50_000 && ages[15] <= 100_100, "{ages:?}");
    assert!(ages[15] - ages[0] > 20_000, "{ages:?}");
}

#[test]
fn a_process_that_has_served_enough_is_replaced() {
    let (mut driver, processes) = supervised(1, |supervision| {
        supervision.max_connections_served = Some(10);
        supervision.jitter = 0;
    });
    let worker = driver.serves(processes[0]);
    for _ in 0..9 {
        driver.accept(WEB);
    }
    driver.take_all(worker);
    driver.wait(ms(1_000));
    assert_eq!(driver.starts(), []);
    driver.accept(WEB);
    driver.take_all(worker);
    let next = next_start(&mut driver, ms(1_000));
    let new = driver.serves(next);
    assert_eq!((driver.state(worker), driver.state(new)), (State::Draining, State::Active));
    assert_eq!(driver.loads(&[worker]), [10], "its connections go on");
}

#[test]
fn a_process_that_uses_too_much_memory_is_replaced() {
    let (mut driver, processes) = supervised(2, |_| {});
    let workers: Vec<_> = processes.iter().map(|&process| driver.serves(process)).collect();
    driver.core.exceeds_memory(driver.now, processes[1]);
    driver.core.exceeds_memory(driver.now, processes[0]);
    driver.pump();
    let replacing = Event::Replacing { process: processes[1], why: Replacement::Memory };
    assert!(driver.log.contains(&Effect::Event(replacing)));
    let next = driver.starts();
    assert_eq!(next.len(), 1);
    driver.serves(next[0]);
    assert_eq!(driver.state(workers[1]), State::Draining);
    assert_eq!(driver.starts(), [], "max_surge is 1");
    driver.dies(processes[1], Some(workers[1]));
    assert_eq!(driver.starts().len(), 1);
}

#[test]
fn the_old_process_stays_while_the_new_one_fails() {
    let (mut driver, processes) = supervised(1, |_| {});
    let worker = driver.serves(processes[0]);
    driver.core.exceeds_memory(driver.now, processes[0]);
    driver.pump();
    for round in 0..4 {
        let next = driver.starts()[0];
        driver.runs(next);
        driver.dies(next, None);
        assert_eq!(driver.state(worker), State::Active);
        driver.wait(RESTART_MIN * 2u32.pow(round));
    }
    let next = driver.starts()[0];
    driver.serves(next);
    assert_eq!(driver.state(worker), State::Draining);
}

#[test]
fn starts_beside_an_old_process_back_off_to_a_crash_loop() {
    let (mut driver, processes) = supervised(1, |_| {});
    let worker = driver.serves(processes[0]);
    driver.wait(ms(3_600_000));
    driver.core.exceeds_memory(driver.now, processes[0]);
    driver.pump();
    let mut delays = Vec::new();
    for _ in 0..8 {
        let next = driver.starts()[0];
        driver.runs(next);
        let died = driver.now;
        driver.dies(next, None);
        let again = next_place(&mut driver);
        delays.push((driver.now - died).as_millis());
        assert!(again);
    }
    assert_eq!(delays, [100, 200, 400, 800, 1_600, 3_200, 6_400, 30_000]);
    let snapshot = driver.core.snapshot().pools[0].processes.clone().unwrap();
    assert!(snapshot.crash_loop && snapshot.counts.active == 1, "{snapshot:?}");
    assert_eq!(driver.state(worker), State::Active);
    // A version that starts ends it.
    let next = driver.starts()[0];
    driver.serves(next);
    assert_eq!(driver.state(worker), State::Draining);
    driver.wait(RESTART_RESET);
    assert!(!driver.core.snapshot().pools[0].processes.clone().unwrap().crash_loop);
}

/// Lets time pass until a process is to be started, and leaves it in the log.
fn next_place(driver: &mut Driver) -> bool {
    let starts =
        |driver: &Driver| driver.log.iter().any(|effect| matches!(effect, Effect::Spawn { .. }));
    for _ in 0..1_000 {
        if starts(driver) {
            return true;
        }
        let next = driver.core.deadline().unwrap_or(driver.now + ms(1_000));
        driver.wait((next - driver.now).max(Duration::from_nanos(1)));
    }
    false
}

#[test]
fn an_operator_restarts_as_many_at_once_as_may_be_beyond() {
    let (mut driver, mut old) = supervised(8, |supervision| {
        supervision.max_surge = Surge::Percent(25);
    });
    let mut workers: Vec<_> = old.iter().map(|&process| driver.serves(process)).collect();
    driver.core.roll(driver.now, PoolId(0), false).unwrap();
    driver.pump();
    let mut rounds = 0;
    while !old.is_empty() {
        let next = driver.starts();
        assert_eq!(next.len(), 2);
        for process in next {
            driver.serves(process);
            let at = old.iter().position(|old| old.place == process.place).unwrap();
            let (process, worker) = (old.remove(at), workers.remove(at));
            assert_eq!(driver.state(worker), State::Draining);
            assert_eq!(driver.counts().1, 8, "never fewer than wanted");
            driver.core.leave(driver.now, worker, Departure::Disconnected);
            driver.core.exited(driver.now, process);
        }
        driver.pump();
        rounds += 1;
    }
    assert_eq!((rounds, driver.starts().len()), (4, 0));
}

#[test]
fn one_process_is_restarted() {
    let (mut driver, processes) = supervised(2, |_| {});
    let workers: Vec<_> = processes.iter().map(|&process| driver.serves(process)).collect();
    driver.core.roll_one(driver.now, processes[1], None, false).unwrap();
    driver.pump();
    let next = driver.starts();
    assert_eq!((next.len(), next[0].place), (1, 1));
    driver.serves(next[0]);
    assert_eq!(driver.state(workers[0]), State::Active);
    let again = driver.core.roll_one(driver.now, processes[1], None, false);
    assert_eq!(again, Err(RollRefusal::NotServing), "it is leaving");
}

#[test]
fn connections_are_ended_after_drain_timeout() {
    let (mut driver, processes) = supervised(1, |supervision| {
        supervision.drain_timeout = Some(ms(5_000));
    });
    let worker = driver.serves(processes[0]);
    driver.accept(WEB);
    driver.take_all(worker);
    driver.core.roll(driver.now, PoolId(0), false).unwrap();
    driver.pump();
    let next = driver.starts()[0];
    driver.events();
    driver.serves(next);
    let draining = Event::Draining { worker, live: 1, deadline: Some(ms(5_000)) };
    assert!(driver.events().contains(&draining));
    driver.wait(ms(5_000));
    assert_eq!(driver.stops(), []);
    // It does not end its connection: it is ended by a signal.
    driver.wait(Supervision::default().stop_timeout + ms(250));
    assert_eq!(driver.stops(), [processes[0]]);
}

#[test]
fn scaling_resumes_what_it_can_and_starts_the_rest() {
    let (mut driver, processes) = supervised(4, |_| {});
    let workers: Vec<_> = processes.iter().map(|&process| driver.serves(process)).collect();
    driver.wait(RESTART_RESET);
    driver.core.scale(driver.now, PoolId(0), 1);
    assert_eq!(driver.counts(), (1, 1, 0, 3));
    driver.goodbye(workers[1]);
    driver.dies(processes[2], Some(workers[2]));
    driver.core.scale(driver.now, PoolId(0), 5);
    driver.pump();
    assert_eq!(driver.started_places(), [1, 2, 4]);
    assert_eq!(driver.state(workers[3]), State::Active, "resumed");
    assert_eq!(driver.counts(), (5, 2, 3, 1));
}
