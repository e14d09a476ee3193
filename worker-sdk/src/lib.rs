//! Be a worker of the dispatcher: receive live TCP connections over a Unix socket.
#![warn(missing_docs)]

pub mod scoreboard;
pub mod wire;

mod sys;

pub use wire::PeerAddr;
