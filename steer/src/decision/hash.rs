//! The numbers of the policy `hash`: weighted rendezvous hashing with integers.
//!
//! `bpf/hash.h` has the same. Highest random weight: Thaler and Ravishankar, "Using name-based
//! mappings to increase hit rates", 1998. With weights the lowest `−ln(u) / w` wins: Schindelhauer
//! and Schomaker, "Weighted distributed hash tables", 2005 (the logarithmic method). Programs in
//! the kernel have no floating point, so the logarithm is a polynomial.

/// The finisher of SplitMix64: every bit of `z` counts for every bit of the result.
pub(super) fn mixed(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Coefficients of q, the highest power first, in units of 2⁻³⁰; see [`distance`].
const Q: [i64; 7] =
    [9_759_190, -45_890_689, 102_680_175, -159_061_941, 215_475_628, -299_100_158, 475_339_163];

/// `-log2(drawn / 2^64)` in units of 2⁻³⁰, at least 1.
///
/// With z = 2⁶³ (1 + x) it is the number of leading zeros plus 1 − log2(1 + x), and log2(1 + x) is
/// x + x (1 − x) q(x); q interpolates at the Chebyshev nodes. The error is below 2·10⁻⁷.
pub(super) fn distance(drawn: u64) -> u64 {
    let z = drawn | 1;
    let whole = z.leading_zeros();
    let x = ((z << whole) >> 33 & 0x3fff_ffff) as i64;
    let y = (1 << 30) - x;
    let q = Q.into_iter().reduce(|q, next| next + ((q * x) >> 30)).unwrap_or(0);
    let part = y - ((((x * y) >> 30) * q) >> 30);
    // A draw of nearly 1 has distance 0: then no weight would count.
    (u64::from(whole) << 30) + part.max(1) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_polynomial_is_the_logarithm() {
        let mut seed = 1u64;
        for n in 0..200_000u64 {
            seed = mixed(seed.wrapping_add(n));
            // All magnitudes, near 1 as well as near 0.
            let drawn = if n % 2 == 0 { seed >> (n % 60) } else { !(seed >> (n % 60)) };
            let exact = -((drawn | 1) as f64 / 2f64.powi(64)).log2();
            let found = distance(drawn) as f64 / 2f64.powi(30);
            assert!((found - exact).abs() < 2e-7, "{drawn:x}: {found} for {exact}");
        }
        assert_eq!((distance(0), distance(u64::MAX), distance(1 << 63)), (64 << 30, 1, 1 << 30));
    }

    #[test]
    fn a_greater_draw_is_never_further() {
        for from in [1u64, 1 << 20, 1 << 40, 1 << 62, 1 << 63, u64::MAX - (1 << 50)] {
            let step = (from >> 36).max(1);
            let distances = (0..1000).map(|n| distance(from.saturating_add(n * step)));
            assert!(distances.is_sorted_by(|a, b| a >= b), "{from}");
        }
    }
}
