//! What the event loop reports about itself: log limits, faults, meters. No decision depends on it.

use std::time::Duration;

use super::conditions::Conditions;
use super::event_order::{DelayedEvent, ExpectedEnds};
use super::events;
use super::fault_list::{FaultList, Seconds};
use super::meters::Meters;
use super::rate_limit::{Cause, RateLimits};
use dispatcher_core::{PoolId, Time};

/// A turn this long is logged; later turns are logged only if they are longer still.
const SLOW_TURN: Duration = Duration::from_millis(100);

/// What the event loop reports about itself.
#[derive(Debug)]
pub(super) struct Observation {
    pub(super) meters: Meters,
    /// The longest turn, from waking up to sleeping again.
    pub(super) longest_turn: Duration,
    pub(super) rate_limits: RateLimits,
    /// When the log must report suppressed lines.
    pub(super) suppressed_due: Option<Time>,
    pub(super) faults: FaultList,
    /// What is wrong with pools now.
    pub(super) conditions: Conditions,
    pub(super) expected_ends: ExpectedEnds,
    /// Events that the log reports after the other events of this turn.
    pub(super) delayed_events: Vec<DelayedEvent>,
    pub(super) seconds: Seconds,
}

impl Observation {
    pub(super) fn new(start: Time) -> Observation {
        Observation {
            meters: Meters::default(),
            longest_turn: Duration::ZERO,
            rate_limits: RateLimits::default(),
            suppressed_due: None,
            faults: FaultList::default(),
            conditions: Conditions::default(),
            expected_ends: ExpectedEnds::default(),
            delayed_events: Vec::new(),
            seconds: Seconds::new(start),
        }
    }

    /// Whether a log line may be written; if so, how many lines were suppressed before it.
    pub(super) fn allow(&mut self, now: Time, pool: Option<PoolId>, cause: Cause) -> Option<u64> {
        self.rate_limits.allow(now, pool, cause)
    }

    /// Records the duration of a turn. A long turn means that the hot thread waited, which it must
    /// never do.
    pub(super) fn turn_ended(&mut self, took: Duration) {
        self.meters.turn.record(took);
        if took > self.longest_turn {
            self.longest_turn = took;
            if took > SLOW_TURN {
                log::warn!("event=slow_turn took={}", events::span(took));
            }
        }
    }
}
