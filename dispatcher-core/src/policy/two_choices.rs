//! The less loaded, for its weight, of two different workers drawn at random, each as likely as its weight says.
//!
//! Nearly as even as least connections, and no two dispatchers in front of the same workers choose the same ones
//! (Mitzenmacher, "The power of two choices in randomized load balancing", 2001).

use super::Candidate;
use super::tournament::Rank;
use super::weighted_sampler::WeightedSampler;
use crate::random::Random;

/// The one that is chosen, then the other one; twice the same if there is only one.
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
    // A draw among all but the first: step over its share.
    let mut number = random.below(others);
    if number >= sampler.before(first) {
        number += sampler.weight(first);
    }
    let second = sampler.find(number);
    Some(if list[second].is_before(list[first]) { (second, first) } else { (first, second) })
}
