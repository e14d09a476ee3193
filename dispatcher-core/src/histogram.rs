//! Histograms of durations: fixed buckets, counted without a lock, an allocation or a system call.
//!
//! Owns the bounds of the buckets. They are log-spaced, 1-2-5 in each decade, so that the error of
//! a quantile is at most a factor of 2.5, and mostly much less.

use std::time::Duration;

/// Most buckets, the last one without a bound included.
const MOST: usize = 20;

/// Nanoseconds from 10 µs to 10 s: from a client's accept to its worker's take.
pub const HANDOFF: &[u64] = &steps::<19>(10_000);

/// Nanoseconds from 50 ns to 1 ms: a decision.
pub const DECISION: &[u64] = &steps::<14>(50);

/// Nanoseconds from 2 µs to 500 ms: a turn of the hot thread.
pub const TURN: &[u64] = &steps::<17>(2_000);

/// `N` bounds from `first` on, which is 1, 2 or 5 of its decade.
const fn steps<const N: usize>(first: u64) -> [u64; N] {
    let mut bounds = [first; N];
    let mut digit = first;
    while digit >= 10 {
        digit /= 10;
    }
    let mut at = 1;
    while at < N {
        let before = bounds[at - 1];
        (bounds[at], digit) = match digit {
            1 => (before * 2, 2),
            2 => (before / 2 * 5, 5),
            _ => (before * 2, 1),
        };
        at += 1;
    }
    bounds
}

/// Durations, by bucket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Histogram {
    bounds: &'static [u64],
    counts: [u64; MOST],
    sum: u64,
}

impl Histogram {
    /// An empty histogram with these bounds, at most nineteen, ascending.
    pub fn new(bounds: &'static [u64]) -> Histogram {
        debug_assert!(bounds.len() < MOST && bounds.is_sorted());
        Histogram { bounds, counts: [0; MOST], sum: 0 }
    }

    /// Counts one duration: in the first bucket whose bound it does not exceed.
    #[inline]
    pub fn record(&mut self, duration: Duration) {
        let nanoseconds = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        let bucket = self.bounds.partition_point(|&bound| bound < nanoseconds);
        self.counts[bucket.min(MOST - 1)] += 1;
        self.sum = self.sum.saturating_add(nanoseconds);
    }

    /// The upper bound of each bucket but the last, in nanoseconds, ascending.
    pub fn bounds(&self) -> &[u64] {
        self.bounds
    }

    /// How many durations are in each bucket; the last one has no bound.
    pub fn counts(&self) -> &[u64] {
        &self.counts[..=self.bounds.len()]
    }

    /// The sum of all durations, in nanoseconds; saturates.
    pub fn sum(&self) -> u64 {
        self.sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_duration_is_in_the_first_bucket_that_covers_it() {
        for bounds in [HANDOFF, DECISION, TURN] {
            let mut histogram = Histogram::new(bounds);
            for &bound in bounds {
                histogram.record(Duration::from_nanos(bound));
                histogram.record(Duration::from_nanos(bound + 1));
            }
            histogram.record(Duration::ZERO);
            histogram.record(Duration::MAX);
            let mut expected = vec![2; bounds.len() + 1];
            expected[bounds.len()] = 2;
            assert_eq!(histogram.counts(), expected);
            assert_eq!(histogram.bounds(), bounds);
            assert_eq!(histogram.sum(), u64::MAX, "saturated");
        }
    }

    #[test]
    fn bounds_are_log_spaced() {
        for bounds in [HANDOFF, DECISION, TURN] {
            for pair in bounds.windows(2) {
                let ratio = pair[1] as f64 / pair[0] as f64;
                assert!((2.0..=2.5).contains(&ratio), "{pair:?}");
            }
        }
    }
}
