//! Claiming keys: telling the dispatcher that a client is ours from its next connection on. Never waits.

use std::fmt;
use std::io;

use rustix::io::Errno;
use rustix::net::{SendFlags, send};

use super::core::{Core, Link};
use super::join::Session;
use dispatch_protocol::wire::{Features, MAX_KEY, Own};

/// Why a key was not claimed. The application goes on as if it had not tried: the client is served wherever the
/// dispatcher sends it, and is remembered there.
///
/// ```
/// use worker_sdk::{OwnError, Worker, WorkerConfig};
///
/// # fn main() -> Result<(), worker_sdk::Error> {
/// let worker = Worker::connect(WorkerConfig::new().listen("127.0.0.1:0"))?;
/// assert_eq!(worker.own("6f1d29"), Ok(()), "alone, everything is ours");
/// assert_eq!(worker.own(""), Err(OwnError::Key));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OwnError {
    /// The key is empty, or longer than [`MAX_KEY`] bytes.
    Key,
    /// The dispatcher is away, or this worker is closed or the fork of one.
    NotJoined,
    /// The dispatcher's pool had no `affinity.key` when this worker joined, or it is a version that does not know claims.
    NoAffinity,
    /// The dispatcher has yet to read earlier claims. Trying again later may help.
    Busy,
}

impl fmt::Display for OwnError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            OwnError::Key => write!(f, "a key to claim has 1 to {MAX_KEY} bytes"),
            OwnError::NotJoined => f.write_str("no dispatcher has this worker now"),
            OwnError::NoAffinity => f.write_str(
                "this pool knew no keys when the worker joined: set its affinity.key in the dispatcher's \
                 configuration, and join again if it has been set since",
            ),
            OwnError::Busy => {
                f.write_str("the dispatcher has not read the last claims yet; try again later")
            }
        }
    }
}

impl std::error::Error for OwnError {}

/// For functions that return [`io::Result`].
impl From<OwnError> for io::Error {
    fn from(error: OwnError) -> io::Error {
        let kind = match error {
            OwnError::Key => io::ErrorKind::InvalidInput,
            OwnError::NotJoined => io::ErrorKind::NotConnected,
            OwnError::NoAffinity => io::ErrorKind::Unsupported,
            OwnError::Busy => io::ErrorKind::WouldBlock,
        };
        io::Error::new(kind, error)
    }
}

impl Core {
    pub(crate) fn own(&self, key: &[u8]) -> Result<(), OwnError> {
        let own = Own::new(key).ok_or(OwnError::Key)?;
        if !self.process().is_current() {
            return Err(OwnError::NotJoined);
        }
        // Sent under the lock, which nobody holds while waiting: so a claim never follows a goodbye.
        match &self.lock().link {
            Link::Joined { session, .. } => session.own(&own),
            Link::Standalone { .. } => Ok(()),
            Link::Waiting { .. } | Link::Greeting { .. } | Link::Closed => Err(OwnError::NotJoined),
        }
    }
}

impl Session {
    fn own(&self, own: &Own) -> Result<(), OwnError> {
        if !self.features.contains(Features::OWN) {
            return Err(OwnError::NoAffinity);
        }
        let mut record = Vec::with_capacity(8 + own.key().len());
        own.encode(&mut record);
        loop {
            match send(&self.control, &record, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM) => return Err(OwnError::Busy),
                Err(_) => return Err(OwnError::NotJoined),
            }
        }
    }
}
