//! What a run's clients are known by: ids, routes and silences, drawn from the plan's seed like everything else.

use std::time::Duration;

use super::Random;
use crate::affinity::{KeySource, Known};
use crate::pool::{Affinity, Peek};

/// Few enough that they come again, more than the smallest memory holds.
const CLIENTS: u64 = 40;

/// What a pool remembers: for half of all runs nothing.
pub(super) fn affinity(random: &mut Random) -> Option<Affinity> {
    random.once_in(2).then(|| Affinity {
        key: KeySource::Cookie("ID".to_owned()),
        ttl: Duration::from_millis(1 + random.below(3_000)),
        max_entries: 1 + random.below(60) as u32,
    })
}

/// How first bytes are awaited: often too few, often not long enough.
pub(super) fn peek(random: &mut Random) -> Peek {
    Peek {
        timeout: Duration::from_millis(1 + random.below(400)),
        max_bytes: 1024,
        max_awaiting: 1 + random.below(40) as u32,
    }
}

/// When a client speaks, and as whom; `None`: never.
pub(super) fn first_words(random: &mut Random) -> Option<(u64, u64)> {
    (!random.once_in(10)).then(|| (random.below(150_000_000), random.below(CLIENTS)))
}

/// What client number `id` is known by: some not at all, some by an id that names a process.
pub(super) fn known(id: u64) -> Option<Known> {
    let text = match id % 5 {
        0 => return None,
        1 => format!("{id}.p{}", id % 7),
        _ => format!("{id}"),
    };
    KeySource::Cookie(String::new()).of_value(text.as_bytes())
}
