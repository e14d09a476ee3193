//! The decision core under any sequence of inputs, in the simulator's virtual event loop: two
//! pools, one with processes, and workers with any behaviour. Unlike the simulator's own runs, the
//! sequences need not be plausible. The virtual event loop checks every effect, and the core checks
//! its invariants after every input.

use std::net::SocketAddr;
use std::time::Duration;

use dispatch_protocol::ClientAddr;
use dispatch_protocol::scoreboard::gauge::Reading;
use dispatch_protocol::scoreboard::slot::{Revoke, SlotState};
use dispatch_protocol::wire::{Hello, VERSION};
use dispatcher_core::*;
use dispatcher_core::{ClientIdentity, KeySource};
use simulator::{Driver, Random};

use super::bytes::Bytes;

/// Most inputs of one run: shorter runs, and more of them per second, find more.
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
    driver: Driver,
    workers: Vec<WorkerId>,
    conns: Vec<ConnId>,
    stopping: bool,
}

fn millis(bytes: &mut Bytes<'_>) -> Duration {
    Duration::from_millis(u64::from(bytes.byte()))
}

/// Every kind of affinity key, with tables that are soon full.
fn affinity(kind: u8) -> Option<Affinity> {
    let key = match kind % 4 {
        0 => return None,
        1 => KeySource::ClientIp { ipv4_prefix: 32, ipv6_prefix: 64 },
        2 => KeySource::Cookie("ID".to_owned()),
        _ => KeySource::Sni,
    };
    Some(Affinity {
        key,
        ttl: Duration::from_millis(200),
        max_entries: 1 + u32::from(kind >> 2 & 3),
    })
}

fn scores(kind: u8) -> Scores {
    let gauge = |name: &str, multiplier| ScoredGauge { name: name.parse().unwrap(), multiplier };
    let gauges = vec![gauge("queue_wait", 100.0), gauge("sessions", -1.0)];
    Scores {
        gauges: gauges.into_iter().take(usize::from(kind & 3)).collect(),
        valid_for: Duration::from_millis(100),
        interval: (kind & 4 != 0).then_some(Duration::from_millis(10)),
        ..Scores::default()
    }
}

fn settings(name: &str, processes: u32, bytes: &mut Bytes<'_>) -> PoolSettings {
    let policy = Policy::ALL[bytes.below(Policy::ALL.len())];
    let slow_start = millis(bytes);
    let kinds = bytes.byte();
    PoolSettings {
        name: name.to_owned(),
        policy,
        slow_start,
        history: u32::from(kinds % 4),
        history_candidates: 2,
        affinity: affinity(kinds >> 2),
        peek: Peek { timeout: Duration::from_millis(50), max_bytes: 64, max_awaiting: 2 },
        scores: scores(kinds >> 4),
        max_connections_per_worker: 1 + bytes.below(6) as u32,
        max_untaken: 1 + bytes.below(4) as u32,
        max_workers: 1 + bytes.below(5) as u32,
        handoff_timeout: Duration::from_millis(1) + millis(bytes),
        max_handoff_timeout: millis(bytes),
        wait_for_worker: millis(bytes),
        access: AllowedAccounts { users: vec![0], groups: Vec::new() },
        processes,
        agent_workers: None,
        supervision: Supervision {
            start_timeout: Duration::from_secs(5),
            stop_timeout: Duration::from_secs(1),
            drain_timeout: Some(Duration::from_secs(4)),
            kill_hung_after: Some(Duration::from_secs(3)),
            max_age: Some(Duration::from_secs(20)),
            max_connections_served: Some(16),
            crash_loop_after: 3,
            ..Supervision::default()
        },
        steered: false,
        queues_move: false,
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
        let mut driver = Driver::new(pools, listeners);
        driver.logging = false;
        Run { driver, workers: Vec::new(), conns: Vec::new(), stopping: false }
    }

    /// One of the workers so far, most often a recent one.
    fn worker(&self, bytes: &mut Bytes<'_>) -> Option<WorkerId> {
        let back = bytes.below(self.workers.len().min(8));
        self.workers.iter().rev().nth(back).copied()
    }

    /// Only if its process lives.
    fn living(&mut self, bytes: &mut Bytes<'_>) -> Option<WorkerId> {
        let worker = self.worker(bytes)?;
        self.driver.link(worker).alive.then_some(worker)
    }

    fn step(&mut self, bytes: &mut Bytes<'_>) {
        let now = self.driver.now;
        match bytes.below(28) {
            0 | 1 => self.join(bytes),
            2 => {
                let Some(worker) = self.worker(bytes) else { return };
                self.driver.core.goodbye(now, worker);
            }
            3 => {
                let Some(worker) = self.worker(bytes) else { return };
                let why = match bytes.below(3) {
                    0 => Departure::Disconnected,
                    1 => Departure::Died,
                    _ => Departure::Expelled("fuzz"),
                };
                if why == Departure::Died {
                    let link = self.driver.link(worker);
                    (link.alive, link.closed) = (false, true);
                }
                self.driver.core.leave(now, worker, why);
            }
            4..=6 => {
                let listener = ListenerId(bytes.below(LISTENERS.into()) as u16);
                for _ in 0..=bytes.below(4) {
                    // Some clients have repeated addresses.
                    let peer = match self.conns.len() % 5 {
                        0 => ClientAddr::Unix,
                        n => SocketAddr::from(([127, 0, 0, n as u8], 1)).into(),
                    };
                    self.conns.push(self.driver.accept_only_from(listener, peer));
                }
            }
            7..=9 => {
                let Some(worker) = self.living(bytes) else { return };
                for _ in 0..=bytes.below(4) {
                    self.driver.take(worker);
                }
            }
            10 => {
                let Some(worker) = self.living(bytes) else { return };
                self.driver.lose(worker);
            }
            11 => {
                let Some(worker) = self.living(bytes) else { return };
                self.driver.scribble(worker);
            }
            12 | 13 => {
                let Some(worker) = self.living(bytes) else { return };
                let said = bytes.number();
                let link = self.driver.link(worker);
                // Small numbers are increments, so that some workers are honest.
                link.finished = if said < 64 { link.finished.wrapping_add(said) } else { said };
            }
            14 | 15 => self.driver.turn(),
            16 | 17 => {
                let time = millis(bytes);
                self.driver.wait(time);
            }
            18 => {
                let back = bytes.below(self.conns.len().min(16));
                let Some(&conn) = self.conns.iter().rev().nth(back) else { return };
                self.driver.core.client_gone(now, conn);
            }
            19 => {
                let Some(worker) = self.worker(bytes) else { return };
                let link = self.driver.link(worker);
                match bytes.byte() {
                    0 => link.closed = true,
                    capacity => link.capacity = usize::from(capacity),
                }
            }
            20 => self.driver.scarcity = u32::from(bytes.byte() % 8),
            21 => self.process(bytes),
            22 => self.stale(bytes),
            24 => {
                let Some(worker) = self.worker(bytes) else { return };
                let deadline = match bytes.byte() {
                    0 => None,
                    millis => Some(now + Duration::from_millis(millis.into())),
                };
                self.driver.core.drain_worker(now, worker, deadline);
            }
            25 => {
                let Some(worker) = self.worker(bytes) else { return };
                // Other tests check the reason; the invariants hold in either case.
                let _ = self.driver.core.resume_worker(now, worker);
            }
            26 => self.says(bytes),
            27 => {
                let back = bytes.below(self.conns.len().min(16));
                let Some(&conn) = self.conns.iter().rev().nth(back) else { return };
                let (key, route) = (bytes.byte(), bytes.byte());
                let known = (key > 0).then(|| ClientIdentity {
                    key: AffinityKey(u64::from(key % 8)),
                    // All workers have the same name.
                    route: (route % 2 == 1).then(|| AffinityKey::of(b"")),
                });
                self.driver.core.first_bytes(now, conn, known);
            }
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
            // The decoder rejects more than `base`.
            finished: bytes.number().min(base),
            ..Hello::default()
        };
        if let Ok(worker) = self.driver.join(hello) {
            self.workers.push(worker);
        }
    }

    /// Reports of a worker: claims of keys, and gauges with any value at any time.
    fn says(&mut self, bytes: &mut Bytes<'_>) {
        let now = self.driver.now;
        let Some(worker) = self.worker(bytes) else { return };
        let choice = bytes.byte();
        let number = usize::from(choice >> 4);
        match choice % 4 {
            0 => {
                let key: &[u8] = match number {
                    0 => b"127.0.0.1",
                    1 => b"localhost.",
                    _ => &[number as u8],
                };
                self.driver.core.claim(now, worker, key);
            }
            1 => {
                let name = (number > 0).then(|| "queue_wait".parse().unwrap());
                self.driver.core.misnamed_gauge(worker, name);
            }
            of => {
                let value = f64::from_bits(match bytes.byte() {
                    255 => f64::NAN.to_bits(),
                    254 => f64::NEG_INFINITY.to_bits(),
                    253 => f64::MAX.to_bits(),
                    small => f64::from(small).to_bits(),
                });
                // Old, fresh, or in the future.
                let at = match bytes.byte() {
                    255 => u64::MAX,
                    ago => now.0.saturating_sub(1_000_000 * u64::from(ago)),
                };
                let said = Some(Reading { value, at });
                if of == 2 {
                    // At the time when the event loop reads it, or at another, and perhaps with a
                    // gauge that does not exist.
                    let gauges = &mut self.driver.link(worker).gauges;
                    if let Some(gauge) = gauges.get_mut(number % 2) {
                        *gauge = said;
                    }
                } else {
                    self.driver.core.gauge(now, worker, number, said);
                }
            }
        }
    }

    fn process(&mut self, bytes: &mut Bytes<'_>) {
        let now = self.driver.now;
        let choice = bytes.byte();
        let number = u32::from(choice >> 4) % (PROCESSES + 1);
        let process = ProcessId {
            pool: PoolId(u16::from(choice) & 1),
            place: number,
            start: 1 + u32::from(choice >> 3) % 8,
        };
        match choice >> 1 & 3 {
            0 => self.driver.core.spawned(now, process, true),
            1 => self.driver.core.spawned(now, process, false),
            _ => self.driver.core.exited(now, process),
        }
    }

    /// Inputs for objects that are gone or never existed: the core ignores them.
    fn stale(&mut self, bytes: &mut Bytes<'_>) {
        let now = self.driver.now;
        let before = self.driver.core.totals();
        let index = u32::from(bytes.byte() % 8);
        let (worker, ticket) = match self.worker(bytes) {
            // A sequence number that was never issued.
            Some(worker) if index < 4 => (worker, Ticket { slot: index, seq: u64::MAX >> 8 }),
            _ => (WorkerId { index, serial: u64::MAX }, Ticket { slot: 0, seq: 1 }),
        };
        let state = match bytes.below(3) {
            0 => SlotState::Taken,
            1 => SlotState::Lost,
            _ => SlotState::Sent,
        };
        let core = &mut self.driver.core;
        match bytes.below(7) {
            0 => core.slot(now, worker, ticket, state, now),
            1 => core.revoked(now, worker, ticket, Revoke::Revoked),
            2 => core.revoked(now, worker, ticket, Revoke::Was(state)),
            3 => core.send_failed(now, worker, ticket, SendFailure::Full),
            4 => core.probe_failed(now, worker, ticket, SendFailure::Resources),
            5 => core.client_gone(now, ConnId { index, serial: u64::MAX }),
            _ => core.goodbye(now, WorkerId { index, serial: u64::MAX }),
        }
        let after = self.driver.core.totals();
        assert_eq!((before.taken, before.accepted), (after.taken, after.accepted));
    }

    fn rarely(&mut self, bytes: &mut Bytes<'_>) {
        let now = self.driver.now;
        match bytes.below(10) {
            8 => {
                let weight = bytes.number() as u16;
                let Some(worker) = self.worker(bytes) else { return };
                self.driver.core.set_weight(now, worker, weight);
            }
            9 => {
                // Queries change nothing; a later check would fail.
                let pool = PoolId(u16::from(bytes.byte() % 3));
                let first = self.driver.core.explain(now, pool, ClientAddr::Unix);
                assert_eq!(first, self.driver.core.explain(now, pool, ClientAddr::Unix));
            }
            0 => {
                self.stopping = true;
                let deadline = now + millis(bytes);
                self.driver.core.stop(now, deadline);
            }
            1 => self.driver.races = Some(Random::new(u64::from(bytes.byte()))),
            2 => self.driver.races = None,
            3 => {
                let pause = millis(bytes);
                self.driver.core.set_resource_pause(pause);
            }
            // A tick without reading the scoreboards, and a very long pause.
            4 => self.driver.core.tick(now + Duration::from_millis(1)),
            _ => self.driver.wait(Duration::from_secs(u64::from(bytes.byte()))),
        }
    }

    fn judge(&mut self) {
        self.driver.pump();
        self.driver.raced.clear();
        let core = &self.driver.core;
        core.check();
        let totals = core.totals();
        assert_eq!(self.driver.open_copies() as u64, totals.queued + totals.in_flight);
        for listener in (0..LISTENERS).map(ListenerId) {
            assert_eq!(core.accepting(listener) == Accepting::Finish, self.stopping);
        }
        for &worker in self.workers.iter().rev().take(8) {
            let tickets = core.tickets(worker).count() as u64;
            // A ticket may be that of a probe.
            assert!(core.untaken(worker) <= tickets);
            assert!(core.load(worker).is_none_or(|load| load >= core.untaken(worker)));
            assert!(tickets == 0 || core.wants(worker) != 0);
        }
        let status = core.snapshot();
        // Connections that wait for a worker or for first bytes.
        let affinities = status.pools.iter().filter_map(|pool| pool.affinity.as_ref());
        let awaited: u64 = affinities.map(|affinity| affinity.awaiting).sum();
        assert_eq!(core.queued().count() as u64 + awaited, totals.queued);
        assert_eq!(status.totals, totals);
    }

    /// After any sequence, a stop completes.
    fn end(mut self) {
        (self.driver.races, self.driver.scarcity) = (None, 0);
        let deadline = self.driver.now + Duration::from_secs(1);
        self.driver.core.stop(self.driver.now, deadline);
        self.stopping = true;
        self.judge();
        self.driver.wait(Duration::from_secs(2));
        self.judge();
        assert!(self.driver.core.stopped());
        assert_eq!(self.driver.core.totals().queued, 0, "queued when all is over");
    }
}
