//! The interface of a contender to the workers, and the two references.

use std::collections::VecDeque;

use crate::Random;

/// A contender. Workers and clients are identified by numbers.
pub(super) trait Front {
    /// A worker joins.
    fn join(&mut self, now: u64, worker: usize);
    /// A client arrives.
    fn arrive(&mut self, now: u64, client: u32);
    /// A worker takes its next connection, if there is one, and answers probes.
    fn receive(&mut self, now: u64, worker: usize) -> Option<u32>;
    /// A worker answers probes and takes nothing.
    fn answer(&mut self, now: u64, worker: usize);
    /// A connection at the worker has ended.
    fn finish(&mut self, now: u64, worker: usize);
    /// The number of the worker's threads that wait in accept, and how long a thread that has just
    /// returned was away.
    fn idle_threads(&mut self, now: u64, worker: usize, idle: u32, away: Option<u64>);
    /// A worker stops or continues; only recorded.
    fn stopped(&mut self, worker: usize, stopped: bool);
    /// The time of its next action.
    fn next_turn(&self) -> Option<u64>;
    /// Its next action is due.
    fn turn(&mut self, now: u64);
    /// Workers with deliveries since the last call; duplicates are possible.
    fn delivered(&mut self, workers: &mut Vec<usize>);
    /// How long a delivery takes.
    fn delay(&self) -> u64;
    /// A worker's connections, untaken ones included, if known.
    fn load(&self, worker: usize) -> u64;
}

/// One queue for all workers.
#[derive(Debug)]
pub(super) struct Shared {
    queue: VecDeque<u32>,
    joined: Vec<usize>,
    loads: Vec<u64>,
    arrived: bool,
    random: Random,
}

impl Shared {
    pub(super) fn new(workers: usize, seed: u64) -> Shared {
        Shared {
            queue: VecDeque::new(),
            joined: Vec::new(),
            loads: vec![0; workers],
            arrived: false,
            random: Random::new(seed),
        }
    }
}

impl Front for Shared {
    fn join(&mut self, _: u64, worker: usize) {
        self.joined.push(worker);
        self.arrived = true;
    }

    fn arrive(&mut self, _: u64, client: u32) {
        self.queue.push_back(client);
        self.arrived = true;
    }

    fn receive(&mut self, _: u64, worker: usize) -> Option<u32> {
        let client = self.queue.pop_front()?;
        self.loads[worker] += 1;
        Some(client)
    }

    fn answer(&mut self, _: u64, _: usize) {}

    fn finish(&mut self, _: u64, worker: usize) {
        self.loads[worker] -= 1;
    }

    fn idle_threads(&mut self, _: u64, _: usize, _: u32, _: Option<u64>) {}

    fn stopped(&mut self, _: usize, _: bool) {}

    fn next_turn(&self) -> Option<u64> {
        None
    }

    fn turn(&mut self, _: u64) {}

    /// Every process that waits in accept wakes up, in any order.
    fn delivered(&mut self, workers: &mut Vec<usize>) {
        if std::mem::take(&mut self.arrived) {
            for last in (1..self.joined.len()).rev() {
                let other = self.random.below(last as u64 + 1) as usize;
                self.joined.swap(last, other);
            }
            workers.extend(&self.joined);
        }
    }

    fn delay(&self) -> u64 {
        0
    }

    fn load(&self, worker: usize) -> u64 {
        self.loads[worker]
    }
}

/// The least loaded worker gets the connection and keeps it.
#[derive(Debug)]
pub(super) struct Never {
    queues: Vec<VecDeque<u32>>,
    up: Vec<bool>,
    loads: Vec<u64>,
    queued: VecDeque<u32>,
    most: usize,
    delivered: Vec<usize>,
    /// The dispatcher has noticed that a worker has room again.
    doorbell: Option<u64>,
    random: Random,
}

impl Never {
    pub(super) fn new(workers: usize, most: u32, seed: u64) -> Never {
        Never {
            queues: vec![VecDeque::new(); workers],
            up: vec![false; workers],
            loads: vec![0; workers],
            queued: VecDeque::new(),
            most: most as usize,
            delivered: Vec::new(),
            doorbell: None,
            random: Random::new(seed),
        }
    }

    fn place(&mut self) {
        while let Some(&client) = self.queued.front() {
            let (mut best, mut ties) = (None, 0);
            for worker in (0..self.queues.len())
                .filter(|&worker| self.up[worker] && self.queues[worker].len() < self.most)
            {
                let load = self.loads[worker];
                let least = best.map_or(u64::MAX, |best: usize| self.loads[best]);
                ties = if load < least { 1 } else { ties + 1 };
                if load < least || (load == least && self.random.once_in(ties)) {
                    best = Some(worker);
                }
            }
            let Some(worker) = best else { return };
            self.queued.pop_front();
            self.loads[worker] += 1;
            self.queues[worker].push_back(client);
            self.delivered.push(worker);
        }
    }
}

impl Front for Never {
    fn join(&mut self, _: u64, worker: usize) {
        self.up[worker] = true;
        self.place();
    }

    fn arrive(&mut self, _: u64, client: u32) {
        self.queued.push_back(client);
        self.place();
    }

    fn receive(&mut self, now: u64, worker: usize) -> Option<u32> {
        let client = self.queues[worker].pop_front()?;
        if !self.queued.is_empty() {
            self.doorbell.get_or_insert(now + super::world::LAG);
        }
        Some(client)
    }

    fn answer(&mut self, _: u64, _: usize) {}

    fn finish(&mut self, _: u64, worker: usize) {
        self.loads[worker] -= 1;
    }

    fn idle_threads(&mut self, _: u64, _: usize, _: u32, _: Option<u64>) {}

    fn stopped(&mut self, _: usize, _: bool) {}

    fn next_turn(&self) -> Option<u64> {
        self.doorbell
    }

    fn turn(&mut self, _: u64) {
        self.doorbell = None;
        self.place();
    }

    fn delivered(&mut self, workers: &mut Vec<usize>) {
        workers.append(&mut self.delivered);
    }

    fn delay(&self) -> u64 {
        super::world::DELIVERY
    }

    fn load(&self, worker: usize) -> u64 {
        self.loads[worker]
    }
}
