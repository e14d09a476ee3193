//! Each in turn, as often as its weight says.
//!
//! Owns when each worker's next turn is, on a clock of its own that only decisions move: a worker's turns are `1 / weight`
//! apart, and the earliest turn of all is next. So in as many decisions as all weights together each worker has as many
//! turns as its weight, spread out. All begin at the same moment, so a random one is first.

use super::tournament::{Rank, Tournament};
use super::{Candidate, UNAVAILABLE};

/// The time between two turns of a worker with weight 1 (of the table's, which is a 256th of a configured 1).
const UNIT: u64 = 1 << 40;

/// Once the clock is here, it starts again. Turns are at most [`UNIT`] ahead of it.
const LATE: u64 = 1 << 62;

/// A worker's next turn.
#[derive(Clone, Copy, Debug)]
struct Turn {
    at: u64,
    /// The last one that was known: the table has none for a worker that is not available.
    weight: u32,
    available: bool,
}

impl Rank for Turn {
    fn is_before(self, other: Turn) -> bool {
        self.available && (!other.available || self.at < other.at)
    }

    fn is_available(self) -> bool {
        self.available
    }
}

#[derive(Debug)]
pub(super) struct RoundRobin {
    /// Runs parallel to the candidates.
    turns: Vec<Turn>,
    tournament: Tournament,
    /// When the last turn was.
    now: u64,
    /// Order among equals: arbitrary, but constant.
    first: usize,
}

impl RoundRobin {
    /// `random` chooses the first.
    pub(super) fn new(random: u64) -> RoundRobin {
        let first = random as usize;
        RoundRobin { turns: Vec::new(), tournament: Tournament::default(), now: 0, first }
    }

    /// Changes the first among equals.
    pub(super) fn set_first(&mut self, random: u64) {
        self.first = random as usize;
    }

    /// A new worker has a turn at once.
    pub(super) fn add(&mut self) {
        self.turns.push(Turn { at: self.now, weight: 1, available: false });
        self.tournament.rebuild(&self.turns);
    }

    pub(super) fn remove(&mut self, at: usize) {
        self.turns.swap_remove(at);
        self.tournament.rebuild(&self.turns);
    }

    pub(super) fn update(&mut self, list: &[Candidate], at: usize) {
        let candidate = list[at];
        let turn = &mut self.turns[at];
        let available = candidate.cost < UNAVAILABLE;
        if available == turn.available && (!available || candidate.weight == turn.weight) {
            return;
        }
        if available {
            // It does not catch up on turns that went by without it.
            let ahead = u128::from(turn.at.saturating_sub(self.now));
            // What is left of the way to its next turn is walked at the new speed.
            let ahead = ahead * u128::from(turn.weight) / u128::from(candidate.weight);
            turn.at = self.now + ahead.min(u128::from(UNIT)) as u64;
            turn.weight = candidate.weight;
        }
        turn.available = available;
        self.tournament.update(&self.turns, at);
    }

    pub(super) fn pick(&self) -> Option<usize> {
        self.tournament.choose(&self.turns, self.first % self.turns.len().max(1))
    }

    /// The worker at `at` has had its turn.
    pub(super) fn commit(&mut self, at: usize) {
        let turn = &mut self.turns[at];
        self.now = turn.at;
        turn.at += UNIT / u64::from(turn.weight);
        self.tournament.update(&self.turns, at);
        if self.now >= LATE {
            for turn in &mut self.turns {
                turn.at = turn.at.saturating_sub(self.now);
            }
            self.now = 0;
            self.tournament.rebuild(&self.turns);
        }
    }

    /// How far away the worker's turn is, in turns of a worker with weight 1.
    pub(super) fn distance(&self, at: usize) -> f64 {
        self.turns[at].at.saturating_sub(self.now) as f64 / (UNIT / 256) as f64
    }
}
