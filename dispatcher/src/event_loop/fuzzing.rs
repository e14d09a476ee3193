//! Private functions for the fuzz targets; compiled for tests and with `--cfg fuzzing` only.
//!
//! Each function calls the private one, so a target tests the code that runs.

use std::io;
use std::os::fd::{OwnedFd, RawFd};

use dispatch_protocol::wire::Control;

use super::control::{self, Received};
use crate::listen::inherit::Variables;

/// What came on a control connection.
#[derive(Debug)]
pub enum FromControl {
    /// One well-formed record.
    Record(Control),
    /// Nothing more for now.
    Empty,
    /// The peer has closed it.
    End,
    /// Something that no worker may send.
    Broken(String),
}

/// Receives one record from a control connection, without waiting.
pub fn from_control(socket: &OwnedFd) -> FromControl {
    match control::receive(socket, &mut Vec::new()) {
        Received::Record(record) => FromControl::Record(record),
        Received::Empty => FromControl::Empty,
        Received::End => FromControl::End,
        Received::Broken(fault) => FromControl::Broken(fault.to_string()),
    }
}

/// The descriptors that `LISTEN_PID`, `LISTEN_FDS` and `LISTEN_FDNAMES` announce to the process
/// `own`, with their names.
///
/// # Errors
/// When the variables cannot be true; `passed` says which numbers are descriptors that another
/// program passed.
pub fn announced(
    variables: [Option<String>; 3],
    own: u32,
    passed: impl Fn(RawFd) -> io::Result<()>,
) -> Result<Vec<(RawFd, String)>, String> {
    let [pid, count, names] = variables;
    Variables { pid, count, names }.announced(own, passed)
}

#[cfg(test)]
mod replayed;
