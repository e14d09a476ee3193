//! A connection that the application has taken, and the guard that counts its end.
//!
//! Owns the rules of closing: who shuts down, who counts, and in which order.

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::core::Core;
use super::process::Process;
use crate::scoreboard::{Scoreboard, claim};
use crate::wire::PeerAddr;

/// Counts one connection as held by this worker; dropping the last clone counts it as finished.
///
/// A [`Connection`] has one inside. Keep one by hand, from [`Connection::into_parts`], when another
/// library owns the stream: drop it after the stream is closed.
///
/// A fork's copy counts nothing: only the process that took the connection does.
///
/// ```no_run
/// use std::net::{Shutdown, TcpStream};
/// use worker_sdk::{Connection, Guard};
///
/// /// A stream of our own. Fields are dropped in this order: the guard last.
/// struct Counted {
///     stream: TcpStream,
///     guard: Guard,
/// }
///
/// impl Drop for Counted {
///     fn drop(&mut self) {
///         if self.guard.must_shut_down() {
///             // It fails when the client is gone already.
///             let _ = self.stream.shutdown(Shutdown::Both);
///         }
///     }
/// }
///
/// fn own(connection: Connection) -> std::io::Result<Counted> {
///     let (stream, guard) = connection.into_parts()?;
///     Ok(Counted { stream, guard })
/// }
/// ```
#[derive(Clone)]
pub struct Guard(Arc<Counted>);

struct Counted {
    core: Arc<Core>,
    process: Process,
    /// Where the dispatcher shows whether it still has a copy; `None` without a dispatcher.
    custody: Option<Custody>,
    /// Its place among the live connections, once it has a descriptor there.
    place: OnceLock<u32>,
}

pub(super) struct Custody {
    pub(super) board: Arc<Scoreboard>,
    pub(super) slot: u32,
    pub(super) seq: u64,
    /// Another worker may have a copy, too.
    pub(super) resent: bool,
}

impl Guard {
    pub(super) fn new(core: Arc<Core>, custody: Option<Custody>) -> Guard {
        let process = core.process();
        Guard(Arc::new(Counted { core, process, custody, place: OnceLock::new() }))
    }

    /// Enters the connection among the live ones; `fd` stays open until [`Guard::disown`].
    fn own(&self, fd: BorrowedFd<'_>) {
        if self.0.process.is_current() {
            self.0.place.get_or_init(|| self.0.core.live_connections().enter(fd));
        }
    }

    fn disown(&self) {
        if let Some(at) = self.place() {
            self.0.core.live_connections().disown(at);
        }
    }

    /// Nothing in a forked child: its copy of the lock may be locked for ever.
    fn place(&self) -> Option<u32> {
        self.0.place.get().copied().filter(|_| self.0.process.is_current())
    }

    /// Whether somebody else may still hold a copy of the socket, so that the client would not see the
    /// end if its owner merely closed it: shut it down first (both directions).
    ///
    /// False in a forked child, and while this guard has clones: then the connection does not end yet. The
    /// [example above](Guard) shows where to ask.
    pub fn must_shut_down(&self) -> bool {
        // Fork comes first: nothing may end what the parent still serves.
        if !self.0.process.is_current() || Arc::strong_count(&self.0) > 1 {
            return false;
        }
        self.0.custody.as_ref().is_some_and(|custody| {
            let slot = custody.board.slot(custody.slot);
            custody.resent || slot.is_some_and(|slot| claim::still_held(slot, custody.seq))
        })
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        if self.process.is_current() {
            if let Some(&at) = self.place.get() {
                self.core.live_connections().leave(at);
            }
            self.core.finished_one();
        }
    }
}

impl fmt::Debug for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guard").finish_non_exhaustive()
    }
}

/// A stream and its guard: shut down if need be, then closed, then counted, in this order.
pub(crate) struct Held<S: AsFd> {
    // Declared, and so dropped, before the guard: what is counted as finished is closed.
    pub(crate) stream: S,
    guard: Guard,
}

impl<S: AsFd> Held<S> {
    pub(crate) fn new(stream: S, guard: Guard) -> Held<S> {
        guard.own(stream.as_fd());
        Held { stream, guard }
    }
}

impl<S: AsFd> Drop for Held<S> {
    fn drop(&mut self) {
        if self.guard.must_shut_down() {
            // It fails when the client is gone already.
            let _ = rustix::net::shutdown(&self.stream, rustix::net::Shutdown::Both);
        }
        // Last of all, before the stream is closed.
        self.guard.disown();
    }
}

/// What the dispatcher says of a connection.
#[derive(Clone, Debug)]
pub(crate) struct Origin {
    pub(crate) peer: PeerAddr,
    pub(crate) listener: Option<Arc<str>>,
    pub(crate) accepted_at: Duration,
}

impl Origin {
    pub(crate) fn listener(&self) -> &str {
        self.listener.as_deref().unwrap_or("")
    }
}

/// A connection as the core hands it out, for a layer to wrap.
pub(crate) struct Accepted {
    /// Also of a Unix client: reading, writing and options go by the descriptor, and the standard
    /// library asks the kernel for the kind only where addresses are concerned.
    pub(crate) stream: TcpStream,
    /// Known to be in non-blocking mode. Otherwise its mode is not known.
    pub(crate) nonblocking: bool,
    pub(crate) guard: Guard,
    pub(crate) origin: Origin,
}

/// A live connection. It counts as held until its last handle is dropped.
///
/// Read and write it like a [`TcpStream`]; `&Connection` reads and writes, too. It starts in blocking
/// mode, or non-blocking when it comes from the mio layer.
///
/// ```no_run
/// use std::io::{Read, Write};
/// use std::time::Duration;
/// use worker_sdk::Connection;
///
/// fn serve(mut connection: Connection) -> std::io::Result<()> {
///     connection.set_nodelay(true)?;
///     connection.set_read_timeout(Some(Duration::from_secs(30)))?;
///     connection.set_write_timeout(Some(Duration::from_secs(30)))?;
///     println!("{} came in at {:?}", connection.peer_addr(), connection.listener());
///
///     let mut buffer = [0; 4096];
///     let n = connection.read(&mut buffer)?;
///     connection.write_all(&buffer[..n])?;
///
///     // No more from us; the client's last words are still read.
///     connection.shutdown(std::net::Shutdown::Write)?;
///     std::io::copy(&mut connection, &mut std::io::sink())?;
///     Ok(())
/// }
/// ```
///
/// A clone is another handle of the same connection, with the same file descriptor: they share its
/// blocking mode, time-outs and options. Dropping the last handle closes the socket, and then counts.
/// A forked child's copy just closes.
#[derive(Clone)]
pub struct Connection(Arc<Inner>);

struct Inner {
    held: Held<TcpStream>,
    origin: Origin,
}

impl Connection {
    pub(crate) fn new(accepted: Accepted) -> Connection {
        Connection(Arc::new(Inner {
            held: Held::new(accepted.stream, accepted.guard),
            origin: accepted.origin,
        }))
    }

    fn stream(&self) -> &TcpStream {
        &self.0.held.stream
    }

    /// Where the client connected from, as the dispatcher saw it.
    pub fn peer_addr(&self) -> PeerAddr {
        self.0.origin.peer
    }

    /// The name of the dispatcher's listener the client connected to; empty if it has none, without a dispatcher, and
    /// for a listener that the dispatcher has had only since after this worker joined.
    pub fn listener(&self) -> &str {
        self.0.origin.listener()
    }

    /// When the connection was accepted: the time of `CLOCK_MONOTONIC`, which starts at boot, in nanoseconds.
    ///
    /// ```no_run
    /// use std::time::Duration;
    /// use rustix::time::{ClockId, clock_gettime};
    ///
    /// // How long the client has waited until now.
    /// fn waited(connection: &worker_sdk::Connection) -> Duration {
    ///     let now = clock_gettime(ClockId::Monotonic);
    ///     Duration::try_from(now).unwrap_or_default().saturating_sub(connection.accepted_at())
    /// }
    /// ```
    pub fn accepted_at(&self) -> Duration {
        self.0.origin.accepted_at
    }

    /// Another handle of the same connection: a [`clone`](Clone::clone) under the name that the standard library's
    /// streams use.
    ///
    /// # Errors
    /// None; the type is that of [`TcpStream::try_clone`], so that code written for one takes the other.
    ///
    /// ```no_run
    /// # fn relay(connection: worker_sdk::Connection, mut backend: std::net::TcpStream) -> std::io::Result<()> {
    /// // One thread for each direction. The connection ends, and is counted, with the later one.
    /// let (mut reader, mut to_backend) = (connection.try_clone()?, backend.try_clone()?);
    /// std::thread::spawn(move || std::io::copy(&mut reader, &mut to_backend));
    /// std::io::copy(&mut backend, &mut &connection)?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn try_clone(&self) -> io::Result<Connection> {
        Ok(self.clone())
    }

    /// The stream for another library to own, and the guard that counts it.
    ///
    /// Drop the guard after the stream is closed. If [`Guard::must_shut_down`] says so, shut the stream
    /// down before closing it; otherwise the client may see the end some milliseconds late.
    ///
    /// The stream of a Unix client is given as a [`TcpStream`], too; everything but addresses and TCP
    /// options works, and `UnixStream::from(OwnedFd::from(stream))` makes it the other type. See [`Guard`] for an
    /// example.
    ///
    /// # Errors
    /// When the process has no file descriptor to spare; the connection is closed then, unless it has other handles.
    pub fn into_parts(self) -> io::Result<(TcpStream, Guard)> {
        // The guard's clone keeps our own handle's end from being taken for the connection's.
        let guard = self.0.held.guard.clone();
        let stream = self.stream().try_clone()?;
        if let Some(at) = guard.place() {
            guard.0.core.live_connections().part(at, stream.as_fd());
        }
        Ok((stream, guard))
    }

    /// The stream, for its other options; `None` for a Unix client.
    ///
    /// ```no_run
    /// # fn print(connection: &worker_sdk::Connection) -> std::io::Result<()> {
    /// if let Some(tcp) = connection.as_tcp() {
    ///     println!("the client called {}", tcp.local_addr()?);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn as_tcp(&self) -> Option<&TcpStream> {
        match self.peer_addr() {
            PeerAddr::Inet(_) => Some(self.stream()),
            PeerAddr::Unix => None,
        }
    }

    /// Sends small writes at once (`TCP_NODELAY`). Does nothing for a Unix client.
    ///
    /// # Errors
    /// What the system says.
    pub fn set_nodelay(&self, nodelay: bool) -> io::Result<()> {
        self.as_tcp().map_or(Ok(()), |stream| stream.set_nodelay(nodelay))
    }

    /// Makes reads and writes return [`io::ErrorKind::WouldBlock`] instead of waiting; for all handles.
    ///
    /// # Errors
    /// What the system says.
    ///
    /// ```no_run
    /// # fn peek(mut connection: worker_sdk::Connection) -> std::io::Result<()> {
    /// use std::io::{ErrorKind, Read};
    ///
    /// connection.set_nonblocking(true)?;
    /// match connection.read(&mut [0; 4096]) {
    ///     Ok(n) => println!("{n} bytes"),
    ///     Err(error) if error.kind() == ErrorKind::WouldBlock => println!("nothing yet"),
    ///     Err(error) => return Err(error),
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        self.stream().set_nonblocking(nonblocking)
    }

    /// How long a read may wait; `None` for ever.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] for a zero duration.
    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.stream().set_read_timeout(timeout)
    }

    /// How long a write may wait; `None` for ever.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] for a zero duration.
    pub fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.stream().set_write_timeout(timeout)
    }

    /// Ends one or both directions for all handles and processes.
    ///
    /// # Errors
    /// What the system says, such as [`io::ErrorKind::NotConnected`].
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        self.stream().shutdown(how)
    }
}

impl Read for &Connection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream().read(buffer)
    }
    fn read_vectored(&mut self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        self.stream().read_vectored(buffers)
    }
}

impl Write for &Connection {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.stream().write(buffer)
    }
    fn write_vectored(&mut self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        self.stream().write_vectored(buffers)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Connection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&*self).read(buffer)
    }
    fn read_vectored(&mut self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        (&*self).read_vectored(buffers)
    }
}

impl Write for Connection {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        (&*self).write(buffer)
    }
    fn write_vectored(&mut self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        (&*self).write_vectored(buffers)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream().as_fd()
    }
}

impl AsRawFd for Connection {
    fn as_raw_fd(&self) -> RawFd {
        self.stream().as_raw_fd()
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("fd", &self.as_raw_fd())
            .field("peer", &self.peer_addr())
            .field("listener", &self.listener())
            .finish()
    }
}
