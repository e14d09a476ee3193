//! The receive paths for the fuzz targets; compiled for tests and with `--cfg fuzzing` only.
//!
//! Each function calls the private one, so a target tests the code that runs.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

use super::channel::{self, ReceiveMode};
use super::join::{self, Failure};
use dispatch_protocol::wire::{Drain, Entry, Probe, Welcome};

/// A received channel record.
#[derive(Debug)]
pub enum FromChannel {
    /// Connections.
    Handoff {
        /// Entries with their descriptors.
        arrived: Vec<(Entry, OwnedFd)>,
        /// Entries without descriptors.
        lost: Vec<Entry>,
    },
    /// A probe.
    Probe(Probe),
    /// No more connections.
    Drain(Drain),
    /// Connections may come again.
    Resume,
    /// No record is available.
    Empty,
    /// The peer has closed the channel.
    End,
    /// Not a valid record of a dispatcher.
    Broken(String),
}

/// Receives one record from a channel, without waiting.
pub fn from_channel(channel: BorrowedFd<'_>) -> FromChannel {
    match channel::receive(channel, &mut [0; channel::BUFFER], ReceiveMode::NonBlocking) {
        channel::Received::Handoff { arrived, lost } => {
            let arrived = arrived.into_iter().map(|it| (it.entry, it.fd)).collect();
            FromChannel::Handoff { arrived, lost }
        }
        channel::Received::Probe(probe) => FromChannel::Probe(probe),
        channel::Received::Drain(drain) => FromChannel::Drain(drain),
        channel::Received::Resume => FromChannel::Resume,
        channel::Received::Empty => FromChannel::Empty,
        channel::Received::End => FromChannel::End,
        channel::Received::Broken(problem) => FromChannel::Broken(problem),
    }
}

/// Receives the answer to a hello, without waiting; `None` if there is none yet.
///
/// # Errors
/// If the dispatcher refuses, is gone, or sends another record.
pub fn answer(control: &OwnedFd) -> Result<Option<Welcome>, String> {
    match join::answer(control, Path::new("fuzz")) {
        Ok(joined) => Ok(joined.map(|joined| joined.welcome)),
        Err(Failure::Absent(problem) | Failure::Transient(problem)) => Err(problem),
        Err(Failure::Permanent(error)) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod replayed;
