//! Virtual workers: when each takes connections, with any of the three contenders.

use std::time::Duration;

use super::references::Front;
use super::{Kind, Rounds, WorkerPlan};
use crate::Random;

/// A worker's process.
#[derive(Debug)]
pub(super) struct Worker {
    pub(super) kind: Kind,
    /// It has joined.
    pub(super) up: bool,
    pub(super) stopped: bool,
    /// Number of threads that serve.
    pub(super) busy: u32,
    /// Connections that would have ended while the threads were stopped.
    pub(super) overdue: u32,
    /// Rounds of an earlier kind do not count.
    pub(super) generation: u32,
    /// The longest round so far.
    pub(super) longest: u64,
    random: Random,
}

impl Worker {
    pub(super) fn new(plan: &WorkerPlan, number: usize, seed: u64) -> Worker {
        Worker {
            kind: plan.kind,
            up: false,
            stopped: false,
            busy: 0,
            overdue: 0,
            generation: 0,
            longest: 0,
            random: Random::new(seed.wrapping_mul(1000) + number as u64 + 1),
        }
    }

    /// The length of the next round, if the worker has rounds.
    pub(super) fn round(&mut self, rounds: Rounds) -> Option<u64> {
        let Kind::Loop { round, .. } = self.kind else { return None };
        let length = rounds.draw(&mut self.random, round).max(1);
        self.longest = self.longest.max(length);
        Some(length)
    }

    /// Progress of the first round when the worker joins.
    pub(super) fn phase(&mut self, rounds: Rounds) -> Option<u64> {
        let length = self.round(rounds)?;
        Some((length as f64 * super::unit(&mut self.random)) as u64)
    }

    /// Whether a delivery wakes it; a busy event loop reads its queue at the end of a round.
    pub(super) fn is_woken(&self) -> bool {
        self.up && !matches!(self.kind, Kind::Loop { .. })
    }

    /// Threads that wait in accept, if the worker reports that.
    pub(super) fn idle_threads(&self) -> Option<u32> {
        match self.kind {
            Kind::Serial { threads } => Some(threads - self.busy),
            Kind::Loop { .. } | Kind::Fast | Kind::Stuck | Kind::Dead | Kind::Flapping { .. } => {
                None
            }
        }
    }

    /// The connections that the worker takes from its queue `now`; `away` is how long the thread
    /// was away from accept, if a thread takes.
    pub(super) fn poll(
        &mut self,
        now: u64,
        number: usize,
        away: Option<u64>,
        front: &mut dyn Front,
        taken: &mut Vec<u32>,
    ) {
        if !self.up || self.stopped {
            return;
        }
        match self.kind {
            Kind::Loop { most, .. } => take(now, number, most, front, taken),
            Kind::Fast => take(now, number, u32::MAX, front, taken),
            Kind::Serial { threads } => {
                take(now, number, threads - self.busy, front, taken);
                self.busy += taken.len() as u32;
                let away = away.filter(|_| taken.is_empty());
                front.idle_threads(now, number, threads - self.busy, away);
            }
            Kind::Stuck => front.answer(now, number),
            Kind::Dead => {}
            Kind::Flapping { serves, rests } => {
                if is_serving(now, serves, rests) {
                    take(now, number, u32::MAX, front, taken);
                } else {
                    front.answer(now, number);
                }
            }
        }
    }
}

fn take(now: u64, number: usize, most: u32, front: &mut dyn Front, taken: &mut Vec<u32>) {
    while (taken.len() as u32) < most
        && let Some(client) = front.receive(now, number)
    {
        taken.push(client);
    }
}

fn is_serving(now: u64, serves: Duration, rests: Duration) -> bool {
    let period = (serves + rests).as_nanos() as u64;
    now % period.max(1) < serves.as_nanos() as u64
}
