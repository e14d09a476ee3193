//! The waits between attempts to join.
//!
//! While no dispatcher listens, attempts come at a steady rate, however long that lasts: so a
//! worker joins within a known time after the dispatcher is ready. An attempt costs the worker some
//! microseconds and no other process anything. A dispatcher that refuses workers is asked less and
//! less often. All waits are shortened at random, so that workers do not return at the same time.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

/// The longest wait while no dispatcher listens. With the time for a join, a worker joins within
/// 200 ms.
const STEADY: Duration = Duration::from_millis(100);

/// Shorter waits would keep a processor busy.
const SHORTEST: Duration = Duration::from_millis(1);

/// Chooses the waits. Each wait is shortened by up to half.
pub(super) struct Backoff {
    min: Duration,
    max: Duration,
    /// The wait after the next refusal, before it is shortened.
    next: Duration,
    random: RandomState,
    draws: u64,
}

impl Backoff {
    pub(super) fn new(min: Duration, max: Duration) -> Backoff {
        let (min, max) = (min.max(SHORTEST), max.max(SHORTEST));
        Backoff { min, max, next: min, random: RandomState::new(), draws: 0 }
    }

    /// A dispatcher has accepted this worker.
    pub(super) fn joined(&mut self) {
        self.next = self.min;
    }

    /// The first wait after the loss of a dispatcher.
    pub(super) fn lost(&mut self) -> Duration {
        self.shortened(self.min.min(STEADY))
    }

    /// No dispatcher has dealt with the last attempt.
    pub(super) fn absent(&mut self) -> Duration {
        self.shortened(self.max.min(STEADY))
    }

    /// A dispatcher has refused the last attempt: exponential back-off.
    pub(super) fn refused(&mut self) -> Duration {
        let full = self.next;
        self.next = full.saturating_mul(2).min(self.max);
        self.shortened(full)
    }

    fn shortened(&mut self, full: Duration) -> Duration {
        self.draws += 1;
        // The standard library chooses the key at random.
        let share = (self.random.hash_one(self.draws) % 1024) as u32;
        // Division first, so that no duration overflows.
        full - full / 2 / 1024 * share
    }
}

#[test]
fn the_longest_wait_there_is_does_no_harm() {
    let mut backoff = Backoff::new(Duration::MAX, Duration::MAX);
    for _ in 0..100 {
        assert!(backoff.refused() >= Duration::MAX / 2);
        assert!(backoff.lost() <= STEADY && backoff.absent() <= STEADY);
    }
}

#[test]
fn waits_after_refusals_double_to_the_maximum_until_a_join() {
    let (min, max) = (Duration::from_millis(50), Duration::from_millis(300));
    let mut backoff = Backoff::new(min, max);
    for _ in 0..2 {
        for full in [50, 100, 200, 300, 300].map(Duration::from_millis) {
            let wait = backoff.refused();
            assert!(wait <= full && wait >= full / 2, "{wait:?} of {full:?}");
            // A dispatcher that is away meanwhile does not change them.
            assert!(backoff.absent() <= STEADY);
        }
        backoff.joined();
    }
}

/// The attempts of a worker that loses its dispatcher at time 0, with an outage of this length:
/// their number, and how long after the outage the last of them is made.
#[cfg(test)]
fn attempts(backoff: &mut Backoff, outage: Duration) -> (u32, Duration) {
    let (mut now, mut count) = (backoff.lost(), 1);
    while now < outage {
        now += backoff.absent();
        count += 1;
    }
    backoff.joined();
    (count, now - outage)
}

#[test]
fn a_long_outage_delays_the_return_no_longer_than_a_short_one() {
    let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(5));
    for outage in [0, 1, 30, 3_000, 30_000, 3_600_000].map(Duration::from_millis) {
        let mut latest = Duration::ZERO;
        for _ in 0..50 {
            let (count, late) = attempts(&mut backoff, outage);
            assert!(late <= STEADY, "{late:?} after {outage:?}");
            // Few attempts: at most twenty in a second.
            assert!(u128::from(count) <= outage.as_millis() / 50 + 2, "{count} in {outage:?}");
            latest = latest.max(late);
        }
        println!("{outage:?}: at most {latest:?} late");
    }
}

#[test]
fn workers_that_lose_a_dispatcher_return_at_random_times() {
    let outage = Duration::from_secs(3);
    let new = || Backoff::new(Duration::from_millis(50), Duration::from_secs(5));
    let mut late: Vec<Duration> = (0..1_000).map(|_| attempts(&mut new(), outage).1).collect();
    late.sort();
    // No tenth of the time has more than three times its share.
    for part in 0..10u32 {
        let range = STEADY / 10 * part..STEADY / 10 * (part + 1);
        let count = late.iter().filter(|late| range.contains(*late)).count();
        assert!(count < 300, "{count} of 1000 between {range:?}");
    }
}
