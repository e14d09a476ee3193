//! The choice as a pure function: what the program in the kernel decides for one SYN.
//!
//! The program in `bpf/choose.h` and this module have the same rules; a property test lets both
//! decide on the same state. Change them together.
//!
//! A worker is usable if it has a weight and a listener for the client's family, and is not
//! draining. Every policy chooses among usable workers below their maximum, trusted ones before
//! suspect ones. Where workers are compared, ties go to the first one after the last choice.

mod hash;

use self::hash::{distance, mixed};
use crate::layout::{DRAWS, SCAN_WORKERS, TURN, TURN_FAR, Totals, WorkerCounts, WorkerSettings};
use crate::policy::Policy;

/// The state that a decision depends on. `settings` and `counts` have an entry for each worker.
#[derive(Clone, Copy, Debug)]
pub struct Pool<'a> {
    /// How workers are compared.
    pub policy: Policy,
    /// The random number that draws depend on, with the number of the decision.
    pub seed: u64,
    /// What the loader decides, by worker.
    pub settings: &'a [WorkerSettings],
    /// What the programs count, by worker.
    pub counts: &'a [WorkerCounts],
    /// The state before the decision.
    pub totals: Totals,
    /// The second of CLOCK_MONOTONIC.
    pub second: u32,
    /// Whether the client has an IPv6 address.
    pub is_v6: bool,
    /// With hash: the key of the client's address, [`crate::policy::key_of`].
    pub key: u64,
}

/// What happens with a SYN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// It goes to this worker.
    Worker(u32),
    /// All usable workers are at their maximum: it is dropped, and the client tries again.
    Full,
    /// No worker is usable: it is dropped for a while, then reset.
    NoWorker,
}

#[derive(Clone, Copy)]
struct Best {
    worker: u32,
    suspect: bool,
    cost: u64,
    weight: u64,
}

#[derive(Default)]
struct Search {
    best: Option<Best>,
    full: bool,
    drawn: u32,
    /// With failover: workers of a lower priority stand by.
    top: u16,
}

impl Pool<'_> {
    /// The choice for one SYN.
    pub fn choose(&self) -> Choice {
        let workers = self.settings.len().min(self.counts.len()) as u32;
        let mut search = Search::default();
        let mut sure = false;
        match self.policy {
            Policy::LeastConnections if workers > SCAN_WORKERS => {
                for draw in 0..DRAWS {
                    self.consider(&mut search, (self.random(draw) >> 32) as u32 % workers);
                    if search.drawn >= 2 {
                        break;
                    }
                }
                sure = search.drawn > 0;
            }
            Policy::Random | Policy::TwoChoices => {
                self.sample(&mut search, workers);
                sure = search.best.is_some();
            }
            Policy::Failover => search.top = self.top(workers),
            Policy::LeastConnections | Policy::RoundRobin | Policy::Hash => {}
        }
        if !sure {
            search.best = None;
            let next = self.totals.last.wrapping_add(1);
            let rotates = self.policy != Policy::Hash && next < workers;
            let start = if rotates { next } else { 0 };
            for worker in (start..workers).chain(0..start) {
                self.consider(&mut search, worker);
            }
        }
        match search.best {
            Some(best) => Choice::Worker(best.worker),
            None if search.full => Choice::Full,
            None => Choice::NoWorker,
        }
    }

    /// Notes the worker if it is the best so far.
    fn consider(&self, search: &mut Search, worker: u32) {
        let settings = &self.settings[worker as usize];
        if !self.is_usable(worker) || settings.priority < search.top {
            return;
        }
        if !self.has_room(worker) {
            search.full = true;
            return;
        }
        let suspect = settings.suspect != 0;
        search.drawn += u32::from(!suspect);
        let (cost, weight) = self.cost(worker);
        let found = Best { worker, suspect, cost, weight };
        // Fractions are compared by cross-multiplication: exact, and within 64 bits.
        let before = |best: Best| {
            (suspect, found.cost * best.weight) < (best.suspect, best.cost * found.weight)
        };
        if search.best.is_none_or(before) {
            search.best = Some(found);
        }
    }

    /// What the policy compares: a cost, and the weight by which it is divided.
    fn cost(&self, worker: u32) -> (u64, u64) {
        let settings = &self.settings[worker as usize];
        let weight = settings.effective_weight();
        match self.policy {
            Policy::RoundRobin => (self.ahead(worker), 1),
            Policy::Hash => {
                let node = if settings.node == 0 { u64::from(worker) + 1 } else { settings.node };
                (distance(mixed(self.key ^ node)), weight)
            }
            Policy::LeastConnections | Policy::Random | Policy::TwoChoices | Policy::Failover => {
                (self.load(worker) + 1, weight)
            }
        }
    }

    /// Virtual time until the worker's next turn: a worker's turns are `1 / weight` apart. A worker
    /// does not catch up on turns that it missed. Sums wrap, so a distance that is too long is a
    /// time in the past.
    fn ahead(&self, worker: u32) -> u64 {
        let weight = self.settings[worker as usize].effective_weight();
        let next = self.counts[worker as usize].last_turn.wrapping_add(TURN / weight);
        let ahead = next.wrapping_sub(self.totals.clock);
        if ahead < TURN_FAR { ahead } else { 0 }
    }

    /// With round-robin: the virtual time of the worker's next turn.
    pub fn turn(&self, worker: u32) -> u64 {
        self.totals.clock.wrapping_add(self.ahead(worker))
    }

    /// With failover: the highest priority of the workers that are up: usable and trusted, even if
    /// full. If none is up, no worker stands by.
    fn top(&self, workers: u32) -> u16 {
        let up = (0..workers).filter(|&worker| {
            self.is_usable(worker) && self.settings[worker as usize].suspect == 0
        });
        up.map(|worker| self.settings[worker as usize].priority).max().unwrap_or(0)
    }

    /// Draws a worker in proportion to weights; with two choices another one, too, of which the
    /// less loaded is taken.
    fn sample(&self, search: &mut Search, workers: u32) {
        let usable = (0..workers).filter(|&worker| self.is_usable(worker));
        let (with_room, full): (Vec<u32>, Vec<u32>) =
            usable.partition(|&worker| self.has_room(worker));
        search.full = !full.is_empty();
        let (suspect, trusted): (Vec<u32>, Vec<u32>) =
            with_room.into_iter().partition(|&worker| self.settings[worker as usize].suspect != 0);
        let mut from = if trusted.is_empty() { suspect } else { trusted };
        let Some(first) = self.draw(&from, 0) else { return };
        self.consider(search, first);
        from.retain(|&worker| worker != first);
        if self.policy == Policy::TwoChoices
            && let Some(second) = self.draw(&from, 1)
        {
            self.consider(search, second);
        }
    }

    /// A worker of these, in proportion to weights.
    fn draw(&self, from: &[u32], draw: u32) -> Option<u32> {
        let weight = |worker: u32| self.settings[worker as usize].effective_weight();
        let all: u64 = from.iter().map(|&worker| weight(worker)).sum();
        let mut rest = self.random(draw).checked_rem(all)?;
        from.iter().copied().find(|&worker| {
            let found = rest < weight(worker);
            rest = rest.saturating_sub(weight(worker));
            found
        })
    }

    fn load(&self, worker: u32) -> u64 {
        self.counts[worker as usize].load(self.second)
    }

    fn has_room(&self, worker: u32) -> bool {
        let maximum = self.settings[worker as usize].maximum;
        maximum == 0 || self.load(worker) < u64::from(maximum)
    }

    fn is_usable(&self, worker: u32) -> bool {
        let settings = &self.settings[worker as usize];
        let counts = &self.counts[worker as usize];
        if settings.weight == 0 || settings.draining != 0 || counts.lost_at == counts.listens {
            return false;
        }
        if self.is_v6 { counts.listeners[1] > 0 } else { counts.serves_v4() }
    }

    /// A random number for a draw of this decision (SplitMix64).
    fn random(&self, draw: u32) -> u64 {
        let n = self.totals.turn.wrapping_mul(DRAWS.into()).wrapping_add(u64::from(draw) + 1);
        mixed(self.seed.wrapping_add(n.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
    }
}

#[cfg(test)]
mod tests;
