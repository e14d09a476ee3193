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
use crate::client::{Accepted, CountedStream, Guard, Origin};
use crate::{PeerAddr, Proxy};

/// A live connection. Dropping it closes the socket, then counts the end.
///
/// Split it with [`into_split`](Connection::into_split) or [`tokio::io::split`] to read and write
/// in different tasks. Every operation is tried immediately, and the runtime registers the socket
/// only when an operation has to wait: a connection that is answered and closed is never
/// registered. Apart from that it behaves as [`tokio::net::TcpStream`] does.
///
/// Once the descriptor has left the SDK's control ([`as_fd`](AsFd::as_fd),
/// [`as_raw_fd`](AsRawFd::as_raw_fd), [`as_tcp`](Connection::as_tcp),
/// [`into_std`](Connection::into_std), [`into_parts`](Connection::into_parts), a later fork),
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
///         tcp.set_ttl(64)?; // An option without a method here.
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

    /// The address that the client connected from, as the dispatcher saw it.
    pub fn peer_addr(&self) -> PeerAddr {
        self.origin.peer
    }

    /// What a proxy said about the client: as [`Connection::proxy`](crate::Connection::proxy).
    pub fn proxy(&self) -> Option<&Proxy> {
        self.origin.proxy.as_deref()
    }

    /// The name of the dispatcher's listener: as
    /// [`Connection::listener`](crate::Connection::listener).
    pub fn listener(&self) -> &str {
        self.origin.listener()
    }

    /// When the connection was accepted: as
    /// [`Connection::accepted_at`](crate::Connection::accepted_at).
    pub fn accepted_at(&self) -> SystemTime {
        self.origin.accepted.at()
    }

    /// The time since the accept: as [`Connection::age`](crate::Connection::age).
    pub fn age(&self) -> Duration {
        self.origin.accepted.age()
    }

    /// The dispatcher's number of this connection: as
    /// [`Connection::number`](crate::Connection::number).
    pub fn number(&self) -> Option<u64> {
        self.origin.number
    }

    /// Whether the dispatcher itself has connected: as
    /// [`Connection::is_ready_check`](crate::Connection::is_ready_check).
    pub fn is_ready_check(&self) -> bool {
        self.origin.is_ready_check
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

    /// Waits until the connection is ready for `interest`.
    ///
    /// # Errors
    /// If the runtime cannot wait.
    pub async fn ready(&self, interest: Interest) -> io::Result<Ready> {
        self.stream().ready(interest).await
    }

    /// Waits until [`try_read`](Connection::try_read) is likely to find data.
    ///
    /// # Errors
    /// If the runtime cannot wait.
    pub async fn readable(&self) -> io::Result<()> {
        self.ready(Interest::READABLE).await.map(drop)
    }

    /// Waits until [`try_write`](Connection::try_write) is likely to find room.
    ///
    /// # Errors
    /// If the runtime cannot wait.
    pub async fn writable(&self) -> io::Result<()> {
        self.ready(Interest::WRITABLE).await.map(drop)
    }

    /// Reads the available data.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if there is none; otherwise the error of the system call.
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

    /// As [`try_read`](Connection::try_read), into several buffers.
    ///
    /// # Errors
    /// As [`try_read`](Connection::try_read).
    pub fn try_read_vectored(&self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        self.try_io(Interest::READABLE, |mut tcp| tcp.read_vectored(buffers))
    }

    /// Writes as much as there is room for.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if there is no room; otherwise the error of the system call.
    pub fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        self.try_io(Interest::WRITABLE, |mut tcp| tcp.write(bytes))
    }

    /// As [`try_write`](Connection::try_write), from several buffers.
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

    /// Reads without removing: the next read returns the same bytes.
    ///
    /// # Errors
    /// As reading.
    pub async fn peek(&self, buffer: &mut [u8]) -> io::Result<usize> {
        std::future::poll_fn(|cx| self.stream().poll_peek(cx, buffer)).await
    }

    /// Splits the connection into two halves for two tasks, without a lock. The connection ends,
    /// and is counted, when both halves have ended.
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

    /// The stream of tokio, for libraries that need it, and the guard that counts the connection:
    /// as [`Connection::into_parts`](crate::Connection::into_parts).
    ///
    /// # Errors
    /// If the process has no file descriptor left, or the runtime is gone. Then the connection is
    /// closed.
    pub fn into_parts(self) -> io::Result<(::tokio::net::TcpStream, Guard)> {
        let runtime = self.stream().runtime().clone();
        let (stream, guard) = self.into_std()?;
        let _entered = runtime.enter();
        Ok((::tokio::net::TcpStream::from_std(stream)?, guard))
    }

    /// The stream of the standard library, in non-blocking mode, and the guard that counts the
    /// connection: as [`Connection::into_parts`](crate::Connection::into_parts).
    ///
    /// # Errors
    /// If the process has no file descriptor left. Then the connection is closed.
    pub fn into_std(self) -> io::Result<(TcpStream, Guard)> {
        // With this clone of the guard, the drop of this handle is not the end of the connection.
        let guard = self.held.guard.clone();
        let stream = guard.duplicate(self.stream().tcp())?;
        Ok((stream, guard))
    }

    /// The descriptor, for any kind of socket, and the guard.
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

    /// The stream, for its options; `None` for a Unix client. It is in non-blocking mode and must
    /// stay so. From here on, dropping the connection only closes it.
    pub fn as_tcp(&self) -> Option<&TcpStream> {
        self.held.guard.expose();
        self.tcp()
    }

    fn tcp(&self) -> Option<&TcpStream> {
        self.origin.is_tcp().then(|| self.held.stream.tcp())
    }

    /// Sends small writes immediately (`TCP_NODELAY`). Does nothing for a Unix client.
    ///
    /// # Errors
    /// The error of the system call.
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
