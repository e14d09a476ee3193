//! The directory of the relay: it knows which worker holds which client id and which members a
//! group has, and gives two workers a direct link when they need it first. Messages do not pass
//! through it, except those to other hosts.
//!
//! [`registry`] decides and is pure. [`run`] serves it on a Unix socket. [`Query`] asks a running
//! directory. [`ticket_key`] is the key that it shares with the dispatcher. `docs/RELAY.md` is the
//! guide.
#![warn(missing_docs)]

#[cfg(feature = "nats")]
mod cluster;
pub mod config;
mod numbers;
mod query;
pub mod registry;
mod run;
mod server;
mod sys;
pub mod ticket_key;

/// The programs in the guide compile.
#[cfg(doctest)]
#[doc = include_str!("../../docs/RELAY.md")]
struct Guide;

pub use numbers::NUMBERS;
pub use query::Query;
pub use run::{run, run_until_end_of};
