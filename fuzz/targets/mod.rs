//! The bodies of the fuzz targets: functions of bytes that panic when a property does not hold.
//!
//! The fuzzer calls them (`fuzz/fuzz_targets`). Ordinary tests on the stable toolchain call them
//! with every file of the corpora: `tests/corpus.rs`, and unit tests of the crates whose private
//! functions a target needs.
#![allow(dead_code, unused_imports)] // Each fuzz target is a program that uses one of the functions.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod bytes;
mod config;
mod dispatcher_path;
mod first_bytes;
mod line;
mod listen_fds;
mod pool_ops;
mod sockets;
mod wire;
mod worker_path;

use dispatcher::event_loop::fuzzing as dispatcher_fuzzing;
use worker_sdk::fuzzing as worker_fuzzing;

pub use config::config;
pub use first_bytes::first_bytes;
pub use line::line;
pub use listen_fds::listen_fds;
pub use pool_ops::pool_ops;
pub use wire::{wire_channel, wire_control, wire_prefork};

/// The receive paths of both sides.
pub fn control_path(data: &[u8]) {
    dispatcher_path::dispatcher_path(data);
    worker_path::worker_path(data);
}
