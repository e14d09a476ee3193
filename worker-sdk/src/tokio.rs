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

/// A worker whose connections are awaited. With the feature `axum` it can be given to `axum::serve`.
///
/// Use it within one runtime, the one it was made in, with I/O enabled. Clones are handles of the same
/// worker, for closing it elsewhere or for more tasks; dropping the last one says goodbye.
///
/// # Which errors end an accept loop
/// All of them. [`accept`](Listener::accept) hides what passes by itself: a lost dispatcher, a client that is gone, a lack of
/// descriptors. It says [`Error::Draining`] and [`Error::Closed`] when there will be no more connections, unless the
/// dispatcher resumes the worker, which [`resumed`](Listener::resumed) waits for. [`Error::Forked`] and [`Error::Io`] mean a
/// program or a runtime in which there is nothing to wait with. A loop that goes on all the same does no harm: from the
/// second error on each takes a tenth of a second, and every return counts as work of the task, so that the runtime lets
/// others run.
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
pub struct Listener {
    inner: Arc<Inner>,
    /// The last accept on this handle gave an error.
    ended: AtomicBool,
}

impl Clone for Listener {
    fn clone(&self) -> Listener {
        Listener { inner: Arc::clone(&self.inner), ended: AtomicBool::new(false) }
    }
}

/// From the second error in a row on, each takes so long.
const REPEATED: Duration = Duration::from_millis(100);

struct Inner {
    // Declared, and so dropped, first: it is deregistered before the descriptor inside is closed.
    ready: AsyncFd<ReadyFd>,
    handle: Handle,
    /// Where it was made.
    runtime: Runtime,
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

    /// Waits until `attempt` is likely to say something else than "not now".
    async fn until(&self, attempt: impl Fn() -> Result<bool, Error>) -> Result<(), Error> {
        let failed = |error| Error::io("wait for the dispatcher", error);
        let mut ready = self.inner.ready.readable().await.map_err(failed)?;
        // Readiness is forgotten only after an attempt that found nothing; what comes later sets it again.
        if !attempt()? {
            ready.clear_ready();
        }
        Ok(())
    }

    pub(crate) fn core(&self) -> &Arc<WorkerCore> {
        &self.inner.handle.0
    }

    /// The next connection, which is this worker's from now on. Cancelling it loses nothing.
    ///
    /// # Errors
    /// [`Error::Closed`] after [`close`](Listener::close), [`Error::Draining`] while the dispatcher drains this worker and
    /// nothing that came before is left (see [`drained`](Listener::drained)), [`Error::Forked`] in a forked child, [`Error::Io`] when the
    /// runtime cannot wait. A lost dispatcher is no error: it is waited for.
    pub async fn accept(&self) -> Result<Connection, Error> {
        // Every return is a piece of work: a task that never has to wait lets others run all the same.
        coop::consume_budget().await;
        let accepted = self.next().await;
        let repeated = self.ended.swap(accepted.is_err(), Ordering::Relaxed);
        if repeated && accepted.is_err() {
            pause(REPEATED).await;
        }
        accepted
    }

    /// The same for a future that is written by hand, as [`tokio::net::TcpListener::poll_accept`]. As there, only the task
    /// that has called it last is woken, of all handles of this worker; tasks in [`accept`](Listener::accept) are not
    /// concerned.
    ///
    /// # Errors
    /// As [`accept`](Listener::accept), but at once, however often it is called.
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

    /// The connections as a stream, for what takes one, such as tonic.
    pub fn into_incoming(self) -> Incoming {
        Incoming::new(self)
    }

    fn connection(&self, accepted: Accepted) -> Connection {
        // As tokio's own: of the runtime in which it is accepted.
        let runtime = Runtime::try_current().unwrap_or_else(|_| self.inner.runtime.clone());
        Connection::new(accepted, runtime)
    }

    async fn next(&self) -> Result<Connection, Error> {
        let failed = |error| Error::io("wait for connections", error);
        // A `resumed` that was given up may have used up the readiness that says so.
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

    /// The end of a program in one call: says goodbye, waits until no connection is live, and after `within` shuts down
    /// those that are left; gives how many. As [`Worker::shutdown`](crate::Worker::shutdown).
    pub async fn shutdown(&self, within: Duration) -> usize {
        self.core().shutdown_async(within).await
    }

    /// Waits until no drain is under way: true; or until the listener is closed: false. For a worker that stays when it is
    /// drained: when [`accept`](Listener::accept) says [`Error::Draining`], wait here and accept again.
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

    /// Calls `callback` when the dispatcher begins to drain this worker: as [`Worker::on_drain`](crate::Worker::on_drain).
    pub fn on_drain(&self, callback: impl Fn(&Drain) + Send + Sync + 'static) {
        self.core().draining().on_drain(self.core(), Arc::new(callback));
    }

    /// Calls `callback` whenever this worker has joined a dispatcher: as [`Worker::on_joined`](crate::Worker::on_joined).
    pub fn on_joined(&self, callback: impl Fn(u64) + Send + Sync + 'static) {
        self.core().on_joined(callback);
    }

    /// Calls `callback` whenever this worker has lost its dispatcher: as [`Worker::on_lost`](crate::Worker::on_lost).
    pub fn on_lost(&self, callback: impl Fn(&str) + Send + Sync + 'static) {
        self.core().on_lost(callback);
    }

    /// Calls `callback` whenever a drain is over: as [`Worker::on_resumed`](crate::Worker::on_resumed).
    pub fn on_resumed(&self, callback: impl Fn() + Send + Sync + 'static) {
        self.core().on_resumed(callback);
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

    /// Takes no connections for now: what is untaken goes to other workers, and the dispatcher sends nothing more until
    /// [`resume_accepting`](Listener::resume_accepting). Live connections go on, and so does the membership in the pool; a pool
    /// all of whose workers are paused lets its clients wait, as if all were full. Also alone, without a dispatcher.
    ///
    /// # Errors
    /// [`Error::Forked`] in a forked child.
    pub fn pause_accepting(&self) -> Result<(), Error> {
        self.core().set_paused(true)
    }

    /// Ends a [pause](Listener::pause_accepting).
    ///
    /// # Errors
    /// [`Error::Forked`] in a forked child; [`Error::Io`] when a worker without a dispatcher can no longer watch its listener.
    pub fn resume_accepting(&self) -> Result<(), Error> {
        self.core().set_paused(false)
    }

    /// Whether it is [paused](Listener::pause_accepting).
    pub fn is_paused(&self) -> bool {
        self.core().is_paused()
    }

    /// Another share of the load from now on, in place of [`WorkerConfig::weight`]; kept over all dispatchers. A weight that
    /// an operator has set (`dispatcher weight`) wins until the worker joins anew.
    ///
    /// # Errors
    /// [`Error::Config`] for 0, [`Error::Forked`] in a forked child.
    pub fn set_weight(&self, weight: u16) -> Result<(), Error> {
        self.core().set_weight(weight)
    }

    /// Another maximum from now on, in place of [`WorkerConfig::max_connections`]; kept over all dispatchers. The pool's own
    /// maximum bounds it. What is live beyond it goes on.
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

    /// Connections taken and not yet ended, in this process.
    pub fn live(&self) -> u64 {
        self.core().live()
    }

    /// The gauge of this name, made if there is none: a number that the dispatcher sees. See [`Gauge`].
    ///
    /// # Errors
    /// [`Error::Config`] for what is [no name](dispatch_protocol::scoreboard::gauge::GaugeName), and when there are 24 already;
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

/// Lets so much time pass, with a timer of our own: a runtime may have none. At once where there is none to be had.
async fn pause(time: Duration) {
    match crate::sys::timer(time) {
        Ok(timer) => drop(timer.readable().await),
        Err(_) => ::tokio::task::yield_now().await,
    }
}
