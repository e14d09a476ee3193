//! The schedule of a run, for any contender.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use super::core::Dispatcher;
use super::outcome::{Client, Outcome};
use super::references::{Front, Never, Shared};
use super::workers::Worker;
use super::{Change, Contender, Kind, Scenario};

/// Time from a send until a waiting worker has received it.
pub(super) const DELIVERY: u64 = 50_000;

/// Time from a ring of the doorbell to the dispatcher's turn.
pub(super) const LAG: u64 = 100_000;

/// After the last arrival every client must be served within this time.
const TAIL: u64 = 90_000_000_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    Join(usize),
    Change(usize),
    Arrive(u32),
    Poll(usize),
    Round(usize, u32),
    End(usize, Option<u64>),
    Turn,
}

struct World<'a> {
    scenario: &'a Scenario,
    front: &'a mut dyn Front,
    now: u64,
    heap: BinaryHeap<Reverse<(u64, u64, What)>>,
    order: u64,
    workers: Vec<Worker>,
    services: Vec<Option<u64>>,
    turn_at: Option<u64>,
    outcome: Outcome,
    untaken: usize,
    taken: Vec<u32>,
    delivered: Vec<usize>,
}

/// Runs a scenario.
pub fn run(scenario: &Scenario, contender: Contender, seed: u64) -> Outcome {
    let count = scenario.workers.len();
    match contender {
        Contender::Shared => play(scenario, seed, &mut Shared::new(count, seed)),
        Contender::Never => {
            play(scenario, seed, &mut Never::new(count, scenario.max_untaken, seed))
        }
        Contender::Core => {
            let mut dispatcher = Dispatcher::new(scenario);
            let mut outcome = play(scenario, seed, &mut dispatcher);
            dispatcher.report(&mut outcome);
            outcome
        }
    }
}

fn play(scenario: &Scenario, seed: u64, front: &mut dyn Front) -> Outcome {
    let arrivals = scenario.arrivals(seed);
    let warm = scenario.warm.as_nanos() as u64;
    let outcome = Outcome {
        clients: arrivals.iter().map(|&(at, _)| Client { at, ..Client::default() }).collect(),
        uncounted: arrivals.partition_point(|&(at, _)| at < warm),
        ..Outcome::default()
    };
    let workers =
        (0..).zip(&scenario.workers).map(|(number, plan)| Worker::new(plan, number, seed));
    let mut world = World {
        scenario,
        front,
        now: 0,
        heap: BinaryHeap::new(),
        order: 0,
        workers: workers.collect(),
        services: arrivals.iter().map(|&(_, service)| service).collect(),
        turn_at: None,
        outcome,
        untaken: arrivals.len(),
        taken: Vec::new(),
        delivered: Vec::new(),
    };
    world.all();
    world.outcome
}

impl World<'_> {
    fn all(&mut self) {
        let nanos = |time: Duration| time.as_nanos() as u64;
        for (number, plan) in self.scenario.workers.iter().enumerate() {
            self.at(nanos(plan.joins), What::Join(number));
        }
        for (number, &(at, _, _)) in self.scenario.changes.iter().enumerate() {
            self.at(nanos(at), What::Change(number));
        }
        self.next_arrival(0);
        let last = self.outcome.clients.last().map_or(0, |client| client.at);
        // Until all clients are served. A recovery of a worker after that is not simulated.
        while self.untaken > 0
            && let Some(Reverse((time, _, what))) = self.heap.pop()
            && time <= last + TAIL
        {
            if what == What::Turn && self.turn_at != Some(time) {
                continue;
            }
            self.now = time;
            self.outcome.events += 1;
            self.happen(what);
            self.deliver();
            self.want_turn();
        }
        let stops = |number| {
            let mut changes = self.scenario.changes.iter();
            changes.any(|&(_, worker, change)| worker == number && change == Change::Stop)
        };
        let others = self.workers.iter().enumerate().filter(|(number, _)| !stops(*number));
        self.outcome.longest_round = others.map(|(_, it)| it.longest).max().unwrap_or(0);
    }

    fn at(&mut self, time: u64, what: What) {
        self.order += 1;
        self.heap.push(Reverse((time, self.order, what)));
    }

    fn next_arrival(&mut self, client: u32) {
        if let Some(next) = self.outcome.clients.get(client as usize) {
            self.at(next.at, What::Arrive(client));
        }
    }

    fn happen(&mut self, what: What) {
        match what {
            What::Join(number) => {
                self.workers[number].up = true;
                self.front.join(self.now, number);
                self.begin(number, true);
            }
            What::Change(number) => self.change(number),
            What::Arrive(client) => {
                self.front.arrive(self.now, client);
                self.next_arrival(client + 1);
                let warm = self.scenario.warm.as_nanos() as u64;
                if self.scenario.compare_loads && self.now >= warm {
                    self.compare_loads();
                }
            }
            What::Poll(number) => self.poll(number, None),
            What::Round(number, generation) => {
                if self.workers[number].generation == generation {
                    self.poll(number, None);
                    self.next_round(number);
                }
            }
            What::End(number, thread) => self.end(number, thread),
            What::Turn => {
                self.turn_at = None;
                self.front.turn(self.now);
            }
        }
    }

    /// A worker starts with its kind of work.
    fn begin(&mut self, number: usize, joined: bool) {
        let now = self.now;
        let worker = &mut self.workers[number];
        worker.generation += 1;
        let generation = worker.generation;
        let first = if joined {
            worker.phase(self.scenario.rounds)
        } else {
            worker.round(self.scenario.rounds)
        };
        if let Some(first) = first {
            self.at(now + first, What::Round(number, generation));
        } else {
            self.at(now, What::Poll(number));
        }
        if let Kind::Flapping { serves, rests } = self.workers[number].kind {
            // It reads its queue whenever it begins to serve.
            let period = (serves + rests).as_nanos() as u64;
            let last = self.outcome.clients.last().map_or(0, |client| client.at) + TAIL;
            for turn in 1..=last / period {
                self.at(turn * period, What::Poll(number));
            }
        }
        if let Some(idle) = self.workers[number].idle_threads() {
            self.front.idle_threads(now, number, idle, None);
        }
    }

    fn next_round(&mut self, number: usize) {
        let worker = &mut self.workers[number];
        let generation = worker.generation;
        if let Some(length) = worker.round(self.scenario.rounds) {
            self.at(self.now + length, What::Round(number, generation));
        }
    }

    fn change(&mut self, number: usize) {
        let (_, worker, change) = self.scenario.changes[number];
        match change {
            Change::Stop => {
                self.workers[worker].stopped = true;
                self.front.stopped(worker, true);
            }
            Change::Continue => {
                self.workers[worker].stopped = false;
                self.front.stopped(worker, false);
                for _ in 0..std::mem::take(&mut self.workers[worker].overdue) {
                    self.end(worker, Some(self.now));
                }
                self.poll(worker, None);
            }
            Change::Become(kind) => {
                self.workers[worker].kind = kind;
                self.begin(worker, false);
            }
        }
    }

    fn poll(&mut self, number: usize, away: Option<u64>) {
        let now = self.now;
        let mut taken = std::mem::take(&mut self.taken);
        let worker = &mut self.workers[number];
        worker.poll(now, number, away, self.front, &mut taken);
        let thread = matches!(worker.kind, Kind::Serial { .. }).then_some(now);
        for client in taken.drain(..) {
            let entry = &mut self.outcome.clients[client as usize];
            assert_eq!(entry.wait, None, "taken twice");
            entry.wait = Some(now - entry.at);
            entry.worker = number as u32;
            self.untaken -= 1;
            if let Some(service) = self.services[client as usize] {
                self.at(now + service, What::End(number, thread));
            }
        }
        self.taken = taken;
    }

    /// A connection ends; `thread` is when a thread took it, if a thread serves it.
    fn end(&mut self, number: usize, thread: Option<u64>) {
        let worker = &mut self.workers[number];
        if thread.is_some() && worker.stopped {
            worker.overdue += 1;
            return;
        }
        self.front.finish(self.now, number);
        if let Some(taken_at) = thread {
            worker.busy -= 1;
            self.poll(number, Some(self.now - taken_at));
        }
    }

    /// Waiting workers receive their deliveries.
    fn deliver(&mut self) {
        let mut delivered = std::mem::take(&mut self.delivered);
        self.front.delivered(&mut delivered);
        let delay = self.front.delay();
        for number in delivered.drain(..) {
            if !self.workers[number].is_woken() {
                continue;
            }
            if delay == 0 {
                self.poll(number, None);
            } else {
                self.at(self.now + delay, What::Poll(number));
            }
        }
        self.delivered = delivered;
    }

    fn want_turn(&mut self) {
        let next = self.front.next_turn();
        if next != self.turn_at {
            self.turn_at = next;
            if let Some(time) = next {
                self.at(time, What::Turn);
            }
        }
    }

    fn compare_loads(&mut self) {
        let is_compared = |worker: &Worker| worker.up && !worker.stopped && worker.kind.is_honest();
        let loads = || {
            let workers = self.workers.iter().enumerate();
            workers.filter(|(_, it)| is_compared(it)).map(|(number, _)| self.front.load(number))
        };
        if let (Some(most), Some(least)) = (loads().max(), loads().min()) {
            self.outcome.unevenness = self.outcome.unevenness.max(most - least);
        }
    }
}
