//! The machine in virtual time, against servers that are up, refuse, or are silent.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::io;

use super::*;
use crate::connector::plan::BackOff;
use crate::connector::selection::Candidate;
use crate::connector::set_aside::{Pauses, Standing};

mod properties;

const PAUSES: Pauses = Pauses { first: Duration::from_secs(1), most: Duration::from_secs(15) };
const MS: Duration = Duration::from_millis(1);

type Server = u8;

fn plan(max_retries: u32, max_retries_alternative: u32) -> Plan {
    Plan {
        max_retries,
        max_retries_alternative,
        attempt_timeout: Duration::from_secs(3),
        total_timeout: Duration::from_secs(3_600),
        back_off: BackOff { first: 100 * MS, most: Duration::from_secs(5) },
        persistence: Persistence::Ask,
    }
}

fn targets(selection: Selection, servers: Server) -> Targets<Server> {
    let mut targets = Targets::new(selection, false, PAUSES);
    targets.replace((0..servers).map(Candidate::new).collect(), None);
    targets
}

fn no() -> Failure {
    Failure::of_server(&io::Error::other("no"))
}

/// How a server answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Accepts,
    Refuses,
    Silent,
}

/// What a connect did: the events with their times, and the server that it reached.
#[derive(Debug)]
struct Course {
    events: Vec<(Duration, Attempt<Server>)>,
    reached: Option<Server>,
    took: Duration,
}

impl Course {
    fn kinds(&self) -> Vec<(bool, u32)> {
        self.events.iter().map(|(_, attempt)| (attempt.alternative, attempt.retries_left)).collect()
    }

    fn addresses(&self) -> Vec<Server> {
        self.events.iter().map(|(_, attempt)| attempt.address).collect()
    }
}

/// A virtual clock and a seeded source of random numbers.
struct World {
    start: Instant,
    now: Cell<Instant>,
    rng: fastrand::Rng,
}

impl World {
    fn new(seed: u64) -> World {
        let start = Instant::now();
        World { start, now: Cell::new(start), rng: fastrand::Rng::with_seed(seed) }
    }

    fn time(&self) -> Duration {
        self.now.get() - self.start
    }

    fn pass(&self, time: Duration) {
        self.now.set(self.now.get() + time);
    }

    /// A random time, in milliseconds.
    fn pass_between(&mut self, range: std::ops::Range<u64>) {
        let time = Duration::from_millis(self.rng.u64(range));
        self.pass(time);
    }

    /// Drives a machine to its end; `asked` is the number of further rounds that the application
    /// asks for.
    fn run(
        &mut self,
        machine: &mut Machine<Server>,
        targets: &mut Targets<Server>,
        mut asked: u32,
        answers: impl Fn(Server, Duration) -> Answer,
    ) -> Course {
        let began = self.now.get();
        let mut events = Vec::new();
        loop {
            let now = self.now.get();
            match machine.next(targets, now, &mut || self.rng.u64(..)) {
                Step::Refresh { .. } => {}
                Step::Wait(until) => {
                    assert!(until > now, "a wait for the past");
                    self.now.set(until);
                }
                Step::Attempt(attempt) => {
                    let address = attempt.address;
                    events.push((self.time(), attempt));
                    let limit = machine.begin(targets, address, now).expect("time is left");
                    let failure = match answers(address, self.time()) {
                        Answer::Accepts => {
                            self.pass(MS);
                            assert_eq!(machine.succeeded(targets), Some(address));
                            let took = self.now.get() - began;
                            return Course { events, reached: Some(address), took };
                        }
                        Answer::Refuses => {
                            self.pass(MS);
                            Failure::of_server(&io::ErrorKind::ConnectionRefused.into())
                        }
                        Answer::Silent => {
                            self.pass(limit);
                            Failure::timed_out("silent")
                        }
                    };
                    machine.failed(targets, failure, self.now.get(), &mut || self.rng.u64(..));
                }
                Step::Ask if asked > 0 => {
                    asked -= 1;
                    machine.decide(Decision::TryAgain, &mut || self.rng.u64(..));
                }
                Step::Ask => machine.decide(Decision::GiveUp, &mut || self.rng.u64(..)),
                Step::GiveUp => {
                    return Course { events, reached: None, took: self.now.get() - began };
                }
            }
        }
    }
}

#[test]
fn three_and_two_give_five_attempts_the_last_two_on_alternatives() {
    let expected = [(false, 2), (false, 1), (false, 0), (true, 1), (true, 0)];
    for seed in 0..200 {
        for selection in [Selection::InOrder, Selection::RoundRobin, Selection::Random] {
            for servers in 1..6 {
                let mut targets = targets(selection, servers);
                let mut machine = Machine::new(plan(3, 2), None);
                let course =
                    World::new(seed).run(&mut machine, &mut targets, 0, |_, _| Answer::Refuses);
                assert_eq!(course.kinds(), expected);
                let tried = course.addresses();
                assert_eq!((tried[0], tried[1]), (tried[1], tried[2]), "the current address");
                let (outcomes, timed_out) = machine.outcomes();
                assert_eq!((outcomes.len(), timed_out), (5, false));
                let same = outcomes.iter().zip(&course.events).all(|(outcome, (_, attempt))| {
                    (outcome.address, outcome.alternative, outcome.retries_left)
                        == (attempt.address, attempt.alternative, attempt.retries_left)
                });
                assert!(same, "{outcomes:?}");
                match servers {
                    1 => assert_eq!(tried, [0; 5], "there is no other"),
                    2 => assert!(tried[3..].iter().all(|other| *other != tried[0])),
                    _ => {
                        let others: BTreeSet<Server> = tried[2..].iter().copied().collect();
                        assert_eq!(others.len(), 3, "none twice: {tried:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn the_first_attempt_is_made_at_once_and_a_lost_server_is_tried_first() {
    for seed in 0..50 {
        let mut world = World::new(seed);
        let mut targets = targets(Selection::RoundRobin, 4);
        let course =
            world.run(&mut Machine::new(plan(3, 2), None), &mut targets, 0, |_, _| Answer::Accepts);
        assert_eq!((course.kinds(), course.took), (vec![(false, 2)], MS));
        let again = world.run(
            &mut Machine::new(plan(3, 2), course.reached),
            &mut targets,
            0,
            |server, _| {
                if Some(server) == course.reached { Answer::Refuses } else { Answer::Accepts }
            },
        );
        let tried = again.addresses();
        assert_eq!(tried[..3], [course.reached.unwrap(); 3]);
        assert_eq!(again.kinds(), [(false, 2), (false, 1), (false, 0), (true, 1)]);
        assert_ne!(again.reached, course.reached);
    }
}

#[test]
fn a_lost_server_that_is_set_aside_is_not_tried_first() {
    let mut world = World::new(1);
    let mut targets = targets(Selection::InOrder, 3);
    // Another connection has found it dead.
    targets.failed(&0, world.now.get(), 0);
    let course =
        world.run(&mut Machine::new(plan(3, 2), Some(0)), &mut targets, 0, |_, _| Answer::Accepts);
    assert_eq!(course.addresses(), [1]);
}

#[test]
fn the_handler_may_replace_the_address() {
    let (mut world, mut targets) = (World::new(3), targets(Selection::InOrder, 2));
    let mut machine = Machine::new(plan(1, 1), None);
    let now = world.now.get();
    let Step::Attempt(attempt) = machine.next(&mut targets, now, &mut || world.rng.u64(..)) else {
        panic!("no attempt");
    };
    assert_eq!(attempt.address, 0);
    machine.begin(&mut targets, 77, now);
    machine.failed(&mut targets, no(), now, &mut || 0);
    assert!(targets.standing(&0, now).is_usable(), "it was not tried");
    assert_eq!(machine.outcomes().0[0].address, 77);
    let course = world.run(&mut machine, &mut targets, 0, |_, _| Answer::Accepts);
    assert_eq!(course.addresses(), [1]);
}

#[test]
fn a_failed_probe_is_not_repeated_while_another_server_is_usable() {
    let mut world = World::new(5);
    let mut targets = targets(Selection::InOrder, 3);
    targets.failed(&0, world.now.get(), 0);
    world.pass(PAUSES.first);
    let answers = |server, _| if server == 0 { Answer::Silent } else { Answer::Accepts };
    let course = world.run(&mut Machine::new(plan(3, 2), None), &mut targets, 0, answers);
    assert_eq!(course.addresses(), [0, 1]);
    assert_eq!(course.kinds(), [(false, 2), (false, 1)]);
}

#[test]
fn one_of_many_connects_probes_at_a_time() {
    let mut world = World::new(9);
    let mut targets = targets(Selection::InOrder, 3);
    targets.failed(&0, world.now.get(), 0);
    world.pass(PAUSES.first);
    let now = world.now.get();
    let mut machines: Vec<_> = (0..20).map(|_| Machine::new(plan(3, 2), None)).collect();
    let mut begun = Vec::new();
    for machine in &mut machines {
        let Step::Attempt(attempt) = machine.next(&mut targets, now, &mut || world.rng.u64(..))
        else {
            panic!("no attempt");
        };
        machine.begin(&mut targets, attempt.address, now);
        begun.push(attempt.address);
    }
    assert_eq!(begun.iter().filter(|address| **address == 0).count(), 1, "{begun:?}");
    assert_eq!(targets.standing(&0, now), Standing::BeingProbed);
    // A connect that is given up leaves the probe to the next one.
    machines[0].cancel(&mut targets);
    assert_eq!(targets.standing(&0, now), Standing::ToProbe);
}

#[test]
fn sticky_connections_stay_until_the_server_is_down_and_then_stay_at_the_next() {
    let mut world = World::new(11);
    let mut targets = Targets::new(Selection::RoundRobin, true, PAUSES);
    targets.replace((0..4).map(Candidate::new).collect(), None);
    let mut connect = |world: &mut World, down: Option<Server>| {
        let answers = |server, _| {
            if Some(server) == down { Answer::Refuses } else { Answer::Accepts }
        };
        let mut machine = Machine::new(plan(2, 2), None);
        world.run(&mut machine, &mut targets, 0, answers).reached.unwrap()
    };
    let first = connect(&mut world, None);
    assert!((0..20).all(|_| connect(&mut world, None) == first));
    let second = connect(&mut world, Some(first));
    assert_ne!(first, second);
    world.pass(PAUSES.most);
    assert!((0..20).all(|_| connect(&mut world, None) == second));
}

#[test]
fn the_advised_address_comes_first_and_is_asked_for_when_one_is_chosen() {
    let (world, mut targets) = (World::new(13), targets(Selection::Best, 3));
    let mut random = fastrand::Rng::with_seed(0);
    let mut random = || random.u64(..);
    let mut machine = Machine::new(plan(1, 1), None);
    let list = (0..3).map(Candidate::new).collect();
    targets.replace(list, Some(world.now.get()));
    for (advised, alternative) in [(2, false), (1, true)] {
        let now = world.now.get();
        // The list is out of date; only alternatives need it.
        let what = Refresh { list: alternative, best: true, urgent: false };
        let best = Step::Refresh(what);
        assert_eq!(machine.next(&mut targets, now, &mut random), best);
        machine.advise(advised);
        let attempt = Attempt { alternative, retries_left: 0, address: advised };
        let step = machine.next(&mut targets, now, &mut random);
        assert_eq!(step, Step::Attempt(attempt));
        machine.begin(&mut targets, advised, now);
        let failure = no();
        machine.failed(&mut targets, failure, now, &mut random);
        // The back-off is over.
        world.pass(Duration::from_secs(1));
    }
}

/// A server that was down when the list was made may be the only one that is up now.
#[test]
fn a_list_that_has_failed_is_asked_for_again() {
    let mut world = World::new(23);
    let mut targets = targets(Selection::InOrder, 0);
    let hour = world.now.get() + Duration::from_secs(3_600);
    targets.replace((0..2).map(Candidate::new).collect(), Some(hour));
    let mut machine = Machine::new(plan(1, 2), None);
    let mut tried = Vec::new();
    let asked = loop {
        let now = world.now.get();
        match machine.next(&mut targets, now, &mut || world.rng.u64(..)) {
            Step::Wait(until) => world.now.set(until),
            Step::Attempt(attempt) => {
                tried.push(attempt.address);
                machine.begin(&mut targets, attempt.address, now);
                let failure = no();
                machine.failed(&mut targets, failure, now, &mut || world.rng.u64(..));
            }
            Step::Refresh(what) => break what,
            step => panic!("{step:?}"),
        }
    };
    assert_eq!(tried, [0, 1]);
    assert_eq!(asked, Refresh { list: true, best: false, urgent: true });
    targets.replace((0..3).map(Candidate::new).collect(), Some(hour));
    let course = world.run(&mut machine, &mut targets, 0, |_, _| Answer::Accepts);
    assert_eq!(course.addresses(), [2]);
}

/// A server that is back may not be advised yet.
#[test]
fn an_address_of_an_earlier_list_is_tried_when_nothing_else_is_left() {
    let mut world = World::new(29);
    let mut targets = targets(Selection::InOrder, 0);
    let hour = world.now.get() + Duration::from_secs(3_600);
    for list in [vec![7, 8], vec![0, 7, 1], vec![0, 1]] {
        targets.replace(list.into_iter().map(Candidate::new).collect(), Some(hour));
    }
    let answers = |server, _| if server == 8 { Answer::Accepts } else { Answer::Refuses };
    let course = world.run(&mut Machine::new(plan(2, 3), None), &mut targets, 0, answers);
    assert_eq!(course.addresses(), [0, 0, 1, 7, 8]);
    // It is no part of the list: a new connection does not go there.
    let course =
        world.run(&mut Machine::new(plan(1, 1), None), &mut targets, 0, |_, _| Answer::Accepts);
    assert!(course.reached.unwrap() < 2);
}

/// Clients of a service begin sessions at the same time, as after an outage; a server fails and
/// recovers. Their rounds must not become the same.
#[test]
fn clients_in_step_do_not_move_together() {
    let mut world = World::new(19);
    let mut clients: Vec<Targets<Server>> =
        (0..300).map(|_| targets(Selection::RoundRobin, 3)).collect();
    let mut on: Vec<Option<Server>> = vec![None; clients.len()];
    for second in 0..120 {
        let mut shares = [0; 3];
        let began = world.now.get();
        let down = [(10..20, 0), (30..40, 1), (50..60, 2)];
        let down = down.iter().find(|(time, _)| time.contains(&second)).map(|(_, server)| *server);
        for (targets, on) in clients.iter_mut().zip(&mut on) {
            // Those of the server that is down reconnect, the others begin a new session.
            let lost = on.filter(|server| down == Some(*server));
            world.now.set(began);
            let course = world.run(&mut Machine::new(plan(3, 2), lost), targets, 0, |server, _| {
                if down == Some(server) { Answer::Refuses } else { Answer::Accepts }
            });
            *on = course.reached;
            shares[usize::from(course.reached.unwrap())] += 1;
        }
        world.now.set(began + Duration::from_secs(1));
        if second >= 60 + PAUSES.most.as_secs() {
            // Fewer than 60 of 300 are five standard deviations away.
            assert!(shares.iter().all(|share| *share >= 60), "{second}: {shares:?}");
        }
    }
}

#[test]
fn without_addresses_nothing_is_tried_and_the_application_is_asked() {
    let (mut world, mut targets) = (World::new(17), targets(Selection::Random, 0));
    let mut machine = Machine::new(plan(3, 2), None);
    let course = world.run(&mut machine, &mut targets, 3, |_, _| Answer::Accepts);
    assert!(course.events.is_empty() && course.reached.is_none());
    assert!(course.took > Duration::ZERO, "a back-off between the rounds");
}

#[test]
fn endless_attempts_go_in_order_to_whatever_is_not_set_aside() {
    let mut targets = Targets::new(Selection::InOrder, false, PAUSES);
    targets.replace((0..3).map(Candidate::new).collect(), None);
    let endless =
        Plan { persistence: Persistence::Endless, total_timeout: Duration::MAX, ..plan(1, 0) };
    let mut machine: Machine<Server> = Machine::new(endless, None);
    let mut now = Instant::now();
    let mut tried = Vec::new();
    while tried.len() < 9 {
        match machine.next(&mut targets, now, &mut || 0) {
            Step::Wait(until) => now = until,
            Step::Attempt(attempt) => {
                machine.begin(&mut targets, attempt.address, now);
                machine.failed_for(&mut targets, now, 100 * MS);
                tried.push(attempt.address);
            }
            step => panic!("{step:?}"),
        }
    }
    assert_eq!(tried, [0, 1, 2, 0, 1, 2, 0, 1, 2]);
}

/// Each failure takes longer than the pause of an address.
#[test]
fn endless_attempts_reach_an_address_behind_others_that_fail_slowly() {
    let mut targets = Targets::new(Selection::InOrder, false, PAUSES);
    targets.replace((0..3).map(Candidate::new).collect(), None);
    let endless =
        Plan { persistence: Persistence::Endless, total_timeout: Duration::MAX, ..plan(1, 0) };
    let mut machine: Machine<Server> = Machine::new(endless, None);
    let mut now = Instant::now();
    let mut tried = Vec::new();
    while tried.len() < 9 {
        match machine.next(&mut targets, now, &mut || 0) {
            Step::Wait(until) => now = until,
            Step::Attempt(attempt) => {
                now += machine.begin(&mut targets, attempt.address, now).expect("no limit");
                machine.failed_for(&mut targets, now, 100 * MS);
                tried.push(attempt.address);
            }
            step => panic!("{step:?}"),
        }
    }
    assert_eq!(tried, [0, 1, 2, 0, 1, 2, 0, 1, 2]);
}

#[test]
fn a_shortage_of_this_machine_uses_up_attempts_and_sets_no_address_aside() {
    let (mut world, mut targets) = (World::new(31), targets(Selection::InOrder, 3));
    // One of them is probed.
    targets.failed(&0, world.now.get(), 0);
    world.pass(PAUSES.first);
    let mut machine = Machine::new(plan(3, 2), None);
    let mut tried = Vec::new();
    loop {
        let now = world.now.get();
        match machine.next(&mut targets, now, &mut || world.rng.u64(..)) {
            Step::Wait(until) => world.now.set(until),
            Step::Attempt(attempt) => {
                tried.push((attempt.alternative, attempt.retries_left));
                machine.begin(&mut targets, attempt.address, now).expect("time is left");
                let shortage = Failure::local(&io::Error::other("no descriptor"));
                machine.failed(&mut targets, shortage, now, &mut || world.rng.u64(..));
            }
            Step::Ask => break,
            step => panic!("{step:?}"),
        }
    }
    assert_eq!(tried, [(false, 2), (false, 1), (false, 0), (true, 1), (true, 0)]);
    assert!(machine.outcomes().0.iter().all(|outcome| outcome.local));
    let now = world.now.get();
    assert_eq!(targets.standing(&0, now), Standing::ToProbe, "the probe is left to others");
    assert!((1..3).all(|server| targets.standing(&server, now) == Standing::Usable));
}

#[test]
fn an_attempt_that_has_no_time_left_when_it_begins_is_not_made() {
    let (mut world, mut targets) = (World::new(37), targets(Selection::InOrder, 2));
    targets.failed(&0, world.now.get(), 0);
    world.pass(PAUSES.first);
    let mut machine = Machine::new(plan(3, 2), None);
    let now = world.now.get();
    let Step::Attempt(attempt) = machine.next(&mut targets, now, &mut || world.rng.u64(..)) else {
        panic!("no attempt");
    };
    let late = now + plan(3, 2).total_timeout;
    assert_eq!(machine.begin(&mut targets, attempt.address, late), None);
    assert_eq!(machine.next(&mut targets, late, &mut || world.rng.u64(..)), Step::Ask);
    assert_eq!(machine.outcomes(), (Vec::new(), true));
    assert_eq!(targets.standing(&0, late), Standing::ToProbe);
}
