//! Weighted sampling with a tree of sums: a draw and a change each take as many steps as the tree
//! is deep.

use super::{Candidate, UNAVAILABLE};

/// For each node the weight of all available candidates below it, in the layout of a tournament:
/// the root is node 1, the halves of node `n` are `2n` and `2n + 1`, the leaf of position `p` is
/// `leaves + p`.
#[derive(Debug, Default)]
pub(super) struct WeightedSampler {
    sums: Vec<u64>,
    leaves: usize,
}

fn weight(candidate: &Candidate) -> u64 {
    if candidate.cost < UNAVAILABLE { u64::from(candidate.weight) } else { 0 }
}

impl WeightedSampler {
    pub(super) fn rebuild(&mut self, list: &[Candidate]) {
        self.leaves = list.len().next_power_of_two().max(2);
        self.sums.clear();
        self.sums.resize(2 * self.leaves, 0);
        for (leaf, candidate) in self.sums[self.leaves..].iter_mut().zip(list) {
            *leaf = weight(candidate);
        }
        for node in (1..self.leaves).rev() {
            self.sums[node] = self.sums[2 * node] + self.sums[2 * node + 1];
        }
    }

    pub(super) fn update(&mut self, list: &[Candidate], at: usize) {
        let mut node = self.leaves + at;
        let (before, after) = (self.sums[node], weight(&list[at]));
        // Most changes are of the load only.
        if before == after {
            return;
        }
        while node > 0 {
            self.sums[node] = self.sums[node] + after - before;
            node /= 2;
        }
    }

    /// The sum of all weights.
    pub(super) fn total(&self) -> u64 {
        self.sums.get(1).copied().unwrap_or(0)
    }

    /// The weight of the candidate at `at`.
    pub(super) fn weight(&self, at: usize) -> u64 {
        self.sums[self.leaves + at]
    }

    /// The position that a draw selects. `number` is below the total; the weights are cumulated in
    /// list order.
    pub(super) fn find(&self, mut number: u64) -> usize {
        let mut node = 1;
        while node < self.leaves {
            node *= 2;
            if number >= self.sums[node] {
                number -= self.sums[node];
                node += 1;
            }
        }
        node - self.leaves
    }

    /// The sum of the weights before the candidate at `at`.
    pub(super) fn before(&self, at: usize) -> u64 {
        let mut node = self.leaves + at;
        let mut sum = 0;
        while node > 1 {
            if node % 2 == 1 {
                sum += self.sums[node - 1];
            }
            node /= 2;
        }
        sum
    }
}
