//! A connection that the application has taken.

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::guard::{CountedStream, Guard};
use crate::PeerAddr;

/// What the dispatcher says of a connection.
#[derive(Clone, Debug)]
pub(crate) struct Origin {
    pub(crate) peer: PeerAddr,
    pub(crate) listener: Option<Arc<str>>,
    pub(crate) accepted: AcceptTime,
    pub(crate) number: Option<u64>,
}

/// When a connection was accepted. The time that has passed goes by a clock that is never set, from the moment on at which
/// the application took the connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AcceptTime {
    at: SystemTime,
    waited: Duration,
    taken: Instant,
}

impl AcceptTime {
    /// `accepted` and `now` by `CLOCK_REALTIME`, which is the same in every time namespace. A time to come means that the
    /// clock was set back: then it is now.
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
///
/// # Closing
/// As long as only the SDK has had the descriptor, dropping the last handle ends the connection: the client sees its end at
/// once, although the dispatcher may still have a copy. Once the descriptor has left the SDK's control, anything may serve
/// the connection: a child process, a thread with a duplicate, another library. Then dropping the last handle only closes
/// this descriptor, as it would with a [`TcpStream`], and the dispatcher closes its copy at once; the client sees the end when
/// the last holder has closed. The descriptor leaves with [`as_fd`](AsFd::as_fd), [`as_raw_fd`](AsRawFd::as_raw_fd),
/// [`as_tcp`](Connection::as_tcp), [`into_parts`](Connection::into_parts), [`into_fd`](Connection::into_fd), and with a child
/// that is forked while the connection is there. (A child made by a raw `clone` system call is not noticed.) A forked child's
/// own copy of a `Connection` just closes.
///
/// The connection counts for this worker until its last handle is dropped, whatever else serves it. So a parent that gives
/// connections to children keeps its handle until the child has ended; the example `inetd` shows it.
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

    /// Where the client connected from, as the dispatcher saw it.
    pub fn peer_addr(&self) -> PeerAddr {
        self.0.origin.peer
    }

    /// The name of the dispatcher's listener the client connected to; empty if it has none, without a dispatcher, and
    /// for a listener that the dispatcher has had only since after this worker joined.
    pub fn listener(&self) -> &str {
        self.0.origin.listener()
    }

    /// When the dispatcher accepted the connection (without a dispatcher, this process), by the system's clock.
    pub fn accepted_at(&self) -> SystemTime {
        self.0.origin.accepted.at()
    }

    /// How long ago the connection was accepted. Right after [`accept`](crate::Worker::accept) it is the time that the client has
    /// waited for this worker, but for the time in the kernel's queue: a dispatcher whose workers are all full accepts nothing.
    ///
    /// The same in every time namespace. Only a clock that is set between the dispatcher's accept and the worker's makes it
    /// wrong.
    ///
    /// ```no_run
    /// # use std::time::Duration;
    /// # fn serve(_: worker_sdk::Connection) {}
    /// # fn next(worker: &worker_sdk::Worker) -> Result<(), worker_sdk::Error> {
    /// if let Some(connection) = worker.accept()? {
    ///     if connection.age() < Duration::from_secs(10) {
    ///         serve(connection);
    ///     } // Otherwise dropped: the client has probably given up.
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn age(&self) -> Duration {
        self.0.origin.accepted.age()
    }

    /// The dispatcher's number of this connection, as its log shows it (`conn=`), for the application's own log; `None`
    /// without a dispatcher, and with one of an older version.
    pub fn number(&self) -> Option<u64> {
        self.0.origin.number
    }

    /// The address the client connected to.
    ///
    /// # Errors
    /// What the system says.
    pub fn local_addr(&self) -> io::Result<PeerAddr> {
        match self.tcp() {
            Some(stream) => stream.local_addr().map(PeerAddr::from),
            None => Ok(PeerAddr::Unix),
        }
    }

    /// Reads without taking: the next read gets the same bytes.
    ///
    /// # Errors
    /// As reading.
    pub fn peek(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream().peek(buffer)
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
    /// Drop the guard after the stream is closed: it has the dispatcher close its copy. From here on nothing shuts the
    /// connection down but its new owner: see [`Guard::must_shut_down`].
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
        let stream = guard.part(self.stream())?;
        Ok((stream, guard))
    }

    /// The same as a descriptor, whatever kind of socket it is: for a child process, or a Unix client.
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
    ///     drop(guard); // Counted as ended when the child has ended.
    /// });
    /// # Ok(())
    /// # }
    /// ```
    pub fn into_fd(self) -> io::Result<(OwnedFd, Guard)> {
        let (stream, guard) = self.into_parts()?;
        Ok((stream.into(), guard))
    }

    /// The stream, for its other options; `None` for a Unix client. From here on dropping the connection only closes it: see
    /// [Closing](Connection#closing).
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

    /// For the mio layer, which does not give it away.
    #[cfg(feature = "mio")]
    pub(crate) fn registered_fd(&self) -> RawFd {
        self.stream().as_raw_fd()
    }

    fn tcp(&self) -> Option<&TcpStream> {
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
        self.tcp().map_or(Ok(()), |stream| stream.set_nodelay(nodelay))
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

/// From here on the SDK does not know who has the descriptor: dropping the connection only closes it. See [`Connection`].
impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.held.guard.expose();
        self.stream().as_fd()
    }
}

/// As with [`AsFd`], dropping the connection only closes it from here on.
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
    fn the_time_since_the_accept_goes_by_a_clock_that_is_never_set() {
        let (one, ten) = (Duration::from_secs(1), Duration::from_secs(10));
        let accepted = AcceptTime::new(one, ten);
        assert_eq!(accepted.at(), SystemTime::UNIX_EPOCH + one);
        assert!(accepted.age() >= ten - one && accepted.age() < ten * 10);

        let set_back = AcceptTime::new(ten, one);
        assert_eq!(set_back.at(), SystemTime::UNIX_EPOCH + one, "no time to come");
        assert!(set_back.age() < ten);
        let strange = AcceptTime::new(Duration::ZERO, Duration::MAX);
        assert_eq!(strange.age(), Duration::MAX, "no overflow");
    }
}
