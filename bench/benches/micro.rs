//! Micro-benchmarks of the event loop's parts: a decision, gauges, the wire codec, the slots, the
//! ledger.
//!
//! They detect regressions; their figures are not comparable between machines. Run with
//! `cargo bench -p bench`.
#![allow(clippy::expect_used, clippy::unwrap_used)]

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use dispatch_protocol::ClientAddr;
use dispatch_protocol::scoreboard::Scoreboard;
use dispatch_protocol::scoreboard::gauge::Reading;
use dispatch_protocol::scoreboard::slot::{self, SlotState};
use dispatch_protocol::wire::{Channel, Entry, EntryFlags, Features, Handoff, Hello, VERSION};
use dispatcher_core::KeySource;
use dispatcher_core::{
    Affinity, AllowedAccounts, Client, Core, Effect, Join, ListenerId, ListenerSettings, Policy,
    PoolId, PoolSettings, ScoredGauge, Scores, Ticket, Time, WorkerId,
};

const LISTENER: ListenerId = ListenerId(0);

fn peer() -> ClientAddr {
    ClientAddr::from(std::net::SocketAddr::from(([127, 0, 0, 1], 40_000)))
}

/// A core whose workers have `weight(index)`.
fn core(policy: Policy, workers: u32, weight: impl Fn(u32) -> u16) -> Core {
    core_with(policy, workers, weight, |_| {})
}

/// The value of a worker's gauge; each worker has another one.
fn reading(worker: u32, gauge: usize) -> Option<Reading> {
    Some(Reading { value: f64::from(worker % 5) * 0.1 + gauge as f64, at: 0 })
}

/// The gauges in the score of a pool with mixed work.
fn scores() -> Scores {
    let multipliers =
        [("queue_wait", 100.0), ("sessions", 0.5), ("process_cpu", 10.0), ("free_memory", -0.001)];
    let gauge = |(name, multiplier): (&str, f64)| ScoredGauge {
        name: name.parse().expect("a name"),
        multiplier,
    };
    Scores { gauges: multipliers.map(gauge).into(), ..Scores::default() }
}

fn core_with(
    policy: Policy,
    workers: u32,
    weight: impl Fn(u32) -> u16,
    change: impl FnOnce(&mut PoolSettings),
) -> Core {
    let mut pool = PoolSettings {
        name: "web".to_owned(),
        policy,
        max_connections_per_worker: u32::MAX,
        max_untaken: 256,
        max_workers: 4096,
        handoff_timeout: Duration::from_secs(1),
        max_handoff_timeout: Duration::from_secs(30),
        wait_for_worker: Duration::from_secs(1),
        access: AllowedAccounts { users: vec![0], groups: Vec::new() },
        ..PoolSettings::default()
    };
    change(&mut pool);
    let listener = ListenerSettings {
        name: "web".to_owned(),
        address: "127.0.0.1:80".to_owned(),
        pool: PoolId(0),
    };
    let mut core = Core::new(vec![pool], vec![listener], Time(0));
    // Each worker sets all gauges that `least-score` compares.
    let gauges = core.scored_gauges(PoolId(0)).len();
    for number in 0..workers {
        let hello = Hello {
            version: VERSION,
            weight: weight(number),
            priority: 0,
            features: Features::NONE,
            max_connections: u32::MAX,
            base: 0,
            finished: 0,
            pool: "web".to_owned(),
            name: format!("w{number}"),
            token: None,
            advertise: None,
        };
        let join = Join { pid: 1, uid: 0, gids: Vec::new(), hello, spawned: None };
        let worker = core.join(Time(0), &join).expect("admitted");
        for gauge in 0..gauges {
            core.gauge(Time(0), worker, gauge, reading(number, gauge));
        }
    }
    while core.effect().is_some() {}
    core
}

/// A batch of connections is accepted, sent, seen taken, released and finished: a whole turn.
fn turn(core: &mut Core, batch: usize, sent: &mut Vec<(WorkerId, Ticket)>, finished: &mut [u64]) {
    let mut number = 0;
    let mut next = || {
        number += 1;
        [10, 0, 0, number]
    };
    turn_of(core, batch, &mut next, sent, finished);
}

fn turn_of(
    core: &mut Core,
    batch: usize,
    next: &mut impl FnMut() -> [u8; 4],
    sent: &mut Vec<(WorkerId, Ticket)>,
    finished: &mut [u64],
) {
    let now = Time(1);
    for _ in 0..batch {
        let address = next();
        let peer = ClientAddr::from(std::net::SocketAddr::from((address, 40_000)));
        core.accepted(now, Client::new(LISTENER, peer));
    }
    while let Some(effect) = core.effect() {
        if let Effect::Send { worker, ticket, .. } = effect {
            sent.push((worker, ticket));
        }
    }
    for &(worker, ticket) in &*sent {
        core.slot(now, worker, ticket, SlotState::Taken, now);
    }
    while core.effect().is_some() {}
    for (worker, _) in sent.drain(..) {
        let at = worker.index as usize;
        finished[at] += 1;
        core.finished(now, worker, finished[at]);
    }
}

/// A turn with each policy; the differences between the figures are those of the decisions.
fn decision(c: &mut Criterion) {
    const BATCH: usize = 64;
    type Weight = fn(u32) -> u16;
    let weights: [(&str, Weight); 2] =
        [("equal", |_| 1), ("mixed", |number| (number % 7 + 1) as u16)];
    let mut group = c.benchmark_group("decision");
    group.throughput(Throughput::Elements(BATCH as u64));
    for policy in Policy::ALL {
        for workers in [2, 64, 1000] {
            for (name, weight) in weights {
                let mut core = core_with(policy, workers, weight, |pool| pool.scores = scores());
                let mut sent = Vec::new();
                let mut finished = vec![0; workers as usize];
                let id = BenchmarkId::new(format!("{} {name}", policy.name()), workers);
                group.bench_function(id, |b| {
                    b.iter(|| turn(&mut core, BATCH, &mut sent, &mut finished));
                });
            }
        }
    }
    group.finish();
}

/// Reads four gauges of every worker and reports those that have changed to the core.
fn gauges(c: &mut Criterion) {
    const SLOTS: u32 = 16;
    let mut group = c.benchmark_group("gauges");
    for workers in [2, 64, 1000] {
        let mut core = core_with(Policy::LeastScore, workers, |_| 1, |pool| pool.scores = scores());
        let boards: Vec<_> =
            (0..workers).map(|_| Scoreboard::create(SLOTS, 0).expect("a scoreboard").0).collect();
        for (number, board) in (0..).zip(&boards) {
            for (gauge, n) in (0..4).zip(0..) {
                board.set_gauge(n, reading(number, gauge).expect("a value"));
            }
        }
        let ids: Vec<WorkerId> = core.workers().collect();
        group.throughput(Throughput::Elements(u64::from(workers)));
        group.bench_function(BenchmarkId::new("read", workers), |b| {
            let read = |board: &Scoreboard| (0..4).filter_map(|n| board.gauge(n)).count();
            b.iter(|| boards.iter().map(read).sum::<usize>());
        });
        group.bench_function(BenchmarkId::new("told", workers), |b| {
            b.iter(|| {
                for (number, &id) in (0..).zip(&ids) {
                    for gauge in 0..4 {
                        core.gauge(Time(1), id, gauge, reading(number, gauge));
                    }
                }
            });
        });
    }
    group.finish();
}

fn wire(c: &mut Criterion) {
    let entry = |seq| Entry {
        seq,
        slot: 7,
        listener: 0,
        flags: EntryFlags::NONE,
        accepted_ns: 1,
        peer: peer(),
        number: seq,
    };
    let mut group = c.benchmark_group("wire");
    for count in [1, 64] {
        let entries: Vec<Entry> = (1..=count).map(entry).collect();
        let mut record = Vec::new();
        group.throughput(Throughput::Elements(count));
        group.bench_function(BenchmarkId::new("encode handoff", count), |b| {
            b.iter(|| {
                record.clear();
                Handoff::encode_entries(black_box(&entries), &mut record);
            });
        });
        group.bench_function(BenchmarkId::new("decode handoff", count), |b| {
            b.iter(|| Channel::decode(black_box(&record)).expect("well-formed"));
        });
    }
    group.finish();
}

fn ring(c: &mut Criterion) {
    const SLOTS: u32 = 256;
    let (board, _fd) = Scoreboard::create(SLOTS, 0).expect("a scoreboard");
    let mut seq = 0;
    let mut group = c.benchmark_group("slots");
    group.throughput(Throughput::Elements(u64::from(SLOTS)));
    group.bench_function("offer, take, see, release", |b| {
        b.iter(|| {
            seq += 1;
            for slot in (0..SLOTS).filter_map(|slot| board.slot(slot)) {
                slot::offer(slot, seq);
                assert!(slot::take(slot, seq));
                assert_eq!(slot::state(slot, seq), SlotState::Taken);
                slot::release(slot, seq);
            }
        });
    });
    group.bench_function("look at a full one", |b| {
        b.iter(|| {
            let slots = (0..SLOTS).filter_map(|slot| board.slot(slot));
            slots.filter(|slot| slot::state(*slot, seq) == SlotState::Sent).count()
        });
    });
    group.bench_function("must_ring, dispatcher awake", |b| {
        b.iter(|| slot::must_ring(board.want(), slot::want::TAKEN));
    });
    group.finish();
}

/// Connections without a worker: into the queue and out of it.
fn ledger(c: &mut Criterion) {
    const BATCH: usize = 64;
    let mut core = core(Policy::LeastConnections, 0, |_| 1);
    let mut conns = Vec::new();
    let mut group = c.benchmark_group("ledger");
    group.throughput(Throughput::Elements(BATCH as u64));
    group.bench_function("hold and let go", |b| {
        b.iter(|| {
            for _ in 0..BATCH {
                conns.push(core.accepted(Time(1), Client::new(LISTENER, peer())));
            }
            for conn in conns.drain(..) {
                core.client_gone(Time(1), conn);
            }
            while core.effect().is_some() {}
        });
    });
    group.finish();
}

/// A turn of known clients, in a pool with a million bindings.
fn affinity(c: &mut Criterion) {
    const BATCH: usize = 64;
    const ENTRIES: u32 = 1_000_000;
    let mut group = c.benchmark_group("affinity");
    group.throughput(Throughput::Elements(BATCH as u64));
    // Known keys from the whole table; then new keys, each of which evicts another.
    for (name, clients) in [("known", ENTRIES), ("new", u32::MAX)] {
        let mut core = core_with(
            Policy::LeastConnections,
            64,
            |_| 1,
            |pool| {
                pool.affinity = Some(Affinity {
                    key: KeySource::ClientIp { ipv4_prefix: 32, ipv6_prefix: 128 },
                    ttl: Duration::from_secs(3600),
                    max_entries: ENTRIES,
                });
            },
        );
        let (mut sent, mut finished) = (Vec::new(), vec![0; 64]);
        let mut number = 0u32;
        let mut next = || {
            number = number.wrapping_add(0x9e37_79b1);
            std::net::Ipv4Addr::from(number % clients).octets()
        };
        for _ in 0..ENTRIES as usize / BATCH {
            turn_of(&mut core, BATCH, &mut next, &mut sent, &mut finished);
        }
        group.bench_function(BenchmarkId::new(name, ENTRIES), |b| {
            b.iter(|| turn_of(&mut core, BATCH, &mut next, &mut sent, &mut finished));
        });
    }
    group.finish();
}

criterion_group!(benches, decision, gauges, wire, ring, ledger, affinity);
criterion_main!(benches);
