//! What each pool of this dispatcher can offer to clients: sums over the workers that its policy
//! would give the next connections.

use std::sync::Arc;

use super::{AgentAnswer, ServerState};
use crate::place::WorkerWait;
use crate::policy::FULL_WEIGHT;
use crate::types::{PoolId, Scored, State, Time, WorkerId};
use crate::worker::Worker;
use crate::{Core, Pool};

/// A pool as one server.
#[derive(Clone, Debug, PartialEq)]
pub struct PoolLoad {
    /// The pool.
    pub pool: PoolId,
    /// Its name.
    pub name: String,
    /// Whether it can be given connections.
    pub state: ServerState,
    /// What HAProxy's agent check is answered.
    pub answer: AgentAnswer,
    /// Live connections of the workers below.
    pub load: u64,
    /// The sum of their maximums.
    pub capacity: u64,
    /// The sum of their weights, which are smaller during a slow start.
    pub weight: f64,
    /// The workers that the policy would choose among, each with its weight. With `failover` those
    /// of the highest priority that is up; with `least-score` those whose gauges are fresh.
    pub workers: Vec<(WorkerId, f64)>,
    /// The workers that have an address of their own, in any state.
    pub advertised: Vec<AdvertisedWorker>,
}

/// A worker that clients can also reach at an address of its own.
#[derive(Clone, Debug, PartialEq)]
pub struct AdvertisedWorker {
    /// The worker.
    pub worker: WorkerId,
    /// The address, as the worker gave it.
    pub address: Arc<str>,
    /// Whether it can be given connections.
    pub state: ServerState,
    /// Its live connections.
    pub load: u64,
    /// Its maximum.
    pub capacity: u64,
    /// Its weight, which is smaller during a slow start.
    pub weight: f64,
}

impl Core {
    /// Every pool that was not removed, and removed ones that still have connections.
    pub fn pool_loads(&self, now: Time) -> Vec<PoolLoad> {
        let pools = (0..self.pools.len()).filter(|&p| self.is_shown(p));
        pools.map(|p| self.pool_load(now, p)).collect()
    }

    /// The workers that the policy of a pool would choose among: active ones, and without any the
    /// suspect ones (`false`). Full ones are included.
    pub(super) fn offered(&self, now: Time, p: usize) -> (Vec<&Worker>, bool) {
        let pool = &self.pools[p];
        let of = |state: State| {
            self.members(pool).filter(move |worker| {
                worker.state == state && !pool.candidates.stands_by(worker.at)
            })
        };
        let mut chosen: Vec<&Worker> = of(State::Active).collect();
        let any_active = !chosen.is_empty();
        if !any_active {
            chosen = of(State::Suspect).collect();
        }
        let fresh = |worker: &&Worker| {
            let candidates = &pool.candidates;
            let scored = candidates.score(worker.at, worker.load(), worker.effective_weight(), now);
            matches!(scored, None | Some(Scored::Score(_)))
        };
        // If no worker is fresh, the policy chooses by load.
        if chosen.iter().any(fresh) {
            chosen.retain(fresh);
        }
        (chosen, any_active)
    }

    /// The workers of a pool that have joined and not left.
    pub(super) fn members<'a>(&'a self, pool: &'a Pool) -> impl Iterator<Item = &'a Worker> + 'a {
        pool.candidates.workers().map(|w| &self.workers[w as usize])
    }

    fn pool_load(&self, now: Time, p: usize) -> PoolLoad {
        let pool = &self.pools[p];
        let (chosen, any_active) = self.offered(now, p);
        let leaves = pool.retired || self.stop.is_some() || self.host_drain.is_some();
        let weight =
            |worker: &Worker| f64::from(worker.effective_weight()) / f64::from(FULL_WEIGHT);
        let advertised = |worker: &Worker| {
            Some(AdvertisedWorker {
                worker: worker.id,
                address: Arc::clone(worker.advertise.as_ref()?),
                state: if leaves || worker.state == State::Draining {
                    ServerState::Draining
                } else if worker.state == State::Active && has_room(pool, worker) {
                    ServerState::Ok
                } else {
                    ServerState::Full
                },
                load: worker.load(),
                capacity: u64::from(worker.max),
                weight: weight(worker),
            })
        };
        let draining = || {
            self.members(pool).any(|worker| {
                worker.state == State::Draining && !pool.candidates.stands_by(worker.at)
            })
        };
        PoolLoad {
            pool: PoolId(p as u16),
            name: pool.settings.name.clone(),
            state: if leaves {
                ServerState::Draining
            } else if pool.worker_wait == WorkerWait::Refusing {
                ServerState::Refusing
            } else if chosen.is_empty() {
                if draining() { ServerState::Draining } else { ServerState::Unserved }
            } else if !any_active || !chosen.iter().any(|worker| has_room(pool, worker)) {
                ServerState::Full
            } else {
                ServerState::Ok
            },
            answer: self.answer_of(now, p),
            load: chosen.iter().map(|worker| worker.load()).sum(),
            capacity: chosen.iter().map(|worker| u64::from(worker.max)).sum(),
            weight: chosen.iter().map(|worker| weight(worker)).sum(),
            advertised: self.members(pool).filter_map(advertised).collect(),
            workers: chosen.iter().map(|worker| (worker.id, weight(worker))).collect(),
        }
    }
}

fn has_room(pool: &Pool, worker: &Worker) -> bool {
    pool.candidates.is_open(worker.at)
}
