//! Claiming keys: telling the dispatcher that a client is ours from its next connection on. Never waits.

use std::fmt;
use std::io;

use rustix::io::Errno;
use rustix::net::{SendFlags, send};

use super::join::Session;
use super::worker_core::{Link, WorkerCore};
use dispatch_protocol::wire::{Claim, Features, MAX_KEY};

/// Why a key was not claimed. The application goes on as if it had not tried: the client is served wherever the
/// dispatcher sends it, and is remembered there.
///
/// ```
/// use worker_sdk::{ClaimError, Worker, WorkerConfig};
///
/// # fn main() -> Result<(), worker_sdk::Error> {
/// let worker = Worker::connect(WorkerConfig::new().listen("127.0.0.1:0"))?;
/// assert_eq!(worker.claim("6f1d29"), Ok(()), "alone, everything is ours");
/// assert_eq!(worker.claim(""), Err(ClaimError::Key));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ClaimError {
    /// The key is empty, or longer than [`MAX_KEY`] bytes.
    Key,
    /// The dispatcher is away, or this worker is closed or the fork of one.
    NotJoined,
    /// The dispatcher's pool had no `affinity.key` when this worker joined, or it is a version that does not know claims.
    NoAffinity,
    /// The dispatcher has yet to read earlier claims. Trying again later may help.
    Busy,
}

impl fmt::Display for ClaimError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ClaimError::Key => write!(f, "a key to claim has 1 to {MAX_KEY} bytes"),
            ClaimError::NotJoined => f.write_str("no dispatcher has this worker now"),
            ClaimError::NoAffinity => f.write_str(
                "this pool knew no keys when the worker joined: set its affinity.key in the dispatcher's \
                 configuration, and join again if it has been set since",
            ),
            ClaimError::Busy => {
                f.write_str("the dispatcher has not read the last claims yet; try again later")
            }
        }
    }
}

impl std::error::Error for ClaimError {}

/// For functions that return [`io::Result`].
impl From<ClaimError> for io::Error {
    fn from(error: ClaimError) -> io::Error {
        let kind = match error {
            ClaimError::Key => io::ErrorKind::InvalidInput,
            ClaimError::NotJoined => io::ErrorKind::NotConnected,
            ClaimError::NoAffinity => io::ErrorKind::Unsupported,
            ClaimError::Busy => io::ErrorKind::WouldBlock,
        };
        io::Error::new(kind, error)
    }
}

impl WorkerCore {
    pub(crate) fn claim(&self, key: &[u8]) -> Result<(), ClaimError> {
        let claim = Claim::new(key).ok_or(ClaimError::Key)?;
        if !self.process().is_current() {
            return Err(ClaimError::NotJoined);
        }
        // Sent under the lock, which nobody holds while waiting: so a claim never follows a goodbye.
        match &self.lock().link {
            Link::Joined { session, .. } => session.claim(&claim),
            Link::Standalone { .. } => Ok(()),
            Link::Waiting { .. } | Link::Greeting { .. } | Link::Closed => {
                Err(ClaimError::NotJoined)
            }
        }
    }
}

impl Session {
    fn claim(&self, claim: &Claim) -> Result<(), ClaimError> {
        if !self.features.contains(Features::CLAIM) {
            return Err(ClaimError::NoAffinity);
        }
        let mut record = Vec::with_capacity(8 + claim.key().len());
        claim.encode(&mut record);
        loop {
            match send(&self.control, &record, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM) => return Err(ClaimError::Busy),
                Err(_) => return Err(ClaimError::NotJoined),
            }
        }
    }
}
