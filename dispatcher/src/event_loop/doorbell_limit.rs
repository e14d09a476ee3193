//! Workers that ring without news: a write to the doorbell eventfd wakes the hot thread, and nothing keeps a worker from
//! writing all the time. Decides when not to listen for a while.

use std::time::Duration;

use dispatcher_core::Time;

/// So many rings without news in [`WINDOW`] are too many. An honest worker rings only if asked, and has news then.
const RINGS: u32 = 64;
const WINDOW: Duration = Duration::from_millis(100);

/// How long not to listen, at first and at most: twice as long each time in a row.
const MIN_MUTE: Duration = Duration::from_millis(100);
const MAX_MUTE: Duration = Duration::from_secs(5);

/// The rings of one worker.
#[derive(Debug, Default)]
pub(super) struct DoorbellLimit {
    /// Its scoreboard has changed since the last ring.
    news: bool,
    idle: u32,
    since: Time,
    mute: Duration,
    /// Not listened to until then.
    pub(super) muted_until: Option<Time>,
}

impl DoorbellLimit {
    /// The scan found something.
    pub(super) fn news(&mut self) {
        self.news = true;
    }

    /// It rang. True if it must not be listened to for a while: until [`DoorbellLimit::muted_until`].
    pub(super) fn rang(&mut self, now: Time) -> bool {
        if std::mem::take(&mut self.news) {
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

    /// Whether it is to be listened to again.
    pub(super) fn unmute(&mut self, now: Time) -> bool {
        self.muted_until.take_if(|until| *until <= now).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_that_only_rings_is_heard_a_few_times_a_second() {
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
    fn one_that_has_news_is_always_heard() {
        let mut limit = DoorbellLimit::default();
        for step in 0..100_000 {
            let now = Time(1_000_000 + step * 10_000);
            if step % 50 == 0 {
                limit.news();
            }
            assert!(!limit.rang(now));
        }
    }
}
