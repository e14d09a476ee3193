//! One worker, as the core knows it: counters, state and timers.
//!
//! Owns the arithmetic of load and eligibility. What follows from a change (events, placing) is decided elsewhere.

use std::sync::Arc;
use std::time::Duration;

use super::drain::Notice;
use super::handoff::Shares;
use super::policy::{Available, FULL_WEIGHT, NEVER};
use super::ring::Ring;
use super::trust::Trust;
use super::types::{
    AffinityKey, Departure, GaugeProblem, ProcessId, State, Threads, Time, WorkerId,
};

/// What to say once every outcome of a round of revocations is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Round {
    /// It left something untaken for this long.
    Suspect(Duration),
    /// Connections move to where they are taken sooner; nothing to say.
    Quiet,
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
    pub(super) binding: u32,
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
    pub(super) trust: Trust,
    /// `Some` if it reports how many of its threads wait in `accept`; then how many do.
    pub(super) threads: Option<Threads>,
    /// Not trusted, and not tested before then.
    pub(super) trial_wait: Option<Time>,
    /// Its channel is being emptied; nothing may be sent to it meanwhile.
    pub(super) purging: bool,
    /// Records in its channel that were revoked since it was last emptied.
    pub(super) stale: u32,
    /// What it counts for in its pool's [`super::handoff::Shares`].
    pub(super) shares: Shares,
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

    /// Whether a probe is out.
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

    /// Whether there is nothing in the way of a record, however slow the worker is.
    pub(super) fn can_be_sent_to(&self) -> bool {
        self.is_usable()
            && self.ring.has_room()
            && self.blocked.is_none()
            && self.starved.is_none()
            && !self.purging
    }

    /// Whether it may have one more connection at all.
    pub(super) fn is_open(&self) -> bool {
        self.can_be_sent_to() && !self.paused && self.load() < u64::from(self.max)
    }

    /// Whether it takes connections as far as is known.
    pub(super) fn is_trusted(&self) -> bool {
        self.state == State::Active && self.trust.proven
    }

    /// Threads that wait in `accept` and for which nothing is on its way, if it reports them.
    pub(super) fn idle_threads(&self) -> u32 {
        self.threads.map_or(0, |threads| threads.idle.saturating_sub(self.untaken()))
    }

    /// Whether it is trusted and all its threads are busy, as far as it reports them.
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

    /// Whether it may be tested with a connection now: it lives, and has nothing else to do. `spaced`: the pool's last
    /// repeated test of a worker that never took anything was long enough ago.
    pub(super) fn is_trialable(&self, spaced: bool) -> bool {
        self.is_usable()
            && !self.trust.proven
            && self.trust.answer.is_some()
            && self.untaken() == 0
            && self.trial_wait.is_none()
            && (spaced || !self.is_doubtful())
    }

    /// Whether it has shown no sign of life for so long that even a long round would be over.
    pub(super) fn is_silent(&self, now: Time, timeout: Duration) -> bool {
        let usual = self.trust.patience(timeout, Duration::MAX, 3);
        self.state == State::Suspect
            && self.trust.ever
            && self.trust.answer.is_none()
            && now - self.trust.last_take > usual
    }

    /// Whether it has failed every test there was.
    pub(super) fn is_doubtful(&self) -> bool {
        self.trust.failed > 0 && !self.trust.ever
    }

    /// How the policy may choose it, if at all. `keyed`: keys decide, so a worker is not passed over for being busy.
    pub(super) fn availability(&self, keyed: bool, spaced: bool) -> Option<Available> {
        if !self.is_open() {
            return None;
        }
        let may = match self.state {
            State::Active if keyed => true,
            _ => (self.trust.proven && self.has_room()) || self.is_trialable(spaced),
        };
        // One of which nothing is known is as good as any; one that has failed comes last among equals.
        let trial = self.state == State::Suspect || self.trust.failed > 0;
        may.then(|| Available { load: self.load(), weight: self.effective_weight(), trial })
    }

    /// What `hash` knows it by. Not its id: a worker that replaces it under the same name has its keys.
    pub(super) fn node(&self) -> u64 {
        node(&self.name, self.twin)
    }

    /// Whether it is there for new connections, be it full at the moment: trusted, or about to be tested.
    pub(super) fn is_up(&self, spaced: bool) -> bool {
        self.is_trusted() || self.is_trialable(spaced)
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

    /// When its next timer is due. Without `timeouts` connections may stay untaken for as long as they like.
    pub(super) fn due(&self, timeouts: bool) -> Time {
        let oldest = timeouts.then(|| self.ring.due());
        let ramp = self.ramp.map(|ramp| ramp.next);
        let timers = [self.blocked, self.starved, self.trial_wait, self.probe_again, oldest, ramp];
        let timers = timers.into_iter().chain([self.notice_again, self.drain_deadline]);
        timers.flatten().min().unwrap_or(NEVER)
    }
}
