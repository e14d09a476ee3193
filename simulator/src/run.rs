//! One run: independent worker processes, clients, faults, and an event loop that runs a turn from
//! time to time.
//!
//! Everything is drawn from the plan's seed, so a run can be repeated. [`Driver`] and the core
//! assert the invariants. This module asserts that loads are exact, and that after the faults every
//! client is served in time.

mod faults;

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use dispatch_protocol::scoreboard::gauge::Reading;
use dispatch_protocol::wire::{Features, Hello};

use super::clients;
use super::plan::Plan;
use super::process::{Process, What};
use super::{Driver, Random};
use dispatcher_core::*;

/// After the faults, every client must be served within this time, even by a single process that
/// serves one client at a time.
const TAIL: Duration = Duration::from_secs(60);
const LISTENER: ListenerId = ListenerId(0);

/// The result of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Number of events.
    pub events: u64,
    /// The core's totals.
    pub totals: Totals,
    /// Number of workers that joined.
    pub workers: u64,
}

struct Run<'a> {
    plan: &'a Plan,
    driver: Driver,
    random: Random,
    heap: BinaryHeap<Reverse<(Time, u64, What)>>,
    order: u64,
    processes: Vec<Process>,
    backlog: u32,
    /// Most clients in the kernel's queue; the kernel rejects further ones.
    most_waiting: u32,
    next_turn: Option<Time>,
    start: Time,
    calm: bool,
    stops: bool,
    think: u64,
    max: u32,
    /// The number of names that all processes share.
    names: u64,
    events: u64,
}

/// Runs a plan to its end. Panics if a property does not hold.
pub fn run(plan: &Plan) -> Outcome {
    let mut random = Random::new(plan.seed);
    let pool = PoolSettings {
        name: "web".to_owned(),
        policy: Policy::ALL[random.below(Policy::ALL.len() as u64) as usize],
        max_connections_per_worker: 2 + random.below(30) as u32,
        max_untaken: 1 + random.below(12) as u32,
        // A killed worker is still known for a moment when its successor joins.
        max_workers: 64 + 4 * plan.processes as u32,
        handoff_timeout: Duration::from_millis(50 + random.below(250)),
        max_handoff_timeout: Duration::from_millis(1 + random.below(30_000)),
        wait_for_worker: Duration::from_millis(100 + random.below(2_000)),
        slow_start: Duration::from_millis(random.below(2) * random.below(2_000)),
        scores: scores(&mut random),
        history: random.below(2) as u32 * 5,
        affinity: clients::affinity(&mut random),
        peek: clients::peek(&mut random),
        access: AllowedAccounts { users: vec![0], groups: Vec::new() },
        ..PoolSettings::default()
    };
    let listener =
        ListenerSettings { name: "http".to_owned(), address: String::new(), pool: PoolId(0) };
    let max = pool.max_connections_per_worker;
    let mut driver = Driver::new(vec![pool], vec![listener]);
    driver.logging = false;
    driver.races = Some(random.clone());
    driver.core.set_access_control(LISTENER, clients::access_control(&mut random));
    let start = driver.now;
    let mut run = Run {
        plan,
        driver,
        heap: BinaryHeap::new(),
        order: 0,
        processes: Vec::new(),
        backlog: 0,
        most_waiting: 300.max(4 * plan.processes as u32),
        next_turn: None,
        start,
        calm: false,
        stops: random.once_in(3),
        think: 5_000_000 + random.below(60_000_000),
        max,
        names: if random.once_in(3) { 1 + random.below(3) } else { u64::MAX },
        events: 0,
        random,
    };
    run.all()
}

/// The scored gauges of a pool with `least-score`.
fn scores(random: &mut Random) -> Scores {
    let gauge = |(name, multiplier): (&str, f64)| {
        Some(ScoredGauge { name: name.parse().ok()?, multiplier })
    };
    Scores {
        connections: random.below(3) as f64,
        gauges: [("wait", 2.0), ("room", -0.5)].into_iter().filter_map(gauge).collect(),
        valid_for: Duration::from_millis(20 + random.below(200)),
        interval: random.once_in(2).then(|| Duration::from_millis(1 + random.below(19))),
    }
}

impl Run<'_> {
    fn all(&mut self) -> Outcome {
        for i in 0..self.plan.processes as usize {
            self.processes.push(Process {
                one_at_a_time: self.random.once_in(5),
                weight: 1 + self.random.below(3) as u16,
                priority: self.random.below(2) as u16,
                ..Process::default()
            });
            let delay = self.random.below(300_000_000);
            self.after(delay, What::Start(i));
        }
        for (i, fault) in self.plan.faults.iter().enumerate() {
            self.order += 1;
            let time = self.start + fault.at;
            self.heap.push(Reverse((time, self.order, What::Fault(i))));
        }
        self.after(0, What::Arrive);
        self.after(self.plan.horizon.as_nanos() as u64, What::Calm);
        let end = self.start + self.plan.horizon + TAIL;
        while let Some(Reverse((time, _, what))) = self.heap.pop()
            && time <= end
        {
            if what == What::Turn && self.next_turn != Some(time) {
                continue;
            }
            assert!(time >= self.driver.now);
            self.driver.now = time;
            self.events += 1;
            self.happen(what);
            self.hear_of_races();
            if what != What::Turn {
                self.want_turn();
            }
        }
        self.finale();
        Outcome {
            events: self.events,
            totals: self.driver.core.totals(),
            workers: self.driver.links.len() as u64,
        }
    }

    fn finale(&mut self) {
        self.driver.core.check();
        let totals = self.driver.core.totals();
        assert_eq!(totals.queued, 0, "a client waits for ever: {totals:?}");
        if self.stops {
            assert!(self.driver.core.stopped());
            return;
        }
        assert_eq!(totals.in_flight, 0, "a connection is never taken: {totals:?}");
        assert_eq!(self.backlog, 0, "a connection is never accepted: {totals:?}");
        assert_eq!(self.driver.open_copies(), 0);
        assert_eq!(self.driver.core.accepting(LISTENER), Accepting::Yes);
        for link in self.driver.links.iter().filter(|link| !link.forgotten && !link.cut) {
            if self.driver.core.worker_state(link.id) == Some(State::Active) {
                let last = link.notices.last();
                assert!(
                    last.is_none_or(|last| *last == Notice::Resume),
                    "it does not know: {last:?}"
                );
            }
        }
    }

    fn after(&mut self, nanos: u64, what: What) {
        self.order += 1;
        let time = self.driver.now + Duration::from_nanos(nanos);
        self.heap.push(Reverse((time, self.order, what)));
    }

    /// The event loop wakes up soon after an event, and at the core's deadline.
    fn want_turn(&mut self) {
        let soon = self.driver.now + Duration::from_nanos(1_000 + self.random.below(400_000));
        let pending = self.next_turn.is_some_and(|at| at <= soon);
        if !pending {
            self.turn_at(soon);
        }
    }

    fn turn_at(&mut self, time: Time) {
        self.next_turn = Some(time);
        self.order += 1;
        self.heap.push(Reverse((time, self.order, What::Turn)));
    }

    fn happen(&mut self, what: What) {
        match what {
            What::Arrive => self.arrive(),
            What::Step(p) => self.step(p),
            What::End(p, life) => self.end(p, life),
            What::Start(p) => self.begin(p),
            What::Notice(serial) => self.notice(serial),
            What::Heal(p) => self.heal(p),
            What::Say(index, serial, id) => {
                let conn = ConnId { index, serial };
                self.driver.core.first_bytes(self.driver.now, conn, clients::known(id));
                self.driver.pump();
            }
            What::GiveUp(index, serial) => {
                let conn = ConnId { index, serial };
                self.driver.core.client_gone(self.driver.now, conn);
                self.driver.pump();
            }
            What::Fault(i) => {
                let fault = self.plan.faults[i];
                let p = fault.process % self.processes.len();
                self.fault(p, fault.kind);
            }
            What::Turn => self.turn(),
            What::Resume(serial) => self.resume(serial),
            What::Calm => self.calm_down(),
        }
    }

    fn arrive(&mut self) {
        if self.calm {
            return;
        }
        self.backlog = (self.backlog + 1).min(self.most_waiting);
        // The rate per process is about the same for any number of processes.
        let next = self.random.around(2_500_000 / self.plan.processes.div_ceil(6));
        self.after(next, What::Arrive);
    }

    /// Processes set their gauges from time to time; lying ones to any value.
    fn set_gauges(&mut self) {
        for process in &self.processes {
            let Some(worker) = process.worker.filter(|_| !process.hung) else { continue };
            let gauges = &mut self.driver.links[worker.serial as usize - 1].gauges;
            for gauge in gauges {
                if self.random.below(4) > 0 {
                    continue;
                }
                *gauge = Some(if process.lying {
                    let at = self.random.number() >> self.random.below(64);
                    Reading { value: f64::from_bits(self.random.number()), at }
                } else {
                    Reading { value: self.random.below(20) as f64, at: self.driver.now.0 }
                });
            }
        }
    }

    fn turn(&mut self) {
        self.next_turn = None;
        self.set_gauges();
        self.driver.turn();
        self.hear_of_races();
        for _ in 0..64 {
            if self.backlog == 0 || self.driver.core.accepting(LISTENER) == Accepting::Pause {
                break;
            }
            self.backlog -= 1;
            let peer = clients::peer(&mut self.random);
            let conn = self.driver.accept_only_from(LISTENER, peer);
            if self.driver.core.awaits_bytes(conn)
                && let Some((delay, id)) = clients::first_words(&mut self.random)
            {
                self.after(delay, What::Say(conn.index, conn.serial, id));
            }
            if self.random.once_in(50) {
                let delay = self.random.below(500_000_000);
                self.after(delay, What::GiveUp(conn.index, conn.serial));
            }
        }
        self.driver.pump();
        self.hear_of_races();
        self.check_loads();
        for p in 0..self.processes.len() {
            self.wake(p);
        }
        if self.backlog > 0 && self.driver.core.accepting(LISTENER) != Accepting::Pause {
            return self.want_turn();
        }
        if let Some(deadline) = self.driver.core.deadline() {
            let now = self.driver.now;
            self.turn_at(deadline.max(now + Duration::from_nanos(1)));
        }
    }

    /// Right after a turn, the core has the exact load of an honest worker.
    fn check_loads(&mut self) {
        for process in &self.processes {
            let Some(worker) = process.worker.filter(|_| !process.lying) else {
                continue;
            };
            let link = &self.driver.links[worker.serial as usize - 1];
            if link.finished != process.finished || link.forgotten || link.cut {
                continue;
            }
            let claimed = link
                .board
                .iter()
                .filter(|slot| slot.load(std::sync::atomic::Ordering::Relaxed) & 7 == 2)
                .count();
            if claimed == 0
                && let Some(load) = self.driver.core.load(worker)
            {
                let untaken = self.driver.core.untaken(worker);
                assert_eq!(load, process.live() + untaken, "of {worker:?}");
            }
        }
    }

    fn wake(&mut self, p: usize) {
        let process = &mut self.processes[p];
        let Some(worker) = process.worker else { return };
        if !process.stepping && !self.driver.link(worker).channel.is_empty() {
            process.stepping = true;
            let delay = self.random.below(400_000);
            self.after(delay, What::Step(p));
        }
    }

    fn step(&mut self, p: usize) {
        self.processes[p].stepping = false;
        loop {
            let process = &mut self.processes[p];
            let Some(worker) = process.worker.filter(|_| !process.hung) else {
                return;
            };
            if process.losing {
                if self.driver.link(worker).channel.is_empty() {
                    return;
                }
                self.driver.lose(worker);
            } else if process.scribbling {
                process.scribbling = false;
                self.driver.scribble(worker);
            } else if process.one_at_a_time && process.live() > 0 {
                return;
            } else if self.driver.take(worker).is_some() {
                self.took(p);
            } else {
                return;
            }
        }
    }

    /// The process has taken a connection.
    fn took(&mut self, p: usize) {
        let process = &mut self.processes[p];
        process.opened += 1;
        let life = process.life;
        // Sometimes it gives the client an id and claims it.
        if let Some(worker) = process.worker
            && self.random.once_in(20)
        {
            let id = self.random.below(60).to_string();
            self.driver.core.claim(self.driver.now, worker, id.as_bytes());
        }
        let time = self.random.around(self.think);
        self.after(time, What::End(p, life));
    }

    /// Takes that preceded revocations during the turn.
    fn hear_of_races(&mut self) {
        while let Some(worker) = self.driver.raced.pop() {
            let of = |process: &Process| process.worker == Some(worker);
            if let Some(p) = self.processes.iter().position(of) {
                self.took(p);
            }
        }
    }

    fn end(&mut self, p: usize, life: u64) {
        let process = &mut self.processes[p];
        if process.life != life {
            return;
        }
        if process.hung {
            return self.after(50_000_000, What::End(p, life));
        }
        process.finished += 1;
        let said = if process.lying {
            self.random.number() >> self.random.below(64)
        } else {
            process.finished
        };
        if let Some(worker) = process.worker {
            self.driver.link(worker).finished = said;
        }
        if self.processes[p].leaving && self.processes[p].live() == 0 {
            self.die(p);
        }
        self.wake(p);
    }

    fn begin(&mut self, p: usize) {
        let process = &mut self.processes[p];
        if process.worker.is_some() {
            return;
        }
        let hello = Hello {
            pool: "web".to_owned(),
            name: format!("p{}", p as u64 % self.names),
            weight: process.weight,
            priority: process.priority,
            max_connections: self.max,
            features: Features(u64::from(process.weight > 1)),
            base: process.opened,
            finished: process.finished,
            ..Hello::default()
        };
        match self.driver.join(hello) {
            Ok(worker) => {
                self.processes[p].worker = Some(worker);
                let live = self.processes[p].live();
                assert!(self.driver.core.load(worker) >= Some(live));
            }
            Err(_) => assert!(self.stops && self.calm, "only a stop refuses"),
        }
    }

    /// The process ends. The connections that it had taken end with it; untaken ones must not be
    /// lost.
    fn die(&mut self, p: usize) {
        let process = &mut self.processes[p];
        let life = process.life + 1;
        let worker = process.worker.take();
        *process = Process {
            life,
            one_at_a_time: process.one_at_a_time,
            weight: process.weight,
            priority: process.priority,
            ..Process::default()
        };
        if let Some(worker) = worker {
            let link = self.driver.link(worker);
            link.alive = false;
            link.closed = true;
            let delay = self.random.below(5_000_000);
            self.after(delay, What::Notice(worker.serial));
            let delay = self.random.below(1_500_000_000);
            self.after(delay, What::Start(p));
        }
    }

    fn notice(&mut self, serial: u64) {
        let worker = self.driver.links[serial as usize - 1].id;
        self.driver.core.leave(self.driver.now, worker, Departure::Died);
        self.driver.pump();
    }

    fn heal(&mut self, p: usize) {
        let process = &mut self.processes[p];
        process.hung = false;
        process.losing = false;
        if let Some(worker) = process.worker {
            self.driver.link(worker).capacity = 278;
        }
        self.wake(p);
    }
}
