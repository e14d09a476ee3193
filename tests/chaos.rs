//! A short chaos test on real processes. `tests/chaos/main.rs` runs the same for any duration.
#![allow(clippy::unwrap_used)]

#[path = "chaos/mod.rs"]
mod chaos;

use std::time::Duration;

use chaos::{Options, Programs};

#[test]
fn every_connection_is_answered_once_or_lost_for_a_reason() {
    if !test_support::descriptors(4_000) {
        return;
    }
    let seed = std::env::var("CHAOS_SEED")
        .ok()
        .map_or_else(test_support::chaos::any_seed, |seed| seed.parse().unwrap());
    // Two minutes in CI.
    let seconds =
        std::env::var("CHAOS_SECONDS").ok().map_or(20, |seconds| seconds.parse().unwrap());
    let options = Options {
        faults_for: Duration::from_secs(seconds),
        seed,
        clients: 48,
        only_dispatcher: false,
        programs: Programs {
            dispatcher: test_support::dispatcher_bin().into(),
            worker: test_support::example("chaos"),
        },
    };
    assert!(chaos::run(&options), "what happened is above; run it again with CHAOS_SEED={seed}");
}
