//! Claims of keys: from its next connection on, a client with the key comes to this worker. A claim
//! never waits.

use std::fmt;
use std::io;

use rustix::io::Errno;
use rustix::net::{SendFlags, send};

use super::join::Session;
use super::worker_core::{Link, WorkerCore};
use dispatch_protocol::wire::{Claim, Features, MAX_KEY};

/// Why a key was not claimed. The application can continue as if it had not tried: the dispatcher
/// places the client as usual and remembers the place.
///
/// ```
/// use worker_sdk::{ClaimError, Worker, WorkerConfig};
///
/// # fn main() -> Result<(), worker_sdk::Error> {
/// let worker = Worker::connect(WorkerConfig::new().listen("127.0.0.1:0"))?;
/// assert_eq!(worker.claim("6f1d29"), Ok(()), "without a dispatcher every claim succeeds");
/// assert_eq!(worker.claim(""), Err(ClaimError::Key));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ClaimError {
    /// The key is empty, or longer than [`MAX_KEY`] bytes.
    Key,
    /// The worker has not joined, is closed, or is a forked copy.
    NotJoined,
    /// The pool had no `affinity.key` when this worker joined, or the dispatcher is a version
    /// without claims.
    NoAffinity,
    /// The dispatcher has not read earlier claims yet. Trying again later may help.
    Busy,
}

impl fmt::Display for ClaimError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ClaimError::Key => write!(f, "a key to claim has 1 to {MAX_KEY} bytes"),
            ClaimError::NotJoined => f.write_str("the worker is not joined to a dispatcher now"),
            ClaimError::NoAffinity => f.write_str(
                "the pool had no affinity key when the worker joined: set its affinity.key in the dispatcher's \
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
        // Sent under the lock, which no thread holds while it waits. So a claim never follows a
        // goodbye.
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
