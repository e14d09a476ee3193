//! A connection for tasks.

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use ::tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf, Ready};
use ::tokio::runtime::Handle as Runtime;

use super::split::{self, OwnedReadHalf, OwnedWriteHalf};
use super::stream::Stream;
use crate::PeerAddr;
use crate::client::{Accepted, CountedStream, Guard, Origin};

/// A live connection. Dropping it closes the socket, and then counts it as ended.
///
/// Split it with [`into_split`](Connection::into_split) or [`tokio::io::split`] to read and write in different tasks. What
/// is asked for is tried at once, and the runtime watches the socket only from when it has to wait: a connection that is
/// answered and closed costs it nothing. Apart from that it behaves as [`tokio::net::TcpStream`] does.
///
/// Once the descriptor has left the SDK's control ([`as_fd`](AsFd::as_fd), [`as_raw_fd`](AsRawFd::as_raw_fd),
/// [`as_tcp`](Connection::as_tcp), [`into_std`](Connection::into_std), [`into_parts`](Connection::into_parts), a later fork),
/// dropping the connection only closes it: see [Closing](crate::Connection#closing).
///
/// ```no_run
/// use tokio::io::{AsyncReadExt, AsyncWriteExt};
/// use worker_sdk::tokio::Connection;
///
/// async fn serve(mut connection: Connection) -> std::io::Result<()> {
///     connection.set_nodelay(true)?;
///     println!("{} came in at {:?}", connection.peer_addr(), connection.listener());
///     println!("accepted {:?} ago", connection.age());
///     if let Some(tcp) = connection.as_tcp() {
///         tcp.set_ttl(64)?; // An option that has no method here.
///     }
///     let mut buffer = [0; 4096];
///     let n = connection.read(&mut buffer).await?;
///     connection.write_all(&buffer[..n]).await?;
///     connection.shutdown().await
/// }
/// ```
pub struct Connection {
    held: CountedStream<Stream>,
    origin: Origin,
}

impl Connection {
    pub(super) fn new(accepted: Accepted, runtime: Runtime) -> Connection {
        let stream = Stream::new(accepted.stream, runtime);
        Connection { held: CountedStream::new(stream, accepted.guard), origin: accepted.origin }
    }

    /// Where the client connected from, as the dispatcher saw it.
    pub fn peer_addr(&self) -> PeerAddr {
        self.origin.peer
    }

    /// The name of the dispatcher's listener the client connected to; empty if it has none, or
    /// without a dispatcher.
    pub fn listener(&self) -> &str {
        self.origin.listener()
    }

    /// When the connection was accepted: as [`Connection::accepted_at`](crate::Connection::accepted_at).
    pub fn accepted_at(&self) -> SystemTime {
        self.origin.accepted.at()
    }

    /// How long ago that was: as [`Connection::age`](crate::Connection::age).
    pub fn age(&self) -> Duration {
        self.origin.accepted.age()
    }

    /// The dispatcher's number of this connection: as [`Connection::number`](crate::Connection::number).
    pub fn number(&self) -> Option<u64> {
        self.origin.number
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

    /// Waits until it can be read or written, as `interest` says.
    ///
    /// # Errors
    /// When the runtime cannot wait.
    pub async fn ready(&self, interest: Interest) -> io::Result<Ready> {
        self.stream().ready(interest).await
    }

    /// Waits until [`try_read`](Connection::try_read) is likely to find something.
    ///
    /// # Errors
    /// When the runtime cannot wait.
    pub async fn readable(&self) -> io::Result<()> {
        self.ready(Interest::READABLE).await.map(drop)
    }

    /// Waits until [`try_write`](Connection::try_write) is likely to find room.
    ///
    /// # Errors
    /// When the runtime cannot wait.
    pub async fn writable(&self) -> io::Result<()> {
        self.ready(Interest::WRITABLE).await.map(drop)
    }

    /// Reads what is there now.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] when nothing is; otherwise what the system says.
    ///
    /// ```no_run
    /// # async fn first(connection: worker_sdk::tokio::Connection) -> std::io::Result<usize> {
    /// let mut buffer = [0; 4096];
    /// loop {
    ///     connection.readable().await?;
    ///     match connection.try_read(&mut buffer) {
    ///         Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
    ///         result => return result,
    ///     }
    /// }
    /// # }
    /// ```
    pub fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.try_io(Interest::READABLE, |mut tcp| tcp.read(buffer))
    }

    /// The same into several buffers.
    ///
    /// # Errors
    /// As [`try_read`](Connection::try_read).
    pub fn try_read_vectored(&self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        self.try_io(Interest::READABLE, |mut tcp| tcp.read_vectored(buffers))
    }

    /// Writes what there is room for now.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] when there is none; otherwise what the system says.
    pub fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        self.try_io(Interest::WRITABLE, |mut tcp| tcp.write(bytes))
    }

    /// The same from several buffers.
    ///
    /// # Errors
    /// As [`try_write`](Connection::try_write).
    pub fn try_write_vectored(&self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        self.try_io(Interest::WRITABLE, |mut tcp| tcp.write_vectored(buffers))
    }

    fn try_io<T>(
        &self,
        interest: Interest,
        call: impl FnOnce(&TcpStream) -> io::Result<T>,
    ) -> io::Result<T> {
        self.stream().try_io(interest, call)
    }

    /// Reads without taking: the next read gets the same bytes.
    ///
    /// # Errors
    /// As reading.
    pub async fn peek(&self, buffer: &mut [u8]) -> io::Result<usize> {
        std::future::poll_fn(|cx| self.stream().poll_peek(cx, buffer)).await
    }

    /// Two halves for two tasks, without a lock between them. The connection ends, and is counted, with the later one.
    ///
    /// ```no_run
    /// # async fn echo(connection: worker_sdk::tokio::Connection) -> std::io::Result<()> {
    /// let (mut reader, mut writer) = connection.into_split();
    /// tokio::io::copy(&mut reader, &mut writer).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn into_split(self) -> (OwnedReadHalf, OwnedWriteHalf) {
        split::split(self)
    }

    /// tokio's own stream, for a library that takes no other, and the guard that counts it: as
    /// [`Connection::into_parts`](crate::Connection::into_parts).
    ///
    /// # Errors
    /// When the process has no file descriptor to spare, or the runtime is gone; the connection is closed then.
    pub fn into_parts(self) -> io::Result<(::tokio::net::TcpStream, Guard)> {
        let runtime = self.stream().runtime().clone();
        let (stream, guard) = self.into_std()?;
        let _entered = runtime.enter();
        Ok((::tokio::net::TcpStream::from_std(stream)?, guard))
    }

    /// The standard library's stream, in non-blocking mode, and the guard that counts it: as
    /// [`Connection::into_parts`](crate::Connection::into_parts).
    ///
    /// # Errors
    /// When the process has no file descriptor to spare; the connection is closed then.
    pub fn into_std(self) -> io::Result<(TcpStream, Guard)> {
        // The clone keeps our own handle's end from being taken for the connection's.
        let guard = self.held.guard.clone();
        let stream = guard.part(self.stream().tcp())?;
        Ok((stream, guard))
    }

    /// The same as a descriptor, whatever kind of socket it is.
    ///
    /// # Errors
    /// As [`into_std`](Connection::into_std).
    pub fn into_fd(self) -> io::Result<(OwnedFd, Guard)> {
        let (stream, guard) = self.into_std()?;
        Ok((stream.into(), guard))
    }

    pub(super) fn stream(&self) -> &Stream {
        &self.held.stream
    }

    pub(super) fn is_ours(&self) -> bool {
        self.held.guard.is_ours()
    }

    /// The stream, for its options; `None` for a Unix client. It is in non-blocking mode and must stay so. From here on
    /// dropping the connection only closes it.
    pub fn as_tcp(&self) -> Option<&TcpStream> {
        self.held.guard.expose();
        self.tcp()
    }

    fn tcp(&self) -> Option<&TcpStream> {
        match self.origin.peer {
            PeerAddr::Inet(_) => Some(self.held.stream.tcp()),
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
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.stream().poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.stream().poll_write(cx, buffer)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.stream().poll_write_vectored(cx, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.stream().shut_down_writing())
    }
}

/// From here on dropping the connection only closes it.
impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.held.guard.expose();
        self.stream().as_fd()
    }
}

/// From here on dropping the connection only closes it.
impl AsRawFd for Connection {
    fn as_raw_fd(&self) -> RawFd {
        self.held.guard.expose();
        self.stream().tcp().as_raw_fd()
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("peer", &self.peer_addr())
            .field("listener", &self.listener())
            .finish_non_exhaustive()
    }
}
