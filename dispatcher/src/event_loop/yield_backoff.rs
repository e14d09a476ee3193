//! Decides whether to yield the CPU before sleeping, from the duration of the last yields.
//!
//! A yield pays where cores are shared with clients and workers that sleep often: it is over in
//! microseconds, and the next turn has more to do. Beside a process that only computes, it would
//! cost a time slice of milliseconds, in which a sleeper would have been woken at once. So a long
//! yield is followed by a pause without yields, which doubles each time, and a run of short yields
//! resets the pause.

use std::time::Duration;

use dispatcher_core::Time;

/// A yield this long shows that another process computes on this core.
const LONG: Duration = Duration::from_millis(1);

const MIN_PAUSE: Duration = Duration::from_millis(20);
const MAX_PAUSE: Duration = Duration::from_secs(2);

/// So many short yields in a row reset the pause.
const TRUST: u32 = 64;

#[derive(Debug)]
pub(super) struct YieldBackoff {
    paused_until: Time,
    next_pause: Duration,
    short: u32,
}

impl Default for YieldBackoff {
    fn default() -> YieldBackoff {
        YieldBackoff { paused_until: Time(0), next_pause: MIN_PAUSE, short: 0 }
    }
}

impl YieldBackoff {
    pub(super) fn wanted(&self, now: Time) -> bool {
        self.paused_until <= now
    }

    /// Records a yield that ended at `now`.
    pub(super) fn took(&mut self, now: Time, took: Duration) {
        if took > LONG {
            self.short = 0;
            self.paused_until = now + self.next_pause;
            self.next_pause = (self.next_pause * 2).min(MAX_PAUSE);
        } else {
            self.short += 1;
            if self.short >= TRUST {
                self.short = 0;
                self.next_pause = MIN_PAUSE;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_yields_pause_longer_each_time_and_short_ones_reset_it() {
        let mut yield_backoff = YieldBackoff::default();
        let mut now = Time(1_000_000_000);
        assert!(yield_backoff.wanted(now));
        for pause in [20, 40, 80, 160, 320, 640, 1280, 2000, 2000] {
            yield_backoff.took(now, Duration::from_millis(3));
            let pause = Duration::from_millis(pause);
            assert!(!yield_backoff.wanted(now + (pause - Duration::from_nanos(1))));
            now = now + pause;
            assert!(yield_backoff.wanted(now));
        }
        for _ in 0..TRUST {
            yield_backoff.took(now, Duration::from_micros(50));
            assert!(yield_backoff.wanted(now));
        }
        yield_backoff.took(now, Duration::from_millis(3));
        assert!(!yield_backoff.wanted(now));
        assert!(yield_backoff.wanted(now + MIN_PAUSE));
    }
}
