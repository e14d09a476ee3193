//! The less loaded, for its weight, of two different workers drawn by lot, each as likely as its weight says.
//!
//! Nearly as even as least connections, and no two dispatchers in front of the same workers choose the same ones
//! (Mitzenmacher, "The power of two choices in randomized load balancing", 2001).

use super::Candidate;
use super::lots::Lots;
use super::tournament::Rank;
use crate::random::Random;

/// The one that is chosen, then the other one; twice the same if there is only one.
pub(super) fn pick(lots: &Lots, list: &[Candidate], random: &mut Random) -> Option<(usize, usize)> {
    let first = super::random::pick(lots, random)?;
    let others = lots.total() - lots.weight(first);
    if others == 0 {
        return Some((first, first));
    }
    // A lot among all but the first: step over its share.
    let mut number = random.below(others);
    if number >= lots.before(first) {
        number += lots.weight(first);
    }
    let second = lots.find(number);
    Some(if list[second].is_before(list[first]) { (second, first) } else { (first, second) })
}
