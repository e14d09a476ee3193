//! A short chaos test of steered pools. `tests/steer_chaos/main.rs` runs the same for any duration.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "steer_chaos/mod.rs"]
mod chaos;

use std::time::Duration;

use chaos::{Options, Programs};

#[test]
fn counts_equal_the_kernels_and_every_client_is_served_or_lost_for_a_reason() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let seed = number("STEER_CHAOS_SEED").unwrap_or_else(test_support::chaos::any_seed);
    let options = Options {
        // Two minutes in CI.
        faults_for: Duration::from_secs(number("STEER_CHAOS_SECONDS").unwrap_or(10)),
        seed,
        clients: 24,
        programs: Programs {
            dispatcher: test_support::dispatcher_bin().into(),
            server: test_support::example("steer_chaos"),
        },
    };
    assert!(
        chaos::run(&options),
        "what happened is above; run it again with STEER_CHAOS_SEED={seed}"
    );
}
