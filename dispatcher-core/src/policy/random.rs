//! By lot, as likely as its weight says.

use super::lots::Lots;
use crate::random::Random;

pub(super) fn pick(lots: &Lots, random: &mut Random) -> Option<usize> {
    match lots.total() {
        0 => None,
        total => Some(lots.find(random.below(total))),
    }
}
