//! The worker for programs on [tokio].

mod connection;
mod incoming;
mod split;
mod stream;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use ::tokio::io::unix::AsyncFd;
use ::tokio::runtime::Handle as Runtime;
use ::tokio::task::coop;

pub use self::connection::Connection;
pub use self::incoming::Incoming;
pub use self::split::{OwnedReadHalf, OwnedWriteHalf, ReuniteError};

use crate::PeerAddr;
use crate::client::worker_core::WorkerCore;
use crate::client::{Accepted, ClaimError, Drain, Error, Gauge, Handle, WorkerConfig};
use crate::sys::ReadyFd;

/// A worker for tokio. With the feature `axum` it works with `axum::serve`.
///
/// Use it in the runtime in which it was created, with I/O enabled. Clones are handles of the same
/// worker, for a close from another task or for more accepting tasks; dropping the last handle says
/// goodbye.
///
/// # Which errors end an accept loop
/// All errors. [`accept`](Listener::accept) handles passing conditions itself: a lost dispatcher, a
/// client that is gone, a lack of descriptors. It returns [`Error::Draining`] or [`Error::Closed`]
/// if no more connections come; after a drain, [`resumed`](Listener::resumed) waits for the resume.
/// [`Error::Forked`] and [`Error::Io`] mean that this process or runtime cannot wait. A loop that
/// continues is harmless: from the second error on, each call takes a tenth of a second, and every
/// return uses the task's budget, so that the runtime runs other tasks.
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
/// // The worker is drained or closed. Its live connections may still end by themselves.
/// listener.close();
/// listener.wait_until_idle().await;
/// match end {
///     Error::Draining | Error::Closed => Ok(()),
///     error => Err(error),
/// }
/// # }
/// ```
///
/// A worker alone, as in a test:
///
/// ```
/// use tokio::io::{AsyncReadExt, AsyncWriteExt};
/// use worker_sdk::{WorkerConfig, tokio::Listener};
///
/// #[tokio::main(flavor = "current_thread")]
/// async fn main() -> Result<(), Box<dyn std::error::Error>> {
///     let config = WorkerConfig::new().pool("web").listen("127.0.0.1:0");
///     let listener = Listener::connect(config).await?;
///     assert!(listener.is_joined() && listener.id().is_none(), "without an id from a dispatcher");
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
pub struct Listener {
    inner: Arc<Inner>,
    /// Whether the last accept on this handle returned an error.
    ended: AtomicBool,
}

impl Clone for Listener {
    fn clone(&self) -> Listener {
        Listener { inner: Arc::clone(&self.inner), ended: AtomicBool::new(false) }
    }
}

/// The duration of each repeated error.
const REPEATED: Duration = Duration::from_millis(100);

struct Inner {
    // Declared first, so dropped first: it is deregistered before its descriptor is closed.
    ready: AsyncFd<ReadyFd>,
    handle: Handle,
    /// The runtime in which it was created.
    runtime: Runtime,
}

impl Listener {
    /// Joins a dispatcher and waits until the join succeeds; as
    /// [`Worker::connect`](crate::Worker::connect).
    ///
    /// # Errors
    /// As [`Worker::connect`](crate::Worker::connect).
    ///
    /// # Panics
    /// Outside a tokio runtime with I/O enabled.
    pub async fn connect(config: WorkerConfig) -> Result<Listener, Error> {
        let core = WorkerCore::new(&config)?;
        let handle = Handle(Arc::clone(&core));
        let ready = ReadyFd::register(Arc::clone(&core))
            .map_err(|error| Error::io("wait for the dispatcher", error))?;
        let runtime = Runtime::current();
        let inner = Arc::new(Inner { ready, handle, runtime });
        let listener = Listener { inner, ended: AtomicBool::new(false) };
        while !core.try_join()? {
            listener.until(|| core.try_join()).await?;
        }
        Ok(listener)
    }

    /// Waits until `attempt` is likely to succeed.
    async fn until(&self, attempt: impl Fn() -> Result<bool, Error>) -> Result<(), Error> {
        let failed = |error| Error::io("wait for the dispatcher", error);
        let mut ready = self.inner.ready.readable().await.map_err(failed)?;
        // Readiness is cleared only after an attempt without success; later events set it again.
        if !attempt()? {
            ready.clear_ready();
        }
        Ok(())
    }

    pub(crate) fn core(&self) -> &Arc<WorkerCore> {
        &self.inner.handle.0
    }

    /// Waits for the next connection, which then belongs to this worker. Cancel safe.
    ///
    /// # Errors
    /// [`Error::Closed`] after [`close`](Listener::close), [`Error::Draining`] while the dispatcher
    /// drains this worker and no earlier connection is left (see [`drained`](Listener::drained)),
    /// [`Error::Forked`] in a forked child, [`Error::Io`] if the runtime cannot wait. The loss of
    /// the dispatcher is not an error: the call waits until the worker has joined again.
    pub async fn accept(&self) -> Result<Connection, Error> {
        // Every return uses budget, so that a task that never waits lets other tasks run.
        coop::consume_budget().await;
        let accepted = self.next().await;
        let repeated = self.ended.swap(accepted.is_err(), Ordering::Relaxed);
        if repeated && accepted.is_err() {
            pause(REPEATED).await;
        }
        accepted
    }

    /// For futures written by hand, as [`tokio::net::TcpListener::poll_accept`]. As there, it wakes
    /// only the task of the last call, over all handles of this worker; tasks in
    /// [`accept`](Listener::accept) are independent.
    ///
    /// # Errors
    /// As [`accept`](Listener::accept), but immediately, also for repeated calls.
    pub fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<Result<Connection, Error>> {
        let failed = |error| Error::io("wait for connections", error);
        let turn = ready!(coop::poll_proceed(cx));
        if self.is_draining() {
            let accepted = self.core().try_accept();
            if let Some(result) = accepted.transpose() {
                turn.made_progress();
                return Poll::Ready(result.map(|accepted| self.connection(accepted)));
            }
        }
        loop {
            let mut ready = ready!(self.inner.ready.poll_read_ready(cx)).map_err(failed)?;
            match self.core().try_accept().transpose() {
                Some(result) => {
                    turn.made_progress();
                    return Poll::Ready(result.map(|accepted| self.connection(accepted)));
                }
                None => ready.clear_ready(),
            }
        }
    }

    /// The connections as a stream, for libraries such as tonic.
    pub fn into_incoming(self) -> Incoming {
        Incoming::new(self)
    }

    fn connection(&self, accepted: Accepted) -> Connection {
        // As in tokio, the connection belongs to the runtime in which it is accepted.
        let runtime = Runtime::try_current().unwrap_or_else(|_| self.inner.runtime.clone());
        Connection::new(accepted, runtime)
    }

    async fn next(&self) -> Result<Connection, Error> {
        let failed = |error| Error::io("wait for connections", error);
        // A cancelled `resumed` may have cleared the readiness.
        if self.is_draining()
            && let Some(accepted) = self.core().try_accept()?
        {
            return Ok(self.connection(accepted));
        }
        loop {
            let mut ready = self.inner.ready.readable().await.map_err(failed)?;
            match self.core().try_accept()? {
                Some(accepted) => return Ok(self.connection(accepted)),
                None => ready.clear_ready(),
            }
        }
    }

    /// Waits until the dispatcher drains this worker, for axum's graceful shutdown. The worker
    /// notices a drain only while a task is in [`accept`](Listener::accept), as `axum::serve`
    /// always is.
    ///
    /// Any number of tasks may wait. Cancel safe, so it works in a `select!` per connection.
    pub async fn drained(&self) {
        self.core().draining().begun().await;
    }

    /// Waits until no connection is live in this process, for the end of a program. Call
    /// [`close`](Listener::close) before, so that no more connections come. As
    /// [`Worker::wait_until_idle`](crate::Worker::wait_until_idle).
    pub async fn wait_until_idle(&self) {
        self.core().idle().await;
    }

    /// Ends the worker in one call: says goodbye, waits until no connection is live, and after
    /// `within` shuts down the others; returns how many. As
    /// [`Worker::shutdown`](crate::Worker::shutdown).
    pub async fn shutdown(&self, within: Duration) -> usize {
        self.core().shutdown_async(within).await
    }

    /// Waits until no drain is in progress (true) or the listener is closed (false). For a worker
    /// that stays after a drain: wait here after [`Error::Draining`], then accept again.
    ///
    /// # Errors
    /// As [`accept`](Listener::accept).
    pub async fn resumed(&self) -> Result<bool, Error> {
        let failed = |error| Error::io("wait for connections", error);
        loop {
            let mut ready = self.inner.ready.readable().await.map_err(failed)?;
            match self.core().try_resumed()? {
                Some(resumed) => return Ok(resumed),
                None => ready.clear_ready(),
            }
        }
    }

    /// Calls `callback` when the dispatcher starts to drain this worker: as
    /// [`Worker::on_drain`](crate::Worker::on_drain).
    pub fn on_drain(&self, callback: impl Fn(&Drain) + Send + Sync + 'static) {
        self.core().draining().on_drain(self.core(), Arc::new(callback));
    }

    /// Calls `callback` each time this worker has joined a dispatcher: as
    /// [`Worker::on_joined`](crate::Worker::on_joined).
    pub fn on_joined(&self, callback: impl Fn(u64) + Send + Sync + 'static) {
        self.core().on_joined(callback);
    }

    /// Calls `callback` each time this worker has lost its dispatcher: as
    /// [`Worker::on_lost`](crate::Worker::on_lost).
    pub fn on_lost(&self, callback: impl Fn(&str) + Send + Sync + 'static) {
        self.core().on_lost(callback);
    }

    /// Calls `callback` each time a drain ends: as
    /// [`Worker::on_resumed`](crate::Worker::on_resumed).
    pub fn on_resumed(&self, callback: impl Fn() + Send + Sync + 'static) {
        self.core().on_resumed(callback);
    }

    /// Whether the dispatcher drains this worker.
    pub fn is_draining(&self) -> bool {
        self.core().draining().now().is_some()
    }

    /// Says goodbye: as [`Worker::close`](crate::Worker::close). Tasks in
    /// [`accept`](Listener::accept) get [`Error::Closed`].
    pub fn close(&self) {
        self.core().close();
    }

    /// Accepts no connections for now: as
    /// [`Worker::pause_accepting`](crate::Worker::pause_accepting).
    ///
    /// # Errors
    /// [`Error::Forked`] in a forked child.
    pub fn pause_accepting(&self) -> Result<(), Error> {
        self.core().set_paused(true)
    }

    /// Ends a [pause](Listener::pause_accepting).
    ///
    /// # Errors
    /// [`Error::Forked`] in a forked child; [`Error::Io`] if a worker without a dispatcher can no
    /// longer watch its listener.
    pub fn resume_accepting(&self) -> Result<(), Error> {
        self.core().set_paused(false)
    }

    /// Whether the worker is [paused](Listener::pause_accepting).
    pub fn is_paused(&self) -> bool {
        self.core().is_paused()
    }

    /// Changes the worker's share of the load: as
    /// [`Worker::set_weight`](crate::Worker::set_weight).
    ///
    /// # Errors
    /// [`Error::Config`] for 0, [`Error::Forked`] in a forked child.
    pub fn set_weight(&self, weight: u16) -> Result<(), Error> {
        self.core().set_weight(weight)
    }

    /// Changes the maximum number of connections: as
    /// [`Worker::set_max_connections`](crate::Worker::set_max_connections).
    ///
    /// # Errors
    /// [`Error::Config`] for 0, [`Error::Forked`] in a forked child.
    pub fn set_max_connections(&self, max: u32) -> Result<(), Error> {
        self.core().set_max_connections(max)
    }

    /// Claims a key for this worker: as [`Worker::claim`](crate::Worker::claim). Never waits.
    ///
    /// # Errors
    /// See [`ClaimError`].
    pub fn claim(&self, key: impl AsRef<[u8]>) -> Result<(), ClaimError> {
        self.core().claim(key.as_ref())
    }

    /// Connections that are taken and have not ended, in this process.
    pub fn live(&self) -> u64 {
        self.core().live()
    }

    /// The gauge of this name, created if necessary: a number that the dispatcher sees. See
    /// [`Gauge`].
    ///
    /// # Errors
    /// [`Error::Config`] for an [invalid name](dispatch_protocol::scoreboard::gauge::GaugeName) and
    /// if there are already 24 gauges; [`Error::Forked`] in a forked child.
    pub fn gauge(&self, name: &str) -> Result<Gauge, Error> {
        self.core().gauge(name)
    }

    /// The id of this worker at the dispatcher; `None` while not joined.
    pub fn id(&self) -> Option<u64> {
        self.core().id()
    }

    /// The ticket with which this worker proves its pool to the directory of the relay
    /// ([`RelayConfig::ticket`](crate::relay::RelayConfig::ticket)); `None` while not joined, or if
    /// the dispatcher gives none (`relay_ticket_key`).
    #[cfg(feature = "relay")]
    pub fn relay_ticket(&self) -> Option<Vec<u8>> {
        self.core().relay_ticket()
    }

    /// Whether connections can come now: the worker has joined a dispatcher, or listens itself.
    pub fn is_joined(&self) -> bool {
        self.core().is_joined()
    }

    /// The pool of this worker.
    pub fn pool(&self) -> &str {
        self.core().pool()
    }

    /// The address on which a worker without a dispatcher listens, with its real port; `None` with
    /// a dispatcher.
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

/// Sleeps on a timer of the SDK, because a runtime may have none. Only yields if no timer can be
/// created.
async fn pause(time: Duration) {
    match crate::sys::timer(time) {
        Ok(timer) => drop(timer.readable().await),
        Err(_) => ::tokio::task::yield_now().await,
    }
}
