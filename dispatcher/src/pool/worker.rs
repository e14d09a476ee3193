//! One worker, as the core knows it: counters, state and timers.
//!
//! Owns the arithmetic of load and eligibility. What follows from a change (events, placing) is decided elsewhere.

use std::time::Duration;

use super::policy::NEVER;
use super::ring::Ring;
use super::types::{Departure, State, Time, WorkerId};

/// What to say once every outcome of a round of revocations is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Round {
    /// It left something untaken for this long.
    Suspect(Duration),
    /// It said goodbye.
    Goodbye,
    /// It is gone.
    Gone(Departure),
}

#[derive(Debug)]
pub(super) struct Worker {
    pub(super) id: WorkerId,
    pub(super) pool: usize,
    /// Position among the pool's candidates; meaningless once gone.
    pub(super) at: usize,
    pub(super) name: String,
    pub(super) pid: i32,
    pub(super) weight: u32,
    pub(super) max: u32,
    pub(super) state: State,

    pub(super) base: u64,
    pub(super) taken: u64,
    pub(super) finished: u64,
    /// Connections sent; `taken + untaken + revoked` of them are accounted for, always.
    pub(super) sent: u64,
    pub(super) revoked: u64,
    pub(super) ring: Ring,

    /// `Some` while a round of revocations is under way.
    pub(super) round: Option<Round>,
    /// Connections that came back in this round.
    pub(super) resent: u32,

    pub(super) suspect_since: Time,
    pub(super) said_goodbye: bool,
    /// Its channel is closed at its end: it takes nothing more, goodbye or not.
    pub(super) closed: bool,
    /// Draining, and suspect: asked whether it is alive before it gets anything again.
    pub(super) unproven: bool,
    /// Gone, and nothing refers to it any more.
    pub(super) forgotten: bool,
    /// Its channel is full; tried again then at the latest.
    pub(super) blocked: Option<Time>,
    /// It lost a connection; tried again then at the latest.
    pub(super) starved: Option<Time>,
    /// Gets one connection at a time until then.
    pub(super) probation: Option<Time>,
    /// Its probe could not be sent; next try.
    pub(super) probe_again: Option<Time>,
    /// Kinds of impossible counters already reported.
    pub(super) told_clamped: bool,
    pub(super) told_went_back: bool,
    /// Times its channel had no room.
    pub(super) channel_full: u64,
}

impl Worker {
    /// Connections sent and not yet taken.
    pub(super) fn untaken(&self) -> u32 {
        self.ring.conns()
    }

    /// Live connections, untaken ones included.
    pub(super) fn load(&self) -> u64 {
        self.base
            .saturating_add(self.taken)
            .saturating_sub(self.finished)
            .saturating_add(u64::from(self.untaken()))
    }

    /// Whether it counts as a worker of its pool: somebody to wait for.
    pub(super) fn is_usable(&self) -> bool {
        match self.state {
            State::Active | State::Suspect => true,
            State::Draining | State::Gone => false,
        }
    }

    /// Whether there is nothing in the way of a record, whatever we think of the worker.
    pub(super) fn can_be_sent_to(&self) -> bool {
        self.is_usable() && self.ring.has_room() && self.blocked.is_none() && self.starved.is_none()
    }

    /// Whether it may be chosen.
    pub(super) fn is_eligible(&self) -> bool {
        self.state == State::Active
            && self.can_be_sent_to()
            && self.load() < u64::from(self.max)
            && (self.probation.is_none() || self.untaken() == 0)
    }

    /// When its next timer is due. `handoff_timeout` is `None` when timeouts no longer matter.
    pub(super) fn due(&self, handoff_timeout: Option<Duration>) -> Time {
        // During a round of revocations everything out is being revoked already.
        let oldest = handoff_timeout
            .filter(|_| self.ring.revoking() == 0)
            .and_then(|timeout| Some(self.ring.oldest()? + timeout));
        [self.blocked, self.starved, self.probation, self.probe_again, oldest]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or(NEVER)
    }
}
