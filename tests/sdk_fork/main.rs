//! Workers that fork, and workers whose threads are counted, apart from the other tests of the SDK.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the report")]

mod close;
mod gauges;
