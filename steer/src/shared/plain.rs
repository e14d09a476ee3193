//! Listeners of a shared port without a program: the kernel's own hash of the addresses chooses
//! among them. No privilege is needed.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use super::group::Listener;
use crate::error::Error;
use crate::steering::check_port;

/// A listener with `SO_REUSEPORT`, among whose group the kernel's hash chooses.
///
/// It stays open as long as this value or a duplicate: the next process can inherit it with the
/// connections that wait in it.
#[derive(Debug)]
pub struct PlainListener(Listener);

impl PlainListener {
    /// Opens a listener at a public address. `[::]:P` is for IPv4 clients, too.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for port 0; [`Error::System`] if the address cannot be used.
    pub fn open(public: SocketAddr, backlog: u32) -> Result<PlainListener, Error> {
        let listener = PlainListener::bind(public, backlog)?;
        listener.0.listen()?;
        Ok(listener)
    }

    /// Whether a listener can be opened at a public address. It gets no connections.
    ///
    /// # Errors
    ///
    /// As [`PlainListener::open`].
    pub fn possible(public: SocketAddr) -> Result<(), Error> {
        PlainListener::bind(public, 1).map(drop)
    }

    fn bind(public: SocketAddr, backlog: u32) -> Result<PlainListener, Error> {
        check_port(public.port())?;
        Listener::bind(public, backlog).map(PlainListener)
    }

    /// For a process to inherit.
    ///
    /// # Errors
    ///
    /// [`Error::System`] if there is no descriptor left.
    pub fn duplicate(&self) -> Result<OwnedFd, Error> {
        self.0.duplicate()
    }

    /// Connections that no process has accepted.
    ///
    /// # Errors
    ///
    /// [`Error::System`] if the kernel fails.
    pub fn queue_len(&self) -> Result<u32, Error> {
        self.0.queue_len()
    }
}
