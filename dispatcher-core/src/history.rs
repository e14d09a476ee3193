//! A pool's last decisions, and the explanation of its next one: candidates, their loads, and the
//! reason of the choice.
//!
//! Owns the ring of decisions and their contents; it influences no decision. With a size of 0 it
//! costs nothing; otherwise entries are reused, so that recording does not allocate once warm.

use std::collections::VecDeque;
use std::sync::Arc;

use dispatch_protocol::ClientAddr;

use super::policy::{Choice, FULL_WEIGHT};
use super::types::*;
use super::{Core, WorkerWait};

/// A placement decision.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// Number of the decision in its pool, from 1.
    pub number: u64,
    /// When.
    pub at: Time,
    /// The connection; `None` in an explanation.
    pub conn: Option<u64>,
    /// Its listener; `None` in an explanation.
    pub listener: Option<ListenerId>,
    /// The client's address.
    pub peer: ClientAddr,
    /// The client's key, if any.
    pub key: Option<AffinityKey>,
    /// Whether the connection was sent to another worker before.
    pub resent: bool,
    /// The id of the chosen worker, if any.
    pub chosen: Option<u64>,
    /// Workers that were considered, the chosen one first.
    pub candidates: Vec<CandidateSnapshot>,
    /// How many more workers were considered.
    pub left_out: usize,
}

/// A worker in a decision, before it got the connection.
#[derive(Clone, Debug, PartialEq)]
pub struct CandidateSnapshot {
    /// Its id.
    pub worker: u64,
    /// Its name.
    pub name: Arc<str>,
    /// Live connections, untaken ones included.
    pub load: u64,
    /// Its effective weight: less than the configured one during a slow start.
    pub weight: f64,
    /// The number that the policy compared, if it compares numbers.
    pub score: Option<f64>,
    /// Why it was chosen or passed over.
    pub why: Why,
    /// With the policy `least-score`: the gauge that made it ineligible; its `Display` is a
    /// sentence.
    pub out: Option<Scored>,
}

/// Where the next connection would go.
#[derive(Clone, Debug, PartialEq)]
pub struct Explanation {
    /// The decision, with every worker.
    pub decision: Decision,
    /// Why no worker was chosen, or why the connection would not be sent now.
    pub obstacle: Option<Obstacle>,
}

/// Why a connection would not be sent now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// Every worker is full, suspect or paused.
    BackPressure,
    /// There is no usable worker.
    NoWorker,
    /// There has been none for `wait_for_worker`: clients are refused.
    Refusing,
    /// Other connections are queued and come first.
    Queue,
    /// This machine is short of descriptors or memory.
    Short,
    /// The dispatcher is stopping.
    Stopping,
}

impl Obstacle {
    /// The name in answers.
    pub fn name(self) -> &'static str {
        match self {
            Obstacle::BackPressure => "back-pressure",
            Obstacle::NoWorker => "no-worker",
            Obstacle::Refusing => "refusing",
            Obstacle::Queue => "queue",
            Obstacle::Short => "short-of-resources",
            Obstacle::Stopping => "stopping",
        }
    }
}

/// The last decisions of a pool.
#[derive(Debug, Default)]
pub(super) struct History {
    size: usize,
    most_candidates: usize,
    decisions: VecDeque<Arc<Decision>>,
    count: u64,
}

impl History {
    pub(super) fn new(size: u32, most_candidates: u32) -> History {
        History {
            size: size as usize,
            most_candidates: most_candidates as usize,
            ..History::default()
        }
    }

    /// Changes the size and keeps the latest decisions; returns the others.
    pub(super) fn resize(&mut self, size: u32, most_candidates: u32) -> VecDeque<Arc<Decision>> {
        self.size = size as usize;
        self.most_candidates = most_candidates as usize;
        let surplus = self.decisions.len().saturating_sub(self.size);
        let kept = self.decisions.split_off(surplus);
        std::mem::replace(&mut self.decisions, kept)
    }

    pub(super) fn is_on(&self) -> bool {
        self.size > 0
    }

    /// The entry for the next decision: the oldest one is reused, unless a reader holds it.
    fn place(&mut self) -> Arc<Decision> {
        if self.decisions.len() >= self.size
            && let Some(mut oldest) = self.decisions.pop_front()
            && Arc::get_mut(&mut oldest).is_some()
        {
            return oldest;
        }
        Arc::new(Decision::empty())
    }
}

impl Decision {
    fn empty() -> Decision {
        Decision {
            number: 0,
            at: Time::default(),
            conn: None,
            listener: None,
            peer: ClientAddr::Unix,
            key: None,
            resent: false,
            chosen: None,
            candidates: Vec::new(),
            left_out: 0,
        }
    }
}

impl Core {
    /// The decisions of a pool that come after number `after`, oldest first.
    pub fn history(&self, pool: PoolId, after: u64) -> Vec<Arc<Decision>> {
        let Some(pool) = self.pools.get(usize::from(pool.0)) else { return Vec::new() };
        let decisions = &pool.history.decisions;
        let start = decisions.partition_point(|decision| decision.number <= after);
        decisions.range(start..).cloned().collect()
    }

    /// The worker that the pool's next connection from `peer` would go to, and why. Changes no
    /// state.
    pub fn explain(&self, now: Time, pool: PoolId, peer: ClientAddr) -> Option<Explanation> {
        let p = usize::from(pool.0);
        let settings = &self.pools.get(p)?.settings;
        let identity = settings.affinity.as_ref().and_then(|affinity| affinity.key.of_peer(&peer));
        let key = identity.map(|identity| identity.key).or_else(|| settings.policy.key_of(&peer));
        let mut decision = Decision { at: now, peer, key, ..Decision::empty() };
        let choice = self.pick(now, p, key, identity).map(|(choice, _)| choice);
        self.describe(p, choice.as_ref(), usize::MAX, &mut decision);
        let pool = &self.pools[p];
        let obstacle = if self.stop.is_some() {
            Some(Obstacle::Stopping)
        } else if self.out_of_resources.is_some() {
            Some(Obstacle::Short)
        } else if choice.is_some() {
            (!pool.queued.is_empty()).then_some(Obstacle::Queue)
        } else {
            Some(match pool.worker_wait {
                WorkerWait::Refusing => Obstacle::Refusing,
                WorkerWait::Since(_) => Obstacle::NoWorker,
                WorkerWait::Off => Obstacle::BackPressure,
            })
        };
        Some(Explanation { decision, obstacle })
    }

    /// Records a decision that is about to take effect.
    pub(super) fn record(&mut self, now: Time, p: usize, conn: u32, choice: &Choice) {
        let history = &mut self.pools[p].history;
        let most = history.most_candidates;
        history.count += 1;
        let number = history.count;
        let mut place = history.place();
        if let Some(decision) = Arc::get_mut(&mut place) {
            let entry = self.ledger.get(conn);
            decision.number = number;
            decision.at = now;
            decision.conn = Some(entry.serial);
            decision.listener = Some(entry.listener);
            decision.peer = entry.peer;
            decision.key = entry.key;
            decision.resent = entry.resent;
            self.describe(p, Some(choice), most, decision);
        }
        self.pools[p].history.decisions.push_back(place);
    }

    /// Fills in the workers: the chosen one first, at most `most` in all.
    fn describe(&self, p: usize, choice: Option<&Choice>, most: usize, decision: &mut Decision) {
        let candidates = &self.pools[p].candidates;
        let chosen = choice.map(|choice| choice.at);
        let others = (0..candidates.len()).filter(|&at| Some(at) != chosen);
        decision.candidates.clear();
        for at in chosen.into_iter().chain(others).take(most) {
            let worker = &self.workers[candidates.get(at).worker as usize];
            let (score, why, out) = match (self.why_not(p, at), choice) {
                (None, Some(choice)) => {
                    let verdict = candidates.verdict(at, choice, decision.key);
                    (verdict.score, verdict.why, verdict.out)
                }
                (why, _) => (None, why.unwrap_or(Why::Tie), None),
            };
            decision.candidates.push(CandidateSnapshot {
                worker: worker.id.serial,
                name: Arc::clone(&worker.name),
                load: worker.load(),
                weight: f64::from(worker.effective_weight()) / f64::from(FULL_WEIGHT),
                score,
                why,
                out,
            });
        }
        decision.left_out = candidates.len() - decision.candidates.len();
        decision.chosen =
            chosen.map(|at| self.workers[candidates.get(at).worker as usize].id.serial);
    }
}

impl Core {
    /// Why the policy may not choose a worker; `None` if it may.
    fn why_not(&self, p: usize, at: usize) -> Option<Why> {
        let pool = &self.pools[p];
        let worker = &self.workers[pool.candidates.get(at).worker as usize];
        if let State::Draining | State::Gone = worker.state {
            return Some(Why::Draining);
        }
        if pool.candidates.is_available(at) {
            return None;
        }
        Some(if pool.candidates.stands_by(at) {
            Why::StandsBy
        } else if worker.starved.is_some() {
            Why::LostOne
        } else if worker.blocked.is_some() || worker.purging {
            Why::ChannelFull
        } else if worker.paused || worker.load() >= u64::from(worker.max) {
            Why::Full
        } else if worker.state == State::Suspect {
            Why::Suspect
        } else if !worker.ring.has_room() {
            Why::NoSlot
        } else if worker.trust.proven {
            Why::Busy
        } else {
            Why::Unproven
        })
    }
}
