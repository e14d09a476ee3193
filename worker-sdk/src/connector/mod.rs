//! A client's connection to a service with several addresses, and its replacement when it is lost.
//!
//! A [`Connector`] connects to one of the addresses of a service: those of a list, those of a host
//! name, or those that the service's dispatchers advise ([`Addresses`]). It makes up to
//! `max_retries` attempts on one address, then up to `max_retries_alternative` on others, with time
//! limits and growing random pauses. When the connection is lost later, [`Connection::reconnect`]
//! does the same again. It needs nothing else of this crate, and no dispatcher.
//!
//! What it guarantees:
//!
//! - An event ([`Attempt`]) precedes each attempt. When all attempts have failed, the result is
//!   [`Error::ConnectionLost`] with the outcome of each, unless a handler decides to try again.
//! - An alternative is never an address that has failed in the same series while another is left.
//! - An address that fails is set aside with growing pauses, for all connections of the connector.
//!   When its pause is over, one attempt at a time probes it, and after a success it has its share
//!   of new connections again. A shortage of this machine, such as no free descriptor, sets no
//!   address aside.
//! - Attempts and questions for advice end with their limits, also if a handler blocks on the new
//!   connection.
//! - It never sends a byte: what was written to a lost connection is the application's matter. A
//!   handler (`on_reconnect`) restores the session.
//!
//! The connection is an ordinary [`TcpStream`](std::net::TcpStream), so TLS works on top of it. The
//! blocking connector and the one for tokio ([`tokio`]) perform the steps of one state machine.
//!
//! A server that hangs may still accept connections, because its kernel does. Only an answer of the
//! server shows that it serves: let `on_connect` wait for one where that matters.
//!
//! ```no_run
//! use std::io::{BufRead, BufReader, Write};
//! use worker_sdk::connector::{Addresses, Connector, ConnectorConfig};
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let addresses = Addresses::list(["10.0.0.1:7000", "10.0.0.2:7000", "10.0.0.3:7000"])?;
//!     let connector = Connector::new(ConnectorConfig::new(addresses))?;
//!     let mut connection = connector.connect()?;
//!     loop {
//!         let mut line = String::new();
//!         connection.write_all(b"hello\n")?;
//!         match BufReader::new(&connection).read_line(&mut line) {
//!             Ok(length) if length > 0 => return Ok(print!("{line}")),
//!             // The server is gone. The question can be asked twice, so it is.
//!             _ => connection.reconnect()?,
//!         }
//!     }
//! }
//! ```
#![cfg_attr(
    not(feature = "connector"),
    allow(dead_code, unused_imports, reason = "the worker uses a part of the state machine")
)]

pub(crate) mod address;
#[cfg(feature = "connector")]
mod addresses;
#[cfg(feature = "connector")]
mod advice;
#[cfg(feature = "connector")]
mod asking;
#[cfg(feature = "connector")]
mod blocking;
#[cfg(feature = "connector")]
mod config;
#[cfg(feature = "connector")]
mod core;
#[cfg(feature = "connector")]
mod dialling;
pub(crate) mod error;
pub(crate) mod event;
pub(crate) mod failure;
pub(crate) mod machine;
pub(crate) mod plan;
#[cfg(feature = "connector")]
mod race;
#[cfg(feature = "connector")]
mod resolve;
pub(crate) mod selection;
pub(crate) mod set_aside;
pub(crate) mod targets;
#[cfg(all(feature = "connector", feature = "tokio"))]
pub mod tokio;
#[cfg(feature = "connector")]
mod watchdog;

pub use self::address::Address;
#[cfg(feature = "connector")]
pub use self::addresses::Addresses;
#[cfg(feature = "connector")]
pub use self::blocking::{Connection, Connector};
#[cfg(feature = "connector")]
pub use self::config::ConnectorConfig;
pub use self::error::{ConnectionLost, Error, Outcome};
pub use self::event::{Attempt, Decision};
pub use self::selection::Selection;

/// A client program must not depend on the worker's side.
#[test]
fn the_connector_imports_nothing_else_of_the_crate() {
    fn check(directory: &std::path::Path) {
        for entry in std::fs::read_dir(directory).unwrap().map(Result::unwrap) {
            if entry.file_type().unwrap().is_dir() {
                check(&entry.path());
                continue;
            }
            let text = std::fs::read_to_string(entry.path()).unwrap();
            for import in text.split("use crate::").skip(1).filter(|rest| !rest.starts_with('"')) {
                assert!(
                    import.starts_with("connector"),
                    "{}: {import:.60}",
                    entry.path().display()
                );
            }
        }
    }
    check(std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src/connector")));
}
