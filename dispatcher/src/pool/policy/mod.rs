//! Choosing a worker: what a policy sees, and which policy a pool has.
//!
//! Owns the compact table that decisions are made from. A policy is a pure function of that table; it knows nothing of
//! workers' states, tickets or time: whoever is not to be chosen simply costs too much.

pub(super) mod least_connections;

use self::least_connections::Tournament;
use super::random::Random;
use super::types::{AffinityKey, Policy, Time};

/// The end of time: a timer that is not running.
pub(super) const NEVER: Time = Time(u64::MAX);

/// The cost of a worker that must not be chosen: more than that of any eligible one (at most 2³²), and small enough
/// that its product with a weight fits in 64 bits.
pub(super) const UNAVAILABLE: u64 = 1 << 40;

/// One worker as a policy sees it. 16 bytes, so that 1,000 stay in the first-level cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Candidate {
    /// Its load after one more connection, or [`UNAVAILABLE`].
    pub(super) cost: u64,
    /// Its weight, or 1 if unavailable.
    pub(super) weight: u32,
    /// Position in the core's workers.
    pub(super) worker: u32,
}

/// The workers of a pool that have not left, and beside each its next timer.
#[derive(Debug)]
pub(super) struct Candidates {
    list: Vec<Candidate>,
    /// Over `list`, always up to date.
    tournament: Tournament,
    /// Runs parallel to `list`, apart from it because ticks scan only this.
    due: Vec<Time>,
    /// Where the next decision starts, so that ties rotate.
    start: usize,
    eligible: usize,
    random: Random,
}

impl Candidates {
    /// Nobody yet; `seed` is where choices by lot come from.
    pub(super) fn new(seed: u64) -> Candidates {
        Candidates {
            list: Vec::new(),
            tournament: Tournament::default(),
            due: Vec::new(),
            start: 0,
            eligible: 0,
            random: Random::new(seed),
        }
    }

    pub(super) fn set_seed(&mut self, seed: u64) {
        self.random = Random::new(seed);
    }

    /// Adds a worker, not eligible yet; answers its position.
    pub(super) fn add(&mut self, worker: u32) -> usize {
        self.list.push(Candidate { cost: UNAVAILABLE, weight: 1, worker });
        self.due.push(NEVER);
        self.tournament.rebuild(&self.list);
        self.list.len() - 1
    }

    /// Removes the worker at `at`; the worker whose position becomes `at`, if there is one, is answered.
    pub(super) fn remove(&mut self, at: usize) -> Option<u32> {
        self.eligible -= usize::from(self.list[at].cost != UNAVAILABLE);
        self.list.swap_remove(at);
        self.due.swap_remove(at);
        self.tournament.rebuild(&self.list);
        self.list.get(at).map(|moved| moved.worker)
    }

    /// Updates the worker at `at`: `load` and `weight` if it is eligible, and its next timer.
    pub(super) fn set(&mut self, at: usize, available: Option<(u64, u32)>, due: Time) {
        self.due[at] = due;
        let candidate = &mut self.list[at];
        let (cost, weight) = match available {
            Some((load, weight)) => (load + 1, weight),
            None => (UNAVAILABLE, 1),
        };
        if (cost, weight) == (candidate.cost, candidate.weight) {
            return;
        }
        self.eligible -= usize::from(candidate.cost != UNAVAILABLE);
        self.eligible += usize::from(available.is_some());
        (candidate.cost, candidate.weight) = (cost, weight);
        self.tournament.update(&self.list, at);
    }

    /// The worker for the next connection, of a client known by `key`.
    #[inline]
    pub(super) fn choose(&mut self, policy: Policy, _key: Option<AffinityKey>) -> Option<u32> {
        if self.eligible == 0 {
            return None;
        }
        let at = match policy {
            // Each has a file of its own, but for those that have not been written.
            _ => self.tournament.choose(&self.list, self.start)?,
        };
        self.start = at + 1;
        Some(self.list[at].worker)
    }

    pub(super) fn eligible(&self) -> usize {
        self.eligible
    }

    pub(super) fn len(&self) -> usize {
        self.list.len()
    }

    pub(super) fn get(&self, at: usize) -> Candidate {
        self.list[at]
    }

    pub(super) fn due(&self, at: usize) -> Time {
        self.due[at]
    }

    /// The earliest timer of all.
    pub(super) fn earliest(&self) -> Time {
        self.due.iter().copied().min().unwrap_or(NEVER)
    }

    pub(super) fn workers(&self) -> impl Iterator<Item = u32> + '_ {
        self.list.iter().map(|candidate| candidate.worker)
    }
}
