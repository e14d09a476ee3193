//! A run's clients: their addresses, the access rules, and their affinity keys. All of them are
//! drawn from the plan's seed.

use std::time::Duration;

use dispatch_protocol::ClientAddr;

use super::Random;
use dispatcher_core::{AccessControl, AccessRules, Affinity, Peek, Rate};
use dispatcher_core::{ClientIdentity, KeySource};

/// Few enough that they repeat, and more than the smallest affinity table holds.
const CLIENTS: u64 = 40;

/// A pool's affinity: none in half of all runs.
pub(super) fn affinity(random: &mut Random) -> Option<Affinity> {
    random.once_in(2).then(|| Affinity {
        key: KeySource::Cookie("ID".to_owned()),
        ttl: Duration::from_millis(1 + random.below(3_000)),
        max_entries: 1 + random.below(60) as u32,
    })
}

/// The limits of first bytes: often too few connections, often too short a time.
pub(super) fn peek(random: &mut Random) -> Peek {
    Peek {
        timeout: Duration::from_millis(1 + random.below(400)),
        max_bytes: 1024,
        max_awaiting: 1 + random.below(40) as u32,
    }
}

/// When a client sends its first bytes, and its key; `None` if it sends none.
pub(super) fn first_words(random: &mut Random) -> Option<(u64, u64)> {
    (!random.once_in(10)).then(|| (random.below(150_000_000), random.below(CLIENTS)))
}

/// The identity of client number `id`: some have none, some have an id that names a process.
pub(super) fn known(id: u64) -> Option<ClientIdentity> {
    let text = match id % 5 {
        0 => return None,
        1 => format!("{id}.p{}", id % 7),
        _ => format!("{id}"),
    };
    KeySource::Cookie(String::new()).of_value(text.as_bytes())
}

/// A client's address: one of a few, or a Unix socket.
pub(super) fn peer(random: &mut Random) -> ClientAddr {
    match random.below(24) as u8 {
        0 => ClientAddr::Unix,
        host => ClientAddr::Inet(([192, 0, 2, host], 40_000).into()),
    }
}

/// Access rules: half of all runs admit every client. Often the table is smaller than the number of
/// clients.
pub(super) fn access_control(random: &mut Random) -> Option<Box<AccessControl>> {
    if random.once_in(2) {
        return None;
    }
    let rate = Rate {
        every: Duration::from_millis(1 + random.below(50)),
        burst: 1 + random.below(40) as u32,
    };
    let rules = AccessRules {
        rate: random.once_in(2).then_some(rate),
        max_queued_per_client: random.once_in(2).then(|| 1 + random.below(20) as u32),
        max_clients: 1 + random.below(40) as u32,
        ..AccessRules::default()
    };
    AccessControl::new(rules, random.number())
}
