//! Several hosts behind a balancer: what a pool answers HAProxy's agent check, and draining a host.

use dispatch_protocol::wire::Features;
use proptest::prelude::*;

use super::supervision::ProcessSteps;
use super::*;
use dispatcher_core::advice::{AgentAnswer, DownReason, ServerState};

fn answer(driver: &Driver) -> AgentAnswer {
    let answer = driver.core.agent_answer(driver.now, PoolId(0)).unwrap();
    let load = driver.core.pool_loads(driver.now).into_iter().find(|load| load.pool == PoolId(0));
    assert!(load.is_none_or(|load| load.answer == answer), "one answer for both");
    answer
}

fn line(driver: &Driver) -> String {
    answer(driver).to_string()
}

fn small(weight: u16, max_connections: u32) -> Hello {
    Hello { weight, max_connections, ..hello() }
}

#[test]
fn an_answer_is_the_capacity_and_not_the_free_capacity() {
    let mut driver = driver();
    assert_eq!(line(&driver), "down # no usable worker");
    let workers = [driver.trusted(small(1, 10)), driver.trusted(small(1, 10))];
    assert_eq!(line(&driver), "ready up 100% maxconn:20");
    (0..20).for_each(|_| _ = driver.accept(WEB));
    assert_eq!(driver.loads(&workers), [10, 10], "both are full");
    assert_eq!(line(&driver), "ready up 100% maxconn:20");
}

#[test]
fn a_new_worker_counts_before_its_first_client() {
    let mut driver = driver();
    driver.join(small(1, 10)).unwrap();
    assert_eq!(line(&driver), "ready up 100% maxconn:10");
}

#[test]
fn a_drained_a_suspect_and_a_paused_worker_are_missing() {
    let mut driver = driver_with(|pool| pool.agent_workers = Some(4));
    let workers: Vec<_> = (0..4).map(|_| driver.trusted(small(1, 100))).collect();
    assert_eq!(line(&driver), "ready up 100% maxconn:400");
    driver.drain(workers[0]);
    assert_eq!(line(&driver), "ready up 75% maxconn:300");
    driver.core.update(
        driver.now,
        workers[1],
        dispatch_protocol::wire::Update { weight: 1, max_connections: 100, paused: true },
    );
    driver.pump();
    assert_eq!(line(&driver), "ready up 50% maxconn:200");
    driver.accept(WEB);
    driver.accept(WEB);
    driver.take_all(workers[3]);
    driver.wait(ms(1_000));
    assert_eq!(driver.state(workers[2]), State::Suspect);
    assert_eq!(line(&driver), "ready up 25% maxconn:100");
    driver.leave(workers[3], Departure::Died);
    assert!(line(&driver).starts_with("ready up 1% maxconn:"), "{}", line(&driver));
}

#[test]
fn missing_workers_count_by_what_is_expected() {
    // Without a number, those that have joined are all.
    let mut driver = driver();
    let gone = driver.trusted(small(1, 100));
    driver.trusted(small(3, 100));
    driver.leave(gone, Departure::Died);
    assert_eq!(line(&driver), "ready up 100% maxconn:100");

    let mut driver = driver_with(|pool| pool.processes = 4);
    let processes = driver.starts();
    for &process in &processes[..2] {
        driver.runs(process);
        let worker = driver.join_as(small(1, 100), Some(process)).unwrap();
        driver.vouch(worker);
    }
    assert_eq!(line(&driver), "ready up 50% maxconn:200");
    driver.core.scale(driver.now, PoolId(0), 2);
    driver.pump();
    assert_eq!(line(&driver), "ready up 100% maxconn:200");
}

#[test]
fn weights_and_maximums_count_and_a_slow_start_grows() {
    let mut driver = driver_with(|pool| pool.slow_start = ms(64_000));
    let (light, _heavy) = (driver.trusted(small(1, 100)), driver.trusted(small(3, 100)));
    assert!(line(&driver).starts_with("ready up 2% "), "{}", line(&driver));
    driver.wait(ms(32_000));
    assert!(["ready up 51% ", "ready up 52% "].iter().any(|it| line(&driver).starts_with(it)));
    driver.wait(ms(64_000));
    assert_eq!(line(&driver), "ready up 100% maxconn:200");
    driver.drain(light);
    assert_eq!(line(&driver), "ready up 50% maxconn:100", "the smaller share: by maximum");
}

#[test]
fn a_maximum_fits_into_what_haproxy_keeps() {
    let mut driver = driver();
    (0..3).for_each(|_| _ = driver.trusted(small(1, 1_000_000)));
    assert_eq!(line(&driver), "ready up 100% maxconn:3000000");
    let mut driver = driver_with(|pool| pool.max_connections_per_worker = u32::MAX);
    driver.trusted(small(1, u32::MAX));
    assert_eq!(line(&driver), "ready up 100% maxconn:2147483647");
    driver.trusted(small(1, 0));
    driver.trusted(small(1, 0));
    let AgentAnswer::Ready { max_connections, .. } = answer(&driver) else { panic!() };
    assert!(max_connections >= 1);
}

#[test]
fn a_pool_that_an_operator_drains_keeps_its_connections() {
    let mut driver = driver();
    let (one, other) = (driver.worker(), driver.worker());
    driver.drain(one);
    driver.drain(other);
    assert_eq!(answer(&driver), AgentAnswer::Drain);
    driver.wait(ms(60_000));
    assert_eq!(answer(&driver), AgentAnswer::Drain, "also while clients are refused");
    driver.resume(one).unwrap();
    assert!(line(&driver).starts_with("ready up "), "ready ends the drain");
    // Workers that leave by themselves are no drain by an operator.
    driver.goodbye(one);
    driver.leave(other, Departure::Died);
    assert_eq!(answer(&driver), AgentAnswer::Down(DownReason::NoWorker));
    driver.worker();
    assert!(line(&driver).starts_with("ready up "), "up ends down");
}

#[test]
fn a_pool_whose_workers_take_nothing_is_down_until_one_answers() {
    let mut driver = driver();
    let hung = driver.worker();
    driver.accept(WEB);
    (0..10).for_each(|_| driver.wait(ms(1_000)));
    assert_eq!(driver.core.pool_state(PoolId(0)), Some(PoolState::Refusing));
    assert_eq!(answer(&driver), AgentAnswer::Down(DownReason::NotTaking));
    // With `down` no client would come to test the worker.
    assert!(driver.answer(hung));
    driver.turn();
    assert!(line(&driver).starts_with("ready up 1% "), "{}", line(&driver));
    driver.accept(WEB);
    assert_eq!(driver.take_all(hung), 1);
    assert!(line(&driver).starts_with("ready up 100% "), "{}", line(&driver));
}

#[test]
fn a_stopping_dispatcher_and_a_removed_pool_are_down() {
    let mut driver = driver();
    driver.worker();
    driver.core.drain_host(driver.now, Duration::ZERO, None);
    driver.core.stop(driver.now, driver.now + ms(10_000));
    assert_eq!(line(&driver), "down # the dispatcher is stopping");
    let mut driver = self::driver();
    driver.worker();
    driver.core.retire_pool(driver.now, PoolId(0));
    assert_eq!(line(&driver), "down # the pool was removed");
    assert_eq!(driver.core.agent_answer(driver.now, PoolId(7)), None);
}

#[test]
fn standby_workers_are_no_part_of_the_whole() {
    let mut driver = driver_with(|pool| pool.policy = Policy::Failover);
    let primary = driver.trusted(Hello { priority: 5, ..small(1, 10) });
    let second = driver.trusted(Hello { priority: 5, ..small(1, 10) });
    driver.trusted(Hello { priority: 1, ..small(7, 100) });
    assert_eq!(line(&driver), "ready up 100% maxconn:20");
    driver.drain(primary);
    assert_eq!(line(&driver), "ready up 50% maxconn:10");
    driver.leave(primary, Departure::Died);
    driver.leave(second, Departure::Died);
    assert_eq!(line(&driver), "ready up 100% maxconn:100");
}

fn drain_host(driver: &mut Driver, announce: u64, deadline: Option<u64>) {
    driver.core.drain_host(driver.now, ms(announce), deadline.map(ms));
    driver.pump();
}

fn resume_host(driver: &mut Driver) {
    driver.core.resume_host(driver.now);
    driver.pump();
}

#[test]
fn a_draining_host_empties_and_returns() {
    let mut driver = driver();
    let workers = [driver.worker(), driver.worker()];
    (0..4).for_each(|_| _ = driver.accept(WEB));
    workers.iter().for_each(|&worker| _ = driver.take_all(worker));
    driver.events();
    drain_host(&mut driver, 0, None);
    let begun = Event::HostDraining { live: 4, after: Duration::ZERO, deadline: None };
    assert_eq!(driver.events()[0], begun);
    assert_eq!(answer(&driver), AgentAnswer::Drain);
    assert_eq!(driver.core.pool_loads(driver.now)[0].state, ServerState::Draining);
    let drain = driver.core.host_drain().unwrap();
    assert_eq!((drain.state, drain.connections), (HostState::Draining, 4));
    assert_eq!(driver.resume(workers[0]), Err(CannotResume::HostDrains));
    // A worker that joins now drains, too.
    let late = driver.join(hello()).unwrap();
    assert_eq!(driver.state(late), State::Draining);
    driver.finish(workers[0], 2);
    assert_eq!(driver.core.host_drain().unwrap().state, HostState::Draining);
    driver.finish(workers[1], 2);
    assert_eq!(driver.core.host_drain().unwrap().state, HostState::Drained);
    resume_host(&mut driver);
    assert_eq!(driver.core.host_drain(), None);
    assert!(driver.events().contains(&Event::HostResumed));
    for worker in [workers[0], workers[1], late] {
        assert_eq!(driver.state(worker), State::Active);
    }
    assert!(line(&driver).starts_with("ready up 100%"));
}

/// A worker that ends when it is drained would be started again and again by its supervisor.
#[test]
fn a_worker_that_joins_a_draining_host_is_told_only_if_it_has_connections() {
    let notices = Hello { features: Features::DRAIN, ..hello() };
    let mut driver = driver();
    drain_host(&mut driver, 0, Some(60_000));
    let idle = driver.join(notices.clone()).unwrap();
    assert_eq!((driver.state(idle), driver.link(idle).notices.len()), (State::Draining, 0));
    let serving = driver.join(Hello { base: 3, finished: 1, ..notices }).unwrap();
    assert_eq!((driver.state(serving), driver.link(serving).notices.len()), (State::Draining, 1));
    resume_host(&mut driver);
    assert_eq!((driver.state(idle), driver.state(serving)), (State::Active, State::Active));
}

#[test]
fn an_announced_drain_serves_until_it_begins() {
    let mut driver = driver();
    let worker = driver.worker();
    drain_host(&mut driver, 5_000, Some(10_000));
    assert_eq!(answer(&driver), AgentAnswer::Drain, "others are told at once");
    assert_eq!(driver.core.host_drain().unwrap().state, HostState::Announced);
    driver.accept(WEB);
    assert_eq!(driver.take_all(worker), 1, "clients that still come are served");
    assert_eq!(driver.core.deadline(), Some(driver.now + ms(5_000)));
    driver.wait(ms(4_999));
    assert_eq!(driver.state(worker), State::Active);
    driver.wait(ms(1));
    assert_eq!(driver.state(worker), State::Draining);
    assert_eq!(driver.core.host_drain().unwrap().state, HostState::Draining);
    driver.events();
    // The deadline counts from the beginning of the drain.
    driver.wait(ms(9_999));
    assert!(!driver.events().iter().any(|event| matches!(event, Event::DrainOver { .. })));
    driver.wait(ms(1));
    assert!(driver.events().iter().any(|event| matches!(event, Event::DrainOver { .. })));
}

#[test]
fn a_second_drain_can_only_begin_it_earlier() {
    let mut driver = driver();
    let worker = driver.worker();
    drain_host(&mut driver, 5_000, None);
    drain_host(&mut driver, 60_000, None);
    assert_eq!(driver.core.host_drain().unwrap().begins, driver.now + ms(5_000));
    drain_host(&mut driver, 0, None);
    assert_eq!(driver.state(worker), State::Draining);
    resume_host(&mut driver);
    drain_host(&mut driver, 5_000, None);
    resume_host(&mut driver);
    driver.wait(ms(60_000));
    assert_eq!(driver.state(worker), State::Active, "it was resumed before it began");
}

#[test]
fn no_process_is_started_beside_drained_workers() {
    let mut driver = driver_with(|pool| {
        pool.processes = 2;
        pool.supervision.max_age = Some(ms(60_000));
        pool.supervision.jitter = 0;
    });
    let processes = driver.starts();
    let first = driver.serves(processes[0]);
    let second = driver.serves(processes[1]);
    drain_host(&mut driver, 0, None);
    // Neither an end nor an age is a reason to start one.
    driver.dies(processes[1], Some(second));
    driver.wait(ms(120_000));
    assert_eq!(driver.starts(), []);
    assert_eq!(driver.core.roll(driver.now, PoolId(0), false), Err(RollRefusal::HostDrains));
    // A pool that a reload adds starts none either, and a change of the pool resumes nothing.
    let other = PoolSettings { name: "other".to_owned(), processes: 1, ..settings() };
    driver.core.add_pool(driver.now, other, 1);
    let same = PoolSettings { processes: 2, ..settings() };
    driver.core.change_pool(driver.now, PoolId(0), same, 1);
    driver.pump();
    assert_eq!((driver.starts(), driver.state(first)), (vec![], State::Draining));
    assert_eq!(answer(&driver), AgentAnswer::Drain);
    resume_host(&mut driver);
    assert_eq!(driver.state(first), State::Active);
    let started: Vec<_> = driver.starts().iter().map(|process| process.pool.0).collect();
    assert!(started.contains(&0) && started.contains(&1), "{started:?}");
}

#[test]
fn surplus_workers_stay_drained_when_the_host_returns() {
    let mut driver = driver_with(|pool| pool.processes = 2);
    let processes = driver.starts();
    let workers = [driver.serves(processes[0]), driver.serves(processes[1])];
    (0..2).for_each(|_| _ = driver.accept(WEB));
    drain_host(&mut driver, 0, None);
    driver.core.scale(driver.now, PoolId(0), 1);
    driver.pump();
    resume_host(&mut driver);
    assert_eq!(driver.state(workers[0]), State::Active);
    assert_eq!(driver.state(workers[1]), State::Draining);
}

/// What may happen to a pool.
#[derive(Clone, Copy, Debug)]
enum Step {
    Join(u16, u32),
    Leave(usize),
    Goodbye(usize),
    Drain(usize),
    Resume(usize),
    Pause(usize, bool),
    Accept,
    Take(usize),
    Wait(u64),
    DrainHost(u64),
    ResumeHost,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (1u16..5, prop_oneof![Just(0), 1u32..100]).prop_map(|(w, m)| Step::Join(w, m)),
        1 => (0usize..8).prop_map(Step::Leave),
        1 => (0usize..8).prop_map(Step::Goodbye),
        2 => (0usize..8).prop_map(Step::Drain),
        2 => (0usize..8).prop_map(Step::Resume),
        1 => (0usize..8, any::<bool>()).prop_map(|(n, on)| Step::Pause(n, on)),
        4 => Just(Step::Accept),
        4 => (0usize..8).prop_map(Step::Take),
        3 => (1u64..8_000).prop_map(Step::Wait),
        1 => (0u64..3_000).prop_map(Step::DrainHost),
        2 => Just(Step::ResumeHost),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_answer_is_complete_and_in_range(
        steps in prop::collection::vec(step(), 1..60),
        expected in prop::option::of(1u32..6),
        failover in any::<bool>(),
    ) {
        let mut driver = driver_with(|pool| {
            pool.agent_workers = expected;
            if failover {
                pool.policy = Policy::Failover;
            }
        });
        for step in steps {
            let workers: Vec<WorkerId> = driver.core.workers().collect();
            let nth = |n: usize| workers.get(n % workers.len().max(1)).copied();
            let before = answer(&driver);
            match step {
                Step::Join(weight, max) => {
                    driver.trusted(small(weight, max));
                }
                Step::Leave(n) => if let Some(w) = nth(n) { driver.leave(w, Departure::Died) },
                Step::Goodbye(n) => if let Some(w) = nth(n) { driver.goodbye(w) },
                Step::Drain(n) => if let Some(w) = nth(n) { driver.drain(w); },
                Step::Resume(n) => if let Some(w) = nth(n) { let _ = driver.resume(w); },
                Step::Pause(n, paused) => if let Some(w) = nth(n) {
                    let update = dispatch_protocol::wire::Update { weight: 1, max_connections: 9, paused };
                    driver.core.update(driver.now, w, update);
                    driver.pump();
                },
                Step::Accept => if driver.core.accepting(WEB) == Accepting::Yes {
                    driver.accept(WEB);
                    prop_assert_eq!(answer(&driver), before, "a client changes no capacity");
                },
                Step::Take(n) => if let Some(w) = nth(n) { driver.take_all(w); },
                Step::Wait(time) => driver.wait(ms(time)),
                Step::DrainHost(announce) => drain_host(&mut driver, announce, None),
                Step::ResumeHost => resume_host(&mut driver),
            }
            let usable = |w: &WorkerId| {
                matches!(driver.core.worker_state(*w), Some(State::Active | State::Suspect))
            };
            let usable = driver.core.workers().filter(usable).count();
            let answer = answer(&driver);
            let line = answer.to_string();
            match answer {
                AgentAnswer::Ready { percent, max_connections } => {
                    prop_assert!((1..=100).contains(&percent) && max_connections >= 1);
                    prop_assert_eq!(line, format!("ready up {percent}% maxconn:{max_connections}"));
                    prop_assert!(usable > 0 && driver.core.host_drain().is_none());
                }
                AgentAnswer::Drain => {
                    prop_assert_eq!(line, "drain");
                    prop_assert!(usable == 0 || driver.core.host_drain().is_some());
                }
                AgentAnswer::Down(_) => {
                    prop_assert!(line.starts_with("down # ") && driver.core.host_drain().is_none());
                }
            }
            driver.core.check();
        }
    }
}
