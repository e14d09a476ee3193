//! Fewest live connections for its weight.
//!
//! Owns an index over the candidates: a tournament in which each node names the better of its two halves. A change costs
//! as many comparisons as the tree is deep, and often fewer; a decision needs no look at those who are not chosen.

use super::{Candidate, UNAVAILABLE};

/// No candidate here.
const NOBODY: u32 = u32::MAX;

/// For each node the position of the least candidate below it, the first among equals.
///
/// The root is node 1, the halves of node `n` are nodes `2n` and `2n + 1`; the leaf of position `p` is node `leaves + p`.
#[derive(Debug, Default)]
pub(in crate::pool) struct Tournament {
    nodes: Vec<u32>,
    /// A power of two, at least the number of candidates.
    leaves: usize,
}

/// Whether `a` has less cost for its weight than `b`.
///
/// Fractions are compared by cross-multiplication: exact, and within 64 bits by the bound on costs.
fn is_less(a: Candidate, b: Candidate) -> bool {
    a.cost * u64::from(b.weight) < b.cost * u64::from(a.weight)
}

impl Tournament {
    /// Candidates were added or removed: all is played again.
    pub(super) fn rebuild(&mut self, list: &[Candidate]) {
        self.leaves = list.len().next_power_of_two().max(2);
        self.nodes.clear();
        self.nodes.resize(2 * self.leaves, NOBODY);
        for (leaf, position) in self.nodes[self.leaves..].iter_mut().zip(0..list.len()) {
            *leaf = position as u32;
        }
        for node in (1..self.leaves).rev() {
            self.nodes[node] = self.winner(list, node);
        }
    }

    /// The candidate at `at` has changed.
    pub(super) fn update(&mut self, list: &[Candidate], at: usize) {
        let mut node = (self.leaves + at) / 2;
        while node > 0 {
            let winner = self.winner(list, node);
            let before = std::mem::replace(&mut self.nodes[node], winner);
            // Above here nothing depends on a candidate that neither won nor wins.
            if before == winner && winner != at as u32 {
                return;
            }
            node /= 2;
        }
    }

    /// The left one among equals: it comes first in the list.
    fn winner(&self, list: &[Candidate], node: usize) -> u32 {
        let (left, right) = (self.nodes[2 * node], self.nodes[2 * node + 1]);
        match (list.get(left as usize), list.get(right as usize)) {
            (Some(&a), Some(&b)) if is_less(b, a) => right,
            (Some(_), _) => left,
            (None, _) => right,
        }
    }

    /// The position of the candidate with the least cost for its weight; among equals the first from `start` on, cyclically.
    #[inline]
    pub(super) fn choose(&self, list: &[Candidate], start: usize) -> Option<usize> {
        let first = *self.nodes.get(1)?;
        let least = *list.get(first as usize)?;
        if least.cost >= UNAVAILABLE {
            return None;
        }
        let is_equal = |position: u32| {
            list.get(position as usize).is_some_and(|&candidate| !is_less(least, candidate))
        };
        // Upwards from the leaf at `start`: what lies to the right of the path comes after it, the nearest first.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn list(costs: &[(u64, u32)]) -> Vec<Candidate> {
        costs
            .iter()
            .zip(0..)
            .map(|(&(cost, weight), worker)| Candidate { cost, weight, worker })
            .collect()
    }

    fn choose(list: &[Candidate], start: usize) -> Option<usize> {
        let mut tournament = Tournament::default();
        tournament.rebuild(list);
        tournament.choose(list, start)
    }

    #[test]
    fn least_cost_for_its_weight() {
        assert_eq!(choose(&list(&[(3, 1), (4, 2), (9, 3)]), 0), Some(1));
    }

    #[test]
    fn ties_go_to_the_first_from_the_start_on() {
        let list = list(&[(2, 1), (4, 2), (2, 1)]);
        assert_eq!(choose(&list, 0), Some(0));
        assert_eq!(choose(&list, 1), Some(1));
        assert_eq!(choose(&list, 2), Some(2));
        assert_eq!(choose(&list, 3), Some(0));
    }

    #[test]
    fn nobody_available() {
        assert_eq!(choose(&list(&[(UNAVAILABLE, 1), (UNAVAILABLE, 1)]), 1), None);
        assert_eq!(choose(&[], 7), None);
        assert_eq!(Tournament::default().choose(&[], 0), None);
    }

    #[test]
    fn the_largest_costs_and_weights_do_not_overflow() {
        let max = u64::from(u32::MAX) + 1;
        let list = list(&[(UNAVAILABLE, 1), (max, 1), (max, 65_535)]);
        assert_eq!(choose(&list, 0), Some(2));
        assert_eq!(choose(&list[..2], 0), Some(1));
    }

    /// The plain scan that the tournament stands for.
    fn scan(list: &[Candidate], start: usize) -> Option<usize> {
        let start = if start < list.len() { start } else { 0 };
        let mut best: Option<usize> = None;
        for at in (start..list.len()).chain(0..start) {
            let candidate = list[at];
            if candidate.cost < UNAVAILABLE
                && best.is_none_or(|best| is_less(candidate, list[best]))
            {
                best = Some(at);
            }
        }
        best
    }

    proptest::proptest! {
        #[test]
        fn as_a_scan_would_choose(
            costs in proptest::collection::vec((1u64..6, 1u32..4, proptest::bool::ANY), 1..40),
            changes in proptest::collection::vec((0usize..40, 1u64..6, 1u32..4, 0usize..41), 0..100),
        ) {
            let mut list: Vec<Candidate> = costs
                .iter()
                .zip(0..)
                .map(|(&(cost, weight, here), worker)| {
                    let cost = if here { cost } else { UNAVAILABLE };
                    Candidate { cost, weight: if here { weight } else { 1 }, worker }
                })
                .collect();
            let mut tournament = Tournament::default();
            tournament.rebuild(&list);
            for (at, cost, weight, start) in changes {
                let at = at % list.len();
                (list[at].cost, list[at].weight) =
                    if cost == 5 { (UNAVAILABLE, 1) } else { (cost, weight) };
                tournament.update(&list, at);
                proptest::prop_assert_eq!(tournament.choose(&list, start), scan(&list, start));
            }
        }
    }
}
