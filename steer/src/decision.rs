//! The choice as a pure function: what the program in the kernel decides for one SYN.
//!
//! The program in `bpf/steer.bpf.c` and this module have the same rules; a property test lets both
//! decide on the same state. Change them together.
//!
//! A worker is usable if it has a weight and a listener for the client's family, and is not
//! draining. Among usable workers below their maximum, trusted ones come before suspect ones; then
//! the fewest connections for the weight win; ties go to the first one after the last choice.

use crate::layout::{DRAWS, SCAN_WORKERS, Totals, WorkerCounts, WorkerSettings};

/// The state that a decision depends on. `settings` and `counts` have an entry for each worker.
#[derive(Clone, Copy, Debug)]
pub struct Pool<'a> {
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
}

impl Pool<'_> {
    /// The choice for one SYN.
    pub fn choose(&self) -> Choice {
        let workers = self.settings.len().min(self.counts.len()) as u32;
        let mut search = Search::default();
        if workers > SCAN_WORKERS {
            for draw in 0..DRAWS {
                let random = mix(self.totals.turn, draw);
                self.consider(&mut search, random % workers);
                if search.drawn >= 2 {
                    break;
                }
            }
        }
        if search.drawn == 0 {
            search.best = None;
            let next = self.totals.last.wrapping_add(1);
            let start = if next < workers { next } else { 0 };
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

    fn consider(&self, search: &mut Search, worker: u32) {
        let (settings, counts) = (self.settings[worker as usize], self.counts[worker as usize]);
        if !is_usable(&settings, &counts, self.is_v6) {
            return;
        }
        let load = counts.load(self.second);
        if settings.maximum != 0 && load >= u64::from(settings.maximum) {
            search.full = true;
            return;
        }
        let suspect = settings.suspect != 0;
        search.drawn += u32::from(!suspect);
        let found = Best { worker, suspect, cost: load + 1, weight: settings.effective_weight() };
        // Fractions are compared by cross-multiplication: exact, and within 64 bits.
        let before = |best: Best| {
            (suspect, found.cost * best.weight) < (best.suspect, best.cost * found.weight)
        };
        if search.best.is_none_or(before) {
            search.best = Some(found);
        }
    }
}

fn is_usable(settings: &WorkerSettings, counts: &WorkerCounts, is_v6: bool) -> bool {
    if settings.weight == 0 || settings.draining != 0 || counts.lost_at == counts.listens {
        return false;
    }
    if is_v6 { counts.listeners[1] > 0 } else { counts.serves_v4() }
}

/// A random number for a draw of a decision (SplitMix64).
fn mix(turn: u64, draw: u32) -> u32 {
    let n = turn.wrapping_mul(DRAWS.into()).wrapping_add(u64::from(draw) + 1);
    let mut z = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
    (z >> 32) as u32
}

#[cfg(test)]
mod tests;
