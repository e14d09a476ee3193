//! Messages between workers: a real directory, and relays in this process and in others.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the report")]

mod access;
mod chaos;
mod directory;
mod embedded;
mod faults;
mod groups;
mod hostile;
mod messages;
mod metrics;
mod outages;
mod presence;

use std::time::Duration;

use worker_sdk::relay::Id;

use directory::Directory;

fn id(text: &str) -> Id {
    Id::new(text).unwrap()
}

/// Waits for the next message of a registration or membership and returns its text.
macro_rules! text_of {
    ($receiver:expr) => {
        $receiver
            .recv()
            .wait_for(test_support::PATIENCE)
            .map(|message| String::from_utf8(message.bytes().to_vec()).unwrap())
    };
}
pub(crate) use text_of;

/// Long enough for anything to happen that must not happen, and not a condition of success.
const MOMENT: Duration = Duration::from_millis(50);

/// Several hosts are tested by `relay_nats`, which is not built without the feature.
#[cfg(not(feature = "nats"))]
#[test]
fn several_hosts() {
    test_support::skip("needs --features nats of dispatch-directory, for the test relay_nats");
}
