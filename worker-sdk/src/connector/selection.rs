//! The choice among the usable addresses of a list.

use super::set_aside::fraction;

/// Which address a new connection gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Selection {
    /// The first of the list that is usable: the others are its replacements.
    InOrder,
    /// One after the other, beginning with a random one.
    #[default]
    RoundRobin,
    /// Each with the same probability.
    Random,
    /// Each with a probability in proportion to its weight.
    Weighted,
    /// The one that the advice interface names as best, asked for each new connection. If no host
    /// answers: of two at random, in proportion to their weights, the one with the better score of
    /// the last list. Only with [`Addresses::advice`](super::Addresses::advice).
    Best,
}

/// An address of a list.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Candidate<A> {
    pub(crate) address: A,
    /// 0: only when nothing else is left.
    pub(crate) weight: u32,
    /// Lower is better; none: unknown.
    pub(crate) score: Option<f64>,
}

impl<A> Candidate<A> {
    pub(crate) fn new(address: A) -> Candidate<A> {
        Candidate { address, weight: 1, score: None }
    }
}

/// A source of random numbers.
pub(crate) type Random<'a> = &'a mut dyn FnMut() -> u64;

/// Where a round-robin continues; none before the first choice.
#[derive(Debug, Default)]
pub(crate) struct Turn(Option<u64>);

impl Selection {
    /// Chooses one; none only of none.
    pub(super) fn choose<'a, A>(
        self,
        among: &[&'a Candidate<A>],
        turn: &mut Turn,
        random: Random<'_>,
    ) -> Option<&'a Candidate<A>> {
        let count = among.len();
        match self {
            Selection::InOrder => among.first().copied(),
            Selection::RoundRobin => {
                let next = turn.0.unwrap_or_else(&mut *random);
                turn.0 = Some(next.wrapping_add(1));
                among.get(remainder(next, count)?).copied()
            }
            Selection::Random => among.get(remainder(random(), count)?).copied(),
            Selection::Weighted => weighted(among, random),
            Selection::Best => {
                let (first, second) = (weighted(among, random)?, weighted(among, random)?);
                let score = |candidate: &Candidate<A>| candidate.score.unwrap_or(f64::INFINITY);
                Some(if score(second) < score(first) { second } else { first })
            }
        }
    }
}

fn remainder(number: u64, count: usize) -> Option<usize> {
    usize::try_from(number.checked_rem(u64::try_from(count).ok()?)?).ok()
}

fn weighted<'a, A>(among: &[&'a Candidate<A>], random: Random<'_>) -> Option<&'a Candidate<A>> {
    let sum: u64 = among.iter().map(|candidate| u64::from(candidate.weight)).sum();
    if sum == 0 {
        return among.get(remainder(random(), among.len())?).copied();
    }
    let mut left = (fraction(random()) * sum as f64) as u64;
    for candidate in among {
        match left.checked_sub(candidate.weight.into()) {
            Some(rest) => left = rest,
            None => return Some(candidate),
        }
    }
    // Not reached: `left` is less than the sum of all weights.
    among.last().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(selection: Selection, list: &[(u32, Option<f64>)], seed: u64) -> Vec<u32> {
        let candidates: Vec<Candidate<usize>> = list
            .iter()
            .enumerate()
            .map(|(address, &(weight, score))| Candidate { address, weight, score })
            .collect();
        let among: Vec<&Candidate<usize>> = candidates.iter().collect();
        let mut rng = fastrand::Rng::with_seed(seed);
        let (mut turn, mut shares) = (Turn::default(), vec![0; list.len()]);
        for _ in 0..10_000 {
            let chosen = selection.choose(&among, &mut turn, &mut || rng.u64(..)).unwrap();
            shares[chosen.address] += 1;
        }
        shares
    }

    fn about(share: u32, expected: u32) -> bool {
        share.abs_diff(expected) < 300
    }

    #[test]
    fn each_selection_gives_its_shares() {
        let even = [(1, None); 4];
        assert_eq!(shares(Selection::InOrder, &even, 1), [10_000, 0, 0, 0]);
        assert_eq!(shares(Selection::RoundRobin, &even, 2), [2_500; 4]);
        assert!(shares(Selection::Random, &even, 3).iter().all(|&share| about(share, 2_500)));
        let weights = [(1, None), (0, None), (3, None), (6, None)];
        let shares_by_weight = shares(Selection::Weighted, &weights, 4);
        for (share, (weight, _)) in shares_by_weight.iter().zip(weights) {
            assert!(about(*share, 1_000 * weight), "{shares_by_weight:?}");
        }
        assert_eq!(shares_by_weight[1], 0);
        // Without a weight all are equal.
        let none = shares(Selection::Weighted, &[(0, None); 2], 5);
        assert!(about(none[0], 5_000), "{none:?}");
    }

    #[test]
    fn the_worst_by_score_is_avoided_and_no_single_one_gets_all() {
        let scores = [(1, Some(0.1)), (1, Some(0.2)), (1, Some(0.9))];
        let shares = shares(Selection::Best, &scores, 6);
        assert!(shares[2] < 1_500 && shares[0] < 6_500 && shares[1] > 2_500, "{shares:?}");
    }

    #[test]
    fn round_robin_starts_at_random() {
        let firsts: Vec<usize> = (0..100)
            .map(|seed| {
                let candidates: Vec<_> = (0..4).map(Candidate::new).collect();
                let among: Vec<&Candidate<usize>> = candidates.iter().collect();
                let mut rng = fastrand::Rng::with_seed(seed);
                let mut random = || rng.u64(..);
                let mut turn = Turn::default();
                Selection::RoundRobin.choose(&among, &mut turn, &mut random).unwrap().address
            })
            .collect();
        assert!((0..4).all(|n| firsts.iter().filter(|&&first| first == n).count() > 10));
    }

    #[test]
    fn nothing_is_chosen_of_nothing() {
        for selection in [
            Selection::InOrder,
            Selection::RoundRobin,
            Selection::Random,
            Selection::Weighted,
            Selection::Best,
        ] {
            let chosen = selection.choose::<u8>(&[], &mut Turn::default(), &mut || 7);
            assert!(chosen.is_none(), "{selection:?}");
        }
    }
}
