//! What surrounds a dispatcher: signals, processes and their groups, a system short of threads, the log's file, names.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the report")]

mod log;
mod processes;
mod signals;
mod sockets;
mod threads;
