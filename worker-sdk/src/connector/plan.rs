//! How often and how long a connector tries: the numbers of attempts, time limits and back-off.

use std::time::Duration;

use super::set_aside::{doubled, fraction};

/// The limits of one round of attempts, and what follows a round without success.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// Attempts on the current address, at least 1.
    pub(crate) max_retries: u32,
    /// Attempts on other addresses after that.
    pub(crate) max_retries_alternative: u32,
    /// The time limit of one attempt.
    pub(crate) attempt_timeout: Duration,
    /// The time limit of a round: attempts, pauses and look-ups.
    pub(crate) total_timeout: Duration,
    pub(crate) back_off: BackOff,
    pub(crate) persistence: Persistence,
}

/// What follows a round in which every attempt failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Persistence {
    /// The application is asked.
    Ask,
    /// The next round.
    Rounds,
    /// There are no rounds and no limits: each address is tried as soon as its pause is over.
    Endless,
}

/// The wait before an attempt that is not the first.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BackOff {
    pub(crate) first: Duration,
    pub(crate) most: Duration,
}

impl BackOff {
    /// Exponential, with full jitter: between nothing and `first`, doubled with each failure in a
    /// row but the first, at most `most`.
    pub(crate) fn wait(self, failures: u32, random: u64) -> Duration {
        doubled(self.first, failures.saturating_sub(1), self.most).mul_f64(fraction(random))
    }
}

#[test]
fn the_wait_has_full_jitter_and_grows_to_its_maximum() {
    let back_off = BackOff { first: Duration::from_millis(100), most: Duration::from_secs(1) };
    let mut rng = fastrand::Rng::with_seed(7);
    for (failures, full) in [(1, 100), (2, 200), (3, 400), (4, 800), (5, 1_000), (u32::MAX, 1_000)]
    {
        let full = Duration::from_millis(full);
        let waits: Vec<Duration> =
            (0..1_000).map(|_| back_off.wait(failures, rng.u64(..))).collect();
        assert!(waits.iter().all(|wait| *wait <= full), "{failures}");
        // No tenth of the range is empty or has twice its share.
        for part in 0..10 {
            let range = full / 10 * part..full / 10 * (part + 1);
            let count = waits.iter().filter(|wait| range.contains(wait)).count();
            assert!((50..200).contains(&count), "{count} in {range:?}");
        }
    }
}
