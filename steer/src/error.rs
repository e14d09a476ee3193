//! What can fail, and what to do about it.

use std::fmt;
use std::io;
use std::path::PathBuf;

/// Why a step failed. The text has the cause and what to do.
#[derive(Debug)]
pub enum Error {
    /// The machine lacks something: each entry has what is missing and the remedy.
    Missing(Vec<String>),
    /// The kernel refused the programs or maps; the text has its reason.
    Refused {
        /// The step, as in "cannot …".
        step: &'static str,
        /// The answer of the kernel.
        reason: String,
    },
    /// A file, directory or descriptor cannot be used.
    Path {
        /// The step, as in "cannot …".
        step: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Why.
        error: io::Error,
        /// What to do, if that is known.
        help: Option<String>,
    },
    /// A system call failed.
    System {
        /// The step, as in "cannot …".
        step: &'static str,
        /// Why.
        error: io::Error,
    },
    /// The pinned maps are those of another version of this program.
    Version {
        /// The directory with the pins.
        path: PathBuf,
        /// The version found.
        found: u32,
    },
    /// A listener that was open before cannot be registered; the text has why and what to do.
    Listener {
        /// Its address.
        address: std::net::SocketAddr,
        /// Why, and what to do.
        reason: String,
    },
    /// A value is outside its range; the text has the range.
    Invalid(String),
}

impl Error {
    pub(crate) fn refused(step: &'static str, error: impl std::error::Error) -> Error {
        Error::Refused { step, reason: with_sources(&error) }
    }
}

/// The messages of an error and of its causes, without repetitions.
fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Missing(all) => write!(f, "this machine cannot steer: {}", all.join("; ")),
            Error::Refused { step, reason } => write!(f, "cannot {step}: {reason}"),
            Error::Path { step, path, error, help } => {
                write!(f, "cannot {step}: {}: {error}", path.display())?;
                match help {
                    Some(help) => write!(f, "; {help}"),
                    None => Ok(()),
                }
            }
            Error::System { step, error } => write!(f, "cannot {step}: {error}"),
            Error::Version { path, found } => write!(
                f,
                "cannot adopt {}: its maps have version {found}, this program needs version {}; \
                 remove the directory to detach the old programs",
                path.display(),
                crate::layout::VERSION
            ),
            Error::Listener { address, reason } => {
                write!(f, "cannot register the listener at {address}: {reason}")
            }
            Error::Invalid(text) => f.write_str(text),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Path { error, .. } | Error::System { error, .. } => Some(error),
            Error::Missing(_)
            | Error::Refused { .. }
            | Error::Version { .. }
            | Error::Listener { .. }
            | Error::Invalid(_) => None,
        }
    }
}
