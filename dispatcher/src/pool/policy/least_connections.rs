//! Fewest live connections for its weight.

use super::{Candidate, UNAVAILABLE};

/// The position of the candidate with the least `cost / weight`; among equals the first from `start` on, cyclically.
///
/// Fractions are compared by cross-multiplication: exact, and within 64 bits by the bound on costs.
pub(in crate::pool) fn choose(list: &[Candidate], start: usize) -> Option<usize> {
    let start = if start < list.len() { start } else { 0 };
    let (before, after) = list.split_at(start);
    let mut best_at = None;
    let (mut best_cost, mut best_weight) = (UNAVAILABLE, 1);
    let mut scan = |part: &[Candidate], offset: usize| {
        for (i, candidate) in part.iter().enumerate() {
            let weight = u64::from(candidate.weight);
            if candidate.cost * best_weight < best_cost * weight {
                (best_cost, best_weight) = (candidate.cost, weight);
                best_at = Some(offset + i);
            }
        }
    };
    scan(after, start);
    scan(before, 0);
    best_at
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
    }

    #[test]
    fn the_largest_costs_and_weights_do_not_overflow() {
        let max = u64::from(u32::MAX) + 1;
        let list = list(&[(UNAVAILABLE, 1), (max, 1), (max, 65_535)]);
        assert_eq!(choose(&list, 0), Some(2));
        assert_eq!(choose(&list[..2], 0), Some(1));
    }
}
