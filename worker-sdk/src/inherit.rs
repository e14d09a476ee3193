//! Listeners that this process inherits.

use std::io;
use std::net::TcpListener;
use std::os::fd::RawFd;
use std::sync::{Mutex, PoisonError};

use crate::sys;

/// The number of the first descriptor that is passed (`SD_LISTEN_FDS_START`).
const FIRST: RawFd = 3;

/// Whether the listeners have an owner.
static TAKEN: Mutex<bool> = Mutex::new(false);

/// The TCP listeners that this process inherits, from the dispatcher or from a service manager such
/// as systemd (`LISTEN_PID`, `LISTEN_FDS`), in their order.
///
/// The list is empty if the variables are missing or are meant for another process, as in a process
/// that this one has started. The environment is not changed. The listeners are set close-on-exec.
/// Whether `accept` waits is left as it is: call [`TcpListener::set_nonblocking`] before the
/// listener goes to tokio or mio.
///
/// A server that listens by itself needs this and no [`Worker`](crate::Worker):
///
/// ```no_run
/// use std::io::{self, Write};
/// use std::net::TcpListener;
///
/// fn main() -> io::Result<()> {
///     let listener = match worker_sdk::inherited_listeners()?.into_iter().next() {
///         Some(listener) => listener,
///         // Started by hand.
///         None => TcpListener::bind("127.0.0.1:7000")?,
///     };
///     for connection in listener.incoming() {
///         connection?.write_all(b"hello\n")?;
///     }
///     Ok(())
/// }
/// ```
///
/// # Errors
///
/// `LISTEN_FDS` is no number of descriptors, or one of them is not open, was opened by this process
/// itself, or is no TCP socket that listens: the error names it, and all remain as they are. A
/// second call, after one that has returned listeners, is an error, too.
pub fn inherited_listeners() -> io::Result<Vec<TcpListener>> {
    let value = |name| std::env::var(name).ok();
    let own = value("LISTEN_PID").is_some_and(|pid| pid.parse() == Ok(std::process::id()));
    let Some(count) = value("LISTEN_FDS").filter(|_| own) else { return Ok(Vec::new()) };
    let end = count.parse().ok().and_then(|count| FIRST.checked_add(count));
    let Some(end) = end.filter(|&end| end >= FIRST) else {
        let text = format!("LISTEN_FDS is {count:?}, which is no number of descriptors");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    };
    let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
    if *taken {
        return Err(io::Error::other("the inherited listeners were returned before"));
    }
    let listeners = sys::adopt_listeners(FIRST..end).map_err(|(fd, error)| {
        let text = format!("descriptor {fd} of LISTEN_FDS={count} is no TCP listener: {error}");
        io::Error::new(error.kind(), text)
    })?;
    *taken = !listeners.is_empty();
    Ok(listeners)
}
