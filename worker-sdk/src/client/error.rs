//! What can go wrong for a worker, sorted by what its caller will do about it.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::log_queue::{readable, readable_path};
use dispatch_protocol::wire::RefusedCode;

/// Why a worker could not be made, could not join, or gives no more connections.
///
/// Only the first join reports these. A worker that has joined once retries for ever by itself, and says
/// so in the log. After that [`Error::Closed`], [`Error::Draining`] and [`Error::Forked`] remain, and [`Error::Io`] where even waiting
/// fails.
///
/// ```
/// use worker_sdk::{Error, Worker, WorkerConfig};
///
/// // The exit codes of sysexits.h, so that a service manager knows what to do.
/// fn exit_code(error: &Error) -> i32 {
///     match error {
///         Error::Config { .. } => 78,
///         Error::Refused { .. } => 77,
///         Error::JoinTimeout { .. } => 75,
///         Error::Protocol { .. } => 76,
///         _ => 71,
///     }
/// }
///
/// match Worker::connect(WorkerConfig::new()) {
///     Err(error) => {
///         eprintln!("{error}"); // "dispatch_socket: not set: set DISPATCH_SOCKET …"
///         assert_eq!(exit_code(&error), 78);
///     }
///     Ok(_) => unreachable!("neither a dispatcher nor an address to listen on"),
/// }
/// ```
#[non_exhaustive]
pub enum Error {
    /// A setting is missing or wrong: change it and start again.
    Config {
        /// The setting: a field of [`WorkerConfig`](crate::WorkerConfig), or an environment variable.
        setting: &'static str,
        /// What was wrong, and what to set instead.
        problem: String,
    },
    /// The dispatcher does not take this worker; somebody has to change a configuration.
    Refused {
        /// The dispatcher's socket.
        socket: PathBuf,
        /// Why, for programs.
        code: RefusedCode,
        /// Why, in the dispatcher's words.
        reason: String,
        /// The key of the dispatcher's configuration that decides it.
        key: Option<String>,
    },
    /// The dispatcher did not let us in within `join_timeout`. Trying again may help.
    JoinTimeout {
        /// The dispatcher's socket.
        socket: PathBuf,
        /// How long we waited.
        after: Duration,
        /// What the last attempt met.
        last: String,
    },
    /// What answers on the socket does not speak this protocol: is it the right socket and version?
    Protocol {
        /// The dispatcher's socket.
        socket: PathBuf,
        /// What was wrong with its answer.
        problem: String,
    },
    /// A system call failed, and trying again at once would not help.
    Io {
        /// What we were doing.
        action: String,
        /// The error of the system call.
        source: io::Error,
    },
    /// The worker was closed: there will be no more connections.
    Closed,
    /// The dispatcher drains this worker: there will be no more connections, unless it resumes it.
    Draining,
    /// No connection came within the time given to [`accept_timeout`](crate::Worker::accept_timeout). Trying again may help.
    TimedOut,
    /// This process is a fork of the one that joined. Only that one may take connections; connect after forking.
    Forked,
}

impl Error {
    pub(crate) fn config(setting: &'static str, problem: impl Into<String>) -> Error {
        Error::Config { setting, problem: problem.into() }
    }

    pub(crate) fn io(action: impl Into<String>, source: impl Into<io::Error>) -> Error {
        Error::Io { action: action.into(), source: source.into() }
    }
}

impl fmt::Debug for Error {
    /// The same words as `Display`: this is what a `main` that returns the error prints.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Config { setting, problem } => write!(f, "{setting}: {problem}"),
            Error::Refused { socket, reason, key, .. } => {
                let (socket, reason) = (readable_path(socket), readable(reason));
                write!(f, "the dispatcher at {socket} refused this worker: {reason}")?;
                match key {
                    Some(key) => {
                        write!(
                            f,
                            " (decided by {} in the dispatcher's configuration)",
                            readable(key)
                        )
                    }
                    None => Ok(()),
                }
            }
            Error::JoinTimeout { socket, after, last } => write!(
                f,
                "could not join the dispatcher at {} within {after:?}: {last}; \
                 is it running, and is join_timeout long enough?",
                readable_path(socket)
            ),
            Error::Protocol { socket, problem } => write!(
                f,
                "{} does not answer like a dispatcher: {problem}; \
                 does dispatch_socket name the dispatch socket of a compatible version?",
                readable_path(socket)
            ),
            Error::Io { action, source } => write!(f, "cannot {action}: {source}"),
            Error::Closed => f.write_str("the worker is closed"),
            Error::TimedOut => f.write_str("no connection came in time"),
            Error::Draining => f.write_str("the dispatcher drains this worker"),
            Error::Forked => f.write_str(
                "this process is a fork of the worker; connect after forking, once in each process",
            ),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Io { source, .. } => Some(source),
            Error::Config { .. }
            | Error::Refused { .. }
            | Error::JoinTimeout { .. }
            | Error::Protocol { .. }
            | Error::Closed
            | Error::Draining
            | Error::TimedOut
            | Error::Forked => None,
        }
    }
}

/// For functions that return [`io::Result`]. The kind says what sort of error it was, and the error itself is inside.
impl From<Error> for io::Error {
    fn from(error: Error) -> io::Error {
        let kind = match &error {
            Error::Config { .. } => io::ErrorKind::InvalidInput,
            Error::Refused { .. } => io::ErrorKind::PermissionDenied,
            Error::JoinTimeout { .. } | Error::TimedOut => io::ErrorKind::TimedOut,
            Error::Protocol { .. } => io::ErrorKind::InvalidData,
            Error::Io { source, .. } => source.kind(),
            Error::Closed | Error::Draining => io::ErrorKind::NotConnected,
            Error::Forked => io::ErrorKind::Unsupported,
        };
        io::Error::new(kind, error)
    }
}
