//! What needs `unsafe`. This module has every `unsafe` block of the crate and decides nothing.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::unix::AsyncFd;

/// Registers a descriptor with the runtime.
pub(crate) fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an owned descriptor is open for as long as it exists, and always has this one number.
    Ok(unsafe { AsyncFd::register(fd) }?)
}
