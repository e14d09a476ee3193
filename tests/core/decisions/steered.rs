//! Workers whose connections the kernel chooses: what the core makes of the kernel's counts, and
//! what it has the kernel told.

mod model;
mod moved;
mod supervised;

use std::collections::BTreeMap;

use dispatch_protocol::ClientAddr;
use dispatch_protocol::wire::RefusedCode;

use super::*;

/// The kernel's side: what it counts for a worker, and what it was told.
#[derive(Clone, Copy, Debug, Default)]
struct Socket {
    counts: SteerCounts,
    told: Option<SteerSettings>,
}

/// A core with a steered pool, and the kernel.
struct Lab {
    core: Core,
    now: Time,
    sockets: BTreeMap<WorkerId, Socket>,
    /// Workers of [`Effect::Steer`] since the last look, in order.
    steers: Vec<(WorkerId, SteerSettings)>,
    events: Vec<Event>,
    /// Processes to be started, and those to be ended.
    starts: Vec<ProcessId>,
    stops: Vec<ProcessId>,
    /// Workers whose queues are to be moved.
    moves: Vec<WorkerId>,
}

fn steered() -> PoolSettings {
    PoolSettings { steered: true, ..settings() }
}

fn lab() -> Lab {
    lab_with(|_| {})
}

fn lab_with(change: impl FnOnce(&mut PoolSettings)) -> Lab {
    let mut pool = steered();
    change(&mut pool);
    let now = Time(1_000_000_000);
    let mut lab = Lab {
        core: Core::new(vec![pool], vec![listener()], now),
        now,
        sockets: BTreeMap::new(),
        steers: Vec::new(),
        events: Vec::new(),
        starts: Vec::new(),
        stops: Vec::new(),
        moves: Vec::new(),
    };
    lab.wait(Duration::ZERO);
    lab
}

fn counts(live: u64, total: u64, queued: u64) -> SteerCounts {
    SteerCounts { live, total, queued, ..SteerCounts::default() }
}

impl Lab {
    fn pump(&mut self) {
        while let Some(effect) = self.core.effect() {
            match effect {
                Effect::Steer { worker, settings } => {
                    let socket = self.sockets.entry(worker).or_default();
                    socket.told = Some(settings);
                    self.steers.push((worker, settings));
                }
                Effect::Forget { worker } => _ = self.sockets.remove(&worker),
                Effect::Event(event) => self.events.push(event),
                Effect::Spawn { process } => self.starts.push(process),
                Effect::StopProcess { process, .. } => self.stops.push(process),
                Effect::MoveQueue { worker } => self.moves.push(worker),
                Effect::EndProcess { .. } | Effect::CheckReady { .. } => {}
                effect => panic!("nothing can be sent to a steered worker: {effect:?}"),
            }
        }
        self.core.check();
    }

    fn try_join(&mut self, change: impl FnOnce(&mut SteerJoin)) -> Result<WorkerId, Refusal> {
        let mut join = SteerJoin {
            pool: PoolId(0),
            name: "web".to_owned(),
            pid: 7,
            process: None,
            weight: 1,
            priority: 0,
            counts: SteerCounts::default(),
        };
        change(&mut join);
        let worker = self.core.join_steered(self.now, &join)?;
        self.sockets.insert(worker, Socket { counts: join.counts, told: None });
        self.pump();
        Ok(worker)
    }

    fn join(&mut self) -> WorkerId {
        self.try_join(|_| {}).unwrap()
    }

    fn counts(&mut self, worker: WorkerId, counts: SteerCounts) {
        self.core.steer_counts(self.now, worker, counts);
        if let Some(socket) = self.sockets.get_mut(&worker) {
            socket.counts = counts;
        }
        self.pump();
    }

    fn wait(&mut self, time: Duration) {
        self.now = self.now + time;
        self.core.tick(self.now);
        self.pump();
    }

    /// The worker's counts stay as they are for this long; they are read ten times a second.
    fn idle(&mut self, worker: WorkerId, time: Duration) {
        for _ in 0..time.as_millis() / 100 {
            self.wait(ms(100));
            let counts = self.sockets[&worker].counts;
            self.counts(worker, counts);
        }
    }

    fn state(&self, worker: WorkerId) -> State {
        self.core.worker_state(worker).unwrap()
    }

    fn told(&self, worker: WorkerId) -> SteerSettings {
        self.sockets[&worker].told.unwrap()
    }

    fn settings(&self) -> PoolSettings {
        self.core.pool_settings(PoolId(0)).unwrap().clone()
    }
}

#[test]
fn the_load_is_what_the_kernel_counts() {
    let mut lab = lab();
    let worker = lab.try_join(|join| join.counts = counts(3, 90, 0)).unwrap();
    assert_eq!(lab.core.load(worker), Some(3));
    assert_eq!(lab.core.totals().accepted, 0, "they were connected before");
    lab.counts(worker, SteerCounts { pending: 2, ..counts(2, 91, 0) });
    assert_eq!(lab.core.load(worker), Some(4));
    lab.counts(worker, counts(0, 95, 0));
    assert_eq!(lab.core.load(worker), Some(0));
    let totals = lab.core.totals();
    assert_eq!((totals.accepted, totals.taken, totals.in_flight), (5, 5, 0));
    let snapshot = lab.core.snapshot();
    let pool = &snapshot.pools[0];
    assert_eq!((pool.taken, pool.workers[0].taken, pool.workers[0].finished), (5, 5, 8));
    assert_eq!(pool.workers[0].steered, Some(counts(0, 95, 0)));
}

#[test]
fn a_worker_without_connections_that_a_kernel_counts_from_zero_is_no_fault() {
    let mut lab = lab();
    let worker = lab.try_join(|join| join.counts = counts(50, 1_000, 0)).unwrap();
    lab.counts(worker, counts(60, 1_010, 0));
    // New programs: the open connections are unknown to them.
    lab.counts(worker, counts(0, 0, 0));
    assert_eq!(lab.core.load(worker), Some(0));
    lab.counts(worker, counts(2, 3, 0));
    assert_eq!((lab.core.load(worker), lab.core.totals().accepted), (Some(2), 13));
    // The accept queue is never empty when it is looked at, and the worker accepts.
    for total in 4..40 {
        lab.wait(ms(100));
        lab.counts(worker, counts(2, total, 1));
        assert_eq!(lab.state(worker), State::Active, "it accepts as many as come");
    }
}

#[test]
fn impossible_counts_are_clamped() {
    let mut lab = lab();
    let most = SteerCounts {
        live: u64::MAX,
        pending: u64::MAX,
        total: u64::MAX,
        queued: u64::MAX,
        moved_in: u64::MAX,
        moved_out: u64::MAX,
    };
    let worker = lab.try_join(|join| join.counts = most).unwrap();
    lab.counts(worker, most);
    assert_eq!(lab.core.load(worker), Some(10_000_000));
    lab.counts(worker, SteerCounts::default());
    lab.counts(worker, most);
    lab.counts(worker, counts(1, 1, 0));
    assert_eq!(lab.core.load(worker), Some(1));
}

#[test]
fn the_kernel_is_told_only_what_has_changed() {
    let mut lab = lab();
    let worker = lab.join();
    assert_eq!(lab.steers.len(), 1);
    let told = lab.told(worker);
    assert!(!told.draining && !told.suspect);
    assert_eq!((told.weight, told.slow_start, told.maximum), (1, 1_000, 1_000_000));
    for total in 1..10 {
        lab.counts(worker, counts(total, total, 0));
    }
    assert!(!lab.core.set_weight(lab.now, WorkerId { serial: 99, ..worker }, 5));
    assert!(lab.core.set_weight(lab.now, worker, 1));
    lab.pump();
    assert_eq!(lab.steers.len(), 1, "its counts are the kernel's, and its weight is the same");
    assert!(lab.core.set_weight(lab.now, worker, 9));
    lab.pump();
    assert_eq!(lab.told(worker).weight, 9);
    lab.core.drain_worker(lab.now, worker, None);
    lab.pump();
    assert!(lab.told(worker).draining);
    assert_eq!(lab.core.resume_worker(lab.now, worker), Ok(true));
    lab.pump();
    assert!(!lab.told(worker).draining);
    let settings = PoolSettings { max_connections_per_worker: 10, ..lab.settings() };
    lab.core.change_pool(lab.now, PoolId(0), settings, 1);
    lab.pump();
    assert_eq!(lab.told(worker).maximum, 10);
    assert_eq!(lab.steers.len(), 5);
}

#[test]
fn the_last_settings_of_a_turn_count() {
    let mut lab = lab();
    lab.core.drain_host(lab.now, Duration::ZERO, None);
    lab.pump();
    lab.steers.clear();
    let late = lab.try_join(|join| join.name = "late".to_owned()).unwrap();
    assert_eq!(lab.steers.len(), 1, "no moment in which it would get connections");
    assert!(lab.told(late).draining);
    lab.core.resume_host(lab.now);
    for weight in 2..20 {
        lab.core.set_weight(lab.now, late, weight);
    }
    lab.pump();
    assert_eq!(lab.steers.len(), 2);
    assert!(!lab.told(late).draining && lab.told(late).weight == 19);
}

#[test]
fn a_drain_of_the_host_reaches_the_kernel_when_it_begins() {
    let mut lab = lab();
    let workers = [lab.join(), lab.join()];
    lab.core.drain_host(lab.now, ms(500), None);
    lab.pump();
    assert!(workers.iter().all(|&worker| !lab.told(worker).draining), "it is announced");
    lab.wait(ms(500));
    assert!(workers.iter().all(|&worker| lab.told(worker).draining));
    lab.core.resume_host(lab.now);
    lab.pump();
    assert!(workers.iter().all(|&worker| !lab.told(worker).draining));
}

#[test]
fn a_slow_start_reaches_the_kernel_in_steps() {
    let mut lab = lab_with(|pool| pool.slow_start = ms(6_400));
    let worker = lab.join();
    assert_eq!(lab.told(worker).slow_start, 15, "the first of 64 steps");
    lab.wait(ms(3_200));
    assert_eq!(lab.told(worker).slow_start, 33 * 1000 / 64);
    lab.wait(ms(3_200));
    assert_eq!(lab.told(worker).slow_start, 1_000);
    assert_eq!(lab.core.deadline(), None, "no timer is left");
}

#[test]
fn a_worker_that_accepts_nothing_is_suspect_until_it_accepts() {
    let mut lab = lab();
    let worker = lab.join();
    lab.idle(worker, ms(5_000));
    assert_eq!(lab.state(worker), State::Active, "nothing waits");
    lab.counts(worker, counts(1, 1, 1));
    lab.idle(worker, ms(1_000));
    assert_eq!(lab.state(worker), State::Active, "not longer than its patience");
    lab.idle(worker, ms(100));
    assert_eq!(lab.state(worker), State::Suspect);
    let told = lab.told(worker);
    assert!(told.suspect && !told.draining, "it gets what no other worker has room for");
    let suspect = |event: &Event| matches!(event, Event::Suspect { revoked: 0, .. });
    assert_eq!(lab.events.iter().filter(|event| suspect(event)).count(), 1);
    lab.idle(worker, ms(5_000));
    assert_eq!(lab.events.iter().filter(|event| suspect(event)).count(), 1, "told once");
    // More come, and it accepts one.
    lab.counts(worker, counts(3, 3, 3));
    assert_eq!(lab.state(worker), State::Suspect);
    lab.counts(worker, counts(3, 3, 2));
    assert_eq!(lab.state(worker), State::Active);
    assert!(!lab.told(worker).suspect);
    assert!(lab.events.iter().any(|event| matches!(event, Event::Trusted { .. })));
}

#[test]
fn an_empty_queue_ends_the_suspicion_too() {
    let mut lab = lab();
    let worker = lab.join();
    lab.counts(worker, counts(1, 1, 1));
    lab.idle(worker, ms(1_200));
    assert_eq!(lab.state(worker), State::Suspect);
    // New programs while its queue was emptied: the total says nothing.
    lab.counts(worker, counts(0, 0, 0));
    assert_eq!(lab.state(worker), State::Active);
}

#[test]
fn a_worker_that_accepts_is_not_suspect_however_long_its_queue_is() {
    let mut lab = lab();
    let worker = lab.join();
    for total in 1..200 {
        lab.wait(ms(100));
        lab.counts(worker, counts(total, 100 + total, 100));
        assert_eq!(lab.state(worker), State::Active);
    }
}

#[test]
fn the_patience_grows_with_a_serial_worker() {
    // It serves one connection in 1.5 s, with a handoff_timeout of 1 s, and its queue stays full.
    let mut lab = lab();
    let worker = lab.join();
    let mut suspects = 0;
    for accepted in 0..20 {
        for _ in 0..15 {
            lab.wait(ms(100));
            lab.counts(worker, counts(5, accepted + 4, 4));
        }
        suspects += u32::from(lab.state(worker) == State::Suspect);
    }
    assert_eq!(suspects, 1, "its first time shows how long it needs");
    assert_eq!(lab.state(worker), State::Active);
    // Then it hangs, 1.4 s after its last one: three times its longest wait.
    lab.idle(worker, ms(3_000));
    assert_eq!(lab.state(worker), State::Active);
    lab.idle(worker, ms(300));
    assert_eq!(lab.state(worker), State::Suspect);
}

#[test]
fn a_drained_worker_that_hangs_is_suspect_when_it_is_resumed() {
    let mut lab = lab();
    let worker = lab.join();
    lab.core.drain_worker(lab.now, worker, None);
    lab.pump();
    lab.counts(worker, counts(1, 1, 1));
    lab.idle(worker, ms(1_200));
    assert_eq!(lab.state(worker), State::Draining);
    assert_eq!(lab.core.resume_worker(lab.now, worker), Ok(true));
    lab.pump();
    assert_eq!(lab.state(worker), State::Suspect);
    lab.counts(worker, counts(1, 1, 0));
    assert_eq!(lab.state(worker), State::Active);
}

#[test]
fn workers_that_join_by_themselves_are_refused() {
    let mut lab = lab();
    let hello = Hello { pool: "web".to_owned(), ..hello() };
    let join = Join { pid: 5, uid: 0, gids: vec![0], hello, spawned: None };
    let report = dispatch_protocol::line::Report::default();
    let line = LineJoin { pid: 5, uid: 0, gids: vec![0], pool: "web".to_owned(), report };
    let refusals = [
        lab.core.join(lab.now, &join).unwrap_err(),
        lab.core.join_line(lab.now, &line).unwrap_err(),
    ];
    for refusal in refusals {
        assert_eq!(refusal.code, RefusedCode::NotAllowed);
        assert_eq!(refusal.key.as_deref(), Some("pool.web.mode"));
        assert!(refusal.reason.contains("mode = \"steer\""), "{}", refusal.reason);
    }
    // If the kernel cannot choose, the pool is an ordinary one.
    lab.core.pass_instead(PoolId(0));
    lab.core.join(lab.now, &join).unwrap();
}

#[test]
fn a_pool_with_workers_stays_as_it_is() {
    let mut lab = lab();
    let worker = lab.join();
    let passed = PoolSettings { steered: false, ..lab.settings() };
    lab.core.change_pool(lab.now, PoolId(0), passed.clone(), 1);
    lab.pump();
    assert_eq!(lab.core.accepting(WEB), Accepting::Pause, "its worker can be sent nothing");
    lab.core.leave(lab.now, worker, Departure::Died);
    lab.core.change_pool(lab.now, PoolId(0), passed, 1);
    lab.pump();
    let join = Join { pid: 5, uid: 0, gids: vec![0], hello: hello(), spawned: None };
    lab.core.join(lab.now, &join).unwrap();
    lab.core.change_pool(lab.now, PoolId(0), steered(), 1);
    assert_eq!(lab.core.accepting(WEB), Accepting::Yes);
}

#[test]
fn the_bounds_of_a_pool_hold_for_steered_workers() {
    let mut lab = lab_with(|pool| pool.max_workers = 1);
    lab.join();
    let refusal = lab.try_join(|_| {}).unwrap_err();
    assert_eq!(refusal.key.as_deref(), Some("pool.web.max_workers"));
    let refusal = lab.try_join(|join| join.pool = PoolId(9)).unwrap_err();
    assert_eq!(refusal.code, RefusedCode::Stopping);
    lab.core.stop(lab.now, lab.now);
    lab.wait(ms(1));
    assert_eq!(lab.try_join(|_| {}).unwrap_err().code, RefusedCode::Stopping);
}

#[test]
fn nothing_is_accepted_and_what_came_before_is_closed() {
    let mut lab = lab();
    lab.join();
    assert_eq!(lab.core.accepting(WEB), Accepting::Pause);
    lab.core.stop(lab.now, lab.now + ms(1_000));
    assert_eq!(lab.core.accepting(WEB), Accepting::Finish);
    let conn = lab.core.accepted(lab.now, Client::new(WEB, ClientAddr::Unix));
    let closes = std::iter::from_fn(|| lab.core.effect());
    let closed = closes.filter(|effect| match effect {
        Effect::Close { conn: of, reason, .. } => *of == conn && *reason == CloseReason::NoWorker,
        effect => panic!("{effect:?}"),
    });
    assert_eq!(closed.count(), 1);
    lab.core.check();
}

#[test]
fn a_worker_whose_listener_is_closed_keeps_its_connections() {
    let mut lab = lab();
    let worker = lab.join();
    lab.counts(worker, counts(2, 2, 0));
    lab.core.steer_closed(lab.now, worker);
    lab.pump();
    assert!(lab.told(worker).draining);
    assert_eq!(lab.state(worker), State::Draining);
    assert!(lab.events.iter().any(|event| matches!(event, Event::Goodbye { live: 2, .. })));
    assert_eq!(lab.core.resume_worker(lab.now, worker), Err(CannotResume::Leaving));
    lab.counts(worker, counts(1, 2, 0));
    assert_eq!(lab.core.load(worker), Some(1));
    // It listens again, as another worker with the same name.
    let again = lab.join();
    let names = [worker, again].map(|it| lab.core.worker_name(it).to_owned());
    assert_eq!(names[0], names[1], "its number is free");
    lab.steers.clear();
    lab.core.leave(lab.now, worker, Departure::Disconnected);
    lab.pump();
    assert!(lab.steers.is_empty(), "its number in the kernel may be another worker's");
    lab.counts(worker, counts(7, 7, 0));
    lab.core.steer_closed(lab.now, worker);
    lab.pump();
}

#[test]
fn a_pool_without_workers_waits_for_one_and_then_refuses() {
    let mut lab = lab();
    let refusing = |lab: &Lab| {
        lab.events.iter().any(|event| matches!(event, Event::Refusing { unserved: false, .. }))
    };
    let worker = lab.join();
    lab.core.leave(lab.now, worker, Departure::Died);
    lab.wait(ms(4_900));
    assert!(!refusing(&lab));
    lab.wait(ms(200));
    assert!(refusing(&lab));
    assert_eq!(lab.core.accepting(WEB), Accepting::Pause, "the kernel resets them");
    lab.join();
    assert_eq!(lab.core.snapshot().pools[0].state, PoolState::Ready);
}

#[test]
fn full_workers_are_back_pressure() {
    let mut lab = lab_with(|pool| pool.max_connections_per_worker = 2);
    let worker = lab.join();
    lab.counts(worker, counts(2, 2, 0));
    lab.wait(ms(1_000));
    assert_eq!(lab.core.snapshot().pools[0].state, PoolState::BackPressure);
    lab.counts(worker, counts(1, 2, 0));
    assert_eq!(lab.core.snapshot().pools[0].state, PoolState::Ready);
}

#[test]
fn what_would_be_chosen_next_is_the_policys_choice() {
    let mut lab = lab_with(|pool| pool.history = 8);
    let workers = [lab.join(), lab.join()];
    lab.counts(workers[0], counts(5, 5, 0));
    let next = lab.core.explain(lab.now, PoolId(0), ClientAddr::Unix).unwrap();
    assert_eq!((next.obstacle, next.decision.chosen), (None, Some(workers[1].serial)));
    assert!(lab.core.history(PoolId(0), 0).is_empty(), "the kernel keeps none");
    // Only a suspect worker has room: the kernel gives it connections.
    lab.core.drain_worker(lab.now, workers[0], None);
    lab.counts(workers[1], counts(1, 1, 1));
    lab.idle(workers[1], ms(1_200));
    let next = lab.core.explain(lab.now, PoolId(0), ClientAddr::Unix).unwrap();
    assert_eq!(next.obstacle, Some(Obstacle::BackPressure));
    assert!(next.decision.candidates.iter().any(|it| it.why == Why::Suspect));
}

#[test]
fn a_removed_pool_drains_its_members_and_takes_no_new_ones() {
    let mut lab = lab();
    let worker = lab.join();
    lab.counts(worker, counts(1, 1, 0));
    lab.core.retire_listener(WEB);
    lab.core.retire_pool(lab.now, PoolId(0));
    lab.core.listener_closed(lab.now, WEB);
    lab.wait(ms(10));
    assert!(lab.told(worker).draining);
    let refusal = lab.try_join(|_| {}).unwrap_err();
    assert_eq!(refusal.code, RefusedCode::UnknownPool);
    assert!(refusal.reason.contains("`web` was removed"), "{}", refusal.reason);
    // It comes back before its worker has gone.
    assert_eq!(lab.core.add_pool(lab.now, steered(), 1), PoolId(0));
    lab.pump();
    assert!(!lab.told(worker).draining);
    // Its counts outlive its entry.
    lab.core.retire_pool(lab.now, PoolId(0));
    lab.core.leave(lab.now, worker, Departure::Disconnected);
    lab.wait(ms(10_000));
    let other = PoolSettings { name: "other".to_owned(), ..steered() };
    assert_eq!(lab.core.add_pool(lab.now, other, 1), PoolId(0), "the entry is used again");
    lab.pump();
    assert_eq!(lab.core.totals().accepted, 1);
}
