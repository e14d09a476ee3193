//! A random worker, in proportion to its weight.

use super::weighted_sampler::WeightedSampler;
use crate::random::Random;

pub(super) fn pick(sampler: &WeightedSampler, random: &mut Random) -> Option<usize> {
    match sampler.total() {
        0 => None,
        total => Some(sampler.find(random.below(total))),
    }
}
