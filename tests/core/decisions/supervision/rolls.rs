//! Rolls: generations, ready checks, a roll that stops, and its undoing.

use super::*;

const POOL: PoolId = PoolId(0);

/// A pool whose processes serve.
struct Pool {
    driver: Driver,
    /// The process and the worker in each place.
    serving: Vec<(ProcessId, WorkerId)>,
}

impl Pool {
    fn new(processes: u32, change: impl FnOnce(&mut Supervision)) -> Pool {
        Pool::with(Policy::LeastConnections, processes, change)
    }

    fn with(policy: Policy, processes: u32, change: impl FnOnce(&mut Supervision)) -> Pool {
        let mut driver = driver_with(|pool| {
            pool.policy = policy;
            pool.processes = processes;
            pool.supervision.ready_check = true;
            change(&mut pool.supervision);
        });
        let started = driver.starts();
        let serving =
            started.into_iter().map(|process| (process, driver.serves(process))).collect();
        let mut pool = Pool { driver, serving };
        assert_eq!(pool.checks(), [], "nothing is replaced: no ready check");
        pool
    }

    fn roll(&mut self) -> RollBegun {
        let begun = self.driver.core.roll(self.driver.now, POOL, false).unwrap();
        self.driver.pump();
        begun
    }

    /// The processes to be checked, since the last call of this or of `starts`.
    fn checks(&mut self) -> Vec<ProcessId> {
        let check = |effect: &Effect| match effect {
            Effect::CheckReady { process, .. } => Some(*process),
            _ => None,
        };
        self.driver.pump();
        self.driver.log.iter().filter_map(check).collect()
    }

    fn checked(&mut self, process: ProcessId, passed: bool) {
        self.driver.core.checked(self.driver.now, process, passed);
        self.driver.pump();
    }

    /// The next process of the roll joins and passes.
    fn step(&mut self) -> (ProcessId, WorkerId) {
        let [process] = self.driver.starts()[..] else { panic!("one at a time") };
        let worker = self.driver.serves(process);
        assert_eq!(self.checks(), [process]);
        self.checked(process, true);
        (process, worker)
    }

    fn last(&self) -> Roll {
        self.driver.core.last_roll(POOL).expect("a roll")
    }

    fn state(&self, place: usize) -> State {
        self.driver.state(self.serving[place].1)
    }

    fn generation(&self, process: ProcessId) -> u32 {
        self.driver.core.generation_of(process).expect("it runs").0
    }
}

#[test]
fn one_after_the_other_is_replaced_although_old_ones_keep_connections() {
    let mut pool = Pool::new(4, |_| {});
    for _ in 0..8 {
        pool.driver.accept(WEB);
    }
    for (_, worker) in pool.serving.clone() {
        pool.driver.take_all(worker);
    }
    let begun = pool.roll();
    assert_eq!((begun.generation, begun.processes), (Generation(2), 4));
    for replaced in 0..4 {
        let states: Vec<State> = (0..4).map(|place| pool.state(place)).collect();
        let drained = states.iter().filter(|state| **state == State::Draining).count();
        assert_eq!(drained, replaced, "an old one is drained when the new one is ready");
        assert_eq!(pool.last().replaced as usize, replaced);
        let (process, _) = pool.step();
        assert_eq!(pool.generation(process), 2);
    }
    assert_eq!(pool.last().state, RollState::Done);
    assert_eq!(pool.driver.core.generation(POOL), Generation(2));
    let rolled = Event::Rolled { pool: POOL, generation: Generation(2) };
    assert!(pool.driver.log.contains(&Effect::Event(rolled)));
    let leaving = pool.driver.core.snapshot().pools[0].processes.clone().unwrap();
    let oldest = LeavingGeneration { generation: Generation(1), processes: 4, connections: 8 };
    assert_eq!(leaving.leaving_generations, [oldest]);
    // A process that crashes is replaced at once: those that leave do not count for max_surge.
    let (process, worker) = pool.serving[0];
    let new = pool.driver.core.process_ids(POOL).find(|(id, leaves)| !leaves && id.place == 0);
    let (new, _) = new.expect("it runs");
    pool.driver.dies(new, None);
    pool.driver.wait(RESTART_MIN);
    let [again] = pool.driver.starts()[..] else { panic!("started again") };
    assert_eq!((again.place, pool.generation(again)), (0, 2));
    pool.driver.dies(process, Some(worker));
}

#[test]
fn a_worker_gets_no_clients_until_it_has_passed() {
    let mut pool = Pool::new(1, |_| {});
    pool.roll();
    let [process] = pool.driver.starts()[..] else { panic!() };
    let worker = pool.driver.serves(process);
    for _ in 0..10 {
        pool.driver.accept(WEB);
    }
    assert_eq!(pool.driver.loads(&[pool.serving[0].1, worker]), [10, 0]);
    // The dispatcher's own connection is no client's: it counts only while it is there.
    assert!(pool.driver.core.send_check(pool.driver.now, worker));
    assert!(!pool.driver.core.send_check(pool.driver.now, worker), "one at a time");
    pool.driver.pump();
    assert_eq!(pool.driver.loads(&[worker]), [0]);
    pool.driver.take_all(worker);
    pool.driver.turn();
    let taken = |effect: &Effect| matches!(effect, Effect::CheckOver { taken: true, .. });
    assert!(pool.driver.log.iter().any(taken));
    assert_eq!(pool.driver.loads(&[worker]), [1]);
    pool.driver.finish(worker, 1);
    assert_eq!(pool.driver.loads(&[worker]), [0]);
    assert_eq!(pool.driver.core.snapshot().totals.accepted, 10);
    assert!(pool.driver.core.snapshot().pools[0].taken == 0);
    pool.checked(process, true);
    assert_eq!(pool.state(0), State::Draining);
    pool.driver.accept(WEB);
    assert_eq!(pool.driver.loads(&[worker]), [1]);
    pool.driver.core.check();
}

#[test]
fn the_check_of_a_worker_that_leaves_is_over() {
    let mut pool = Pool::new(1, |_| {});
    pool.roll();
    let [process] = pool.driver.starts()[..] else { panic!() };
    let worker = pool.driver.serves(process);
    assert!(pool.driver.core.send_check(pool.driver.now, worker));
    pool.driver.pump();
    pool.driver.dies(process, Some(worker));
    let over = |effect: &&Effect| matches!(effect, Effect::CheckOver { taken: false, .. });
    assert_eq!(pool.driver.log.iter().filter(over).count(), 1);
    assert_eq!(pool.last().failure, Some((process, StepFailure::Ended)));
    pool.driver.core.check();
}

type Fail = fn(&mut Pool, ProcessId);

/// The ways in which the first process of a version fails.
fn failures() -> Vec<(StepFailure, Fail)> {
    vec![
        (StepFailure::NotStarted, |pool, process| {
            pool.driver.core.spawned(pool.driver.now, process, false);
        }),
        (StepFailure::Ended, |pool, process| {
            pool.driver.runs(process);
            pool.driver.dies(process, None);
        }),
        (StepFailure::Late, |pool, process| {
            pool.driver.runs(process);
            pool.driver.wait(Supervision::default().start_timeout);
        }),
        (StepFailure::NotReady, |pool, process| {
            pool.driver.serves(process);
            pool.checked(process, false);
        }),
        (StepFailure::NotReady, |pool, process| {
            // The check gives no answer.
            pool.driver.serves(process);
            pool.driver.wait(ms(29_000));
            assert_eq!(pool.last().state, RollState::Progressing);
            pool.driver.wait(ms(3_000));
        }),
        (StepFailure::Left, |pool, process| {
            let worker = pool.driver.serves(process);
            pool.driver.goodbye(worker);
        }),
    ]
}

#[test]
fn a_roll_stops_at_the_first_process_that_fails() {
    for (cause, fail) in failures() {
        let mut pool = Pool::new(2, |supervision| supervision.min_ready = ms(1_000));
        pool.roll();
        let [process] = pool.driver.starts()[..] else { panic!() };
        fail(&mut pool, process);
        pool.driver.pump();
        let roll = pool.last();
        assert_eq!((roll.state, roll.failure), (RollState::Stopped, Some((process, cause))));
        let stopped = Event::RollStopped { process, cause };
        assert!(pool.driver.log.contains(&Effect::Event(stopped)), "{cause:?}");
        assert_eq!([pool.state(0), pool.state(1)], [State::Active; 2], "untouched: {cause:?}");
        pool.driver.wait(ms(600_000));
        assert_eq!(pool.driver.starts(), [], "nothing more is started: {cause:?}");
        let snapshot = pool.driver.core.snapshot().pools[0].processes.clone().unwrap();
        assert_eq!((snapshot.outdated, snapshot.crash_loop), (0, false), "{cause:?}");
        // A process of the old generation that ends is started again from its own command.
        let (old, worker) = pool.serving[1];
        pool.driver.dies(old, Some(worker));
        pool.driver.wait(RESTART_MIN);
        let [again] = pool.driver.starts()[..] else { panic!("{cause:?}") };
        assert_eq!(pool.generation(again), 1);
        // There is nothing to undo, but it ends the report.
        pool.driver.serves(again);
        let undone = pool.driver.core.undo_roll(pool.driver.now, POOL).unwrap();
        assert_eq!((undone.generation, undone.processes), (Generation(1), 0), "{cause:?}");
        assert_eq!(pool.last().state, RollState::Done);
    }
}

#[test]
fn a_worker_that_takes_nothing_within_min_ready_stops_the_roll() {
    let mut pool = Pool::new(2, |supervision| {
        supervision.ready_check = false;
        supervision.min_ready = ms(10_000);
    });
    pool.roll();
    let [process] = pool.driver.starts()[..] else { panic!() };
    let worker = pool.driver.serves(process);
    pool.driver.take_all(worker);
    pool.driver.turn();
    for _ in 0..80 {
        pool.driver.accept(WEB);
        for (_, old) in pool.serving.clone() {
            pool.driver.take_all(old);
        }
        pool.driver.wait(ms(1_000));
    }
    let roll = pool.last();
    assert_eq!(roll.failure, Some((process, StepFailure::Suspect)));
    assert_eq!([pool.state(0), pool.state(1)], [State::Active; 2]);
}

#[test]
fn a_step_stays_ready_for_min_ready() {
    let mut pool = Pool::new(1, |supervision| supervision.min_ready = ms(5_000));
    pool.roll();
    pool.step();
    pool.driver.wait(ms(4_999));
    assert_eq!(pool.state(0), State::Active);
    pool.driver.wait(ms(1));
    assert_eq!((pool.state(0), pool.last().state), (State::Draining, RollState::Done));
}

#[test]
fn undo_returns_to_the_former_generation() {
    let mut pool = Pool::new(3, |_| {});
    pool.roll();
    pool.step();
    let [second] = pool.driver.starts()[..] else { panic!() };
    pool.driver.dies(second, None);
    assert_eq!((pool.last().state, pool.last().replaced), (RollState::Stopped, 1));
    let undone = pool.driver.core.undo_roll(pool.driver.now, POOL).unwrap();
    pool.driver.pump();
    assert_eq!((undone.generation, undone.processes), (Generation(1), 1));
    let (back, _) = pool.step();
    assert_eq!(pool.generation(back), 1);
    let roll = pool.last();
    assert_eq!((roll.state, roll.undo, roll.replaced), (RollState::Done, true, 1));
    assert_eq!(pool.driver.core.generation(POOL), Generation(1));
    // To undo it again returns to the other one; a new roll has a new number.
    let again = pool.driver.core.undo_roll(pool.driver.now, POOL).unwrap();
    assert_eq!((again.generation, again.processes), (Generation(2), 3));
    assert_eq!(pool.roll().generation, Generation(3));
}

#[test]
fn a_roll_that_stops_is_undone_if_so_configured() {
    let mut pool = Pool::new(3, |supervision| supervision.undo_on_failure = true);
    pool.roll();
    pool.step();
    let [second] = pool.driver.starts()[..] else { panic!() };
    pool.driver.runs(second);
    pool.driver.dies(second, None);
    let roll = pool.last();
    assert!(roll.undo && roll.state == RollState::Progressing, "{roll:?}");
    assert_eq!(roll.failure, Some((second, StepFailure::Ended)), "the reason is kept");
    let (back, _) = pool.step();
    assert_eq!(pool.generation(back), 1);
    assert_eq!(pool.last().state, RollState::Done);
    pool.driver.wait(ms(60_000));
    assert_eq!(pool.driver.starts(), []);
}

#[test]
fn too_many_leaving_generations_refuse_a_roll() {
    let mut pool = Pool::new(1, |_| {});
    let mut worker = pool.serving[0].1;
    for generation in 2..=3 {
        pool.driver.accept(WEB);
        pool.driver.accept(WEB);
        pool.driver.take_all(worker);
        assert_eq!(pool.roll().generation, Generation(generation));
        worker = pool.step().1;
    }
    let now = pool.driver.now;
    let oldest = LeavingGeneration { generation: Generation(1), processes: 1, connections: 2 };
    let refused = pool.driver.core.roll(now, POOL, false);
    assert_eq!(refused, Err(RollRefusal::TooManyGenerations(oldest)));
    assert_eq!(pool.last().generation, Generation(3), "nothing has changed");
    let first = pool.serving[0].1;
    pool.driver.core.roll(now, POOL, true).expect("the oldest is ended");
    pool.driver.pump();
    pool.driver.wait(ms(1));
    let over = |effect: &Effect| matches!(effect, Effect::Event(Event::DrainOver { worker, live: 2, .. }) if *worker == first);
    assert!(pool.driver.log.iter().any(over), "its connections are ended, counted");
    pool.step();
    // A process that does not end them is ended by a signal.
    pool.driver.wait(Supervision::default().stop_timeout + ms(250));
    assert!(pool.driver.stops().contains(&pool.serving[0].0));
}

#[test]
fn one_process_gets_the_new_command_and_the_others_keep_theirs() {
    let mut pool = Pool::new(3, |_| {});
    let now = pool.driver.now;
    let begun = pool.driver.core.roll_one(now, pool.serving[1].0, None, false).unwrap();
    pool.driver.pump();
    assert_eq!((begun.generation, begun.processes), (Generation(2), 1));
    let (new, _) = pool.step();
    assert_eq!((new.place, pool.generation(new)), (1, 2));
    assert_eq!(pool.last().state, RollState::Done);
    assert_eq!([pool.state(0), pool.state(2)], [State::Active; 2]);
    assert_eq!(pool.driver.core.generation(POOL), Generation(1), "of new places");
    let undone = pool.driver.core.undo_roll(pool.driver.now, POOL).unwrap();
    assert_eq!((undone.generation, undone.processes), (Generation(1), 1));
}

#[test]
fn a_new_roll_ends_the_steps_of_the_last_one() {
    let mut pool = Pool::new(2, |_| {});
    pool.roll();
    let [first] = pool.driver.starts()[..] else { panic!() };
    pool.driver.runs(first);
    let begun = pool.roll();
    assert_eq!((begun.generation, begun.processes), (Generation(3), 2));
    assert!(pool.driver.stops().contains(&first));
    pool.driver.dies(first, None);
    assert_eq!(pool.last().state, RollState::Progressing, "its end does not matter");
    for _ in 0..2 {
        let (process, _) = pool.step();
        assert_eq!(pool.generation(process), 3);
    }
    assert_eq!(pool.last().state, RollState::Done);
}

#[test]
fn places_without_a_process_start_from_a_proven_generation() {
    let mut pool = Pool::new(3, |supervision| supervision.min_ready = ms(1_000));
    pool.roll();
    let (dead, worker) = pool.serving[2];
    pool.driver.dies(dead, Some(worker));
    pool.driver.wait(RESTART_MIN);
    let started = pool.driver.starts();
    let [new, old] = started[..] else { panic!("{started:?}") };
    assert_eq!((old.place, pool.generation(old)), (2, 1), "the new one is not known yet");
    pool.driver.serves(old);
    pool.driver.serves(new);
    pool.checked(new, true);
    pool.driver.wait(ms(1_000));
    let (dead, worker) = pool.serving[1];
    let [next] = pool.driver.starts()[..] else { panic!() };
    pool.driver.dies(dead, Some(worker));
    pool.driver.serves(next);
    pool.checked(next, true);
    pool.driver.wait(ms(1_000));
    assert_eq!(pool.last().replaced, 2);
    pool.step();
    pool.driver.wait(ms(1_000));
    assert_eq!(pool.last().state, RollState::Done);
}

#[test]
fn without_a_serving_process_the_new_generation_starts_at_once() {
    let mut driver = driver_with(|pool| pool.processes = 2);
    for process in driver.starts() {
        driver.dies(process, None);
    }
    driver.core.roll(driver.now, POOL, false).unwrap();
    driver.pump();
    let started = driver.starts();
    assert_eq!(started.len(), 2);
    assert!(started.iter().all(|&it| driver.core.generation_of(it) == Some(Generation(2))));
    driver.runs(started[0]);
    // It fails: the roll says so, and the processes are tried again, as there is nothing better.
    driver.dies(started[0], None);
    let roll = driver.core.last_roll(POOL).unwrap();
    assert_eq!(roll.failure, Some((started[0], StepFailure::Ended)));
    driver.wait(RESTART_MIN);
    let [again] = driver.starts()[..] else { panic!() };
    assert_eq!(driver.core.generation_of(again), Some(Generation(2)));
}

#[test]
fn an_adopted_roll_goes_on() {
    let mut pool = PoolSettings { processes: 3, ..settings() };
    pool.supervision.ready_check = true;
    let mut core = Core::new(vec![pool], vec![listener()], Time(1));
    let (old, new) = (Generation(4), Generation(5));
    let mut adopt = |place, start, generation| {
        core.adopt(Time(1), POOL, (place, start), false, generation).unwrap()
    };
    let replaced = adopt(0, 7, new);
    let remaining = adopt(1, 2, old);
    // It was not ready yet, as far as is known.
    let beside = adopt(1, 8, new);
    let last = adopt(2, 3, old);
    let roll = Roll {
        generation: new,
        former: old,
        place: None,
        state: RollState::Progressing,
        undo: false,
        failure: None,
        replaced: 1,
        began: Time(0),
        ended: None,
    };
    core.resume_roll(Time(1), POOL, Some(roll), old);
    core.tick(Time(2));
    let mut joined = Vec::new();
    for process in [replaced, remaining, beside, last] {
        let join = Join { pid: 1, uid: 0, gids: vec![0], hello: hello(), spawned: Some(process) };
        joined.push(core.join(Time(3), &join).unwrap());
    }
    let effects = |core: &mut Core| std::iter::from_fn(|| core.effect()).collect::<Vec<_>>();
    let checks = effects(&mut core);
    let check =
        |it: &Effect| matches!(it, Effect::CheckReady { process, .. } if *process == beside);
    assert!(checks.iter().any(check), "{checks:?}");
    core.checked(Time(4), beside, true);
    assert_eq!(core.worker_state(joined[1]), Some(State::Draining));
    let starts = effects(&mut core);
    let start = starts.iter().find_map(|it| match it {
        Effect::Spawn { process } => Some(*process),
        _ => None,
    });
    let start = start.expect("the last place follows");
    assert_eq!((start.place, core.generation_of(start)), (2, Some(new)));
    core.check();
}

/// Clients connect again when their worker is drained; returns how many came to a worker of the old
/// generation, and how many there were.
fn reconnections(policy: Policy, prefer_new: bool) -> (usize, usize) {
    let mut pool = Pool::with(policy, 8, |supervision| supervision.prefer_new = prefer_new);
    for _ in 0..800 {
        pool.driver.accept(WEB);
    }
    let mut all: Vec<(ProcessId, WorkerId)> = pool.serving.clone();
    for &(_, worker) in &all {
        pool.driver.vouch(worker);
        pool.driver.take_all(worker);
    }
    pool.roll();
    let (mut again, mut total) = (0, 0);
    for _ in 0..8 {
        let (process, worker) = pool.step();
        pool.driver.vouch(worker);
        all.push((process, worker));
        let drained: Vec<(ProcessId, WorkerId)> = all
            .iter()
            .copied()
            .filter(|(_, worker)| pool.driver.state(*worker) == State::Draining)
            .collect();
        for (process, worker) in drained {
            let clients = pool.driver.loads(&[worker])[0];
            pool.driver.finish(worker, clients);
            pool.driver.dies(process, Some(worker));
            all.retain(|(_, other)| *other != worker);
            for _ in 0..clients {
                pool.driver.accept(WEB);
                total += 1;
                let sent = pool.driver.log.iter().rev().find_map(|effect| match effect {
                    Effect::Send { worker, .. } => Some(*worker),
                    _ => None,
                });
                let to = all.iter().find(|(_, worker)| Some(*worker) == sent).expect("sent").0;
                again += usize::from(pool.generation(to) == 1);
                for &(_, worker) in &all {
                    pool.driver.take_all(worker);
                }
            }
        }
    }
    assert_eq!(pool.last().state, RollState::Done);
    pool.driver.core.check();
    (again, total)
}

#[test]
fn clients_that_connect_again_seldom_come_to_an_old_worker() {
    for policy in [Policy::LeastConnections, Policy::RoundRobin, Policy::Random, Policy::TwoChoices]
    {
        let (with, all) = reconnections(policy, true);
        let (without, all_without) = reconnections(policy, false);
        println!(
            "{}: to an old worker again {with} of {all}; without the rule {without} of {all_without}",
            policy.name()
        );
        // The new worker is the least loaded anyway while all clients connect again at once.
        match policy {
            Policy::LeastConnections => assert_eq!((with, without), (0, 0)),
            _ => assert!(2 * with < without, "{with} of {all}, {without} of {all_without}"),
        }
    }
}

#[test]
fn the_oldest_process_of_one_place_is_ended_and_no_other() {
    let mut pool = Pool::new(2, |_| {});
    let mut last = pool.serving.clone();
    let mut leaving = Vec::new();
    // Two rolls: each place has two former processes with connections.
    for _ in 0..2 {
        for &(_, worker) in &last {
            pool.driver.vouch(worker);
        }
        for _ in 0..4 {
            pool.driver.accept(WEB);
        }
        for &(_, worker) in &last {
            pool.driver.take_all(worker);
        }
        pool.roll();
        let new = vec![pool.step(), pool.step()];
        leaving.extend(std::mem::replace(&mut last, new));
    }
    let now = pool.driver.now;
    let refused = pool.driver.core.roll_one(now, last[1].0, None, false);
    assert!(matches!(refused, Err(RollRefusal::TooManyGenerations(oldest))
        if oldest.processes == 1 && oldest.connections == 2));
    pool.driver.core.roll_one(now, last[1].0, None, true).expect("the oldest is ended");
    pool.driver.pump();
    pool.driver.wait(ms(1));
    let over = |effect: &Effect| match effect {
        Effect::Event(Event::DrainOver { worker, .. }) => Some(*worker),
        _ => None,
    };
    let ended: Vec<WorkerId> = pool.driver.log.iter().filter_map(over).collect();
    let oldest = leaving.iter().find(|(process, _)| process.place == 1).expect("it leaves");
    assert_eq!(ended, [oldest.1], "its clients, and no others");
}

#[test]
fn a_worker_that_joins_again_and_again_is_checked_once() {
    let mut pool = Pool::new(1, |_| {});
    pool.roll();
    let [process] = pool.driver.starts()[..] else { panic!() };
    let mut worker = pool.driver.serves(process);
    for _ in 0..10 {
        pool.driver.leave(worker, Departure::Disconnected);
        worker = pool.driver.join_as(hello(), Some(process)).expect("it may join");
        pool.driver.accept(WEB);
        assert_eq!(pool.driver.loads(&[worker]), [0], "it gets no clients");
    }
    assert_eq!(pool.checks(), [process]);
    pool.checked(process, true);
    assert_eq!(pool.state(0), State::Draining);
}

#[test]
fn a_surplus_process_that_is_wanted_again_gets_clients() {
    let mut pool = Pool::new(2, |_| {});
    pool.roll();
    pool.step();
    // A step beside nothing: the old process of its place has ended.
    let (old, worker) = pool.serving[1];
    pool.driver.dies(old, Some(worker));
    let [step] = pool.driver.starts()[..] else { panic!() };
    let new = pool.driver.serves(step);
    assert_eq!(step.place, 1);
    pool.driver.core.scale(pool.driver.now, POOL, 1);
    pool.driver.pump();
    assert_eq!(pool.driver.state(new), State::Draining);
    pool.driver.core.scale(pool.driver.now, POOL, 2);
    pool.driver.pump();
    assert_eq!(pool.driver.state(new), State::Active);
    pool.driver.vouch(new);
    for _ in 0..8 {
        pool.driver.accept(WEB);
    }
    assert!(pool.driver.loads(&[new])[0] > 0, "its check was given up");
}
