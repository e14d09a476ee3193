//! Reports of the core: a snapshot of everything, and names and numbers for logs and metrics.

use std::time::Duration;

use super::host::HostDrainSnapshot;
use super::line::LineSnapshot;
use super::steer::SteerCounts;
use super::supervise::{Generation, LeavingGeneration, ProcessCounts, ProcessTotals, Roll};
use super::types::*;
use super::worker::Worker;
use super::{Core, Pool, WorkerWait};
use crate::affinity::key::KeySource;
use crate::histogram::Histogram;

/// The state of the core at one instant, as plain values. The reader formats them.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// Whether the dispatcher is stopping.
    pub stopping: bool,
    /// The drain of the host, if there is one.
    pub host_drain: Option<HostDrainSnapshot>,
    /// Connections by place.
    pub totals: Totals,
    /// Connections that workers were notified to end at the deadlines of their drains.
    pub ended_at_deadline: u64,
    /// In the order of the configuration.
    pub listeners: Vec<ListenerSnapshot>,
    /// In the order of the configuration.
    pub pools: Vec<PoolSnapshot>,
}

/// One listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenerSnapshot {
    /// Its name.
    pub name: String,
    /// Its configured address.
    pub address: String,
    /// The pool that serves it.
    pub pool: String,
    /// Connections accepted since the start.
    pub accepted: u64,
    /// Connections closed by the dispatcher, in the order of [`CloseReason::ALL`].
    pub closed: [u64; CloseReason::ALL.len()],
    /// Clients in the table of its access control.
    pub tracked_clients: u64,
    /// PROXY headers; `None` without `proxy_protocol`.
    pub headers: Option<HeaderSnapshot>,
}

/// The PROXY headers of a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeaderSnapshot {
    /// Connections whose header is awaited now; they are part of the pool's `queued`.
    pub awaited: u64,
    /// Headers read since the start.
    pub read: u64,
}

/// Whether a pool's clients are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolState {
    /// A worker can be given connections.
    Ready,
    /// Clients wait because no worker can be given a connection now.
    BackPressure,
    /// The pool has no usable worker; clients wait for one.
    NoWorker,
    /// Clients are refused.
    Refusing,
    /// A reload removed the pool; its workers still have connections.
    Removed,
}

impl PoolState {
    /// The name in status and metrics.
    pub fn name(self) -> &'static str {
        match self {
            PoolState::Ready => "ready",
            PoolState::BackPressure => "back-pressure",
            PoolState::NoWorker => "no-worker",
            PoolState::Refusing => "refusing",
            PoolState::Removed => "removed",
        }
    }
}

/// The processes of a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessSnapshot {
    /// The number of processes in each state.
    pub counts: ProcessCounts,
    /// Counters since the start of the dispatcher.
    pub totals: ProcessTotals,
    /// Processes that another one is to replace.
    pub outdated: u32,
    /// Whether starts have failed too often.
    pub crash_loop: bool,
    /// When a start that waits for a delay is due, from the last turn on.
    pub next_start_in: Option<Duration>,
    /// The generation of new places, and after a roll that of every process.
    pub generation: Generation,
    /// The last roll, and how long ago it began.
    pub roll: Option<(Roll, Duration)>,
    /// Processes of the pool, or of its only place, that are not of the last roll's generation.
    pub remaining: u32,
    /// The generations that leave because of a roll and have connections, oldest first.
    pub leaving_generations: Vec<LeavingGeneration>,
}

/// One pool. Counts are since the start and include workers that have left.
#[derive(Clone, Debug, PartialEq)]
pub struct PoolSnapshot {
    /// Its name.
    pub name: String,
    /// Its policy.
    pub policy: Policy,
    /// Whether its clients are served.
    pub state: PoolState,
    /// Connections queued now, awaited ones included.
    pub queued: u64,
    /// Connections taken by its workers.
    pub taken: u64,
    /// Connections revoked from its workers.
    pub revoked: u64,
    /// Connections that did not reach their worker, because it was short of descriptors.
    pub lost: u64,
    /// Times a connection went to another worker because a channel had no room.
    pub channel_full: u64,
    /// Times a worker became suspect.
    pub suspects: u64,
    /// The processes that the pool starts; `None` if it starts none.
    pub processes: Option<ProcessSnapshot>,
    /// Connections that came back from workers of the line protocol that have left.
    pub returned: u64,
    /// Workers that have joined.
    pub joined: u64,
    /// Workers that have left.
    pub gone: u64,
    /// From accept to take.
    pub handoff: Histogram,
    /// Affinity; `None` without an affinity key.
    pub affinity: Option<AffinitySnapshot>,
    /// Its workers, by id.
    pub workers: Vec<WorkerSnapshot>,
}

/// The affinity of a pool. Counts are of connections since the start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AffinitySnapshot {
    /// The source of the keys.
    pub key: KeySource,
    /// Keys in the table now, including expired ones that are not yet removed.
    pub entries: u64,
    /// Connections whose first bytes are awaited now; they are part of `queued`.
    pub awaiting: u64,
    /// Connections that went to the worker that their key is bound to.
    pub hits: u64,
    /// Connections whose key had no binding.
    pub misses: u64,
    /// Connections whose bound worker was not eligible: they went to another worker, and the
    /// binding moved.
    pub moved: u64,
    /// Connections that went to the worker that their session id names.
    pub routed: u64,
    /// Connections without a key.
    pub unknown: u64,
    /// Of those, connections whose first bytes did not arrive in time.
    pub timed_out: u64,
    /// Of those, connections that were not awaited because `max_awaiting` others were.
    pub not_awaited: u64,
    /// Keys claimed by workers.
    pub claimed: u64,
    /// Keys removed before they expired because the table was full.
    pub evicted: u64,
}

/// One worker. `load = base + taken + in flight − finished`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerSnapshot {
    /// Its id.
    pub id: WorkerId,
    /// Its name, from its hello.
    pub name: String,
    /// Its process.
    pub pid: i32,
    /// Its state.
    pub state: State,
    /// Its share relative to others.
    pub weight: u32,
    /// Its current share of its weight, in per cent: less than 100 during its slow start.
    pub warm_percent: u32,
    /// For `failover`: the workers of the highest priority that is up get all connections.
    pub priority: u16,
    /// Most live connections: the smaller of the pool's maximum and its own.
    pub max_connections: u32,
    /// It has paused itself.
    pub paused: bool,
    /// Connections that it had taken over its lifetime when it joined.
    pub base: u64,
    /// Live connections, untaken ones included.
    pub load: u64,
    /// Connections sent to it by this dispatcher.
    pub sent: u64,
    /// Connections it has taken from this dispatcher.
    pub taken: u64,
    /// Connections that it has closed over its lifetime.
    pub finished: u64,
    /// Connections sent and not yet taken.
    pub in_flight: u64,
    /// Connections revoked from it.
    pub revoked: u64,
    /// Times its channel had no room.
    pub channel_full: u64,
    /// Whether it has taken a connection since it joined, or since it was last suspect.
    pub proven: bool,
    /// The longest time that it usually needs to take a connection.
    pub longest_take: Duration,
    /// Number of its threads that wait for a connection; `None` if it does not report threads.
    pub idle_threads: Option<u32>,
    /// Connections that it was notified to end at the deadline of its drain.
    pub ended_at_deadline: u64,
    /// `Some` if it speaks the line protocol.
    pub line: Option<LineSnapshot>,
    /// `Some` if the kernel chooses its connections: its last counts.
    pub steered: Option<SteerCounts>,
}

/// Connections by place. Always `accepted + returned = queued + in flight + taken + Σ closed`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Accepted since the start.
    pub accepted: u64,
    /// Sent to a worker of the line protocol, and not read before it left, since the start. They
    /// count among `taken` too, and once more in the place that they have then.
    pub returned: u64,
    /// Waiting for a worker now.
    pub queued: u64,
    /// Sent and not yet taken now.
    pub in_flight: u64,
    /// Taken by workers since the start.
    pub taken: u64,
    /// Closed by the dispatcher since the start, in the order of [`CloseReason::ALL`].
    pub closed: [u64; CloseReason::ALL.len()],
}

/// Counts of a pool since the start, including workers that have left.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    pub(super) taken: u64,
    pub(super) revoked: u64,
    pub(super) lost: u64,
    pub(super) channel_full: u64,
    pub(super) suspects: u64,
    pub(super) returned: u64,
    /// Connections that the kernel gave to its workers.
    pub(super) steered: u64,
    pub(super) joined: u64,
    pub(super) gone: u64,
}

/// Counts of removed listeners and pools whose entries have been reused.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct RetiredCounts {
    pub(super) accepted: u64,
    pub(super) closed: u64,
    pub(super) taken: u64,
    pub(super) returned: u64,
    pub(super) steered: u64,
}

impl Totals {
    /// Whether every connection is in exactly one place.
    pub fn is_conserved(&self) -> bool {
        self.accepted + self.returned
            == self.queued + self.in_flight + self.taken + self.closed.iter().sum::<u64>()
    }
}

impl Core {
    /// A snapshot of everything.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            stopping: self.stop.is_some(),
            host_drain: self.host_drain(),
            totals: self.totals,
            ended_at_deadline: self.ended,
            listeners: self
                .listeners
                .iter()
                .filter(|listener| !listener.retired)
                .map(|listener| ListenerSnapshot {
                    name: listener.settings.name.clone(),
                    address: listener.settings.address.clone(),
                    pool: self.pools[listener.pool].settings.name.clone(),
                    accepted: listener.accepted,
                    closed: listener.closed,
                    tracked_clients: listener
                        .access_control
                        .as_ref()
                        .map_or(0, |access_control| access_control.len() as u64),
                    headers: listener.headers.snapshot(),
                })
                .collect(),
            pools: (0..self.pools.len())
                .filter(|&p| self.is_shown(p))
                .map(|p| self.pool_snapshot(p))
                .collect(),
        }
    }

    /// Whether a pool's clients are served.
    pub fn pool_state(&self, pool: PoolId) -> Option<PoolState> {
        let p = usize::from(pool.0);
        (p < self.pools.len()).then(|| self.state_of_pool(p))
    }

    fn state_of_pool(&self, p: usize) -> PoolState {
        let pool = &self.pools[p];
        match pool.worker_wait {
            _ if pool.retired => PoolState::Removed,
            WorkerWait::Refusing => PoolState::Refusing,
            WorkerWait::Since(_) => PoolState::NoWorker,
            WorkerWait::Off if pool.pressure => PoolState::BackPressure,
            WorkerWait::Off => PoolState::Ready,
        }
    }

    fn pool_snapshot(&self, p: usize) -> PoolSnapshot {
        let pool = &self.pools[p];
        let mut workers: Vec<WorkerSnapshot> =
            pool.candidates.workers().map(|w| worker_snapshot(&self.workers[w as usize])).collect();
        workers.sort_by_key(|worker| worker.id.serial);
        PoolSnapshot {
            name: pool.settings.name.clone(),
            policy: pool.settings.policy,
            state: self.state_of_pool(p),
            taken: pool.counts.taken,
            revoked: pool.counts.revoked,
            lost: pool.counts.lost,
            channel_full: pool.counts.channel_full,
            suspects: pool.counts.suspects,
            processes: self.process_snapshot(p),
            returned: pool.counts.returned,
            joined: pool.counts.joined,
            gone: pool.counts.gone,
            handoff: pool.handoff.clone(),
            queued: pool.held(),
            affinity: pool.affinity_snapshot(),
            workers,
        }
    }

    fn process_snapshot(&self, p: usize) -> Option<ProcessSnapshot> {
        let pool = &self.pools[p];
        let processes = &pool.processes;
        let totals = processes.totals();
        let some = processes.wanted() > 0 || processes.ids().next().is_some();
        (some || totals != ProcessTotals::default()).then(|| ProcessSnapshot {
            counts: self.processes(PoolId(p as u16)),
            totals,
            outdated: processes.outdated(),
            crash_loop: processes.is_crash_loop(),
            next_start_in: processes.next_start(pool.ticked).map(|at| at - pool.ticked),
            generation: processes.current(),
            roll: processes.last_roll().map(|roll| (roll, pool.ticked - roll.began)),
            remaining: processes.remaining(),
            leaving_generations: processes.leaving_generations(),
        })
    }

    /// The error of the sum over all connections: always 0. Computed from the separate counts of
    /// listeners, queues, workers and pools, and not from the [`Totals`].
    pub fn residual(&self) -> i64 {
        let arrived: u64 = self.listeners.iter().map(|listener| listener.accepted).sum();
        let closed: u64 = self.listeners.iter().flat_map(|listener| listener.closed).sum();
        let queued: u64 = self.pools.iter().map(Pool::held).sum();
        let taken: u64 = self.pools.iter().map(|pool| pool.counts.taken).sum();
        let returned: u64 = self.pools.iter().map(|pool| pool.counts.returned).sum();
        let in_flight: u64 = self.workers.iter().map(|worker| u64::from(worker.untaken())).sum();
        let retired_counts = &self.retired_counts;
        let placed =
            queued + in_flight + taken + retired_counts.taken + closed + retired_counts.closed;
        let steered: u64 = self.pools.iter().map(|pool| pool.counts.steered).sum();
        let arrived = arrived + retired_counts.accepted + steered + retired_counts.steered;
        let arrived = arrived + returned + retired_counts.returned;
        arrived.wrapping_sub(placed).cast_signed()
    }

    /// Sizes of the tables of pools, listeners and workers, including free entries.
    pub fn entries(&self) -> (usize, usize, usize) {
        (self.pools.len(), self.listeners.len(), self.workers.len())
    }

    /// Connections by place.
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// A worker's name; empty if its entry was reused. Valid until the event loop has seen its
    /// `Forget`.
    pub fn worker_name(&self, worker: WorkerId) -> &str {
        self.entry(worker).map_or("", |worker| &worker.name)
    }

    /// A worker's process.
    pub fn worker_pid(&self, worker: WorkerId) -> Option<i32> {
        self.entry(worker).map(|worker| worker.pid)
    }

    /// A worker's pool.
    pub fn pool_of_worker(&self, worker: WorkerId) -> Option<PoolId> {
        self.entry(worker).map(|worker| PoolId(worker.pool as u16))
    }

    /// A worker's state.
    pub fn worker_state(&self, worker: WorkerId) -> Option<State> {
        self.entry(worker).map(|worker| worker.state)
    }

    /// A worker's live connections, untaken ones included.
    pub fn load(&self, worker: WorkerId) -> Option<u64> {
        self.entry(worker).map(Worker::load)
    }

    /// Connections sent to a worker and not yet taken; 0 for one that is forgotten.
    pub fn untaken(&self, worker: WorkerId) -> u64 {
        self.entry(worker).map_or(0, |worker| u64::from(worker.untaken()))
    }

    /// Most live connections of a worker: the smaller of its pool's maximum and its own.
    pub fn max_connections_of(&self, worker: WorkerId) -> Option<u32> {
        self.entry(worker).map(|worker| worker.max)
    }

    /// The pool that serves a listener.
    pub fn pool_of_listener(&self, listener: ListenerId) -> Option<PoolId> {
        self.listeners.get(usize::from(listener.0)).map(|listener| listener.settings.pool)
    }

    /// A pool's settings.
    pub fn pool_settings(&self, pool: PoolId) -> Option<&PoolSettings> {
        self.pools.get(usize::from(pool.0)).map(|pool| &pool.settings)
    }

    /// A pool's name.
    pub fn pool_name(&self, pool: PoolId) -> &str {
        self.pools.get(usize::from(pool.0)).map_or("", |pool| &pool.settings.name)
    }

    /// A listener's addresses, separated by ", ": those that it was bound to, also after it was
    /// closed.
    pub fn listener_address(&self, listener: ListenerId) -> &str {
        self.listeners
            .get(usize::from(listener.0))
            .map_or("", |listener| &listener.settings.address)
    }

    /// A listener's name.
    pub fn listener_name(&self, listener: ListenerId) -> &str {
        self.listeners.get(usize::from(listener.0)).map_or("", |listener| &listener.settings.name)
    }

    /// Unlike `find`, also finds a forgotten worker until its entry is reused, because queued
    /// events may name it.
    fn entry(&self, id: WorkerId) -> Option<&Worker> {
        self.workers.get(id.index as usize).filter(|worker| worker.id == id)
    }
}

fn worker_snapshot(worker: &Worker) -> WorkerSnapshot {
    WorkerSnapshot {
        id: worker.id,
        name: worker.name.to_string(),
        pid: worker.pid,
        state: worker.state,
        weight: worker.weight,
        warm_percent: worker.warm_percent(),
        priority: worker.priority,
        max_connections: worker.max,
        paused: worker.paused,
        base: worker.base,
        load: worker.load(),
        sent: worker.sent,
        taken: worker.taken,
        finished: worker.finished,
        in_flight: u64::from(worker.untaken()),
        revoked: worker.revoked,
        channel_full: worker.channel_full,
        proven: worker.trust.proven,
        longest_take: worker.trust.peak,
        idle_threads: worker.threads.map(|threads| threads.idle),
        ended_at_deadline: worker.ended,
        line: worker.line.as_ref().map(|line| line.snapshot()),
        steered: worker.steered.as_ref().map(|steered| steered.snapshot()),
    }
}
