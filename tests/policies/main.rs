//! Real dispatchers and workers: load-balancing policies and access rules.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the report")]

mod access;
mod affinity;
mod balance;
mod chosen;
mod listeners;
mod proxy;
mod scores;
