//! The worker for programs on [tokio].

mod stream;

use std::fmt;
use std::io::{self, IoSlice};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use ::tokio::io::unix::AsyncFd;
use ::tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use self::stream::Stream;
use crate::client::core::Core;
use crate::client::{Accepted, Drain, Error, Gauge, Handle, Held, Origin, OwnError, WorkerConfig};
use crate::sys::ReadyFd;
use crate::wire::PeerAddr;

/// A worker whose connections are awaited. With the feature `axum` it can be given to `axum::serve`.
///
/// Use it within one runtime, the one it was made in, with I/O enabled. Clones are handles of the same
/// worker, for closing it elsewhere or for more tasks; dropping the last one says goodbye.
///
/// ```no_run
/// use tokio::io::AsyncWriteExt;
/// use worker_sdk::{Error, WorkerConfig, tokio::Listener};
///
/// # async fn run() -> Result<(), worker_sdk::Error> {
/// let listener = Listener::connect(WorkerConfig::from_env()?).await?;
/// let end = loop {
///     match listener.accept().await {
///         Ok(mut connection) => {
///             tokio::spawn(async move { connection.write_all(b"hello\n").await });
///         }
///         Err(end) => break end,
///     }
/// };
/// // Drained by an operator, or closed: goodbye, and what is live goes on to its end.
/// listener.close();
/// listener.wait_until_idle().await;
/// match end {
///     Error::Draining | Error::Closed => Ok(()),
///     error => Err(error),
/// }
/// # }
/// ```
///
/// Alone, as in a test, and what it says of itself:
///
/// ```
/// use tokio::io::{AsyncReadExt, AsyncWriteExt};
/// use worker_sdk::{WorkerConfig, tokio::Listener};
///
/// #[tokio::main(flavor = "current_thread")]
/// async fn main() -> Result<(), Box<dyn std::error::Error>> {
///     let config = WorkerConfig::new().pool("web").listen("127.0.0.1:0");
///     let listener = Listener::connect(config).await?;
///     assert!(listener.is_joined() && listener.id().is_none(), "no dispatcher has numbered it");
///     assert_eq!(listener.pool(), "web");
///
///     let address = listener.local_addr().and_then(|addr| addr.socket_addr()).ok_or("not TCP")?;
///     let mut client = tokio::net::TcpStream::connect(address).await?;
///     let mut connection = listener.accept().await?;
///     assert_eq!(listener.live(), 1);
///     connection.write_all(b"hello\n").await?;
///     drop(connection);
///     assert_eq!(listener.live(), 0);
///
///     let mut text = String::new();
///     client.read_to_string(&mut text).await?;
///     assert_eq!(text, "hello\n");
///
///     listener.close(); // At SIGTERM.
///     assert!(listener.accept().await.is_err());
///     Ok(())
/// }
/// ```
#[derive(Clone)]
pub struct Listener(Arc<Inner>);

struct Inner {
    // Declared, and so dropped, first: it is deregistered before the descriptor inside is closed.
    ready: AsyncFd<ReadyFd>,
    handle: Handle,
}

impl Listener {
    /// Joins, and waits until that has worked; as [`Worker::connect`](crate::Worker::connect).
    ///
    /// # Errors
    /// As [`Worker::connect`](crate::Worker::connect).
    ///
    /// # Panics
    /// Outside a tokio runtime with I/O enabled.
    pub async fn connect(config: WorkerConfig) -> Result<Listener, Error> {
        let core = Core::new(&config)?;
        let handle = Handle(Arc::clone(&core));
        let ready = ReadyFd::register(Arc::clone(&core))
            .map_err(|error| Error::io("wait for the dispatcher", error))?;
        let listener = Listener(Arc::new(Inner { ready, handle }));
        while !core.try_join()? {
            listener.until(|| core.try_join()).await?;
        }
        Ok(listener)
    }

    /// Waits until `attempt` is likely to say something else than "not now".
    async fn until(&self, attempt: impl Fn() -> Result<bool, Error>) -> Result<(), Error> {
        let failed = |error| Error::io("wait for the dispatcher", error);
        let mut ready = self.0.ready.readable().await.map_err(failed)?;
        // Readiness is forgotten only after an attempt that found nothing; what comes later sets it again.
        if !attempt()? {
            ready.clear_ready();
        }
        Ok(())
    }

    fn core(&self) -> &Arc<Core> {
        &self.0.handle.0
    }

    /// The next connection, which is this worker's from now on. Cancelling it loses nothing.
    ///
    /// # Errors
    /// [`Error::Closed`] after [`close`](Listener::close), [`Error::Draining`] while the dispatcher drains this worker and
    /// nothing that came before is left (see [`drained`](Listener::drained)), [`Error::Forked`] in a forked child, [`Error::Io`] when the
    /// runtime cannot wait. A lost dispatcher is no error: it is waited for.
    pub async fn accept(&self) -> Result<Connection, Error> {
        let failed = |error| Error::io("wait for connections", error);
        // A `resumed` that was given up may have used up the readiness that says so.
        if self.is_draining()
            && let Some(accepted) = self.core().try_accept()?
        {
            return Ok(Connection::new(accepted));
        }
        loop {
            let mut ready = self.0.ready.readable().await.map_err(failed)?;
            match self.core().try_accept()? {
                Some(accepted) => return Ok(Connection::new(accepted)),
                None => ready.clear_ready(),
            }
        }
    }

    /// Waits until the dispatcher drains this worker. For axum's graceful shutdown, beside SIGTERM. It is heard of only
    /// while somebody is in [`accept`](Listener::accept), as `axum::serve` always is.
    ///
    /// Any number of tasks may wait, and give up, as in a `select!` for every connection.
    pub async fn drained(&self) {
        self.core().draining().begun().await;
    }

    /// Waits until no connection is live in this process: for the end of a program that serves what it has. Call
    /// [`close`](Listener::close) before, so that no more come. As [`Worker::wait_until_idle`](crate::Worker::wait_until_idle).
    pub async fn wait_until_idle(&self) {
        self.core().idle().await;
    }

    /// Waits until no drain is under way: true; or until the listener is closed: false. For a worker that stays when it is
    /// drained: when [`accept`](Listener::accept) says [`Error::Draining`], wait here and accept again.
    ///
    /// # Errors
    /// As [`accept`](Listener::accept).
    pub async fn resumed(&self) -> Result<bool, Error> {
        let failed = |error| Error::io("wait for connections", error);
        loop {
            let mut ready = self.0.ready.readable().await.map_err(failed)?;
            match self.core().try_resumed()? {
                Some(resumed) => return Ok(resumed),
                None => ready.clear_ready(),
            }
        }
    }

    /// Calls `callback` when the dispatcher begins to drain this worker: as [`Worker::on_drain`](crate::Worker::on_drain).
    pub fn on_drain(&self, callback: impl Fn(&Drain) + Send + Sync + 'static) {
        self.core().draining().on_drain(self.core(), Arc::new(callback));
    }

    /// Whether the dispatcher drains this worker.
    pub fn is_draining(&self) -> bool {
        self.core().draining().now().is_some()
    }

    /// Says goodbye: as [`Worker::close`](crate::Worker::close). Tasks in [`accept`](Listener::accept) get
    /// [`Error::Closed`].
    pub fn close(&self) {
        self.core().close();
    }

    /// Claims a key for this worker: as [`Worker::own`](crate::Worker::own). Never waits.
    ///
    /// # Errors
    /// See [`OwnError`].
    pub fn own(&self, key: impl AsRef<[u8]>) -> Result<(), OwnError> {
        self.core().own(key.as_ref())
    }

    /// Connections taken and not yet ended, in this process.
    pub fn live(&self) -> u64 {
        self.core().live()
    }

    /// The gauge of this name, made if there is none: a number that the dispatcher sees. See [`Gauge`].
    ///
    /// # Errors
    /// [`Error::Config`] for what is [no name](crate::scoreboard::gauge::GaugeName), and when there are 24 already;
    /// [`Error::Forked`] in a forked child.
    pub fn gauge(&self, name: &str) -> Result<Gauge, Error> {
        self.core().gauge(name)
    }

    /// The id the dispatcher gave this worker; `None` while not joined.
    pub fn id(&self) -> Option<u64> {
        self.core().id()
    }

    /// Whether connections can come now: a dispatcher has us, or we listen by ourselves.
    pub fn is_joined(&self) -> bool {
        self.core().is_joined()
    }

    /// The pool it joins.
    pub fn pool(&self) -> &str {
        self.core().pool()
    }

    /// The address that a worker without a dispatcher listens on, with the port it got; `None` with a dispatcher.
    pub fn local_addr(&self) -> Option<PeerAddr> {
        self.core().local_addr()
    }
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Listener")
            .field("pool", &self.pool())
            .field("id", &self.id())
            .field("live", &self.live())
            .finish_non_exhaustive()
    }
}

/// A live connection. Dropping it closes the socket, and then counts it as ended.
///
/// Split it with [`tokio::io::split`] to read and write in different tasks. What is asked for is tried at once, and the
/// runtime watches the socket only from when it has to wait: a connection that is answered and closed costs it nothing.
///
/// ```no_run
/// use tokio::io::{AsyncReadExt, AsyncWriteExt};
/// use worker_sdk::tokio::Connection;
///
/// async fn serve(mut connection: Connection) -> std::io::Result<()> {
///     connection.set_nodelay(true)?;
///     println!("{} came in at {:?}", connection.peer_addr(), connection.listener());
///     println!("accepted {:?} after boot", connection.accepted_at());
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
    held: Held<Stream>,
    origin: Origin,
}

impl Connection {
    fn new(accepted: Accepted) -> Connection {
        let stream = Stream::new(accepted.stream);
        Connection { held: Held::new(stream, accepted.guard), origin: accepted.origin }
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

    /// When the connection was accepted: the time of `CLOCK_MONOTONIC`, which starts at boot, in nanoseconds.
    pub fn accepted_at(&self) -> Duration {
        self.origin.accepted_at
    }

    /// The stream, for its options; `None` for a Unix client. It is in non-blocking mode and must stay so.
    pub fn as_tcp(&self) -> Option<&TcpStream> {
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
        self.as_tcp().map_or(Ok(()), |stream| stream.set_nodelay(nodelay))
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.held.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.held.stream).poll_write(cx, buffer)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.held.stream).poll_write_vectored(cx, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.held.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.held.stream).poll_shutdown(cx)
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.held.stream.as_fd()
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
