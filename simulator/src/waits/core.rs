//! The real core, driven as the event loop drives it: scoreboards are read at each wake-up, then
//! timers, then accepts, then all effects at once. A worker's action wakes the dispatcher, after a
//! delay, only if the dispatcher's `want` bits ask for it.

use std::collections::VecDeque;
use std::time::Duration;

use dispatch_protocol::scoreboard::slot::{self, want};
use dispatch_protocol::wire::Hello;

use super::Scenario;
use super::outcome::Outcome;
use super::references::Front;
use super::world::LAG;
use crate::Driver;
use dispatcher_core::*;

const LISTENER: ListenerId = ListenerId(0);

/// The dispatcher's state of a client.
#[derive(Clone, Copy, Debug, Default)]
struct Sent {
    sends: u32,
    at: u64,
    worker: Option<u32>,
    met_a_stop: bool,
}

/// The dispatcher.
#[derive(Debug)]
pub(super) struct Dispatcher {
    driver: Driver,
    /// The driver's time at the start of the scenario.
    start: u64,
    warm: u64,
    /// By worker number of the scenario.
    workers: Vec<Option<WorkerId>>,
    /// Worker numbers in the order of the joins.
    joined: Vec<usize>,
    /// Each worker's report of its threads, if it makes one.
    threads: Vec<Option<Threads>>,
    stopped: Vec<bool>,
    /// Workers whose scoreboards have changed since the last turn.
    changed: Vec<usize>,
    /// Clients in the kernel's queue.
    backlog: VecDeque<u32>,
    /// Clients in the order in which they were accepted.
    accepted: Vec<u32>,
    sent: Vec<Sent>,
    doorbell: Option<u64>,
    deadline: Option<u64>,
    delivered: Vec<usize>,
    /// Suspicions of workers that had taken connections.
    suspicions: Vec<u32>,
    closed: u32,
    /// The longest take of each worker before it stopped.
    longest: Vec<u64>,
    ever_stopped: Vec<bool>,
}

impl Dispatcher {
    pub(super) fn new(scenario: &Scenario) -> Dispatcher {
        let count = scenario.workers.len();
        let pool = PoolSettings {
            name: "web".to_owned(),
            max_connections_per_worker: 1_000_000,
            max_untaken: scenario.max_untaken,
            max_workers: count as u32,
            handoff_timeout: scenario.handoff_timeout,
            max_handoff_timeout: scenario.max_handoff_timeout,
            wait_for_worker: scenario.wait_for_worker,
            access: AllowedAccounts { users: vec![0], groups: Vec::new() },
            ..PoolSettings::default()
        };
        let listener =
            ListenerSettings { name: "http".to_owned(), address: String::new(), pool: PoolId(0) };
        let driver = Driver::new(vec![pool], vec![listener]);
        Dispatcher {
            start: driver.now.0,
            driver,
            warm: scenario.warm.as_nanos() as u64,
            workers: vec![None; count],
            joined: Vec::new(),
            threads: vec![None; count],
            stopped: vec![false; count],
            changed: Vec::new(),
            backlog: VecDeque::new(),
            accepted: Vec::new(),
            sent: vec![Sent::default(); scenario.clients as usize],
            doorbell: None,
            deadline: None,
            delivered: Vec::new(),
            suspicions: vec![0; count],
            closed: 0,
            longest: vec![0; count],
            ever_stopped: vec![false; count],
        }
    }

    /// Adds the dispatcher's part of the results.
    pub(super) fn report(&mut self, outcome: &mut Outcome) {
        self.driver.core.check();
        outcome.suspicions = self.suspicions.iter().sum();
        outcome.alternations = self.suspicions.iter().map(|count| count.saturating_sub(1)).sum();
        outcome.closed = self.closed;
        for (client, sent) in outcome.clients.iter_mut().zip(&self.sent) {
            client.sends = sent.sends;
            client.met_a_stop = sent.met_a_stop;
        }
        let stopped = self.longest.iter().zip(&self.ever_stopped);
        outcome.usual =
            stopped.filter(|(_, ever)| **ever).map(|(most, _)| *most).max().unwrap_or(0);
    }

    fn set_clock(&mut self, now: u64) {
        self.driver.now = Time(self.start + now);
    }

    /// The worker changed its scoreboard; it rings the doorbell if the `want` bits ask for it.
    fn change(&mut self, now: u64, worker: usize, bit: u32) {
        self.changed.push(worker);
        if self.doorbell.is_none()
            && let Some(id) = self.workers[worker]
            && self.driver.core.wants(id) & bit != 0
        {
            self.doorbell = Some(now + LAG);
        }
    }

    fn read_scoreboards(&mut self) {
        let mut changed = std::mem::take(&mut self.changed);
        changed.sort_unstable();
        changed.dedup();
        for &number in &changed {
            if let Some(id) = self.workers[number] {
                self.driver.read(id);
                self.driver.core.threads(self.driver.now, id, self.threads[number]);
            }
        }
        changed.clear();
        self.changed = changed;
    }

    fn accept(&mut self) {
        while let Some(&client) = self.backlog.front()
            && self.driver.core.accepting(LISTENER) != Accepting::Pause
        {
            self.backlog.pop_front();
            self.accepted.push(client);
            self.driver.accept_only(LISTENER);
        }
    }

    /// Performs and counts all effects.
    fn perform(&mut self, now: u64) {
        self.driver.pump();
        let mut log = std::mem::take(&mut self.driver.log);
        for effect in log.drain(..) {
            match effect {
                Effect::Send { worker, conn, .. } => {
                    let number = self.number(worker);
                    let client = self.accepted[conn.serial as usize - 1];
                    let sent = &mut self.sent[client as usize];
                    sent.sends += 1;
                    sent.at = now;
                    sent.worker = Some(number as u32);
                    sent.met_a_stop |= self.stopped[number];
                    self.delivered.push(number);
                }
                Effect::Probe { worker, .. } => {
                    let number = self.number(worker);
                    self.delivered.push(number);
                }
                Effect::Close { .. } => self.closed += 1,
                Effect::Event(Event::Suspect { worker, .. }) if now >= self.warm => {
                    let number = self.number(worker);
                    self.suspicions[number] += u32::from(self.longest[number] > 0);
                }
                _ => {}
            }
        }
        self.driver.log = log;
        let deadline = self.driver.core.deadline();
        self.deadline = deadline.map(|time| time.0.saturating_sub(self.start).max(now + 1_000));
    }

    fn number(&self, worker: WorkerId) -> usize {
        self.joined[worker.serial as usize - 1]
    }
}

impl Front for Dispatcher {
    fn join(&mut self, now: u64, worker: usize) {
        self.set_clock(now);
        let hello = Hello {
            pool: "web".to_owned(),
            name: format!("w{worker}"),
            max_connections: 1_000_000,
            ..Hello::default()
        };
        let id = self.driver.join(hello).unwrap_or_else(|refusal| panic!("refused: {refusal:?}"));
        self.workers[worker] = Some(id);
        self.joined.push(worker);
        self.perform(now);
    }

    fn arrive(&mut self, now: u64, client: u32) {
        self.backlog.push_back(client);
        self.turn(now);
    }

    fn receive(&mut self, now: u64, worker: usize) -> Option<u32> {
        self.set_clock(now);
        let id = self.workers[worker]?;
        let records = self.driver.link(id).channel.len();
        let conn = self.driver.take(id);
        if self.driver.link(id).channel.len() < records {
            self.change(now, worker, want::TAKEN);
        }
        let client = self.accepted[conn?.serial as usize - 1];
        let longest = &mut self.longest[worker];
        if !self.ever_stopped[worker] {
            *longest = (*longest).max(now - self.sent[client as usize].at);
        }
        Some(client)
    }

    fn answer(&mut self, now: u64, worker: usize) {
        self.set_clock(now);
        let Some(id) = self.workers[worker] else { return };
        if self.driver.answer_probes(id) {
            self.change(now, worker, want::TAKEN);
        }
    }

    fn finish(&mut self, now: u64, worker: usize) {
        if let Some(id) = self.workers[worker] {
            self.driver.link(id).finished += 1;
            self.change(now, worker, want::ROOM);
        }
    }

    fn idle_threads(&mut self, now: u64, worker: usize, idle: u32, away: Option<u64>) {
        let before = self.threads[worker];
        let usual = before.and_then(|threads| threads.turnaround);
        let turnaround = match (usual, away.map(Duration::from_nanos)) {
            (Some(usual), Some(away)) => Some((usual * 3 + away) / 4),
            (usual, away) => away.or(usual),
        };
        let threads = Some(Threads { idle, turnaround });
        if before != threads {
            self.threads[worker] = threads;
            let waits = before.is_none_or(|before| before.idle < idle);
            self.change(now, worker, if waits { want::IDLE } else { 0 });
        }
    }

    fn stopped(&mut self, worker: usize, stopped: bool) {
        self.stopped[worker] = stopped;
        if stopped {
            self.ever_stopped[worker] = true;
            let Some(id) = self.workers[worker] else { return };
            let conns = self.driver.link(id).channel.iter().filter_map(|record| record.conn);
            for conn in conns {
                let client = self.accepted[conn.serial as usize - 1];
                let sent = &mut self.sent[client as usize];
                sent.met_a_stop |= sent.worker == Some(worker as u32);
            }
        }
    }

    fn next_turn(&self) -> Option<u64> {
        [self.doorbell, self.deadline].into_iter().flatten().min()
    }

    fn turn(&mut self, now: u64) {
        self.set_clock(now);
        self.doorbell = None;
        self.read_scoreboards();
        self.driver.core.tick(self.driver.now);
        self.accept();
        self.perform(now);
    }

    fn delivered(&mut self, workers: &mut Vec<usize>) {
        workers.append(&mut self.delivered);
    }

    fn delay(&self) -> u64 {
        super::world::DELIVERY
    }

    fn load(&self, worker: usize) -> u64 {
        self.workers[worker].and_then(|id| self.driver.core.load(id)).unwrap_or(0)
    }
}

impl Driver {
    /// Reads one worker's counter and slots.
    fn read(&mut self, worker: WorkerId) {
        let now = self.now;
        let at = worker.serial as usize - 1;
        let finished = self.links[at].finished;
        self.scratch.clear();
        self.scratch.extend(self.core.tickets(worker));
        for &ticket in &self.scratch {
            let state = slot::state(&self.links[at].board[ticket.slot as usize], ticket.seq);
            let taken_at = self.links[at].taken_at[ticket.slot as usize];
            self.core.slot(now, worker, ticket, state, taken_at);
        }
        self.core.finished(now, worker, finished);
    }

    /// The worker claims its probes and leaves its connections; true if there was a probe.
    fn answer_probes(&mut self, worker: WorkerId) -> bool {
        let now = self.now;
        let link = self.link(worker);
        let before = link.channel.len();
        let board = &link.board;
        link.channel.retain(|record| {
            let is_probe = record.conn.is_none();
            if is_probe {
                link.taken_at[record.ticket.slot as usize] = now;
                let claimed = slot::take(&board[record.ticket.slot as usize], record.ticket.seq);
                debug_assert!(claimed, "probes are not revoked here");
            }
            !is_probe
        });
        link.channel.len() < before
    }
}
