//! Derives from a worker's takes whether it is trusted, how long a connection may wait for it, and
//! when it gets another trial.
//!
//! Pure arithmetic on one worker. Guarantees: trust comes from takes only; an answered probe shows
//! that the process lives. `docs/HANDOFF.md` describes the rule and its parameters; `handoff.rs`
//! decides what follows for connections.

use std::time::Duration;

use super::types::Time;

/// Patience is this multiple of the longest take that the worker usually needs.
const PATIENCE_FACTOR: u32 = 3;

/// The recorded peak loses a tenth at most once in this time, and only at a take.
const DECAY_EVERY: Duration = Duration::from_secs(1);

/// The peak also keeps its value for at least this many batches: where connections are rare, each
/// take says little about the longest.
const DECAY_BATCHES: u32 = 4;

/// Batches of takes that a worker needs before connections of other workers move to it: a single
/// sample of an event loop's round depends on its phase.
pub(super) const PROOF: u32 = 3;

/// After this many batches the longest take is known.
const KNOWN: u32 = 8;

/// Takes closer together than this are one batch: one round of an event loop.
const BATCH: Duration = Duration::from_millis(1);

/// Back-off between failed trials: its first value, and its limits for workers that have taken a
/// connection before and for those that never have.
const BACK_OFF: Duration = Duration::from_secs(1);
const BACK_OFF_MAX: Duration = Duration::from_secs(8);
const BACK_OFF_MAX_UNKNOWN: Duration = Duration::from_secs(600);

/// A worker that becomes suspect again within `RELAPSE_WITHIN` waits longer for its next trial: the
/// first wait and its limit.
const RELAPSE_WITHIN: Duration = Duration::from_secs(30);
const RELAPSE: Duration = Duration::from_millis(500);
const RELAPSE_MAX: Duration = Duration::from_secs(8);

/// With gaps between takes longer than this, no connection is sent ahead, because it would wait.
const PREFETCH_GAP: Duration = Duration::from_millis(10);

/// Connections for about this time are sent ahead, at most [`PREFETCH_MAX`].
const PREFETCH_TIME: Duration = Duration::from_micros(500);
const PREFETCH_MAX: u32 = 15;

/// What is known about a worker from its takes.
#[derive(Clone, Debug)]
pub(super) struct Trust {
    /// It has taken a connection since it joined, or since it was last suspect.
    pub(super) proven: bool,
    /// It has ever taken a connection.
    pub(super) ever: bool,
    /// The longest time it usually needs to take a connection.
    pub(super) peak: Duration,
    decayed: Time,
    decayed_batches: u32,
    /// Takes in the current batch, and when it began.
    batch: u32,
    batch_began: Time,
    pub(super) batches: u32,
    /// Moving average of the time between takes, in nanoseconds, at most twice [`PREFETCH_GAP`].
    gap: u64,
    pub(super) last_take: Time,
    /// Since when the connection that made it suspect has waited: `Some` until it takes something
    /// or answers.
    pub(super) stall: Option<Time>,
    /// How long it needed to answer its last probe; `None` again when it becomes suspect.
    pub(super) answer: Option<Duration>,
    /// Consecutive failed trials.
    pub(super) failed: u32,
    back_off: Duration,
    suspected: Option<Time>,
    relapse: Duration,
}

impl Trust {
    /// For a worker that joins at `now`, and has `served` clients before.
    pub(super) fn new(now: Time, served: bool) -> Trust {
        Trust {
            proven: served,
            ever: false,
            peak: Duration::ZERO,
            decayed: now,
            decayed_batches: 0,
            batch: 0,
            batch_began: Time::default(),
            batches: 0,
            gap: 2 * PREFETCH_GAP.as_nanos() as u64,
            last_take: Time::default(),
            stall: None,
            answer: None,
            failed: 0,
            back_off: BACK_OFF,
            suspected: None,
            relapse: Duration::ZERO,
        }
    }

    /// For a worker that always counts as trusted.
    pub(super) fn full(now: Time) -> Trust {
        Trust { ever: true, batches: PROOF, ..Trust::new(now, true) }
    }

    /// How many untaken connections a worker with only busy threads may have, so that its next free
    /// thread finds one. `turnaround` is how long one of its threads usually is away from `accept`.
    pub(super) fn prefetch(&self, turnaround: Option<Duration>) -> u32 {
        let gap = turnaround.map_or(u64::MAX, nanos).min(self.gap);
        if gap > nanos(PREFETCH_GAP) {
            return 0;
        }
        1 + (nanos(PREFETCH_TIME) / gap.max(1)).min(u64::from(PREFETCH_MAX)) as u32
    }

    /// How long a connection that has been moved `moves` times may wait before the worker is
    /// suspect.
    pub(super) fn patience(&self, timeout: Duration, longest: Duration, moves: u8) -> Duration {
        // The longest of a few takes may be shorter than what the worker usually needs. The answer
        // to a probe is one more sample.
        let peak = match self.batches < KNOWN {
            true => self.peak.max(self.answer.filter(|_| self.ever).unwrap_or_default()),
            false => self.peak,
        };
        let usual = timeout.max(peak.saturating_mul(PATIENCE_FACTOR));
        usual.saturating_mul(1 << moves.min(16)).min(longest.max(timeout))
    }

    /// The worker took, at `taken`, a connection that was sent at `sent`. Returns whether this take
    /// made it trusted.
    pub(super) fn took(&mut self, sent: Time, taken: Time, timeout: Duration) -> bool {
        // A take counts from the later of its handoff and the take before it; otherwise the wait in
        // the worker's own queue would increase the patience, which would increase the wait.
        let mut latency = taken - sent.max(self.last_take);
        if let Some(since) = self.stall.take() {
            latency = latency.max(self.clipped(taken - since, timeout));
        }
        if taken - self.decayed >= DECAY_EVERY
            && self.batches >= self.decayed_batches + DECAY_BATCHES
        {
            self.peak = self.peak * 9 / 10;
            self.decayed = taken;
            self.decayed_batches = self.batches;
        }
        self.peak = self.peak.max(latency);
        let between = nanos(taken - self.last_take).min(2 * nanos(PREFETCH_GAP));
        self.gap = (self.gap * 9 + between) / 10;
        self.last_take = self.last_take.max(taken);
        if self.batch == 0 || taken - self.batch_began >= BATCH {
            self.batches = self.batches.saturating_add(1);
            (self.batch, self.batch_began) = (0, taken);
        }
        self.batch = self.batch.saturating_add(1);
        self.ever = true;
        (self.back_off, self.failed) = (BACK_OFF, 0);
        !std::mem::replace(&mut self.proven, true)
    }

    /// The worker answered a probe after `needed`. That measures its round and shows that it lives;
    /// it does not restore trust.
    pub(super) fn answered(&mut self, now: Time, needed: Duration, timeout: Duration) {
        self.answer = Some(needed);
        if let Some(since) = self.stall.take() {
            self.peak = self.peak.max(self.clipped(now - since, timeout));
        }
    }

    /// The part of a stall that counts: one stop of 5 s must not give 15 s of patience.
    fn clipped(&self, stalled: Duration, timeout: Duration) -> Duration {
        stalled.min(2 * timeout.max(self.peak.saturating_mul(PATIENCE_FACTOR)))
    }

    /// The worker has left a connection that was sent at `sent` untaken for too long.
    pub(super) fn stalled(&mut self, sent: Time) {
        self.stall = Some(self.stall.map_or(sent, |since| since.min(sent)));
        // The worker is probed again: the answer ends the stall and determines the length of the
        // next trial.
        self.answer = None;
    }

    /// The worker becomes suspect. Returns until when it gets no trial.
    pub(super) fn suspect(&mut self, now: Time) -> Option<Time> {
        self.proven = false;
        if self.failed > 0 {
            return None;
        }
        let relapsed = self.suspected.replace(now).is_some_and(|last| now - last < RELAPSE_WITHIN);
        self.relapse = match relapsed {
            true => (self.relapse * 2).clamp(RELAPSE, RELAPSE_MAX),
            false => Duration::ZERO,
        };
        relapsed.then(|| now + self.relapse)
    }

    /// The worker failed a trial. Returns when the next one may be.
    pub(super) fn trial_failed(&mut self, now: Time) -> Time {
        self.failed = self.failed.saturating_add(1);
        let next = now + self.back_off;
        let most = if self.ever { BACK_OFF_MAX } else { BACK_OFF_MAX_UNKNOWN };
        self.back_off = (self.back_off * 2).min(most);
        next
    }

    /// The worker was short of descriptors: it has to earn trust again, one connection at a time.
    pub(super) fn restart(&mut self) {
        (self.proven, self.batches, self.decayed_batches) = (false, 0, 0);
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const T: Duration = Duration::from_millis(200);
    const LONGEST: Duration = Duration::from_secs(30);

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn at(millis: u64) -> Time {
        Time(millis * 1_000_000)
    }

    #[test]
    fn patience_follows_the_longest_take_and_doubles_with_each_move() {
        let mut trust = Trust::new(at(0), false);
        assert_eq!(trust.patience(T, LONGEST, 0), T, "nothing is known yet");
        trust.took(at(0), at(320), T);
        assert_eq!(trust.patience(T, LONGEST, 0), ms(960));
        trust.answered(at(700), ms(500), T);
        assert_eq!(trust.patience(T, LONGEST, 0), ms(1_500), "an answer is a sample too, at first");
        for round in 1..10 {
            trust.took(at(320 * round), at(320 * (round + 1)), T);
        }
        assert_eq!(trust.patience(T, LONGEST, 0), ms(960));
        assert_eq!(trust.patience(T, LONGEST, 2), ms(3_840));
        assert_eq!(trust.patience(T, LONGEST, 200), LONGEST);
    }

    #[test]
    fn the_peak_decays_with_time_and_takes_not_with_takes_alone() {
        let mut trust = Trust::new(at(0), false);
        trust.took(at(0), at(400), T);
        for _ in 0..25 {
            trust.took(at(4_990), at(5_000), T);
        }
        assert_eq!(trust.peak, ms(400), "one round of 25 takes forgets nothing");
        for round in 0..4 {
            trust.took(at(6_000 + round), at(6_001 + round), T);
        }
        assert_eq!(trust.peak, ms(360), "a few rounds and a second");
    }

    #[test]
    fn a_queue_behind_one_slow_take_does_not_count_as_slow_takes() {
        let mut trust = Trust::new(at(0), false);
        for take in 1..=50 {
            trust.took(at(0), at(20 * take), T);
        }
        assert_eq!(trust.peak, ms(20));
    }

    #[test]
    fn a_stall_counts_up_to_a_limit() {
        let mut trust = Trust::new(at(0), false);
        trust.took(at(0), at(1), T);
        trust.stalled(at(100));
        trust.suspect(at(300));
        trust.took(at(5_100), at(5_100), T);
        assert_eq!(trust.peak, 2 * T);
    }

    #[test]
    fn one_round_is_one_batch_and_three_are_proof() {
        let mut trust = Trust::new(at(0), false);
        for round in 1..=3_u64 {
            for _ in 0..10 {
                trust.took(at(0), at(round * 50), T);
            }
        }
        assert_eq!(trust.batches, 3);
    }

    #[test]
    fn trials_back_off_further_where_nothing_was_ever_taken() {
        let mut unknown = Trust::new(at(0), false);
        let pauses = |trust: &mut Trust| -> Vec<u64> {
            (0..12).map(|_| (trust.trial_failed(at(0)) - at(0)).as_secs()).collect()
        };
        assert_eq!(pauses(&mut unknown), [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 600, 600]);
        let mut known = Trust::new(at(0), false);
        known.took(at(0), at(1), T);
        assert_eq!(pauses(&mut known)[..5], [1, 2, 4, 8, 8]);
        known.took(at(0), at(2), T);
        assert_eq!(pauses(&mut known)[0], 1, "a take resets it");
    }

    #[test]
    fn a_relapse_waits_longer_each_time() {
        let mut trust = Trust::new(at(0), false);
        let mut waits = Vec::new();
        for turn in 0..7 {
            trust.took(at(turn * 10_000), at(turn * 10_000), T);
            let now = at(turn * 10_000 + 1_000);
            waits.push(trust.suspect(now).map(|until| (until - now).as_millis()));
        }
        assert_eq!(
            waits,
            [None, Some(500), Some(1_000), Some(2_000), Some(4_000), Some(8_000), Some(8_000)]
        );
    }

    #[test]
    fn connections_are_sent_ahead_to_quick_workers_only() {
        let trust = Trust::new(at(0), false);
        assert_eq!(trust.prefetch(None), 0);
        assert_eq!(trust.prefetch(Some(ms(20))), 0);
        assert_eq!(trust.prefetch(Some(ms(1))), 1);
        assert_eq!(trust.prefetch(Some(Duration::from_micros(50))), 11);
        assert_eq!(trust.prefetch(Some(Duration::ZERO)), 16);
    }
}
