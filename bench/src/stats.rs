//! Medians, percentiles and evenness.

/// The value below which `quantile` of the sorted list lies; 0 for an empty one.
pub fn percentile<T: Copy + Default>(sorted: &[T], quantile: f64) -> T {
    let last = sorted.len().saturating_sub(1);
    let at = (last as f64 * quantile).round() as usize;
    sorted.get(at).copied().unwrap_or_default()
}

/// The median of an unsorted list, the mean of the middle two if their number is even.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        len if len % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

/// Smallest and largest.
pub fn range(values: &[f64]) -> (f64, f64) {
    values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), &value| {
        (low.min(value), high.max(value))
    })
}

/// How evenly connections are spread.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evenness {
    /// Largest over mean; 1 is perfect.
    pub max_over_mean: f64,
    /// Standard deviation over mean; 0 is perfect.
    pub variation: f64,
    /// Largest less smallest.
    pub spread: f64,
}

impl Evenness {
    pub fn of(counts: &[u64]) -> Evenness {
        let values = || counts.iter().map(|&count| count as f64);
        let n = counts.len().max(1) as f64;
        let mean = values().sum::<f64>() / n;
        let variance = values().map(|value| (value - mean).powi(2)).sum::<f64>() / n;
        let (low, high) = range(&values().collect::<Vec<_>>());
        if mean == 0.0 {
            return Evenness { max_over_mean: 1.0, variation: 0.0, spread: 0.0 };
        }
        Evenness {
            max_over_mean: high / mean,
            variation: variance.sqrt() / mean,
            spread: high - low,
        }
    }
}

/// A small generator of random numbers (splitmix64): the same seed gives every contender the same
/// load.
#[derive(Debug)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Above 0, at most 1.
    pub fn unit(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_percentiles() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
        let sorted: Vec<u64> = (0..=100).collect();
        assert_eq!(percentile(&sorted, 0.99), 99);
        assert_eq!(percentile::<u64>(&[], 0.5), 0);
    }

    #[test]
    fn evenness() {
        let even = Evenness::of(&[5, 5, 5]);
        assert_eq!(even, Evenness { max_over_mean: 1.0, variation: 0.0, spread: 0.0 });
        let uneven = Evenness::of(&[1, 3]);
        assert_eq!(uneven, Evenness { max_over_mean: 1.5, variation: 0.5, spread: 2.0 });
    }
}
