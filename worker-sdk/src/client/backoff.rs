//! The waits between attempts to join.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

const SHORTEST: Duration = Duration::from_millis(1);

/// Exponential back-off between two bounds. Each wait is shortened at random by up to half.
pub(super) struct Backoff {
    min: Duration,
    max: Duration,
    next: Duration,
    random: RandomState,
    draws: u64,
}

impl Backoff {
    pub(super) fn new(min: Duration, max: Duration) -> Backoff {
        // Shorter waits would keep a processor busy.
        let (min, max) = (min.max(SHORTEST), max.max(SHORTEST));
        Backoff { min, max, next: min, random: RandomState::new(), draws: 0 }
    }

    pub(super) fn reset(&mut self) {
        self.next = self.min;
    }

    pub(super) fn next(&mut self) -> Duration {
        let full = self.next;
        self.next = full.saturating_mul(2).min(self.max);
        self.draws += 1;
        // The standard library chooses the key at random, so that workers do not return at the same
        // time.
        let share = (self.random.hash_one(self.draws) % 1024) as u32;
        // Division first, so that no duration overflows.
        full - full / 2 / 1024 * share
    }
}

#[test]
fn the_longest_wait_there_is_does_no_harm() {
    let mut backoff = Backoff::new(Duration::MAX, Duration::MAX);
    for _ in 0..100 {
        assert!(backoff.next() >= Duration::MAX / 2);
    }
}

#[test]
fn waits_double_to_the_maximum_and_shrink_by_half_at_most() {
    let (min, max) = (Duration::from_millis(50), Duration::from_millis(300));
    let mut backoff = Backoff::new(min, max);
    for _ in 0..2 {
        for full in [50, 100, 200, 300, 300].map(Duration::from_millis) {
            let wait = backoff.next();
            assert!(wait <= full && wait >= full / 2, "{wait:?} of {full:?}");
        }
        backoff.reset();
    }
}
