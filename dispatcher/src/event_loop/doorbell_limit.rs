//! Detects workers that ring the doorbell without a reason. Each ring wakes the hot thread, and a
//! worker could ring all the time; such a worker is muted for a while.

use std::time::Duration;

use dispatcher_core::Time;

/// So many rings without a change of the scoreboard within [`WINDOW`] are too many. An honest
/// worker rings only when asked, after a change.
const RINGS: u32 = 64;
const WINDOW: Duration = Duration::from_millis(100);

/// The time of the first and of the longest mute; each mute in a row doubles it.
const MIN_MUTE: Duration = Duration::from_millis(100);
const MAX_MUTE: Duration = Duration::from_secs(5);

/// The rings of one worker.
#[derive(Debug, Default)]
pub(super) struct DoorbellLimit {
    /// The scoreboard has changed since the last ring.
    changed: bool,
    idle: u32,
    since: Time,
    mute: Duration,
    /// The end of the current mute.
    pub(super) muted_until: Option<Time>,
}

impl DoorbellLimit {
    /// The scan found a change.
    pub(super) fn note_change(&mut self) {
        self.changed = true;
    }

    /// Counts a ring. True if the worker must be muted until [`DoorbellLimit::muted_until`].
    pub(super) fn rang(&mut self, now: Time) -> bool {
        if std::mem::take(&mut self.changed) {
            self.idle = 0;
            self.mute = Duration::ZERO;
            return false;
        }
        if self.idle == 0 || now - self.since > WINDOW {
            self.since = now;
            self.idle = 0;
        }
        self.idle += 1;
        if self.idle < RINGS || self.muted_until.is_some() {
            return false;
        }
        self.idle = 0;
        self.mute = (self.mute * 2).clamp(MIN_MUTE, MAX_MUTE);
        self.muted_until = Some(now + self.mute);
        true
    }

    /// Ends the mute if its time is over; true if it did.
    pub(super) fn unmute(&mut self, now: Time) -> bool {
        self.muted_until.take_if(|until| *until <= now).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_that_only_rings_is_muted() {
        let mut limit = DoorbellLimit::default();
        let mut now = Time(1_000_000_000);
        let (start, mut heard) = (now, 0);
        while now - start < Duration::from_secs(60) {
            if limit.muted_until.is_none() {
                heard += 1;
                limit.rang(now);
            }
            now = now + Duration::from_micros(10);
            limit.unmute(now);
        }
        assert!(heard < 64 * 20, "{heard} rings in a minute");
    }

    #[test]
    fn a_worker_with_changes_is_never_muted() {
        let mut limit = DoorbellLimit::default();
        for step in 0..100_000 {
            let now = Time(1_000_000 + step * 10_000);
            if step % 50 == 0 {
                limit.note_change();
            }
            assert!(!limit.rang(now));
        }
    }
}
