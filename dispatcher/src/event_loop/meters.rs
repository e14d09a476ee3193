//! Measurements of the hot thread: plain counters, shown in the status.
//!
//! A turn causes no extra clock reads, and every 64th decision two: a clock read costs about as
//! much as a decision.

use super::EventLoop;
use crate::api::status::Meters as Told;
use crate::background::{logger, spawner};
use dispatcher_core::histogram::{self, Histogram};

/// One decision in so many is timed.
pub(super) const SAMPLE: u64 = 64;

#[derive(Debug)]
pub(super) struct Meters {
    /// The time from accept to the choice of a worker, for every [`SAMPLE`]th connection.
    pub(super) decision: Histogram,
    /// The time from waking up to sleeping again.
    pub(super) turn: Histogram,
    /// Connections accepted, to choose the samples.
    decisions: u64,
    /// Pauses of accepting because descriptors or memory were short.
    pub(super) accept_pauses: u64,
    /// Workers that were refused.
    pub(super) workers_refused: u64,
}

impl Default for Meters {
    fn default() -> Meters {
        Meters {
            decision: Histogram::new(histogram::DECISION),
            turn: Histogram::new(histogram::TURN),
            decisions: 0,
            accept_pauses: 0,
            workers_refused: 0,
        }
    }
}

impl Meters {
    /// Whether to time the next decision. The first is not timed: its caches are cold.
    pub(super) fn samples(&mut self) -> bool {
        self.decisions += 1;
        self.decisions.is_multiple_of(SAMPLE)
    }
}

impl EventLoop {
    pub(super) fn meters_status(&mut self) -> Told {
        let closing = self.background.closers.closing();
        Told {
            decision: (&self.observation.meters.decision).into(),
            turn: (&self.observation.meters.turn).into(),
            accept_pauses: self.observation.meters.accept_pauses,
            workers_refused: self.observation.meters.workers_refused,
            log_lines_dropped: logger::dropped_lines(),
            log_lines_limited: self.observation.rate_limits.total() + logger::repeated_lines(),
            process_output_lost: spawner::lost_lines(),
            closing: closing.waiting,
            closes_interrupted: closing.interrupted,
            closes_left_out: closing.left_out,
            residual: self.core.residual(),
        }
    }
}
