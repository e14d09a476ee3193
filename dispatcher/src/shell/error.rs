//! Why the dispatcher could not start or go on, in words that say what to do.

use std::fmt;
use std::io;
use std::path::PathBuf;

/// Why [`super::run`] failed.
#[derive(Debug)]
pub enum RunError {
    /// Another process serves this Unix socket.
    InUse(PathBuf),
    /// Something that is not a socket is in the way.
    NotASocket(PathBuf),
    /// A listener or Unix socket could not be made.
    Bind {
        /// What was to be made.
        what: String,
        /// The system's answer.
        error: io::Error,
    },
    /// The configuration names an inherited socket that was not passed, or is of the wrong kind.
    Inherited(String),
    /// A system call that everything depends on failed.
    System {
        /// What was attempted.
        what: &'static str,
        /// The system's answer.
        error: io::Error,
    },
}

impl RunError {
    /// Turns the answer to `what` into an error; for `map_err`.
    pub(crate) fn system<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> RunError {
        move |error| RunError::System { what, error: error.into() }
    }
}

impl fmt::Display for RunError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RunError::InUse(path) => write!(
                f,
                "{} is in use by another process; stop that dispatcher first, or configure another path",
                path.display()
            ),
            RunError::NotASocket(path) => write!(
                f,
                "{} exists and is not a socket; it was left alone: move it away, or configure another path",
                path.display()
            ),
            RunError::Bind { what, error } => write!(f, "cannot listen on {what}: {error}"),
            RunError::Inherited(text) => f.write_str(text),
            RunError::System { what, error } => write!(f, "{what}: {error}"),
        }
    }
}

impl std::error::Error for RunError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            RunError::Bind { error, .. } | RunError::System { error, .. } => Some(error),
            RunError::InUse(_) | RunError::NotASocket(_) | RunError::Inherited(_) => None,
        }
    }
}
