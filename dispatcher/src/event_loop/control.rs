//! Reads control connections and identifies their peers. Bytes of a peer end here: the result is a
//! record or an error.

use std::os::fd::OwnedFd;

use dispatch_protocol::wire::{Control, MAX_CONTROL_RECORD, WireError};
use nix::sys::socket::sockopt::{PeerCredentials, PeerPidfd};
use rustix::io::Errno;

use super::peer_thread;
use crate::sys;

/// The identity of the peer of a Unix socket, as the kernel reports it.
#[derive(Clone, Debug)]
pub(super) struct Peer {
    pub(super) pid: i32,
    pub(super) uid: u32,
    /// The primary group first, then the supplementary groups.
    pub(super) gids: Vec<u32>,
}

impl Peer {
    pub(super) fn of(socket: &OwnedFd) -> std::io::Result<Peer> {
        let credentials = nix::sys::socket::getsockopt(socket, PeerCredentials)?;
        let gids = vec![credentials.gid()];
        Ok(Peer { pid: credentials.pid(), uid: credentials.uid(), gids })
    }

    /// Adds the supplementary groups. Without kernel support only the primary group is known.
    pub(super) fn add_groups(&mut self, socket: &OwnedFd) {
        self.gids.extend(sys::peer_groups(socket).unwrap_or_default());
    }
}

/// A descriptor that becomes readable when the peer's process ends.
///
/// Linux 6.5 provides it for the socket itself. Before that the pid is opened: the worker waits for
/// an answer and so is alive, or its closed connection shows soon that it is not.
pub(super) fn process_of(socket: &OwnedFd, peer: &Peer) -> Option<OwnedFd> {
    match nix::sys::socket::getsockopt(socket, PeerPidfd) {
        Ok(pidfd) => Some(pidfd),
        Err(nix::errno::Errno::ENOPROTOOPT) => {
            let pid = rustix::process::Pid::from_raw(peer.pid)?;
            rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok()
        }
        Err(_) => None,
    }
}

/// The result of a receive.
#[derive(Debug)]
pub(super) enum Received {
    /// One well-formed record.
    Record(Control),
    /// No record for now.
    Empty,
    /// The peer has closed it.
    End,
    /// A message that no worker may send.
    Broken(Fault),
}

/// The error in a message.
#[derive(Debug)]
pub(super) enum Fault {
    /// The message carried file descriptors.
    Descriptors,
    /// The message was longer than a record may be.
    TooLong,
    /// The record was malformed.
    Malformed(WireError),
    /// The record was well-formed and does not belong here.
    Unexpected(&'static str),
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Fault::Descriptors => f.write_str("record carries file descriptors where none belong"),
            Fault::TooLong => write!(f, "record longer than {MAX_CONTROL_RECORD} bytes"),
            Fault::Malformed(error) => error.fmt(f),
            Fault::Unexpected(what) => write!(f, "unexpected {what}"),
        }
    }
}

/// Receives one record. Its descriptors are added to `rubbish`: see [`peer_thread::receive`].
pub(super) fn receive(socket: &OwnedFd, rubbish: &mut Vec<OwnedFd>) -> Received {
    let mut buffer = [0; MAX_CONTROL_RECORD];
    match peer_thread::receive(socket, &mut buffer, rubbish) {
        Err(Errno::AGAIN) => Received::Empty,
        Err(_) => Received::End,
        Ok(message) if message.had_fds => Received::Broken(Fault::Descriptors),
        Ok(message) if message.truncated => Received::Broken(Fault::TooLong),
        // An empty record looks the same and has the same meaning.
        Ok(message) if message.bytes == 0 => Received::End,
        Ok(message) => match buffer.get(..message.bytes).map(Control::decode) {
            Some(Ok(record)) => Received::Record(record),
            Some(Err(error)) => Received::Broken(Fault::Malformed(error)),
            None => Received::Broken(Fault::TooLong),
        },
    }
}
