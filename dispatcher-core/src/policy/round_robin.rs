//! Weighted round robin.
//!
//! Owns the virtual time of each worker's next turn. Only decisions advance the virtual clock: a
//! worker's turns are `1 / weight` apart, and the earliest turn of all is next. So in as many
//! decisions as the sum of all weights, each worker has as many turns as its weight, spread evenly.
//! All begin at the same virtual time, so a random worker is first.

use super::tournament::{Rank, Tournament};
use super::{Candidate, UNAVAILABLE};

/// Virtual time between two turns of a worker with weight 1 of the table, which is a 256th of a
/// configured 1.
const UNIT: u64 = 1 << 40;

/// At this value the virtual clock restarts at 0. Turns are at most [`UNIT`] ahead of it.
const LATE: u64 = 1 << 62;

/// A worker's next turn.
#[derive(Clone, Copy, Debug)]
struct Turn {
    at: u64,
    /// The last known weight: the table has none for an ineligible worker.
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
    /// The virtual clock: the time of the last turn.
    now: u64,
    /// The first among equals: arbitrary, but constant.
    first: usize,
}

impl RoundRobin {
    /// `random` chooses the first among equals.
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
            // A worker does not catch up on turns that it missed.
            let ahead = u128::from(turn.at.saturating_sub(self.now));
            // The rest of the time until its next turn is scaled to the new weight.
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

    /// Commits the turn of the worker at `at`.
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

    /// Virtual time until the worker's turn, in turns of a worker with weight 1.
    pub(super) fn distance(&self, at: usize) -> f64 {
        self.turns[at].at.saturating_sub(self.now) as f64 / (UNIT / 256) as f64
    }
}
