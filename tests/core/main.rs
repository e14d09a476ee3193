//! The decision core in virtual time: no sockets, no processes.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the report")]

mod advice;
mod decisions;
mod lines;
mod load_balancing;
mod simulator;
mod waits;
