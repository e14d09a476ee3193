//! What the core tells: the status, and names and numbers for logs and metrics.

use std::collections::BTreeMap;

use crate::status::{ListenerStatus, PoolStatus, Status, WorkerStatus};

use super::types::*;
use super::worker::Worker;
use super::{Clock, Core};

/// Connections by where they are. `accepted = held + custody + taken + Σ closed`, always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Accepted since the start.
    pub accepted: u64,
    /// Waiting for a worker now.
    pub held: u64,
    /// Sent and not yet taken now.
    pub custody: u64,
    /// Taken by workers since the start.
    pub taken: u64,
    /// Closed by the dispatcher since the start, in the order of [`CloseReason::ALL`].
    pub closed: [u64; CloseReason::ALL.len()],
}

/// What happened in a pool since the start, workers that have left included.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    pub(super) taken: u64,
    pub(super) revoked: u64,
    pub(super) lost: u64,
    pub(super) channel_full: u64,
    pub(super) suspects: u64,
    pub(super) joined: u64,
    pub(super) gone: u64,
}

/// What was counted by listeners and pools whose entries are used for others now.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Former {
    pub(super) accepted: u64,
    pub(super) closed: u64,
    pub(super) taken: u64,
}

impl Totals {
    /// Whether every connection is in exactly one place.
    pub fn is_conserved(&self) -> bool {
        self.accepted == self.held + self.custody + self.taken + self.closed.iter().sum::<u64>()
    }
}

impl Core {
    /// Everything the core knows, for the status. The shell adds what only it knows: version, process, uptime,
    /// log, listeners' states and the addresses they are bound to.
    pub fn status(&self) -> Status {
        let totals = &self.totals;
        Status {
            stopping: self.stop.is_some(),
            accepted: totals.accepted,
            held: totals.held,
            ended_at_deadline: self.ended,
            custody: totals.custody,
            taken: totals.taken,
            closed: by_reason(&totals.closed),
            listeners: self
                .listeners
                .iter()
                .filter(|listener| !listener.retired)
                .map(|listener| ListenerStatus {
                    name: listener.settings.name.clone(),
                    address: listener.settings.address.clone(),
                    pool: self.pools[listener.pool].settings.name.clone(),
                    state: String::new(),
                    accepted: listener.accepted,
                    closed: by_reason(&listener.closed),
                    tracked_clients: listener
                        .screen
                        .as_ref()
                        .map_or(0, |screen| screen.len() as u64),
                })
                .collect(),
            pools: (0..self.pools.len())
                .filter(|&p| self.is_shown(p))
                .map(|p| self.pool_status(p))
                .collect(),
            ..Status::default()
        }
    }

    /// `ready`, `back-pressure`, `no-worker`, `refusing`, or `removed`.
    pub fn pool_state(&self, pool: PoolId) -> Option<&'static str> {
        let p = usize::from(pool.0);
        (p < self.pools.len()).then(|| self.state_of_pool(p))
    }

    fn state_of_pool(&self, p: usize) -> &'static str {
        let pool = &self.pools[p];
        match pool.clock {
            _ if pool.retired => "removed",
            Clock::Refusing => "refusing",
            Clock::Since(_) => "no-worker",
            Clock::Off if pool.pressure => "back-pressure",
            Clock::Off => "ready",
        }
    }

    fn pool_status(&self, p: usize) -> PoolStatus {
        let pool = &self.pools[p];
        let state = self.state_of_pool(p);
        let mut workers: Vec<WorkerStatus> =
            pool.candidates.workers().map(|w| worker_status(&self.workers[w as usize])).collect();
        workers.sort_by_key(|worker| worker.id);
        PoolStatus {
            name: pool.settings.name.clone(),
            policy: pool.settings.policy.name().to_owned(),
            state: state.to_owned(),
            taken: pool.counts.taken,
            revoked: pool.counts.revoked,
            lost: pool.counts.lost,
            channel_full: pool.counts.channel_full,
            suspects: pool.counts.suspects,
            process_restarts: pool.processes.restarts(),
            joined: pool.counts.joined,
            gone: pool.counts.gone,
            handoff: pool.handoff.status(),
            held: pool.held.len() + pool.awaiting.len(),
            affinity: pool.affinity_status(),
            workers,
        }
    }

    /// What is wrong with the sum of all connections: 0, always. Recounted from what listeners, queues, workers and pools
    /// count, each for itself, and not from the [`Totals`].
    pub fn residual(&self) -> i64 {
        let arrived: u64 = self.listeners.iter().map(|listener| listener.accepted).sum();
        let closed: u64 = self.listeners.iter().flat_map(|listener| listener.closed).sum();
        let held: u64 = self.pools.iter().map(|pool| pool.held.len() + pool.awaiting.len()).sum();
        let taken: u64 = self.pools.iter().map(|pool| pool.counts.taken).sum();
        let custody: u64 = self.workers.iter().map(|worker| u64::from(worker.untaken())).sum();
        let former = &self.former;
        let placed = held + custody + taken + former.taken + closed + former.closed;
        (arrived + former.accepted).wrapping_sub(placed).cast_signed()
    }

    /// How many connections are where.
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// The name a worker gave itself; empty for one that is forgotten. Valid until the shell has seen its Forget.
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

    /// Most connections a worker is given: the smaller of its pool's maximum and its own.
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

    /// A listener's name.
    pub fn listener_name(&self, listener: ListenerId) -> &str {
        self.listeners.get(usize::from(listener.0)).map_or("", |listener| &listener.settings.name)
    }

    /// Unlike `find`, answers for a forgotten worker too while its entry is not used again: events that name it may be queued.
    fn entry(&self, id: WorkerId) -> Option<&Worker> {
        self.workers.get(id.index as usize).filter(|worker| worker.id == id)
    }
}

fn by_reason(counts: &[u64; CloseReason::ALL.len()]) -> BTreeMap<String, u64> {
    CloseReason::ALL
        .iter()
        .zip(counts)
        .map(|(reason, &count)| (reason.name().to_owned(), count))
        .collect()
}

fn worker_status(worker: &Worker) -> WorkerStatus {
    WorkerStatus {
        id: worker.id.serial,
        name: worker.name.to_string(),
        pid: worker.pid,
        state: worker.state.name().to_owned(),
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
        custody: u64::from(worker.untaken()),
        revoked: worker.revoked,
        channel_full: worker.channel_full,
        proven: worker.trust.proven,
        longest_take_ms: u64::try_from(worker.trust.peak.as_millis()).unwrap_or(u64::MAX),
        idle_threads: worker.threads.map(|threads| threads.idle),
        ended_at_deadline: worker.ended,
        // What the shell reads, and how old it is, it adds itself.
        ..WorkerStatus::default()
    }
}
