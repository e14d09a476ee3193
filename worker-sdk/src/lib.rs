//! Be a worker of the dispatcher: receive live TCP connections over a Unix socket.
#![warn(missing_docs)]

#[cfg(feature = "axum")]
mod axum;
#[cfg(feature = "client")]
mod client;
#[cfg(feature = "mio")]
pub mod mio;
pub mod scoreboard;
#[cfg(feature = "tokio")]
pub mod tokio;
pub mod wire;

mod sys;

#[cfg(feature = "client")]
pub use client::{Connection, Error, Guard, Incoming, Worker, WorkerConfig};
pub use wire::{PeerAddr, Token};
