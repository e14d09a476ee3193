//! What a pool answers HAProxy's agent check: its capacity, whether it drains, or why it is down.
//!
//! Guarantees that every answer is complete, because HAProxy keeps what an answer leaves out:
//! `ready` ends a drain, `up` ends `down`, so both are in each answer of a pool that serves. The
//! answer depends on capacity only, never on live connections: HAProxy counts those itself.

use std::fmt;

use crate::Core;
use crate::place::WorkerWait;
use crate::types::{Policy, PoolId, State, Time};
use crate::worker::Worker;

/// The most connections in an answer: HAProxy keeps them in a signed 32-bit number.
const MOST_CONNECTIONS: u64 = i32::MAX as u64;

/// An answer to HAProxy's agent check. [`fmt::Display`] writes it without the end of the line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AgentAnswer {
    /// The pool serves.
    Ready {
        /// The share of its whole capacity that can be used: 1 to 100.
        percent: u32,
        /// The most live connections: 1 to 2³¹ − 1. HAProxy takes 0 for no limit.
        max_connections: u32,
    },
    /// The pool or its host drains: new connections go elsewhere, the others stay.
    Drain,
    /// The pool cannot serve.
    Down(DownReason),
}

/// Why a pool cannot serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DownReason {
    /// The dispatcher stops.
    Stopping,
    /// The pool was removed from the configuration.
    Removed,
    /// No worker is usable.
    NoWorker,
    /// No worker has taken a connection for `wait_for_worker`, and none answers.
    NotTaking,
    /// The dispatcher did not answer its own question.
    NoAnswer,
}

impl DownReason {
    /// The text after `#`. HAProxy shows it and writes it to its log.
    pub fn text(self) -> &'static str {
        match self {
            DownReason::Stopping => "the dispatcher is stopping",
            DownReason::Removed => "the pool was removed",
            DownReason::NoWorker => "no usable worker",
            DownReason::NotTaking => "no worker takes connections",
            DownReason::NoAnswer => "the dispatcher does not answer",
        }
    }
}

impl AgentAnswer {
    /// The names of all kinds.
    pub const NAMES: [&'static str; 3] = ["ready", "drain", "down"];

    /// The kind, in status and metrics.
    pub fn name(self) -> &'static str {
        match self {
            AgentAnswer::Ready { .. } => "ready",
            AgentAnswer::Drain => "drain",
            AgentAnswer::Down(_) => "down",
        }
    }
}

impl fmt::Display for AgentAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AgentAnswer::Ready { percent, max_connections } => {
                write!(f, "ready up {percent}% maxconn:{max_connections}")
            }
            AgentAnswer::Drain => f.write_str("drain"),
            AgentAnswer::Down(reason) => write!(f, "down # {}", reason.text()),
        }
    }
}

/// A number of workers with the sums of their weights and of their maximums.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    workers: u64,
    weight: u64,
    max: u64,
}

impl Sums {
    fn of<'a>(workers: impl Iterator<Item = (&'a Worker, u32)>) -> Sums {
        workers.fold(Sums::default(), |sums, (worker, weight)| Sums {
            workers: sums.workers + 1,
            weight: sums.weight + u64::from(weight),
            max: sums.max + u64::from(worker.max),
        })
    }
}

/// The part that `usable` is of `expected` workers like those of `known`, in per cent: the smaller
/// of the parts by weight and by maximum, rounded, 1 to 100.
fn percent(usable: Sums, known: Sums, expected: u64) -> u32 {
    // usable ÷ (all ÷ workers × expected), without losing a fraction.
    let rounded = |usable: u64, all: u64| {
        let part = u128::from(usable) * u128::from(known.workers) * 100;
        let whole = u128::from(all) * u128::from(expected);
        (part + whole / 2).checked_div(whole).unwrap_or(0).min(100) as u32
    };
    rounded(usable.weight, known.weight).min(rounded(usable.max, known.max)).clamp(1, 100)
}

impl Core {
    /// What a pool answers now; `None` if there is no such pool.
    pub fn agent_answer(&self, now: Time, pool: PoolId) -> Option<AgentAnswer> {
        let p = usize::from(pool.0);
        (p < self.pools.len()).then(|| self.answer_of(now, p))
    }

    pub(super) fn answer_of(&self, now: Time, p: usize) -> AgentAnswer {
        let pool = &self.pools[p];
        if self.stop.is_some() {
            return AgentAnswer::Down(DownReason::Stopping);
        }
        if pool.retired {
            return AgentAnswer::Down(DownReason::Removed);
        }
        if self.host_drain.is_some() {
            return AgentAnswer::Drain;
        }
        if pool.usable == 0 {
            // HAProxy may end the connections of a server that is down, so a pool that an operator
            // drains must not say that.
            return match self.members(pool).any(is_drained) {
                true => AgentAnswer::Drain,
                false => AgentAnswer::Down(DownReason::NoWorker),
            };
        }
        let fit = |worker: &Worker| {
            let trusted = worker.is_trusted() && worker.has_room();
            worker.is_usable() && (trusted || worker.trust.answer.is_some())
        };
        let refuses = pool.worker_wait == WorkerWait::Refusing;
        // Such a worker is tested with a client; without clients it never is.
        if refuses && !self.members(pool).any(fit) {
            return AgentAnswer::Down(DownReason::NotTaking);
        }
        self.capacity(now, p, refuses)
    }

    /// The answer of a pool with a usable worker.
    fn capacity(&self, now: Time, p: usize, refuses: bool) -> AgentAnswer {
        let pool = &self.pools[p];
        let (mut offered, trusted) = self.offered(now, p);
        let most = |of: &[&Worker]| of.iter().map(|worker| u64::from(worker.max)).sum::<u64>();
        let any = most(&offered);
        offered.retain(|worker| !worker.paused && !worker.checking);
        let max = if offered.is_empty() { any } else { most(&offered) };
        let max_connections = max.clamp(1, MOST_CONNECTIONS) as u32;
        if refuses || !trusted {
            return AgentAnswer::Ready { percent: 1, max_connections };
        }
        let usable = Sums::of(offered.iter().map(|&worker| (worker, worker.effective_weight())));
        let failover = pool.settings.policy == Policy::Failover;
        let first = self.members(pool).filter(|worker| !is_leaving(worker));
        let first = first.map(|worker| worker.priority).max();
        let known = self
            .members(pool)
            .filter(|worker| !is_leaving(worker) && (!failover || Some(worker.priority) == first));
        let known = Sums::of(known.map(|worker| (worker, worker.full_weight())));
        let wanted = match pool.processes.wanted() {
            // Standby workers are no part of the whole.
            wanted if wanted > 0 && !failover => Some(wanted),
            _ => None,
        };
        let expected = pool.settings.agent_workers.or(wanted).map_or(known.workers, u64::from);
        AgentAnswer::Ready { percent: percent(usable, known, expected), max_connections }
    }
}

/// Whether a worker leaves for good: another one takes its place, or none does.
fn is_leaving(worker: &Worker) -> bool {
    worker.state == State::Draining && (worker.said_goodbye || worker.closed || worker.unwanted)
}

/// Whether an operator drains a worker.
fn is_drained(worker: &Worker) -> bool {
    worker.state == State::Draining && !is_leaving(worker)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sums(workers: u64, weight: u64, max: u64) -> Sums {
        Sums { workers, weight, max }
    }

    #[test]
    fn shares_are_rounded_and_never_zero() {
        let known = sums(3, 3 * 256, 300);
        for (usable, expected, answer) in [(3, 3, 100), (2, 3, 67), (1, 3, 33), (3, 4, 75)] {
            let usable = sums(usable, usable * 256, usable * 100);
            assert_eq!(percent(usable, known, expected), answer, "{usable:?} of {expected}");
        }
        assert_eq!(percent(Sums::default(), known, 3), 1, "0 would be a drain");
        assert_eq!(percent(known, known, 2), 100, "one more than expected");
        assert_eq!(percent(sums(1, 256, 1), known, 1_000_000), 1);
    }

    #[test]
    fn the_smaller_share_counts() {
        // Two workers of equal weight; one of them can have 100 of 10,100 connections.
        let known = sums(2, 512, 10_100);
        assert_eq!(percent(sums(1, 256, 100), known, 2), 1);
        assert_eq!(percent(sums(1, 256, 10_000), known, 2), 50);
    }

    proptest! {
        #[test]
        fn a_share_grows_with_its_workers_and_not_with_their_scale(
            workers in prop::collection::vec((1u64..65_536, 1u64..10_000_000), 1..64),
            usable in 0usize..64,
            expected in 1u64..128,
            scale in 1u64..1_000,
        ) {
            let of = |list: &[(u64, u64)], by: u64| list.iter().fold(Sums::default(), |s, (w, m)| {
                sums(s.workers + 1, s.weight + w * 256 * by, s.max + m * by)
            });
            let usable = usable.min(workers.len());
            let known = of(&workers, 1);
            let part = percent(of(&workers[..usable], 1), known, expected);
            prop_assert!((1..=100).contains(&part));
            prop_assert_eq!(part, percent(of(&workers[..usable], scale), of(&workers, scale), expected));
            if usable > 0 {
                prop_assert!(part >= percent(of(&workers[..usable - 1], 1), known, expected));
            }
            prop_assert!(part >= percent(of(&workers[..usable], 1), known, expected + 1));
            if usable == workers.len() && expected <= usable as u64 {
                prop_assert_eq!(part, 100);
            }
        }
    }
}
