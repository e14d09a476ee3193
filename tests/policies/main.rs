//! Real dispatchers and workers: who gets a connection, and who may connect.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the report")]

mod access;
mod affinity;
mod balance;
mod chosen;
mod listeners;
mod scores;
