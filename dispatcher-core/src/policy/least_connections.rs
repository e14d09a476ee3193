//! Fewest live connections, divided by weight; ties rotate.

use super::tournament::Rank;
use super::{Candidate, UNAVAILABLE};

impl Rank for Candidate {
    /// Fractions are compared by cross-multiplication: exact, and within 64 bits by the bounds on
    /// costs and weights.
    fn is_before(self, other: Candidate) -> bool {
        self.cost * u64::from(other.weight) < other.cost * u64::from(self.weight)
    }

    fn is_available(self) -> bool {
        self.cost < UNAVAILABLE
    }
}

#[cfg(test)]
mod tests {
    use super::super::tournament::Tournament;
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
    fn no_worker_is_available() {
        assert_eq!(choose(&list(&[(UNAVAILABLE, 1), (UNAVAILABLE, 1)]), 1), None);
        assert_eq!(choose(&[], 7), None);
        assert_eq!(Tournament::default().choose::<Candidate>(&[], 0), None);
    }

    #[test]
    fn the_largest_costs_and_weights_do_not_overflow() {
        let max = u64::from(u32::MAX) + 1;
        let list = list(&[(UNAVAILABLE, 1), (max, 1), (max, 65_535)]);
        assert_eq!(choose(&list, 0), Some(2));
        assert_eq!(choose(&list[..2], 0), Some(1));
    }

    /// The plain scan that the tournament replaces.
    fn scan(list: &[Candidate], start: usize) -> Option<usize> {
        let start = if start < list.len() { start } else { 0 };
        let mut best: Option<usize> = None;
        for at in (start..list.len()).chain(0..start) {
            let candidate = list[at];
            if candidate.cost < UNAVAILABLE
                && best.is_none_or(|best| candidate.is_before(list[best]))
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
