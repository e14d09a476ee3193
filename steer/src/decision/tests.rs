use super::*;
use crate::layout::{FULL_SPEED, PENDING_SECONDS};

mod policies;

fn pool(settings: &[WorkerSettings], loads: &[i64]) -> Vec<WorkerCounts> {
    assert_eq!(settings.len(), loads.len());
    let counts = |&live| WorkerCounts { live, listeners: [1, 0], listens: 1, ..Default::default() };
    loads.iter().map(counts).collect()
}

/// A pool with least connections, of an IPv4 client.
fn of<'a>(settings: &'a [WorkerSettings], counts: &'a [WorkerCounts]) -> Pool<'a> {
    Pool {
        policy: Policy::LeastConnections,
        seed: 0,
        settings,
        counts,
        totals: Totals::default(),
        second: 100,
        is_v6: false,
        key: 0,
    }
}

fn choose(settings: &[WorkerSettings], counts: &[WorkerCounts], last: u32) -> Choice {
    let totals = Totals { last, ..Default::default() };
    Pool { totals, ..of(settings, counts) }.choose()
}

#[test]
fn fewest_connections_for_the_weight_and_ties_rotate() {
    let settings = [1, 2, 1].map(WorkerSettings::new);
    assert_eq!(choose(&settings, &pool(&settings, &[3, 5, 3]), 0), Choice::Worker(1));
    let counts = pool(&settings, &[1, 3, 1]);
    for last in 0..3 {
        assert_eq!(choose(&settings, &counts, last), Choice::Worker((last + 1) % 3));
    }
    assert_eq!(choose(&settings, &counts, 3), Choice::Worker(0), "a worker was removed");
    assert_eq!(choose(&settings, &counts, u32::MAX), Choice::Worker(0));
}

#[test]
fn the_largest_numbers_do_not_overflow() {
    let heavy = WorkerSettings::new(u16::MAX);
    let light = WorkerSettings { slow_start: 1, ..WorkerSettings::new(1) };
    let mut counts = pool(&[heavy, light], &[i64::from(u32::MAX), i64::from(u32::MAX)]);
    for worker in &mut counts {
        worker.pending = std::array::from_fn(|n| (97 + n as u64) << 32 | u64::from(u32::MAX));
    }
    assert_eq!(choose(&[light, heavy], &counts, 0), Choice::Worker(1));
}

#[test]
fn full_is_not_the_same_as_no_worker() {
    let full = WorkerSettings { maximum: 2, ..WorkerSettings::new(1) };
    let draining = WorkerSettings { draining: 1, ..WorkerSettings::new(1) };
    let suspect = WorkerSettings { suspect: 1, ..WorkerSettings::new(1) };
    let absent = WorkerSettings::default();
    let decide = |settings: &[WorkerSettings]| {
        let counts = pool(settings, &[2; 3][..settings.len()]);
        choose(settings, &counts, 0)
    };
    assert_eq!(decide(&[full, draining, full]), Choice::Full);
    assert_eq!(decide(&[draining, absent]), Choice::NoWorker);
    assert_eq!(decide(&[full, suspect, draining]), Choice::Worker(1));
    assert_eq!(decide(&[]), Choice::NoWorker);
}

#[test]
fn listeners_decide_on_families() {
    let settings = [WorkerSettings::new(1); 2];
    let counts = |listeners, no_v4_at, lost_at| {
        [WorkerCounts { listeners, listens: 1, no_v4_at, lost_at, ..Default::default() }; 2]
    };
    let decide = |counts: [WorkerCounts; 2], is_v6| {
        let totals = Totals { last: 1, ..Default::default() };
        Pool { totals, is_v6, ..of(&settings, &counts) }.choose()
    };
    assert_eq!(decide(counts([1, 0], 0, 0), false), Choice::Worker(0));
    assert_eq!(decide(counts([1, 0], 0, 0), true), Choice::NoWorker);
    assert_eq!(decide(counts([0, 1], 0, 0), false), Choice::Worker(0), "dual stack");
    assert_eq!(decide(counts([0, 1], 1, 0), false), Choice::NoWorker, "IPv6 only");
    assert_eq!(decide(counts([0, 1], 1, 0), true), Choice::Worker(0));
    assert_eq!(decide(counts([1, 1], 0, 1), true), Choice::NoWorker, "lost");
}

#[test]
fn draws_of_large_pools_are_nearly_even() {
    let settings = vec![WorkerSettings::new(1); 400];
    let mut counts = pool(&settings, &[0; 400]);
    for turn in 0..40_000 {
        let totals = Totals { turn, ..Default::default() };
        let choice = Pool { totals, ..of(&settings, &counts) }.choose();
        let Choice::Worker(worker) = choice else { panic!("no worker") };
        counts[worker as usize].live += 1;
    }
    let most = counts.iter().map(|counts| counts.live).max();
    assert!(most <= Some(105), "a mean of 100: {most:?}");
}

mod kernel {
    //! The program in the kernel decides the same.

    use std::cell::RefCell;
    use std::net::{Ipv4Addr, TcpListener};
    use std::os::fd::AsFd;

    use aya::programs::SkLookup;
    use nix::sched::{CloneFlags, CpuSet, sched_getcpu, sched_setaffinity, unshare};
    use nix::unistd::Pid;
    use proptest::prelude::*;
    use proptest::test_runner::{Config, TestRunner};
    use rustix::net::sockopt::socket_cookie;

    use super::*;
    use crate::layout::{Address, MAX_WORKERS, Settings};
    use crate::machine::{Places, missing};
    use crate::maps::Maps;
    use crate::policy::key_of;
    use crate::steering::load_programs;
    use crate::sys;

    const LISTENERS: u32 = 300;

    #[derive(Clone, Debug)]
    struct Case {
        workers: Vec<(WorkerSettings, WorkerCounts)>,
        last: u32,
        turn: u64,
        seed: u64,
        policy: Policy,
        client: Ipv4Addr,
        clock: u64,
    }

    impl Case {
        /// Before the decision.
        fn totals(&self) -> Totals {
            let (last, turn, clock) = (self.last, self.turn, self.clock);
            Totals { last, turn, clock, ..Default::default() }
        }
    }

    fn worker() -> impl Strategy<Value = (WorkerSettings, WorkerCounts)> {
        let settings = (
            prop_oneof![1 => Just(0u32), 9 => 1..4u32, 1 => Just(65_535)],
            prop_oneof![3 => Just(FULL_SPEED), 1 => 1..=FULL_SPEED],
            prop_oneof![2 => Just(0), 1 => 1..8u32],
            proptest::bool::weighted(0.1),
            proptest::bool::weighted(0.2),
            (0..3u16, prop_oneof![Just(0), any::<u64>()]),
        );
        let age = 0..2 * u64::from(PENDING_SECONDS);
        let slots = proptest::collection::vec((age, 0..3u64), PENDING_SECONDS as usize);
        // Around the virtual clock, and long ago.
        let last_turn = prop_oneof![4 => -(1 << 41)..1i64 << 41, 1 => any::<i64>()];
        let counts = (-1..6i64, slots, 0..10u8, last_turn);
        (settings, counts).prop_map(|(settings, (live, slots, mood, last_turn))| {
            let (weight, slow_start, maximum, draining, suspect, (priority, node)) = settings;
            let settings = WorkerSettings {
                weight,
                slow_start,
                maximum,
                draining: draining.into(),
                suspect: suspect.into(),
                priority,
                node,
            };
            let last_turn = last_turn as u64;
            let mut counts = WorkerCounts { live, listens: 3, last_turn, ..Default::default() };
            // Ages; the test makes seconds of them.
            counts.pending = std::array::from_fn(|n| slots[n].0 << 32 | slots[n].1);
            counts.listeners = [u32::from(mood != 0), 0];
            counts.lost_at = if mood == 1 { 3 } else { 0 };
            (settings, counts)
        })
    }

    fn case() -> impl Strategy<Value = Case> {
        let few = proptest::collection::vec(worker(), 0..9);
        let many =
            proptest::collection::vec(worker(), SCAN_WORKERS as usize - 2..LISTENERS as usize);
        let policy = proptest::sample::select(Policy::ALL.to_vec());
        let clock = prop_oneof![Just(0), any::<u64>()];
        let numbers = (0..310u32, any::<u32>(), any::<u64>(), any::<[u8; 4]>(), clock);
        (prop_oneof![3 => few, 1 => many], policy, numbers).prop_map(
            |(mut workers, policy, (last, turn, seed, client, clock))| {
                for (_, counts) in &mut workers {
                    counts.last_turn = counts.last_turn.wrapping_add(clock);
                }
                let (turn, client) = (turn.into(), client.into());
                Case { workers, last, turn, seed, policy, client, clock }
            },
        )
    }

    struct Kernel {
        ebpf: aya::Ebpf,
        maps: Maps,
        cookies: Vec<u64>,
        sink: u64,
        port: u16,
        _open: Vec<TcpListener>,
    }

    impl Kernel {
        fn new() -> Kernel {
            let (ebpf, mut maps) = load_programs().unwrap();
            let listen = || TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
            let open: Vec<TcpListener> = (0..=LISTENERS).map(|_| listen()).collect();
            for (worker, listener) in open.iter().enumerate() {
                let is_sink = worker == LISTENERS as usize;
                let index = if is_sink { 2 * MAX_WORKERS } else { 2 * worker as u32 };
                sys::set_socket(maps.listeners.fd().as_fd(), index, listener.as_fd()).unwrap();
            }
            let mut cookies: Vec<u64> = open.iter().map(|l| socket_cookie(l).unwrap()).collect();
            let sink = cookies.pop().unwrap();
            let public = Address::new(Ipv4Addr::UNSPECIFIED.into(), 80);
            maps.publics_mut().unwrap().insert(public, 1, 0).unwrap();
            Kernel { ebpf, maps, cookies, sink, port: 1, _open: open }
        }

        /// Runs the program on a state; the choice, and the counts and totals after it.
        fn decide(&mut self, case: &Case) -> (Choice, Vec<WorkerCounts>, Totals) {
            let many = case.workers.len() as u32;
            let (policy, seed) = (case.policy.number(), case.seed);
            let settings = Settings { workers: many, policy, seed, ..Default::default() };
            self.maps.settings_mut().unwrap().set(0, settings, 0).unwrap();
            for (worker, (settings, counts)) in (0..).zip(&case.workers) {
                self.maps.workers_mut().unwrap().set(worker, settings, 0).unwrap();
                self.maps.counts_mut().unwrap().set(worker, counts, 0).unwrap();
            }
            let totals = case.totals();
            self.maps.state_mut().unwrap().set(0, totals, 0).unwrap();
            self.maps.live_bounds.remove();
            self.forget_handshakes();
            let choice = self.choose(case.client);
            let counts = self.maps.counts().unwrap();
            let after = (0..many).map(|worker| counts.get(&worker, 0).unwrap()).collect();
            (choice, after, self.totals())
        }

        fn totals(&self) -> Totals {
            self.maps.state().unwrap().get(&0, 0).unwrap()
        }

        /// What the last choice has counted is not taken back.
        fn forget_handshakes(&mut self) {
            for key in self.maps.remotes().unwrap().keys().collect::<Vec<_>>() {
                self.maps.remotes_mut().unwrap().remove(&key.unwrap()).unwrap();
            }
        }

        /// Runs the program for another client.
        fn choose(&mut self, client: Ipv4Addr) -> Choice {
            self.port = self.port % 60_000 + 1;
            let program = self.ebpf.program("steer_lookup").unwrap();
            let program: &SkLookup = program.try_into().unwrap();
            let fd = program.fd().unwrap().as_fd();
            let (verdict, cookie) = sys::run_lookup(fd, client, self.port, 80).unwrap();
            if cookie == self.sink {
                Choice::Full
            } else if let Some(at) = self.cookies.iter().position(|&other| other == cookie) {
                Choice::Worker(at as u32)
            } else {
                assert_eq!((verdict, cookie), (0, 0), "reset");
                Choice::NoWorker
            }
        }

        /// Changes what the loader writes, as it does.
        fn change(&mut self, worker: u32, settings: &WorkerSettings, counts: &WorkerCounts) {
            self.maps.workers_mut().unwrap().set(worker, settings, 0).unwrap();
            self.maps.counts_mut().unwrap().set(worker, counts, 0).unwrap();
            self.maps.live_bounds.remove();
        }
    }

    /// Steps between two choices.
    #[derive(Clone, Debug)]
    enum Step {
        /// The connection of the last choice is taken back.
        TakenBack,
        /// It stays.
        Stays,
        /// It stays, and this worker has changed.
        Changes(usize, (WorkerSettings, WorkerCounts)),
    }

    /// With many workers a choice starts from what the last one has found out.
    #[test]
    fn choices_in_a_row_are_those_of_the_function() {
        if !can_run() {
            return;
        }
        // Each processor takes back what it has counted itself.
        let mut one = CpuSet::new();
        one.set(sched_getcpu().unwrap()).unwrap();
        sched_setaffinity(Pid::from_raw(0), &one).unwrap();
        // Most of the time all have the same weight and room.
        let even = |(settings, counts): (WorkerSettings, WorkerCounts)| {
            let slow_start = FULL_SPEED;
            (WorkerSettings { weight: 1, slow_start, maximum: 0, draining: 0, ..settings }, counts)
        };
        let one = || prop_oneof![100 => worker().prop_map(even), 1 => worker()];
        let step = prop_oneof![
            4 => Just(Step::TakenBack),
            6 => Just(Step::Stays),
            1 => (any::<usize>(), one()).prop_map(|(at, to)| Step::Changes(at, to)),
        ];
        let many = proptest::collection::vec(one(), 15..=SCAN_WORKERS as usize + 2);
        let steps = proptest::collection::vec(step, 60);
        let kernel = RefCell::new(Kernel::new());
        let config = Config { cases: 60, failure_persistence: None, ..Config::default() };
        TestRunner::new(config)
            .run(&(many, steps, any::<u32>()), |(workers, steps, last)| {
                let mut kernel = kernel.borrow_mut();
                let now = u64::from(crate::second());
                // Ages become seconds, each in its place.
                let seconds = |mut counts: WorkerCounts| {
                    for slot in std::mem::take(&mut counts.pending) {
                        let second = now - (slot >> 32);
                        let place = (second % u64::from(PENDING_SECONDS)) as usize;
                        counts.pending[place] = second << 32 | (slot & 0xffff_ffff);
                    }
                    counts
                };
                let (mut settings, counts): (Vec<_>, Vec<_>) = workers.into_iter().unzip();
                let mut counts: Vec<WorkerCounts> = counts.into_iter().map(seconds).collect();
                let case = Case {
                    workers: settings.iter().copied().zip(counts.iter().copied()).collect(),
                    last: last % 300,
                    turn: 0,
                    seed: 0,
                    policy: Policy::LeastConnections,
                    client: Ipv4Addr::LOCALHOST,
                    clock: 0,
                };
                let mut before = case.totals();
                let (mut choice, _, mut after) = kernel.decide(&case);
                for step in steps.into_iter().map(Some).chain([None]) {
                    let pool = Pool {
                        settings: &settings,
                        counts: &counts,
                        totals: before,
                        policy: case.policy,
                        seed: 0,
                        second: after.second,
                        is_v6: false,
                        key: 0,
                    };
                    prop_assert_eq!(choice, pool.choose());
                    let Some(step) = step else { break };
                    if let Choice::Worker(worker) = choice {
                        let counts = &mut counts[worker as usize];
                        match step {
                            Step::TakenBack => {}
                            _ => counts.add_pending(after.second),
                        }
                    }
                    if !matches!(step, Step::TakenBack) {
                        kernel.forget_handshakes();
                    }
                    if let Step::Changes(at, (to, with)) = step {
                        let at = at % settings.len();
                        (settings[at], counts[at]) = (to, seconds(with));
                        kernel.change(at as u32, &settings[at], &counts[at]);
                    }
                    before = after;
                    choice = kernel.choose(case.client);
                    after = kernel.totals();
                }
                Ok(())
            })
            .unwrap();
    }

    fn can_run() -> bool {
        let missing = missing(&Places::default());
        let runs = missing.is_empty() && unshare(CloneFlags::CLONE_NEWNET).is_ok();
        if !runs {
            let what = missing.join("; ");
            test_support::skip_on_this_kernel(&format!("needs root and BPF: {what}"));
        }
        runs
    }

    #[test]
    fn the_program_decides_as_the_function() {
        if !can_run() {
            return;
        }
        let kernel = RefCell::new(Kernel::new());
        let outcomes = RefCell::new([0; 3]);
        let chosen_by = RefCell::new([0; Policy::ALL.len()]);
        let config = Config { cases: 1200, failure_persistence: None, ..Config::default() };
        TestRunner::new(config)
            .run(&case(), |mut case| {
                // Ages of pending connections become seconds. The clock may go on before the
                // program reads it, so the function uses the second that the program has used.
                let now = u64::from(crate::second());
                for (_, counts) in &mut case.workers {
                    for slot in &mut counts.pending {
                        *slot = (now - (*slot >> 32)) << 32 | (*slot & 0xffff_ffff);
                    }
                }
                let (choice, after, totals) = kernel.borrow_mut().decide(&case);
                let (settings, mut counts): (Vec<_>, Vec<_>) = case.workers.iter().copied().unzip();
                let pool = Pool {
                    settings: &settings,
                    counts: &counts,
                    totals: case.totals(),
                    policy: case.policy,
                    seed: case.seed,
                    second: totals.second,
                    is_v6: false,
                    key: key_of(case.client.into()),
                };
                let expected = pool.choose();
                let turn = match expected {
                    Choice::Worker(worker) if case.policy == Policy::RoundRobin => {
                        Some((worker, pool.turn(worker)))
                    }
                    _ => None,
                };
                prop_assert_eq!(choice, expected);
                prop_assert_eq!(totals.turn, case.turn + 1);
                outcomes.borrow_mut()[match choice {
                    Choice::Worker(worker) => {
                        chosen_by.borrow_mut()[case.policy.number() as usize] += 1;
                        counts[worker as usize].add_pending(totals.second);
                        prop_assert_eq!((totals.last, totals.chosen), (worker, 1));
                        0
                    }
                    Choice::Full => {
                        prop_assert_eq!(totals.full, 1);
                        1
                    }
                    Choice::NoWorker => {
                        prop_assert_eq!(totals.unserved, 1);
                        2
                    }
                }] += 1;
                if let Some((worker, at)) = turn {
                    counts[worker as usize].last_turn = at;
                }
                prop_assert_eq!(totals.clock, turn.map_or(case.clock, |(_, at)| at));
                prop_assert_eq!(after, counts);
                Ok(())
            })
            .unwrap();
        let outcomes = outcomes.into_inner();
        assert!(outcomes.iter().all(|&many| many > 5), "every outcome was seen: {outcomes:?}");
        let chosen_by = chosen_by.into_inner();
        assert!(chosen_by.iter().all(|&many| many > 50), "every policy chose: {chosen_by:?}");
    }
}
