//! One worker, as the core knows it: counters, state and timers.
//!
//! Owns the arithmetic of load and eligibility. What follows from a change (events, placing) is decided elsewhere.

use std::sync::Arc;
use std::time::Duration;

use super::drain::Notice;
use super::policy::{FULL_WEIGHT, NEVER};
use super::ring::Ring;
use super::types::{AffinityKey, Departure, GaugeProblem, ProcessId, State, Time, WorkerId};

/// What to say once every outcome of a round of revocations is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Round {
    /// It left something untaken for this long.
    Suspect(Duration),
    /// It said goodbye.
    Goodbye,
    /// The deadline of its drain has come.
    Drained,
    /// It takes no connections for now.
    Paused,
    /// It is gone.
    Gone(Departure),
}

/// Steps in which a weight grows. Each is a timer, so not too many; each is a jump, so not too few.
const RAMP_STEPS: u32 = 64;

/// A slow start under way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ramp {
    since: Time,
    /// From 1 on.
    step: u32,
    next: Time,
}

/// See [`Worker::node`].
pub(super) fn node(name: &str, twin: u32) -> u64 {
    AffinityKey::of(format!("{name}\0{twin}").as_bytes()).0
}

#[derive(Debug)]
pub(super) struct Worker {
    pub(super) id: WorkerId,
    pub(super) pool: usize,
    /// Position among the pool's candidates; meaningless once gone.
    pub(super) at: usize,
    pub(super) name: Arc<str>,
    /// Tells those of the same name apart.
    pub(super) twin: u32,
    /// What the pool's memory of clients points at; meaningless where there is none, and once gone.
    pub(super) home: u32,
    pub(super) pid: i32,
    pub(super) priority: u16,
    /// 1 to 65,535.
    pub(super) weight: u32,
    /// An operator has set it: what the worker says of it does not count.
    pub(super) weight_set: bool,
    /// `Some` while it has less than its weight.
    pub(super) ramp: Option<Ramp>,
    pub(super) max: u32,
    /// The most it wants itself.
    pub(super) own_max: u32,
    /// It takes no connections for now, by its own wish: as good as full.
    pub(super) paused: bool,
    /// The process we started, if it is one.
    pub(super) process: Option<ProcessId>,
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
    /// It understands notices; the last one, and when to repeat it at the latest.
    pub(super) hears: bool,
    pub(super) notice: Option<Notice>,
    pub(super) notice_again: Option<Time>,
    /// While an operator drains it: when what it has is ended.
    pub(super) drain_deadline: Option<Time>,
    /// It drains because its process, or its pool, was not wanted; not because an operator drains it.
    pub(super) unwanted: bool,
    /// Connections it was told to end at such a deadline.
    pub(super) ended: u64,
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
    /// The same for gauges, by [`GaugeProblem`].
    pub(super) told_gauges: [bool; GaugeProblem::COUNT],
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

    /// What `hash` knows it by. Not its id: whoever comes in its place, with its name, has its keys.
    pub(super) fn node(&self) -> u64 {
        node(&self.name, self.twin)
    }

    /// Whether it is there for new connections, be it full at the moment.
    pub(super) fn is_up(&self) -> bool {
        self.state == State::Active
    }

    /// What the policies go by, in parts of [`FULL_WEIGHT`].
    pub(super) fn effective_weight(&self) -> u32 {
        let step = self.ramp.map_or(RAMP_STEPS, |ramp| ramp.step);
        self.weight * (FULL_WEIGHT / RAMP_STEPS) * step
    }

    /// Its weight grows from next to nothing in this time.
    pub(super) fn start_slowly(&mut self, now: Time, slow_start: Duration) {
        self.ramp = (!slow_start.is_zero()).then(|| Ramp {
            since: now,
            step: 1,
            next: now + slow_start / RAMP_STEPS,
        });
    }

    /// As far as its slow start has come by now.
    pub(super) fn warm_up(&mut self, now: Time, slow_start: Duration) {
        let Some(ramp) = &mut self.ramp else { return };
        let elapsed = now - ramp.since;
        if elapsed >= slow_start {
            self.ramp = None;
            return;
        }
        let steps = elapsed.as_nanos() * u128::from(RAMP_STEPS) / slow_start.as_nanos().max(1);
        ramp.step = 1 + steps as u32;
        ramp.next = ramp.since + slow_start / RAMP_STEPS * ramp.step;
        // Rounding must not make a timer that has just fired due again.
        if ramp.next <= now {
            ramp.next = now + Duration::from_nanos(1);
        }
    }

    /// How much of its weight it has, in hundredths.
    pub(super) fn warm_percent(&self) -> u32 {
        self.ramp.map_or(100, |ramp| ramp.step * 100 / RAMP_STEPS)
    }

    /// Whether it may be chosen.
    pub(super) fn is_eligible(&self) -> bool {
        self.state == State::Active
            && !self.paused
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
        let ramp = self.ramp.map(|ramp| ramp.next);
        let timers = [self.blocked, self.starved, self.probation, self.probe_again, oldest, ramp];
        let timers = timers.into_iter().chain([self.notice_again, self.drain_deadline]);
        timers.flatten().min().unwrap_or(NEVER)
    }
}
