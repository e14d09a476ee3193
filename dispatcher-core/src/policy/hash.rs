//! The worker that the client's key belongs to: weighted rendezvous hashing, without any table.
//!
//! Each worker draws a number from the key and its own name; the highest for its weight wins. So a
//! key stays at its worker while that is eligible, and when a worker leaves, only its own keys
//! move, spread over all others. Highest random weight: Thaler and Ravishankar, "Using name-based
//! mappings to increase hit rates", 1998. With weights `−w / ln(u)` is compared: Schindelhauer and
//! Schomaker, "Weighted distributed hash tables", 2005 (the logarithmic method).

use super::{Candidate, UNAVAILABLE};
use crate::types::AffinityKey;

/// The seed of each worker's numbers.
#[derive(Debug, Default)]
pub(super) struct Rendezvous {
    /// Runs parallel to the candidates.
    nodes: Vec<u64>,
    /// An upper bound of the weights of all candidates so far.
    heaviest: u32,
}

/// A number above 0 and up to 1 that depends only on key and node.
fn draw(key: AffinityKey, node: u64) -> f64 {
    // The finisher of SplitMix64: every bit of both counts for every bit of the result.
    let mut z = key.0 ^ node;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
    ((z >> 11) as f64 + 0.5) / (1u64 << 53) as f64
}

/// Above 0. Infinite for the greatest draw, which rounds to 1: its logarithm may be either zero.
fn score(weight: u32, drawn: f64) -> f64 {
    f64::from(weight) / drawn.ln().abs()
}

impl Rendezvous {
    pub(super) fn add(&mut self, node: u64) {
        self.nodes.push(node);
    }

    pub(super) fn remove(&mut self, at: usize) {
        self.nodes.swap_remove(at);
    }

    pub(super) fn update(&mut self, list: &[Candidate], at: usize) {
        self.heaviest = self.heaviest.max(list[at].weight);
    }

    pub(super) fn pick(&self, list: &[Candidate], key: AffinityKey) -> Option<usize> {
        let mut best = None;
        let mut highest = 0.0;
        // A lower number cannot win even with the highest weight: this saves nearly all logarithms.
        let mut least = 0.0;
        for (at, (candidate, &node)) in list.iter().zip(&self.nodes).enumerate() {
            let drawn = draw(key, node);
            if drawn < least || candidate.cost >= UNAVAILABLE {
                continue;
            }
            let score = score(candidate.weight, drawn);
            if score > highest {
                (best, highest) = (Some(at), score);
                // Slightly less, because of two rounding errors.
                least = (-f64::from(self.heaviest) / score).exp() * (1.0 - 1e-9);
            }
        }
        best
    }

    /// The position with the highest score of those given, each with its weight.
    pub(super) fn owner(
        &self,
        key: AffinityKey,
        among: impl Iterator<Item = (usize, u32)>,
    ) -> Option<usize> {
        let scored = among.map(|(at, weight)| (at, score(weight, draw(key, self.nodes[at]))));
        scored.max_by(|a, b| a.1.total_cmp(&b.1)).map(|(at, _)| at)
    }

    /// The score of the worker at `at` for this key, in units of a configured weight.
    pub(super) fn score(&self, list: &[Candidate], at: usize, key: AffinityKey) -> f64 {
        score(list[at].weight, draw(key, self.nodes[at])) / 256.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_greatest_draw_wins_although_its_score_is_infinite() {
        // The input for which the finisher returns only one-bits.
        const TOP: u64 = 0xcf9a_04af_fa6b_adc0;
        let key = AffinityKey(0);
        assert_eq!(draw(key, TOP), 1.0, "rounded");
        let candidate = Candidate { cost: 1, weight: 256, worker: 0 };
        for nodes in [vec![TOP], vec![TOP, 1], vec![1, TOP]] {
            let list = vec![candidate; nodes.len()];
            let place = nodes.iter().position(|&node| node == TOP);
            let mut rendezvous = Rendezvous::default();
            for (at, node) in nodes.into_iter().enumerate() {
                rendezvous.add(node);
                rendezvous.update(&list, at);
            }
            assert_eq!(rendezvous.pick(&list, key), place);
        }
    }
}
