//! Advice: real dispatchers that ask each other, their clients, and peers that misbehave.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the report")]

mod access;
mod answers;
mod clients;
mod commands;
mod document;
mod hosts;
mod hot_thread;
mod peers;
mod reloads;
