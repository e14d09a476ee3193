//! The bodies of the fuzz targets: plain functions of bytes that panic if something is not as it must be.
//!
//! The fuzzer calls them (`fuzz/fuzz_targets`), and so does an ordinary test with every file of the corpora
//! (`tests/corpus.rs`). They use nothing that a stable toolchain does not have.
#![allow(dead_code, unused_imports)] // each fuzz target is a program of its own and uses one of them
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod bytes;
mod config;
mod control_path;
mod first_bytes;
mod listen_fds;
mod pool_ops;
mod wire;

pub use config::config;
pub use control_path::control_path;
pub use first_bytes::first_bytes;
pub use listen_fds::listen_fds;
pub use pool_ops::pool_ops;
pub use wire::{wire_channel, wire_control};
