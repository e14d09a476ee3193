//! Workers of the line protocol: sockets, reads, reports and ends of connections that come late, in
//! any order that is possible, from a seed.
//!
//! Asserts that no connection is given to a worker after another one has used it, that none is
//! lost, and that loads are exact once everything has been told.

#![allow(clippy::expect_used, reason = "a panic is the report of a property that does not hold")]

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::time::Duration;

use dispatch_protocol::ClientAddr;
use dispatch_protocol::line::Report;

use super::Random;
use dispatcher_core::*;

const LISTENER: ListenerId = ListenerId(0);

/// The result of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// The core's totals.
    pub totals: Totals,
    /// Connections that a worker used.
    pub used: u64,
}

/// One worker process and the dispatcher's side of its stream.
#[derive(Debug)]
struct Worker {
    id: WorkerId,
    reads: bool,
    /// In its socket.
    queue: VecDeque<u64>,
    /// Connections that it has, from this dispatcher and from elsewhere.
    live: BTreeSet<u64>,
    foreign: u64,
    /// The dispatcher's copies of what it may not have read.
    copies: VecDeque<ConnId>,
}

#[derive(Debug)]
struct Client {
    conn: ConnId,
    /// A worker has read or written a byte.
    used: bool,
    /// The dispatcher has a copy.
    copy: bool,
    /// The worker has closed it.
    closed: bool,
    /// The kernel tells its end.
    tracked: bool,
}

struct Lines {
    core: Core,
    random: Random,
    now: Time,
    workers: Vec<Worker>,
    clients: BTreeMap<u64, Client>,
    /// What has happened, and the dispatcher has not been told.
    ends: VecDeque<u64>,
    reports: VecDeque<(WorkerId, u64)>,
    room: usize,
    tracks: bool,
    /// A send to any worker fails for want of resources, sometimes.
    short: bool,
}

/// Runs `steps` random steps, then lets everything settle. Panics if a property does not hold.
pub fn run(seed: u64, steps: u32) -> Outcome {
    let mut random = Random::new(seed);
    let pool = PoolSettings {
        name: "web".to_owned(),
        policy: Policy::ALL[random.below(Policy::ALL.len() as u64) as usize],
        max_connections_per_worker: 2 + random.below(20) as u32,
        max_untaken: 1 + random.below(6) as u32,
        handoff_timeout: Duration::from_millis(100),
        wait_for_worker: Duration::from_secs(3600),
        slow_start: Duration::from_millis(random.below(2) * random.below(2_000)),
        access: AllowedAccounts { users: vec![0], groups: Vec::new() },
        ..PoolSettings::default()
    };
    let listener =
        ListenerSettings { name: "http".to_owned(), address: String::new(), pool: PoolId(0) };
    let now = Time(1_000_000_000);
    let mut lines = Lines {
        core: Core::new(vec![pool], vec![listener], now),
        now,
        workers: Vec::new(),
        clients: BTreeMap::new(),
        ends: VecDeque::new(),
        reports: VecDeque::new(),
        room: 1 + random.below(8) as usize,
        tracks: true,
        short: random.once_in(4),
        random,
    };
    for _ in 0..steps {
        lines.step();
        lines.core.check();
    }
    lines.settle();
    let used = lines.clients.values().filter(|client| client.used).count() as u64;
    Outcome { totals: lines.core.totals(), used }
}

impl Lines {
    fn any(&mut self) -> Option<usize> {
        let count = self.workers.len() as u64;
        (count > 0).then(|| self.random.below(count) as usize)
    }

    fn step(&mut self) {
        self.now = self.now + Duration::from_micros(self.random.below(20_000));
        match self.random.below(40) {
            0..=11 => self.accept(),
            12..=18 => {
                if let Some(w) = self.any().filter(|&w| self.workers[w].reads) {
                    self.read(w);
                }
            }
            19..=24 => {
                if let Some(w) = self.any() {
                    self.close_one(w);
                }
            }
            25 => self.join(),
            26 => {
                if let Some(w) = self.any() {
                    self.workers[w].reads ^= true;
                }
            }
            27 => {
                if let Some(w) = self.any() {
                    self.workers[w].foreign = self.random.below(4);
                }
            }
            28..=29 => {
                if let Some(w) = self.any() {
                    self.write_report(w);
                }
            }
            30..=31 => self.hear_report(),
            32..=34 => self.hear_end(),
            35 => {
                if let Some(w) = self.any().filter(|_| self.random.once_in(3)) {
                    self.die(w);
                }
            }
            36 => self.overrun(),
            37 if self.random.once_in(100) => {
                self.tracks = false;
                self.ends.clear();
                self.core.tracking_ended(self.now);
                self.clients.values_mut().for_each(|client| client.tracked = false);
            }
            38 => {
                if let Some(w) = self.any() {
                    let id = self.workers[w].id;
                    self.core.drain_worker(self.now, id, None);
                    self.pump();
                    let _ = self.core.resume_worker(self.now, id);
                }
            }
            _ => self.core.tick(self.now),
        }
        self.note_reads();
        self.pump();
    }

    fn accept(&mut self) {
        if self.core.accepting(LISTENER) != Accepting::Yes {
            return;
        }
        let client = dispatcher_core::Client::new(LISTENER, ClientAddr::Unix);
        let conn = self.core.accepted(self.now, client);
        let tracked = self.random.once_in(8);
        let client = Client { conn, used: false, copy: true, closed: false, tracked: !tracked };
        self.clients.insert(conn.serial, client);
    }

    fn join(&mut self) {
        if self.workers.len() >= 4 {
            return;
        }
        let foreign = self.random.below(3);
        let report = Report { count: foreign, kind: "sim".to_owned(), ..Report::default() };
        let join = LineJoin { pid: 1, uid: 0, gids: Vec::new(), pool: "web".to_owned(), report };
        let id = self.core.join_line(self.now, &join).expect("it may join");
        let (queue, copies) = (VecDeque::new(), VecDeque::new());
        let live = BTreeSet::new();
        self.workers.push(Worker { id, reads: true, queue, live, foreign, copies });
    }

    fn read(&mut self, w: usize) {
        let Some(serial) = self.workers[w].queue.pop_front() else { return };
        self.workers[w].live.insert(serial);
        let used = !self.random.once_in(3);
        self.clients.get_mut(&serial).expect("known").used |= used;
    }

    fn close_one(&mut self, w: usize) {
        if let Some(serial) = self.workers[w].live.pop_first() {
            self.close(serial);
        }
    }

    /// A worker closes a connection: its end is told once the dispatcher has no copy either.
    fn close(&mut self, serial: u64) {
        let client = self.clients.get_mut(&serial).expect("known");
        client.closed = true;
        client.used = true;
        if !client.copy && client.tracked {
            self.ends.push_back(serial);
        }
    }

    fn write_report(&mut self, w: usize) {
        let worker = &self.workers[w];
        self.reports.push_back((worker.id, worker.live.len() as u64 + worker.foreign));
    }

    fn hear_report(&mut self) {
        let Some((worker, count)) = self.reports.pop_front() else { return };
        self.note_reads();
        let report = Report { count, ..Report::default() };
        self.core.line_report(self.now, worker, report);
    }

    fn hear_end(&mut self) {
        if let Some(serial) = self.ends.pop_front() {
            self.core.sockets_ended(self.now, &[serial, u64::MAX]);
        }
    }

    /// Ends are lost; a list of what is open follows.
    fn overrun(&mut self) {
        if !self.tracks {
            return;
        }
        self.ends.clear();
        let open = |client: &&Client| client.tracked && (client.copy || !client.closed);
        let alive: HashSet<u64> =
            self.clients.values().filter(open).map(|client| client.conn.serial).collect();
        let began = self.now + Duration::from_nanos(1);
        self.core.sockets_alive(self.now, began, &alive);
    }

    /// What the event loop sees of the sockets in each turn.
    fn note_reads(&mut self) {
        for w in 0..self.workers.len() {
            let mut any = false;
            while self.workers[w].copies.len() > self.workers[w].queue.len() {
                let Some(conn) = self.workers[w].copies.pop_front() else { break };
                any = true;
                self.core.line_read(self.now, self.workers[w].id, conn);
            }
            if any {
                self.core.line_room(self.now, self.workers[w].id);
            }
        }
    }

    fn die(&mut self, w: usize) {
        // Sometimes it has read something that the dispatcher has not seen.
        if self.workers[w].reads && self.random.once_in(2) {
            self.read(w);
        }
        let worker = self.workers.swap_remove(w);
        self.core.leave(self.now, worker.id, Departure::Died);
        for serial in worker.live {
            // A connection that no worker used is open while the dispatcher has a copy.
            let client = self.clients.get_mut(&serial).expect("known");
            if client.used || !client.copy {
                self.close(serial);
            }
        }
        self.pump();
        for conn in worker.copies {
            let client = self.clients.get_mut(&conn.serial).expect("known");
            let recovery = match client.used {
                true => Recovery::Read,
                false if self.random.once_in(5) => Recovery::Unknown,
                false => Recovery::Untouched,
            };
            self.core.recovered(self.now, worker.id, conn, recovery);
        }
        self.reports.retain(|(id, _)| *id != worker.id);
    }

    fn pump(&mut self) {
        while let Some(effect) = self.core.effect() {
            match effect {
                Effect::Send { worker, conn, ticket, .. } => self.send(worker, conn, ticket),
                Effect::Release { conn, .. } => {
                    let client = self.clients.get_mut(&conn.serial).expect("known");
                    assert!(client.copy, "released once");
                    client.copy = false;
                    if client.closed && client.tracked {
                        self.ends.push_back(conn.serial);
                    }
                }
                Effect::Close { conn, reason, .. } => {
                    let client = self.clients.get_mut(&conn.serial).expect("known");
                    assert!(client.copy && !client.used, "closed: no worker has it");
                    assert_eq!(reason, CloseReason::Unread);
                    (client.copy, client.closed) = (false, true);
                    if client.tracked {
                        self.ends.push_back(conn.serial);
                    }
                }
                Effect::Forget { .. } | Effect::Event(_) => {}
                other => panic!("not for workers of the line protocol: {other:?}"),
            }
        }
    }

    fn send(&mut self, id: WorkerId, conn: ConnId, ticket: Ticket) {
        let client = &self.clients[&conn.serial];
        assert!(!client.used && client.copy, "no other worker has used it");
        let (tracked, room) = (client.tracked && self.tracks, self.room);
        let short = self.short && self.random.once_in(20);
        let worker = self.workers.iter_mut().find(|worker| worker.id == id);
        let failure = match &worker {
            None => Some(SendFailure::Closed),
            Some(worker) if worker.queue.len() >= room => Some(SendFailure::Full),
            Some(_) if short => Some(SendFailure::Resources),
            Some(_) => None,
        };
        match (failure, worker) {
            (None, Some(worker)) => {
                worker.queue.push_back(conn.serial);
                worker.copies.push_back(conn);
                self.core.line_sent(self.now, id, ticket, tracked.then_some(conn.serial));
            }
            (why, _) => {
                self.core.send_failed(self.now, id, ticket, why.unwrap_or(SendFailure::Closed));
            }
        }
    }

    /// Everything is told: loads are what they are.
    fn settle(&mut self) {
        if self.workers.is_empty() {
            self.join();
        }
        for _ in 0..200 {
            self.now = self.now + Duration::from_millis(20);
            self.core.tick(self.now);
            self.pump();
            for w in 0..self.workers.len() {
                self.workers[w].reads = true;
                while !self.workers[w].queue.is_empty() {
                    self.read(w);
                }
                // Room for what is queued.
                if self.core.totals().queued > 0 {
                    self.workers[w].foreign = 0;
                    self.close_one(w);
                    self.write_report(w);
                }
            }
            self.tell_all();
        }
        let totals = self.core.totals();
        assert_eq!((totals.queued, totals.in_flight), (0, 0), "{totals:?}");
        // The second report covers what the first was too early for.
        for _ in 0..2 {
            (0..self.workers.len()).for_each(|w| self.write_report(w));
            self.tell_all();
        }
        for worker in &self.workers {
            let live = worker.live.len() as u64 + worker.foreign;
            assert_eq!(self.core.load(worker.id), Some(live), "{worker:?}");
        }
        let copies = self.clients.values().filter(|client| client.copy).count();
        assert_eq!(copies, 0, "every copy is closed");
        self.core.check();
    }

    fn tell_all(&mut self) {
        self.note_reads();
        self.pump();
        while !self.ends.is_empty() {
            self.hear_end();
        }
        while !self.reports.is_empty() {
            self.hear_report();
        }
        self.pump();
    }
}
