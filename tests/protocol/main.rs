//! The dispatcher's side of the protocol, against hand-made peers.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the report")]

mod bad_input;
mod hot_thread;
