//! The operator's interface: commands, admin socket, metrics, log, page and manual.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the report")]

mod cli;
mod control;
mod incidents;
mod manual;
mod metrics;
mod page;
mod snapshots;
mod socket;
#[cfg(feature = "tui")]
mod top;
