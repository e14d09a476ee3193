//! The decision core under any sequence of inputs, in the simulator's virtual shell: two pools, one of which has
//! processes; workers that say and do anything a worker can. The simulator's own runs are histories that make sense; these
//! need not. Every effect is judged by the shell, and the invariants are checked after every input.

use std::time::Duration;

use dispatcher::pool::*;
use dispatcher::sim::{Desk, Random};
use worker_sdk::scoreboard::claim::{Revoke, SlotState};
use worker_sdk::wire::{Hello, VERSION};

use super::bytes::Bytes;

/// Enough for any history worth telling; more of them per second find more.
const MOST_STEPS: usize = 1000;
const LISTENERS: u16 = 3;
const PROCESSES: u32 = 2;

pub fn pool_ops(data: &[u8]) {
    let mut bytes = Bytes::new(data);
    let mut run = Run::new(&mut bytes);
    for _ in 0..MOST_STEPS {
        if bytes.is_empty() {
            break;
        }
        run.step(&mut bytes);
        run.judge();
    }
    run.end();
}

struct Run {
    desk: Desk,
    workers: Vec<WorkerId>,
    conns: Vec<ConnId>,
    stopping: bool,
}

fn millis(bytes: &mut Bytes<'_>) -> Duration {
    Duration::from_millis(u64::from(bytes.byte()))
}

fn settings(name: &str, processes: u32, bytes: &mut Bytes<'_>) -> PoolSettings {
    PoolSettings {
        name: name.to_owned(),
        policy: Policy::ALL[bytes.below(Policy::ALL.len())],
        slow_start: millis(bytes),
        history: u32::from(bytes.byte() % 4),
        history_candidates: 2,
        max_connections_per_worker: 1 + bytes.below(6) as u32,
        max_untaken: 1 + bytes.below(4) as u32,
        max_workers: 1 + bytes.below(5) as u32,
        handoff_timeout: Duration::from_millis(1) + millis(bytes),
        probation: millis(bytes),
        wait_for_worker: millis(bytes),
        access: Access { users: vec![0], groups: Vec::new() },
        processes,
        ..PoolSettings::default()
    }
}

impl Run {
    fn new(bytes: &mut Bytes<'_>) -> Run {
        let pools = vec![settings("web", 0, bytes), settings("api", PROCESSES, bytes)];
        let listeners = (0..LISTENERS)
            .map(|n| ListenerSettings {
                name: format!("listener{n}"),
                address: String::new(),
                pool: PoolId(n / 2),
            })
            .collect();
        let mut desk = Desk::new(pools, listeners);
        desk.logging = false;
        Run { desk, workers: Vec::new(), conns: Vec::new(), stopping: false }
    }

    /// One of the workers there ever were, most often a late one.
    fn worker(&self, bytes: &mut Bytes<'_>) -> Option<WorkerId> {
        let back = bytes.below(self.workers.len().min(8));
        self.workers.iter().rev().nth(back).copied()
    }

    /// Only what lives can do something.
    fn living(&mut self, bytes: &mut Bytes<'_>) -> Option<WorkerId> {
        let worker = self.worker(bytes)?;
        self.desk.link(worker).alive.then_some(worker)
    }

    fn step(&mut self, bytes: &mut Bytes<'_>) {
        let now = self.desk.now;
        match bytes.below(24) {
            0 | 1 => self.join(bytes),
            2 => {
                let Some(worker) = self.worker(bytes) else { return };
                self.desk.core.goodbye(now, worker);
            }
            3 => {
                let Some(worker) = self.worker(bytes) else { return };
                let why = match bytes.below(3) {
                    0 => Departure::Disconnected,
                    1 => Departure::Died,
                    _ => Departure::Expelled("fuzz"),
                };
                if why == Departure::Died {
                    let link = self.desk.link(worker);
                    (link.alive, link.closed) = (false, true);
                }
                self.desk.core.leave(now, worker, why);
            }
            4..=6 => {
                let listener = ListenerId(bytes.below(LISTENERS.into()) as u16);
                for _ in 0..=bytes.below(4) {
                    self.conns.push(self.desk.accept_only(listener));
                }
            }
            7..=9 => {
                let Some(worker) = self.living(bytes) else { return };
                for _ in 0..=bytes.below(4) {
                    self.desk.take(worker);
                }
            }
            10 => {
                let Some(worker) = self.living(bytes) else { return };
                self.desk.lose(worker);
            }
            11 => {
                let Some(worker) = self.living(bytes) else { return };
                self.desk.scribble(worker);
            }
            12 | 13 => {
                let Some(worker) = self.living(bytes) else { return };
                let said = bytes.number();
                let link = self.desk.link(worker);
                // Small numbers are steps, so that an honest worker comes about too.
                link.finished = if said < 64 { link.finished.wrapping_add(said) } else { said };
            }
            14 | 15 => self.desk.turn(),
            16 | 17 => {
                let time = millis(bytes);
                self.desk.wait(time);
            }
            18 => {
                let back = bytes.below(self.conns.len().min(16));
                let Some(&conn) = self.conns.iter().rev().nth(back) else { return };
                self.desk.core.client_gone(now, conn);
            }
            19 => {
                let Some(worker) = self.worker(bytes) else { return };
                let link = self.desk.link(worker);
                match bytes.byte() {
                    0 => link.closed = true,
                    capacity => link.capacity = usize::from(capacity),
                }
            }
            20 => self.desk.scarcity = u32::from(bytes.byte() % 8),
            21 => self.process(bytes),
            22 => self.stale(bytes),
            _ => self.rarely(bytes),
        }
    }

    fn join(&mut self, bytes: &mut Bytes<'_>) {
        let kind = bytes.byte();
        let base = bytes.number();
        let hello = Hello {
            version: if kind == 255 { VERSION + 1 } else { VERSION },
            pool: if kind & 1 == 0 { "web" } else { "api" }.to_owned(),
            weight: (bytes.number() as u16).max(1),
            priority: u16::from(kind >> 1 & 3),
            max_connections: (bytes.number() as u32).max(1),
            base,
            // More than `base` does not get through the wire.
            finished: bytes.number().min(base),
            ..Hello::default()
        };
        if let Ok(worker) = self.desk.join(hello) {
            self.workers.push(worker);
        }
    }

    fn process(&mut self, bytes: &mut Bytes<'_>) {
        let now = self.desk.now;
        let choice = bytes.byte();
        let number = u32::from(choice >> 4) % (PROCESSES + 1);
        let process = ProcessId { pool: PoolId(u16::from(choice) & 1), number };
        match choice >> 1 & 3 {
            0 => self.desk.core.spawned(now, process, true),
            1 => self.desk.core.spawned(now, process, false),
            _ => self.desk.core.exited(now, process),
        }
    }

    /// Inputs for what is no longer there, or never was: they are ignored.
    fn stale(&mut self, bytes: &mut Bytes<'_>) {
        let now = self.desk.now;
        let before = self.desk.core.totals();
        let index = u32::from(bytes.byte() % 8);
        let (worker, ticket) = match self.worker(bytes) {
            // A sequence number that was never given out.
            Some(worker) if index < 4 => (worker, Ticket { slot: index, seq: u64::MAX >> 8 }),
            _ => (WorkerId { index, serial: u64::MAX }, Ticket { slot: 0, seq: 1 }),
        };
        let state = match bytes.below(3) {
            0 => SlotState::Taken,
            1 => SlotState::Lost,
            _ => SlotState::Sent,
        };
        let core = &mut self.desk.core;
        match bytes.below(7) {
            0 => core.slot(now, worker, ticket, state),
            1 => core.revoked(now, worker, ticket, Revoke::Revoked),
            2 => core.revoked(now, worker, ticket, Revoke::Was(state)),
            3 => core.send_failed(now, worker, ticket, SendFailure::Full),
            4 => core.probe_failed(now, worker, ticket, SendFailure::Resources),
            5 => core.client_gone(now, ConnId { index, serial: u64::MAX }),
            _ => core.goodbye(now, WorkerId { index, serial: u64::MAX }),
        }
        let after = self.desk.core.totals();
        assert_eq!((before.taken, before.accepted), (after.taken, after.accepted));
    }

    fn rarely(&mut self, bytes: &mut Bytes<'_>) {
        let now = self.desk.now;
        match bytes.below(10) {
            8 => {
                let weight = bytes.number() as u16;
                let Some(worker) = self.worker(bytes) else { return };
                self.desk.core.set_weight(now, worker, weight);
            }
            9 => {
                // Asking changes nothing: what follows would tell.
                let pool = PoolId(u16::from(bytes.byte() % 3));
                let first = self.desk.core.explain(now, pool, worker_sdk::PeerAddr::Unix);
                assert_eq!(first, self.desk.core.explain(now, pool, worker_sdk::PeerAddr::Unix));
            }
            0 => {
                self.stopping = true;
                let deadline = now + millis(bytes);
                self.desk.core.stop(now, deadline);
            }
            1 => self.desk.races = Some(Random::new(u64::from(bytes.byte()))),
            2 => self.desk.races = None,
            3 => {
                let pause = millis(bytes);
                self.desk.core.set_resource_pause(pause);
            }
            // Time without a look at the scoreboards, and far too much of it.
            4 => self.desk.core.tick(now + Duration::from_millis(1)),
            _ => self.desk.wait(Duration::from_secs(u64::from(bytes.byte()))),
        }
    }

    fn judge(&mut self) {
        self.desk.pump();
        self.desk.raced.clear();
        let core = &self.desk.core;
        core.check();
        let totals = core.totals();
        assert_eq!(self.desk.open_copies() as u64, totals.held + totals.custody);
        assert_eq!(core.held().count() as u64, totals.held);
        for listener in (0..LISTENERS).map(ListenerId) {
            assert_eq!(core.accepting(listener) == Accepting::Finish, self.stopping);
        }
        for &worker in self.workers.iter().rev().take(8) {
            let tickets = core.tickets(worker).count() as u64;
            // A probe has a ticket too.
            assert!(core.untaken(worker) <= tickets);
            assert!(core.load(worker).is_none_or(|load| load >= core.untaken(worker)));
            assert!(tickets == 0 || core.wants(worker) != 0);
        }
        let status = core.status();
        assert_eq!((status.held, status.custody), (totals.held, totals.custody));
    }

    /// Whatever happened, a stop comes to its end.
    fn end(mut self) {
        (self.desk.races, self.desk.scarcity) = (None, 0);
        let deadline = self.desk.now + Duration::from_secs(1);
        self.desk.core.stop(self.desk.now, deadline);
        self.stopping = true;
        self.judge();
        self.desk.wait(Duration::from_secs(2));
        self.judge();
        assert!(self.desk.core.stopped());
        assert_eq!(self.desk.core.totals().held, 0, "held when all is over");
    }
}
