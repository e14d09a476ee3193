//! The errors of a connector.

use std::fmt;
use std::io;
use std::time::Duration;

use super::Address;

/// Outcomes that the text of an error shows; the value has all.
const SHOWN: usize = 8;

/// Why there is no connection.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// A setting is wrong: change it and start again.
    Config {
        /// The setting: a field of [`ConnectorConfig`](super::ConnectorConfig) or a kind of
        /// address.
        setting: &'static str,
        /// The problem and its remedy.
        problem: String,
    },
    /// Every attempt failed, and nothing asked for more. Trying again later may help.
    ConnectionLost(ConnectionLost),
}

/// All attempts of the last round failed.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConnectionLost {
    /// The outcome of each attempt, in order. Empty if there was no address to try.
    pub attempts: Vec<Outcome>,
    /// Whether the total time limit ended the attempts before their number did.
    pub timed_out: bool,
    /// The last problem with the list of addresses, such as an advice host that does not answer.
    pub addresses: Option<String>,
}

/// The outcome of an attempt that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Outcome<A = Address> {
    /// The address that was tried, after a replacement by the handler.
    pub address: A,
    /// As in the event of the attempt.
    pub alternative: bool,
    /// As in the event of the attempt.
    pub retries_left: u32,
    /// The time that the attempt took.
    pub took: Duration,
    /// The kind of the error.
    pub kind: io::ErrorKind,
    /// The error.
    pub problem: String,
    /// Whether the cause is a shortage of this machine, such as no free descriptor: then the
    /// address has not been set aside.
    pub local: bool,
}

impl Error {
    pub(super) fn config(setting: &'static str, problem: impl Into<String>) -> Error {
        Error::Config { setting, problem: problem.into() }
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
            Error::ConnectionLost(lost) => lost.fmt(f),
        }
    }
}

impl fmt::Display for ConnectionLost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.attempts.len() {
            0 => f.write_str("no connection: no address was tried")?,
            1 => f.write_str("no connection: 1 attempt failed")?,
            count => write!(f, "no connection: {count} attempts failed")?,
        }
        if self.timed_out {
            f.write_str(" in the time limit of all attempts")?;
        }
        for (place, outcome) in self.attempts.iter().take(SHOWN).enumerate() {
            let before = if place == 0 { ": " } else { "; " };
            write!(f, "{before}{}: {}", outcome.address, outcome.problem)?;
        }
        if self.attempts.len() > SHOWN {
            f.write_str("; …")?;
        }
        match &self.addresses {
            Some(problem) => write!(f, "; no current list of addresses: {problem}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {}

impl std::error::Error for ConnectionLost {}

/// For functions that return [`io::Result`]. The error itself is inside.
impl From<Error> for io::Error {
    fn from(error: Error) -> io::Error {
        let kind = match &error {
            Error::Config { .. } => io::ErrorKind::InvalidInput,
            Error::ConnectionLost(lost) if lost.timed_out => io::ErrorKind::TimedOut,
            Error::ConnectionLost(lost) => {
                lost.attempts.last().map_or(io::ErrorKind::NotConnected, |outcome| outcome.kind)
            }
        };
        io::Error::new(kind, error)
    }
}
