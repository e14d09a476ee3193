//! The environment of a dispatcher: signals, processes and process groups, a shortage of threads,
//! the log file, names.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the report")]

mod log;
mod loss;
mod processes;
mod signals;
mod sockets;
mod threads;
mod watchdog;
