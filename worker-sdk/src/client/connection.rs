//! A connection that the application has taken.

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::guard::{CountedStream, Guard};
use crate::{PeerAddr, Proxy};

/// What the dispatcher states about a connection.
#[derive(Clone, Debug)]
pub(crate) struct Origin {
    pub(crate) peer: PeerAddr,
    pub(crate) listener: Option<Arc<str>>,
    pub(crate) accepted: AcceptTime,
    pub(crate) number: Option<u64>,
    pub(crate) is_ready_check: bool,
    pub(crate) proxy: Option<Box<Proxy>>,
}

/// When a connection was accepted. Its age uses a clock that is never set, from the moment the
/// application took the connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AcceptTime {
    at: SystemTime,
    waited: Duration,
    taken: Instant,
}

impl AcceptTime {
    /// `accepted` and `now` are `CLOCK_REALTIME`, which is the same in every time namespace. An
    /// accept time in the future means that the clock was set back; it then counts as now.
    pub(crate) fn new(accepted: Duration, now: Duration) -> AcceptTime {
        let accepted = accepted.min(now);
        let at = SystemTime::UNIX_EPOCH.checked_add(accepted).unwrap_or(SystemTime::UNIX_EPOCH);
        AcceptTime { at, waited: now - accepted, taken: Instant::now() }
    }

    pub(crate) fn at(&self) -> SystemTime {
        self.at
    }

    pub(crate) fn age(&self) -> Duration {
        self.waited.saturating_add(self.taken.elapsed())
    }
}

impl Origin {
    /// Whether the socket is a TCP socket. Behind a proxy, the client may be of the other kind.
    pub(crate) fn is_tcp(&self) -> bool {
        let source = self.proxy.as_ref().map_or(self.peer, |proxy| proxy.address());
        matches!(source, PeerAddr::Inet(_))
    }

    pub(crate) fn listener(&self) -> &str {
        self.listener.as_deref().unwrap_or("")
    }
}

/// A connection from the core, for a layer to wrap.
pub(crate) struct Accepted {
    /// Also a Unix socket: reads, writes and options use the descriptor, and the standard library
    /// asks the kernel for the kind of socket only for addresses.
    pub(crate) stream: TcpStream,
    /// Whether the socket is known to be in non-blocking mode; otherwise its mode is unknown.
    pub(crate) nonblocking: bool,
    pub(crate) guard: Guard,
    pub(crate) origin: Origin,
}

/// A live connection. It counts as live until its last handle is dropped.
///
/// Read and write it like a [`TcpStream`]; `&Connection` reads and writes, too. It starts in
/// blocking mode, with the mio layer in non-blocking mode.
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
///     // End the sending direction, then read until the client ends.
///     connection.shutdown(std::net::Shutdown::Write)?;
///     std::io::copy(&mut connection, &mut std::io::sink())?;
///     Ok(())
/// }
/// ```
///
/// A clone is another handle of the same connection with the same file descriptor, so the handles
/// share blocking mode, timeouts and options. Dropping the last handle closes the socket, then
/// counts the end.
///
/// # Closing
/// While only the SDK has the descriptor, dropping the last handle ends the connection: the client
/// sees the end immediately, although the dispatcher may still have a copy. Once the descriptor has
/// left the SDK's control, a child process, a thread with a duplicate or another library may serve
/// the connection. Then dropping the last handle only closes this descriptor, as with a
/// [`TcpStream`], and the dispatcher closes its copy immediately; the client sees the end when the
/// last holder has closed. The descriptor leaves with [`as_fd`](AsFd::as_fd),
/// [`as_raw_fd`](AsRawFd::as_raw_fd), [`as_tcp`](Connection::as_tcp),
/// [`into_parts`](Connection::into_parts), [`into_fd`](Connection::into_fd), and with a child
/// forked while the connection exists. (A child of a raw `clone` system call is not noticed.) The
/// copy of a `Connection` in a forked child only closes.
///
/// The connection counts for this worker until its last handle is dropped. So a parent that passes
/// connections to children keeps its handle until the child has ended; the example `inetd` shows
/// this.
#[derive(Clone)]
pub struct Connection(Arc<Inner>);

struct Inner {
    held: CountedStream<TcpStream>,
    origin: Origin,
}

impl Connection {
    pub(crate) fn new(accepted: Accepted) -> Connection {
        Connection(Arc::new(Inner {
            held: CountedStream::new(accepted.stream, accepted.guard),
            origin: accepted.origin,
        }))
    }

    fn stream(&self) -> &TcpStream {
        &self.0.held.stream
    }

    /// The address that the client connected from, as the dispatcher saw it. For a client behind a
    /// proxy, the address that the proxy named.
    pub fn peer_addr(&self) -> PeerAddr {
        self.0.origin.peer
    }

    /// What a proxy said about the client; `None` for a client that came without one. Only
    /// listeners with `proxy_protocol` have proxies.
    ///
    /// ```no_run
    /// # fn log(connection: &worker_sdk::Connection) {
    /// if let Some(proxy) = connection.proxy() {
    ///     let (client, host) = (connection.peer_addr(), proxy.authority());
    ///     println!("{client} through {} for {host:?}", proxy.address());
    /// }
    /// # }
    /// ```
    pub fn proxy(&self) -> Option<&Proxy> {
        self.0.origin.proxy.as_deref()
    }

    /// The name of the dispatcher's listener that the client connected to. Empty without a
    /// dispatcher, and for a listener added after this worker joined.
    pub fn listener(&self) -> &str {
        self.0.origin.listener()
    }

    /// When the dispatcher (without a dispatcher, this process) accepted the connection, by the
    /// system's clock.
    pub fn accepted_at(&self) -> SystemTime {
        self.0.origin.accepted.at()
    }

    /// The time since the connection was accepted. Immediately after
    /// [`accept`](crate::Worker::accept) it is the time that the client has waited for this worker,
    /// without the time in the kernel's queue: a dispatcher with full workers accepts nothing.
    ///
    /// The same in every time namespace. It is wrong only if the clock is set between the accept by
    /// the dispatcher and the take by the worker.
    ///
    /// ```no_run
    /// # use std::time::Duration;
    /// # fn serve(_: worker_sdk::Connection) {}
    /// # fn next(worker: &worker_sdk::Worker) -> Result<(), worker_sdk::Error> {
    /// if let Some(connection) = worker.accept()? {
    ///     if connection.age() < Duration::from_secs(10) {
    ///         serve(connection);
    ///     } // An older one is dropped: the client has probably given up.
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn age(&self) -> Duration {
        self.0.origin.accepted.age()
    }

    /// The dispatcher's number of this connection, `conn=` in its log, for the log of the
    /// application. `None` without a dispatcher, with one of an older version, and for a ready
    /// check.
    pub fn number(&self) -> Option<u64> {
        self.0.origin.number
    }

    /// Whether the dispatcher itself has connected, to see whether this worker is ready
    /// (`ready_check`). The application may treat it like any other connection, or leave it out of
    /// its log and its figures. The dispatcher closes its end when it has seen enough: after the
    /// take (`tcp`), or after the response to its request (a path). False without a dispatcher.
    ///
    /// ```no_run
    /// # fn serve(_: worker_sdk::Connection) {}
    /// # fn next(worker: &mut worker_sdk::Worker) {
    /// for connection in worker.incoming() {
    ///     if !connection.is_ready_check() {
    ///         println!("a client at {}", connection.peer_addr());
    ///     }
    ///     serve(connection);
    /// }
    /// # }
    /// ```
    pub fn is_ready_check(&self) -> bool {
        self.0.origin.is_ready_check
    }

    /// The address that the client connected to.
    ///
    /// # Errors
    /// The error of the system call.
    pub fn local_addr(&self) -> io::Result<PeerAddr> {
        match self.tcp() {
            Some(stream) => stream.local_addr().map(PeerAddr::from),
            None => Ok(PeerAddr::Unix),
        }
    }

    /// Reads without removing: the next read returns the same bytes.
    ///
    /// # Errors
    /// As reading.
    pub fn peek(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream().peek(buffer)
    }

    /// Another handle of the same connection: a [`clone`](Clone::clone), with the name from the
    /// standard library's streams.
    ///
    /// # Errors
    /// None. The type is that of [`TcpStream::try_clone`], so that code for one accepts the other.
    ///
    /// ```no_run
    /// # fn relay(connection: worker_sdk::Connection, mut backend: std::net::TcpStream) -> std::io::Result<()> {
    /// // One thread for each direction. The connection ends when both have ended.
    /// let (mut reader, mut to_backend) = (connection.try_clone()?, backend.try_clone()?);
    /// std::thread::spawn(move || std::io::copy(&mut reader, &mut to_backend));
    /// std::io::copy(&mut backend, &mut &connection)?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn try_clone(&self) -> io::Result<Connection> {
        Ok(self.clone())
    }

    /// The stream for another library to own, and the guard that counts the connection.
    ///
    /// Drop the guard after closing the stream: then the dispatcher closes its copy. From here on
    /// only the new owner shuts the connection down: see [`Guard::must_shut_down`].
    ///
    /// The stream of a Unix client is a [`TcpStream`], too. Everything except addresses and TCP
    /// options works, and `UnixStream::from(OwnedFd::from(stream))` converts it. See [`Guard`] for
    /// an example.
    ///
    /// # Errors
    /// If the process has no file descriptor left. Then the connection is closed, unless it has
    /// other handles.
    pub fn into_parts(self) -> io::Result<(TcpStream, Guard)> {
        // With this clone of the guard, the drop of this handle is not the end of the connection.
        let guard = self.0.held.guard.clone();
        let stream = guard.duplicate(self.stream())?;
        Ok((stream, guard))
    }

    /// The descriptor, for any kind of socket, and the guard: for a child process or a Unix client.
    ///
    /// # Errors
    /// As [`into_parts`](Connection::into_parts).
    ///
    /// ```no_run
    /// # fn give(connection: worker_sdk::Connection) -> std::io::Result<()> {
    /// use std::process::{Command, Stdio};
    ///
    /// let (fd, guard) = connection.into_fd()?;
    /// let mut child = Command::new("/usr/bin/rev").stdin(fd.try_clone()?).stdout(Stdio::from(fd)).spawn()?;
    /// std::thread::spawn(move || {
    ///     let _ = child.wait();
    ///     drop(guard); // The connection has ended with the child.
    /// });
    /// # Ok(())
    /// # }
    /// ```
    pub fn into_fd(self) -> io::Result<(OwnedFd, Guard)> {
        let (stream, guard) = self.into_parts()?;
        Ok((stream.into(), guard))
    }

    /// The stream, for other options; `None` for a Unix client. From here on, dropping the
    /// connection only closes it: see [Closing](Connection#closing).
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
        self.0.held.guard.expose();
        self.tcp()
    }

    /// For the mio layer, which keeps the descriptor inside the SDK.
    #[cfg(feature = "mio")]
    pub(crate) fn registered_fd(&self) -> RawFd {
        self.stream().as_raw_fd()
    }

    fn tcp(&self) -> Option<&TcpStream> {
        self.0.origin.is_tcp().then(|| self.stream())
    }

    /// Sends small writes immediately (`TCP_NODELAY`). Does nothing for a Unix client.
    ///
    /// # Errors
    /// The error of the system call.
    pub fn set_nodelay(&self, nodelay: bool) -> io::Result<()> {
        self.tcp().map_or(Ok(()), |stream| stream.set_nodelay(nodelay))
    }

    /// Makes reads and writes return [`io::ErrorKind::WouldBlock`] instead of waiting, for all
    /// handles.
    ///
    /// # Errors
    /// The error of the system call.
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

    /// The longest wait of a read; `None` for no limit.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] for a zero duration.
    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.stream().set_read_timeout(timeout)
    }

    /// The longest wait of a write; `None` for no limit.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] for a zero duration.
    pub fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.stream().set_write_timeout(timeout)
    }

    /// Ends one or both directions, for all handles and processes.
    ///
    /// # Errors
    /// The error of the system call, such as [`io::ErrorKind::NotConnected`].
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

/// From here on the SDK does not know which code has the descriptor: dropping the connection only
/// closes it. See [`Connection`].
impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.held.guard.expose();
        self.stream().as_fd()
    }
}

/// As with [`AsFd`]: from here on dropping the connection only closes it.
impl AsRawFd for Connection {
    fn as_raw_fd(&self) -> RawFd {
        self.0.held.guard.expose();
        self.stream().as_raw_fd()
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("fd", &self.stream().as_raw_fd())
            .field("peer", &self.peer_addr())
            .field("listener", &self.listener())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_age_uses_a_clock_that_is_never_set() {
        let (one, ten) = (Duration::from_secs(1), Duration::from_secs(10));
        let accepted = AcceptTime::new(one, ten);
        assert_eq!(accepted.at(), SystemTime::UNIX_EPOCH + one);
        assert!(accepted.age() >= ten - one && accepted.age() < ten * 10);

        let set_back = AcceptTime::new(ten, one);
        assert_eq!(set_back.at(), SystemTime::UNIX_EPOCH + one, "never in the future");
        assert!(set_back.age() < ten);
        let strange = AcceptTime::new(Duration::ZERO, Duration::MAX);
        assert_eq!(strange.age(), Duration::MAX, "no overflow");
    }
}
