//! One worker in the core: counters, state and timers.
//!
//! Owns the arithmetic of load and eligibility. Other modules decide what follows from a change:
//! events and placement.

use std::sync::Arc;
use std::time::Duration;

use super::drain::Notice;
use super::handoff::Shares;
use super::line::Line;
use super::policy::{Available, FULL_WEIGHT, NEVER};
use super::ring::Ring;
use super::steer::Steered;
use super::trust::Trust;
use super::types::{
    AffinityKey, Departure, GaugeProblem, ProcessId, State, Threads, Time, WorkerId,
};

/// The event to report when every outcome of a round of revocations is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Round {
    /// It became suspect: a connection was untaken for this long.
    Suspect(Duration),
    /// Connections move to workers that take sooner; no event.
    Quiet,
    /// It said goodbye.
    Goodbye,
    /// The deadline of its drain has come.
    Drained,
    /// It paused.
    Paused,
    /// It is gone.
    Gone(Departure),
}

/// Steps of a slow start. Each step costs a timer, so there are not too many; each is a jump of the
/// weight, so there are not too few.
const RAMP_STEPS: u32 = 64;

/// A slow start in progress.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ramp {
    since: Time,
    /// From 1 on.
    step: u32,
    next: Time,
}

/// See [`Worker::node`].
pub(super) fn node(name: &str, instance: u32) -> u64 {
    AffinityKey::of(format!("{name}\0{instance}").as_bytes()).0
}

#[derive(Debug)]
pub(super) struct Worker {
    pub(super) id: WorkerId,
    pub(super) pool: usize,
    /// Position among the pool's candidates; meaningless once gone.
    pub(super) at: usize,
    pub(super) name: Arc<str>,
    /// Distinguishes workers of the same name.
    pub(super) instance: u32,
    /// Its binding in the pool's affinity table; meaningless without affinity, and once gone.
    pub(super) binding: u32,
    pub(super) pid: i32,
    pub(super) priority: u16,
    /// The address at which clients reach it itself.
    pub(super) advertise: Option<Arc<str>>,
    /// 1 to 65,535.
    pub(super) weight: u32,
    /// An operator has set the weight: updates by the worker do not change it.
    pub(super) weight_set: bool,
    /// `Some` during a slow start.
    pub(super) ramp: Option<Ramp>,
    pub(super) max: u32,
    /// The maximum that the worker itself asks for.
    pub(super) own_max: u32,
    /// It asked for a pause: it counts as full.
    pub(super) paused: bool,
    /// Its process, if the dispatcher started it.
    pub(super) process: Option<ProcessId>,
    pub(super) state: State,

    pub(super) base: u64,
    pub(super) taken: u64,
    pub(super) finished: u64,
    /// Connections sent; always equal to `taken + untaken + revoked`.
    pub(super) sent: u64,
    pub(super) revoked: u64,
    pub(super) ring: Ring,

    /// `Some` during a round of revocations.
    pub(super) round: Option<Round>,
    /// Connections revoked in this round.
    pub(super) resent: u32,

    pub(super) suspect_since: Time,
    pub(super) said_goodbye: bool,
    /// It has closed its end of the channel: it takes nothing more, with or without a goodbye.
    pub(super) closed: bool,
    /// It was suspect when its drain began: if resumed, it is suspect again.
    pub(super) unproven: bool,
    /// Whether it understands notices; the last notice; when to repeat it at the latest.
    pub(super) supports_notices: bool,
    pub(super) notice: Option<Notice>,
    pub(super) notice_again: Option<Time>,
    /// While an operator drains it: when its remaining connections are ended.
    pub(super) drain_deadline: Option<Time>,
    /// It drains because its process is surplus or its pool was removed, not because an operator
    /// drains it.
    pub(super) unwanted: bool,
    /// Connections that it was notified to end at such a deadline.
    pub(super) ended: u64,
    /// Gone, and nothing refers to it.
    pub(super) forgotten: bool,
    /// Its channel is full; it gets nothing before then, unless a slot is settled earlier.
    pub(super) blocked: Option<Time>,
    /// It lost a connection; it gets nothing before then, unless one of its connections ends
    /// earlier.
    pub(super) starved: Option<Time>,
    /// Its ready check is under way: it gets no clients.
    pub(super) checking: bool,
    pub(super) trust: Trust,
    /// The number of its threads that wait in `accept`, if it reports that.
    pub(super) threads: Option<Threads>,
    /// It is not trusted, and gets no trial before then.
    pub(super) trial_wait: Option<Time>,
    /// Its channel is being purged; nothing may be sent to it meanwhile.
    pub(super) purging: bool,
    /// Revoked records in its channel since it was last purged.
    pub(super) stale: u32,
    /// Its part of the pool's [`super::handoff::Shares`].
    pub(super) shares: Shares,
    /// Its probe could not be sent; when to try again.
    pub(super) probe_again: Option<Time>,
    /// Impossible counters that were already reported.
    pub(super) reported_clamped: bool,
    pub(super) reported_decrease: bool,
    /// Problems with gauges that were already reported.
    pub(super) reported_gauges: [bool; GaugeProblem::COUNT],
    /// Times its channel had no room.
    pub(super) channel_full: u64,
    /// `Some` if it speaks the line protocol.
    pub(super) line: Option<Box<Line>>,
    /// `Some` if the kernel chooses its connections.
    pub(super) steered: Option<Box<Steered>>,
}

/// How a worker gets its connections.
#[derive(Debug)]
pub(super) enum Peer {
    /// It speaks the native protocol.
    Native,
    /// It speaks the line protocol.
    Line(Box<Line>),
    /// It speaks neither: the kernel gives it connections.
    Steered(Box<Steered>),
}

impl Worker {
    /// Connections sent and not yet taken.
    pub(super) fn untaken(&self) -> u32 {
        self.ring.conns()
    }

    /// Connections that a worker of the line protocol has not read yet.
    pub(super) fn unread(&self) -> u32 {
        self.line.as_ref().map_or(0, |line| line.unread())
    }

    /// Live connections, untaken ones included.
    pub(super) fn load(&self) -> u64 {
        self.base
            .saturating_add(self.taken)
            .saturating_sub(self.finished)
            .saturating_add(u64::from(self.untaken()))
    }

    /// Whether a probe is in flight.
    pub(super) fn is_asked(&self) -> bool {
        self.ring.len() > self.ring.conns()
    }

    /// Whether it counts as a worker of its pool, so that clients wait for it.
    pub(super) fn is_usable(&self) -> bool {
        match self.state {
            State::Active | State::Suspect => true,
            State::Draining | State::Gone => false,
        }
    }

    /// Whether a record can be sent to it, however slow it is.
    pub(super) fn can_be_sent_to(&self) -> bool {
        self.is_usable()
            && self.ring.has_room_beside(self.unread())
            && self.blocked.is_none()
            && self.starved.is_none()
            && !self.checking
            && !self.purging
    }

    /// Whether it may get one more connection.
    pub(super) fn is_open(&self) -> bool {
        self.can_be_sent_to() && !self.paused && self.load() < u64::from(self.max)
    }

    /// Whether it is active and has shown that it takes connections.
    pub(super) fn is_trusted(&self) -> bool {
        self.state == State::Active && self.trust.proven
    }

    /// Threads that wait in `accept`, less the connections in flight to them; 0 if it does not
    /// report threads.
    pub(super) fn idle_threads(&self) -> u32 {
        self.threads.map_or(0, |threads| threads.idle.saturating_sub(self.untaken()))
    }

    /// Whether it is trusted and reports that all its threads are busy.
    pub(super) fn is_busy(&self) -> bool {
        self.is_trusted() && self.threads.is_some_and(|threads| threads.idle == 0)
    }

    /// Whether a connection that is sent to it now is likely to be taken soon.
    pub(super) fn has_room(&self) -> bool {
        let untaken = self.untaken();
        match self.threads {
            Some(threads) => {
                untaken < threads.idle || untaken < self.trust.prefetch(threads.turnaround)
            }
            None => true,
        }
    }

    /// Whether it may get a trial now: it answered its probe and has nothing in flight. `spaced`:
    /// the pool's last repeated trial of a worker that never took anything was long enough ago.
    pub(super) fn is_trialable(&self, spaced: bool) -> bool {
        self.is_usable()
            && !self.trust.proven
            && self.trust.answer.is_some()
            && self.untaken() == 0
            && self.trial_wait.is_none()
            && (spaced || !self.is_doubtful())
    }

    /// Whether it has neither taken nor answered anything for longer than even a long round lasts.
    pub(super) fn is_silent(&self, now: Time, timeout: Duration) -> bool {
        let usual = self.trust.patience(timeout, Duration::MAX, 3);
        self.state == State::Suspect
            && self.trust.ever
            && self.trust.answer.is_none()
            && now - self.trust.last_take > usual
    }

    /// Whether it has failed every trial.
    pub(super) fn is_doubtful(&self) -> bool {
        self.trust.failed > 0 && !self.trust.ever
    }

    /// What the policy compares, if it may choose the worker. `keyed`: keys decide, so a busy
    /// worker is eligible too.
    pub(super) fn availability(&self, keyed: bool, spaced: bool) -> Option<Available> {
        if !self.is_open() {
            return None;
        }
        let may = match self.state {
            State::Active if keyed => true,
            _ => (self.trust.proven && self.has_room()) || self.is_trialable(spaced),
        };
        // An untested worker ranks like any other; one that has failed comes last among equals.
        let trial = self.state == State::Suspect || self.trust.failed > 0;
        may.then(|| Available { load: self.load(), weight: self.effective_weight(), trial })
    }

    /// Its identity for `hash`. Not its id: a worker that replaces it under the same name gets the
    /// same keys.
    pub(super) fn node(&self) -> u64 {
        node(&self.name, self.instance)
    }

    /// Whether it counts as up for `failover`: trusted, or eligible for a trial, even if full.
    pub(super) fn is_up(&self, spaced: bool) -> bool {
        self.is_trusted() || self.is_trialable(spaced)
    }

    /// The weight that policies use, in units of 1/[`FULL_WEIGHT`].
    pub(super) fn effective_weight(&self) -> u32 {
        let step = self.ramp.map_or(RAMP_STEPS, |ramp| ramp.step);
        self.weight * (FULL_WEIGHT / RAMP_STEPS) * step
    }

    /// The same after its slow start.
    pub(super) fn full_weight(&self) -> u32 {
        self.weight * (FULL_WEIGHT / RAMP_STEPS) * RAMP_STEPS
    }

    /// Starts a slow start: its weight grows to the full value over this time.
    pub(super) fn start_slowly(&mut self, now: Time, slow_start: Duration) {
        self.ramp = (!slow_start.is_zero()).then(|| Ramp {
            since: now,
            step: 1,
            next: now + slow_start / RAMP_STEPS,
        });
    }

    /// Advances its slow start to `now`.
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
        // Without this, rounding could make a timer due again that has just fired.
        if ramp.next <= now {
            ramp.next = now + Duration::from_nanos(1);
        }
    }

    /// Its current share of its weight, in per cent.
    pub(super) fn warm_percent(&self) -> u32 {
        self.ramp.map_or(100, |ramp| ramp.step * 100 / RAMP_STEPS)
    }

    /// Its current share of its weight, in thousandths; at least 1.
    pub(super) fn warm_thousandths(&self) -> u32 {
        self.ramp.map_or(1000, |ramp| ramp.step * 1000 / RAMP_STEPS)
    }

    /// When its next timer is due. Without `timeouts`, untaken connections have none.
    pub(super) fn due(&self, timeouts: bool) -> Time {
        let oldest = timeouts.then(|| self.ring.due());
        let ramp = self.ramp.map(|ramp| ramp.next);
        let timers = [self.blocked, self.starved, self.trial_wait, self.probe_again, oldest, ramp];
        let timers = timers.into_iter().chain([self.notice_again, self.drain_deadline]);
        timers.flatten().min().unwrap_or(NEVER)
    }
}
