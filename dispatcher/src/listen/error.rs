//! Errors that prevent the dispatcher from starting or going on, with a hint for each.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Why `event_loop::run` failed.
#[derive(Debug)]
pub enum RunError {
    /// Another process serves this Unix socket.
    InUse {
        /// The socket file.
        path: PathBuf,
        /// The process that serves it.
        holder: Holder,
    },
    /// The lock file beside a Unix socket could not be opened.
    Lock {
        /// The path of the lock file.
        lock: PathBuf,
        /// The owner of the lock file.
        owner: String,
        /// The error of the system.
        error: io::Error,
    },
    /// A file that is no socket is in the way.
    NotASocket(PathBuf),
    /// A listener or Unix socket could not be made.
    Bind {
        /// What was to be made.
        what: String,
        /// The error of the system.
        error: io::Error,
    },
    /// The configuration names an inherited socket that was not passed, or that has the wrong type.
    Inherited(String),
    /// The kernel cannot choose the workers of a pool with `mode = "steer"`.
    Steer {
        /// The pool.
        pool: String,
        /// What is missing.
        error: String,
    },
    /// The running dispatcher was not taken over; it serves on.
    TakeOver(String),
    /// An essential system call failed.
    System {
        /// What was attempted.
        what: &'static str,
        /// The error of the system.
        error: io::Error,
    },
}

/// The process that holds a lock or a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Holder {
    /// This process.
    This,
    /// Another process: its id and name.
    Other(i32, String),
    /// A process that is not visible from here.
    Unknown,
}

impl Holder {
    /// The holder of the lock on a file.
    pub(crate) fn of_lock(path: &Path) -> Holder {
        let (Ok(found), Ok(locks)) =
            (std::fs::symlink_metadata(path), std::fs::read_to_string("/proc/locks"))
        else {
            return Holder::Unknown;
        };
        let (major, minor) = (rustix::fs::major(found.dev()), rustix::fs::minor(found.dev()));
        let file = format!("{major:02x}:{minor:02x}:{}", found.ino());
        let held = locks.lines().filter(|line| line.contains(" FLOCK ") && !line.contains("->"));
        let pid = held.filter_map(|line| {
            let mut words = line.split_whitespace().skip(4);
            let pid = words.next()?;
            (words.next()? == file).then(|| pid.parse().ok()).flatten()
        });
        pid.into_iter().next().map_or(Holder::Unknown, Holder::of)
    }

    /// The process at the other end of a connection.
    pub(crate) fn of_socket(socket: &OwnedFd) -> Holder {
        let peer = nix::sys::socket::getsockopt(socket, nix::sys::socket::sockopt::PeerCredentials);
        peer.map_or(Holder::Unknown, |peer| Holder::of(peer.pid()))
    }

    fn of(pid: i32) -> Holder {
        if u32::try_from(pid) == Ok(std::process::id()) {
            return Holder::This;
        }
        // Zero or less: the process is in a namespace that is not visible from here.
        match std::fs::read_to_string(format!("/proc/{pid}/comm")) {
            Ok(name) if pid > 0 => Holder::Other(pid, name.trim_end().to_owned()),
            _ => Holder::Unknown,
        }
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Holder::This => {
                f.write_str("this dispatcher itself; give each socket a path of its own")
            }
            Holder::Other(pid, name) => write!(
                f,
                "another process, {pid} ({name}); stop that dispatcher first, or configure another path"
            ),
            Holder::Unknown => f.write_str(
                "another process; stop that dispatcher first, or configure another path",
            ),
        }
    }
}

impl RunError {
    /// Turns the answer to `what` into an error; for `map_err`.
    pub(crate) fn system<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> RunError {
        move |error| RunError::System { what, error: error.into() }
    }

    /// Whether the address or the socket file is in use.
    pub(crate) fn is_in_use(&self) -> bool {
        match self {
            RunError::InUse { .. } => true,
            RunError::Bind { error, .. } => error.kind() == io::ErrorKind::AddrInUse,
            RunError::Lock { .. }
            | RunError::NotASocket(_)
            | RunError::Inherited(_)
            | RunError::TakeOver(_)
            | RunError::Steer { .. }
            | RunError::System { .. } => false,
        }
    }
}

impl fmt::Display for RunError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RunError::InUse { path, holder } => {
                write!(f, "{} is in use by {holder}", path.display())
            }
            RunError::Lock { lock, owner, error } => write!(
                f,
                "cannot open the lock file {}, which belongs to {owner}: {error}; if no dispatcher of that user runs, remove it",
                lock.display()
            ),
            RunError::NotASocket(path) => write!(
                f,
                "{} exists and is not a socket; it was left alone: move it away, or configure another path",
                path.display()
            ),
            RunError::Bind { what, error } => write!(f, "cannot listen on {what}: {error}"),
            RunError::Inherited(text) => f.write_str(text),
            RunError::TakeOver(text) => write!(f, "take-over: {text}"),
            RunError::Steer { pool, error } => write!(
                f,
                "the kernel cannot choose the workers of pool {pool} (mode = \"steer\"): {error}; \
                 `dispatcher doctor` lists what this machine supports"
            ),
            RunError::System { what, error } => write!(f, "{what}: {error}"),
        }
    }
}

impl std::error::Error for RunError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            RunError::Bind { error, .. }
            | RunError::Lock { error, .. }
            | RunError::System { error, .. } => Some(error),
            RunError::InUse { .. }
            | RunError::NotASocket(_)
            | RunError::Inherited(_)
            | RunError::Steer { .. }
            | RunError::TakeOver(_) => None,
        }
    }
}
