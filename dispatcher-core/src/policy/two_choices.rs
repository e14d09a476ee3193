//! The less loaded, relative to weight, of two different workers drawn at random in proportion to
//! their weights.
//!
//! Nearly as even as least connections, and two dispatchers in front of the same workers do not
//! choose the same ones (Mitzenmacher, "The power of two choices in randomized load balancing",
//! 2001).

use super::Candidate;
use super::tournament::Rank;
use super::weighted_sampler::WeightedSampler;
use crate::random::Random;

/// The chosen worker, then the other one; the same worker twice if there is only one.
pub(super) fn pick(
    sampler: &WeightedSampler,
    list: &[Candidate],
    random: &mut Random,
) -> Option<(usize, usize)> {
    let first = super::random::pick(sampler, random)?;
    let others = sampler.total() - sampler.weight(first);
    if others == 0 {
        return Some((first, first));
    }
    // A draw among all but the first: skips its share.
    let mut number = random.below(others);
    if number >= sampler.before(first) {
        number += sampler.weight(first);
    }
    let second = sampler.find(number);
    Some(if list[second].is_before(list[first]) { (second, first) } else { (first, second) })
}
