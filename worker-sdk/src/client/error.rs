//! The errors of a worker, classified by what the caller can do about them.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::log_queue::{readable, readable_path};
use dispatch_protocol::wire::RefusedCode;

/// Why a worker could not be created, could not join, or gets no more connections.
///
/// Most of these occur only in the first join. A worker that has joined once retries without limit
/// and logs it. After that only [`Error::Closed`], [`Error::Draining`], [`Error::Forked`] and, if
/// waiting itself fails, [`Error::Io`] occur.
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
        /// The setting: a field of [`WorkerConfig`](crate::WorkerConfig), or an environment
        /// variable.
        setting: &'static str,
        /// The problem and its remedy.
        problem: String,
    },
    /// The dispatcher refuses this worker; a configuration has to change.
    Refused {
        /// The dispatcher's socket.
        socket: PathBuf,
        /// The reason, for programs.
        code: RefusedCode,
        /// The reason, in the words of the dispatcher.
        reason: String,
        /// The key of the dispatcher's configuration that decides.
        key: Option<String>,
    },
    /// The worker did not join within `join_timeout`. Trying again may help.
    JoinTimeout {
        /// The dispatcher's socket.
        socket: PathBuf,
        /// The value of `join_timeout`.
        after: Duration,
        /// The problem of the last attempt.
        last: String,
    },
    /// The peer does not speak this protocol: check the path of the socket and the versions.
    Protocol {
        /// The dispatcher's socket.
        socket: PathBuf,
        /// The problem with the answer.
        problem: String,
    },
    /// A system call failed, and an immediate retry would not help.
    Io {
        /// The action that failed.
        action: String,
        /// The error of the system call.
        source: io::Error,
    },
    /// The worker is closed: no more connections come.
    Closed,
    /// The dispatcher drains this worker: no more connections come unless the drain is resumed.
    Draining,
    /// No connection came within the timeout of [`accept_timeout`](crate::Worker::accept_timeout).
    /// Trying again may help.
    TimedOut,
    /// This process is a fork of the process that joined. Only that process may take connections;
    /// connect after forking.
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
    /// The same text as `Display`, because a `main` that returns the error prints this.
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

/// For functions that return [`io::Result`]. The kind classifies the error, and the error itself is
/// inside.
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
