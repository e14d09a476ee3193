//! Chooses the worker of each new connection in the kernel.
//!
//! The workers are servers of any kind; each listens on an address of its own. Two programs in the
//! kernel do the rest, without a process in the path of a connection:
//!
//! - one in a network namespace chooses, for each SYN to a public address of the pool, the listener
//!   of the worker that the policy of the pool chooses;
//! - one in a cgroup registers the listeners of the workers by themselves and counts connections.
//!
//! Or the workers share the public port: the program in the kernel chooses among the listeners of a
//! group (`SO_REUSEPORT`), which this library opens and the workers inherit
//! ([`Steering::load_shared`]).
//!
//! [`Steering`] loads, pins and adopts the programs and has the settings and counts. [`decision`]
//! is the choice as a pure function. [`machine`] says what a machine supports.
//!
//! The programs are in `bpf/`, compiled, so that a build needs no C compiler. They are licensed
//! under MIT or GPL-2.0.

mod attach;
pub mod decision;
mod error;
mod existing;
mod layout;
pub mod listening;
pub mod machine;
mod maps;
mod pins;
pub mod policy;
mod reconcile;
mod shared;
mod sink;
mod sockets;
mod steering;
mod sys;

pub use error::Error;
pub use layout::{
    FULL_SPEED, MAX_WORKERS, PENDING_SECONDS, SCAN_WORKERS, Totals, WorkerCounts, WorkerSettings,
};
pub use pins::remove as remove_pins;
pub use policy::Policy;
pub use reconcile::{Correction, Count};
pub use shared::{Direct, Moves, PlainListener, Probe, Probed};
pub use steering::{Options, Steering, Writer, second};

/// The compiled programs.
pub const OBJECT: &[u8] = aya::include_bytes_aligned!("../bpf/steer.bpf.o");

/// The program of the page compiles.
#[cfg(doctest)]
#[doc = include_str!("../../docs/STEER.md")]
struct Page;
