//! The first of many candidates, updated incrementally.
//!
//! Owns a tournament tree in which each node has the better of its two halves. A change costs at
//! most as many comparisons as the tree is deep; a decision does not scan the candidates. The
//! policy defines the order.

/// No candidate.
const NO_WORKER: u32 = u32::MAX;

/// The order in a tournament.
pub(super) trait Rank: Copy {
    /// Whether this candidate goes before the other. An ineligible candidate goes before none.
    fn is_before(self, other: Self) -> bool;
    /// Whether it is eligible.
    fn is_available(self) -> bool;
}

/// For each node the position of the first candidate below it, the leftmost among equals.
///
/// The root is node 1, the halves of node `n` are nodes `2n` and `2n + 1`; the leaf of position `p`
/// is node `leaves + p`.
#[derive(Debug, Default)]
pub(super) struct Tournament {
    nodes: Vec<u32>,
    /// A power of two, at least the number of candidates.
    leaves: usize,
}

impl Tournament {
    /// Rebuilds the tree after candidates were added or removed.
    pub(super) fn rebuild<R: Rank>(&mut self, list: &[R]) {
        self.leaves = list.len().next_power_of_two().max(2);
        self.nodes.clear();
        self.nodes.resize(2 * self.leaves, NO_WORKER);
        for (leaf, position) in self.nodes[self.leaves..].iter_mut().zip(0..list.len()) {
            *leaf = position as u32;
        }
        for node in (1..self.leaves).rev() {
            self.nodes[node] = self.winner(list, node);
        }
    }

    /// Updates the tree after a change of the candidate at `at`.
    pub(super) fn update<R: Rank>(&mut self, list: &[R], at: usize) {
        let mut node = (self.leaves + at) / 2;
        while node > 0 {
            let winner = self.winner(list, node);
            let before = std::mem::replace(&mut self.nodes[node], winner);
            // The nodes above do not depend on a candidate that neither won before nor wins now.
            if before == winner && winner != at as u32 {
                return;
            }
            node /= 2;
        }
    }

    /// Among equals the left one, which comes first in the list.
    fn winner<R: Rank>(&self, list: &[R], node: usize) -> u32 {
        let (left, right) = (self.nodes[2 * node], self.nodes[2 * node + 1]);
        match (list.get(left as usize), list.get(right as usize)) {
            (Some(&a), Some(&b)) if b.is_before(a) => right,
            (Some(_), _) => left,
            (None, _) => right,
        }
    }

    /// The position of the first candidate; among equals the next from `start` on, cyclically.
    #[inline]
    pub(super) fn choose<R: Rank>(&self, list: &[R], start: usize) -> Option<usize> {
        let first = *self.nodes.get(1)?;
        let best = *list.get(first as usize)?;
        if !best.is_available() {
            return None;
        }
        let is_equal = |position: u32| {
            list.get(position as usize).is_some_and(|&candidate| !best.is_before(candidate))
        };
        // Walks up from the leaf at `start`: the subtrees to the right of the path come after it,
        // the nearest first.
        if start < list.len() {
            let mut node = self.leaves + start;
            if is_equal(start as u32) {
                return Some(start);
            }
            while node > 1 {
                if node.is_multiple_of(2) && is_equal(self.nodes[node + 1]) {
                    return Some(self.nodes[node + 1] as usize);
                }
                node /= 2;
            }
        }
        Some(first as usize)
    }
}
