//! The worker: joins a dispatcher, takes connections, counts them, and joins again after a
//! disconnect.
//!
//! This module owns everything that the blocking, mio and tokio layers share; a layer only adds its
//! way of waiting. It does not know what the application does with a connection.

mod backoff;
mod channel;
mod claim;
mod clock;
mod config;
mod connection;
mod dispatchers;
mod drain;
mod error;
mod events;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod gauges;
mod guard;
mod idle_signal;
mod idle_threads;
mod incoming;
mod join;
mod live_connections;
mod log_queue;
mod outbox;
mod prefork;
pub(crate) mod process;
mod readiness;
mod sample;
mod standalone;
mod update;
pub(crate) mod worker_core;

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

pub use self::claim::ClaimError;
pub use self::config::{OnDispatcherLoss, WorkerConfig};
pub use self::connection::Connection;
#[cfg(feature = "tokio")]
pub(crate) use self::connection::{Accepted, Origin};
pub use self::drain::Drain;
pub use self::error::Error;
pub use self::gauges::Gauge;
#[cfg(feature = "tokio")]
pub(crate) use self::guard::CountedStream;
pub use self::guard::Guard;
pub use self::incoming::{Incoming, IntoIncoming};
#[cfg(feature = "axum")]
pub(crate) use self::log_queue::log_now;
pub use self::prefork::prefork;
pub use self::sample::Sampling;

use self::worker_core::WorkerCore;
use crate::PeerAddr;

/// Closes the worker when its last handle is dropped.
pub(crate) struct Handle(pub(crate) Arc<WorkerCore>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.abandon();
    }
}

/// A worker of a dispatcher, for blocking programs with one thread or many.
///
/// The worker joins its pool. From then on [`accept`](Worker::accept) returns the connections that
/// the dispatcher sends to this process. When the dispatcher goes away, live connections continue,
/// and the worker joins again as soon as a dispatcher listens. Without a dispatcher (`listen`) the
/// worker accepts connections itself.
///
/// Clones are handles of the same worker, for other threads. Dropping the last handle says goodbye:
/// untaken connections go to other workers, taken ones continue and are counted until they end.
/// Connect after forking: a forked copy takes nothing, and dropping it tells the dispatcher
/// nothing.
///
/// ```no_run
/// use std::io::Write;
/// use worker_sdk::{Worker, WorkerConfig};
///
/// fn main() -> Result<(), worker_sdk::Error> {
///     let mut worker = Worker::connect(WorkerConfig::from_env()?)?;
///     for mut connection in worker.incoming() {
///         std::thread::spawn(move || connection.write_all(b"hello\n"));
///     }
///     // The worker is drained or closed. Its live connections may still end by themselves.
///     worker.close();
///     worker.wait_until_idle();
///     Ok(())
/// }
/// ```
///
/// A worker alone, as in a test:
///
/// ```
/// use std::io::{Read, Write};
/// use worker_sdk::{Worker, WorkerConfig};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let worker = Worker::connect(WorkerConfig::new().pool("web").listen("127.0.0.1:0"))?;
/// assert!(worker.is_joined() && worker.id().is_none(), "no id without a dispatcher");
/// assert_eq!(worker.pool(), "web");
/// let address = worker.local_addr().and_then(|addr| addr.socket_addr()).ok_or("not TCP")?;
///
/// let mut client = std::net::TcpStream::connect(address)?;
/// if let Some(mut connection) = worker.accept()? {
///     assert_eq!(worker.live(), 1);
///     connection.write_all(b"hello\n")?;
/// } // The drop closes the connection, then counts it as ended.
/// assert_eq!(worker.live(), 0);
///
/// let mut text = String::new();
/// client.read_to_string(&mut text)?;
/// assert_eq!(text, "hello\n");
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Worker(Arc<Handle>);

impl Worker {
    /// Joins a dispatcher and waits until the join succeeds: without limit, or for `join_timeout`.
    ///
    /// It retries while the dispatcher is not there yet, is stopping, or has no room. Without a
    /// dispatch socket it binds `listen` instead.
    ///
    /// # Errors
    /// [`Error::Config`] for a wrong setting, [`Error::Refused`] if the dispatcher refuses this
    /// worker, [`Error::JoinTimeout`], [`Error::Protocol`] if the peer is not a dispatcher, and
    /// [`Error::Io`] if a system call fails, for example if the address is in use or the permission
    /// for the dispatch socket is missing.
    ///
    /// ```
    /// use std::time::Duration;
    /// use worker_sdk::{Error, Worker, WorkerConfig};
    ///
    /// let config = WorkerConfig::new()
    ///     .dispatch_socket("/nonexistent/dispatch.sock")
    ///     .join_timeout(Duration::from_millis(10));
    /// assert!(matches!(Worker::connect(config), Err(Error::JoinTimeout { .. })));
    /// ```
    pub fn connect(config: WorkerConfig) -> Result<Worker, Error> {
        let worker = Worker(Arc::new(Handle(WorkerCore::new(&config)?)));
        worker.core().join()?;
        Ok(worker)
    }

    fn core(&self) -> &Arc<WorkerCore> {
        &self.0.0
    }

    /// Waits for the next connection, which then belongs to this worker. `None` if the worker is
    /// closed, or if the dispatcher drains it (`dispatcher drain`) and no earlier connection is
    /// left.
    ///
    /// A drained worker usually finishes its connections and ends, and another worker takes its
    /// place: it says [goodbye](Worker::close) and [waits](Worker::wait_until_idle). A worker that
    /// stays waits in [`resumed`](Worker::resumed). If `main` returns, the process ends and so do
    /// all its connections.
    ///
    /// Any number of threads may wait. The connection is in blocking mode.
    ///
    /// # Errors
    /// [`Error::Forked`] in a forked child, [`Error::Io`] if waiting itself fails. The loss of the
    /// dispatcher is not an error: the call waits until the worker has joined again, or returns
    /// `None`, as [`on_dispatcher_loss`](WorkerConfig::on_dispatcher_loss) says.
    ///
    /// ```no_run
    /// # fn serve(_: worker_sdk::Connection) {}
    /// # fn main() -> Result<(), worker_sdk::Error> {
    /// # let worker = worker_sdk::Worker::connect(worker_sdk::WorkerConfig::from_env()?)?;
    /// while let Some(connection) = worker.accept()? {
    ///     serve(connection);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn accept(&self) -> Result<Option<Connection>, Error> {
        Ok(self.core().accept(None)?.map(Connection::new))
    }

    /// As [`accept`](Worker::accept), but waits no longer than `timeout`.
    ///
    /// # Errors
    /// [`Error::TimedOut`] if no connection came; otherwise as [`accept`](Worker::accept).
    ///
    /// ```
    /// use std::time::Duration;
    /// # use worker_sdk::{Error, Worker, WorkerConfig};
    /// # fn main() -> Result<(), worker_sdk::Error> {
    /// # let worker = Worker::connect(WorkerConfig::new().listen("127.0.0.1:0"))?;
    /// match worker.accept_timeout(Duration::from_millis(10)) {
    ///     Ok(Some(_connection)) => {}
    ///     Ok(None) => {} // The worker is closed or drained.
    ///     Err(Error::TimedOut) => {} // Do other work, then call it again.
    ///     Err(error) => return Err(error),
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn accept_timeout(&self, timeout: Duration) -> Result<Option<Connection>, Error> {
        Ok(self.core().accept(Some(clock::after(timeout)))?.map(Connection::new))
    }

    /// The next connection if one is available now, in non-blocking mode; otherwise `None`.
    ///
    /// For event loops without a layer in this crate: the worker's descriptor ([`AsFd`]) becomes
    /// readable when there is work. Then call this function until it returns `None`; it also joins
    /// again after the loss of a dispatcher. While a thread waits in [`accept`](Worker::accept),
    /// that thread receives for all, and the descriptor does not report its queue. So use only one
    /// of the two ways at a time.
    ///
    /// # Errors
    /// [`Error::Closed`] after a close, [`Error::Draining`] while the dispatcher drains this
    /// worker, [`Error::Forked`] in a forked child.
    ///
    /// ```no_run
    /// use rustix::event::{PollFd, PollFlags, poll};
    /// use worker_sdk::Error;
    ///
    /// # fn register(_: worker_sdk::Connection) {}
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let worker = worker_sdk::Worker::connect(worker_sdk::WorkerConfig::from_env()?)?;
    /// let mut interest = PollFlags::IN;
    /// while !interest.is_empty() || worker.live() > 0 {
    ///     match worker.try_accept() {
    ///         Ok(Some(connection)) => {
    ///             register(connection);
    ///             continue;
    ///         }
    ///         Ok(None) => {}
    ///         // Drained or closed: continue until the last connection has ended. From now on
    ///         // the worker is always readable.
    ///         Err(Error::Draining | Error::Closed) => {
    ///             worker.close();
    ///             interest = PollFlags::empty();
    ///         }
    ///         Err(error) => return Err(error.into()),
    ///     }
    ///     poll(&mut [PollFd::new(&worker, interest)], None)?; // Poll the connections, too.
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn try_accept(&self) -> Result<Option<Connection>, Error> {
        Ok(self.core().try_accept()?.map(Connection::new))
    }

    /// An iterator over the connections. It ends when the worker is closed or drained, and after a
    /// permanent error, which it logs. The [example above](Worker) shows it.
    pub fn incoming(&mut self) -> Incoming<'_> {
        Incoming { worker: self }
    }

    /// As [`incoming`](Worker::incoming), but the iterator owns its worker, so another thread can
    /// use it. A worker is also an [`IntoIterator`].
    ///
    /// ```no_run
    /// # fn serve(_: worker_sdk::Connection) {}
    /// # fn main() -> Result<(), worker_sdk::Error> {
    /// # let worker = worker_sdk::Worker::connect(worker_sdk::WorkerConfig::from_env()?)?;
    /// let incoming = worker.clone().into_incoming();
    /// let serving = std::thread::spawn(move || incoming.for_each(serve));
    /// # drop(serving);
    /// # Ok(())
    /// # }
    /// ```
    pub fn into_incoming(self) -> IntoIncoming {
        IntoIncoming { worker: self }
    }

    /// Calls `callback` each time this worker has joined a dispatcher, with its id there, and
    /// immediately if it has joined already. Never called without a dispatcher.
    ///
    /// The three callbacks run on a separate thread, in the order of the events, without a lock.
    /// They may call the worker, block, or panic. At most 64 events wait for them. A worker notices
    /// events when it asks for connections. A callback that owns a clone of this worker is a
    /// handle; [`close`](Worker::close) drops all callbacks.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), worker_sdk::Error> {
    /// # let worker = worker_sdk::Worker::connect(worker_sdk::WorkerConfig::from_env()?)?;
    /// worker.on_joined(|id| println!("worker {id} of the dispatcher"));
    /// worker.on_lost(|why| println!("no new connections for now: {why}"));
    /// worker.on_resumed(|| println!("no longer drained"));
    /// # Ok(())
    /// # }
    /// ```
    pub fn on_joined(&self, callback: impl Fn(u64) + Send + Sync + 'static) {
        self.core().on_joined(callback);
    }

    /// Calls `callback` each time this worker has lost its dispatcher, with the reason. The worker
    /// joins again by itself, and live connections continue, unless
    /// [`on_dispatcher_loss`](WorkerConfig::on_dispatcher_loss) says otherwise. As
    /// [`on_joined`](Worker::on_joined).
    pub fn on_lost(&self, callback: impl Fn(&str) + Send + Sync + 'static) {
        self.core().on_lost(callback);
    }

    /// Calls `callback` each time a drain ends and connections may come again. As
    /// [`on_joined`](Worker::on_joined).
    pub fn on_resumed(&self, callback: impl Fn() + Send + Sync + 'static) {
        self.core().on_resumed(callback);
    }

    /// Calls `callback` when the dispatcher starts to drain this worker, or immediately if a drain
    /// is in progress: the time to fail health checks, to ask clients to reconnect, to stop
    /// keep-alive. Callbacks run one after the other on a separate thread. They may block, wait for
    /// the last connection to end, or panic; the deadline of the drain comes regardless.
    ///
    /// A callback that owns a clone of this worker is a handle, so dropping the other handles says
    /// no goodbye. [`close`](Worker::close) says it, and drops all callbacks after they have run
    /// for a drain in progress.
    ///
    /// The worker notices a drain when it asks for connections: a thread must be in
    /// [`accept`](Worker::accept), or an event loop must call [`try_accept`](Worker::try_accept).
    /// From then on the deadline counts in any case: it shuts down the connections that are still
    /// live, so that reads and writes on them end.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), worker_sdk::Error> {
    /// # let worker = worker_sdk::Worker::connect(worker_sdk::WorkerConfig::from_env()?)?;
    /// worker.on_drain(|drain| println!("drained; deadline {:?}", drain.deadline()));
    /// # Ok(())
    /// # }
    /// ```
    pub fn on_drain(&self, callback: impl Fn(&Drain) + Send + Sync + 'static) {
        self.core().draining().on_drain(self.core(), Arc::new(callback));
    }

    /// Whether the dispatcher drains this worker.
    pub fn is_draining(&self) -> bool {
        self.core().draining().now().is_some()
    }

    /// Waits until no drain is in progress (true) or the worker is closed (false). For a worker
    /// that stays after a drain.
    ///
    /// # Errors
    /// As [`accept`](Worker::accept).
    ///
    /// ```no_run
    /// # fn serve(_: worker_sdk::Connection) {}
    /// # fn main() -> Result<(), worker_sdk::Error> {
    /// # let mut worker = worker_sdk::Worker::connect(worker_sdk::WorkerConfig::from_env()?)?;
    /// loop {
    ///     worker.incoming().for_each(serve);
    ///     if !worker.resumed()? {
    ///         return Ok(());
    ///     }
    /// }
    /// # }
    /// ```
    pub fn resumed(&self) -> Result<bool, Error> {
        self.core().resumed()
    }

    /// Says goodbye: no more connections come, and untaken ones go to other workers. Wakes the
    /// threads in [`accept`](Worker::accept). Live connections continue, and are counted until the
    /// last has ended.
    ///
    /// Connections from a dispatcher that has ended cannot go to another worker, so `accept` still
    /// returns them before it returns `None`; dropping the last handle closes them.
    ///
    /// ```
    /// # fn main() -> Result<(), worker_sdk::Error> {
    /// # let config = worker_sdk::WorkerConfig::new().listen("127.0.0.1:0");
    /// let worker = worker_sdk::Worker::connect(config)?;
    /// let closing = worker.clone();
    /// let thread = std::thread::spawn(move || worker.accept()); // It waits for the close.
    /// closing.close(); // As at SIGTERM.
    /// assert!(matches!(thread.join(), Ok(Ok(None))));
    /// # Ok(())
    /// # }
    /// ```
    pub fn close(&self) {
        self.core().close();
    }

    /// Waits until no connection is live in this process, for the end of a program. It does not
    /// poll: the end of the last connection wakes this thread.
    ///
    /// Call [`close`](Worker::close) before, so that no more connections come, and take those that
    /// [`accept`](Worker::accept) still has: they count as live. The deadline of a drain shuts the
    /// connections down; they end when the application drops them. Returns immediately in a forked
    /// child.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let config = worker_sdk::WorkerConfig::new().listen("127.0.0.1:0");
    /// let worker = worker_sdk::Worker::connect(config)?;
    /// # let address = worker.local_addr().and_then(|addr| addr.socket_addr()).ok_or("not TCP")?;
    /// # let client = std::net::TcpStream::connect(address)?;
    /// let connection = worker.accept()?;
    /// worker.close();
    /// let serving = std::thread::spawn(move || drop(connection));
    /// worker.wait_until_idle();
    /// assert_eq!(worker.live(), 0);
    /// # serving.join().map_err(|_| "it panicked")?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn wait_until_idle(&self) {
        self.core().wait_until_idle(None);
    }

    /// As [`wait_until_idle`](Worker::wait_until_idle), but waits no longer than `timeout`: false
    /// if connections are still live.
    pub fn wait_until_idle_timeout(&self, timeout: Duration) -> bool {
        self.core().wait_until_idle(Some(clock::after(timeout)))
    }

    /// Ends the worker in one call, for example at SIGTERM: says goodbye, as
    /// [`close`](Worker::close), waits until no connection is live, and after `within` shuts down
    /// the others, so that reads and writes on them end. Returns how many it shut down.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use std::io::Read;
    /// use std::time::Duration;
    /// # let config = worker_sdk::WorkerConfig::new().listen("127.0.0.1:0");
    /// let worker = worker_sdk::Worker::connect(config)?;
    /// # let address = worker.local_addr().and_then(|addr| addr.socket_addr()).ok_or("not TCP")?;
    /// # let client = std::net::TcpStream::connect(address)?;
    /// let connection = worker.accept()?.ok_or("closed")?;
    /// let serving = std::thread::spawn(move || (&connection).read(&mut [0]));
    /// assert_eq!(worker.shutdown(Duration::from_millis(10)), 1);
    /// assert!(matches!(serving.join(), Ok(Ok(0))));
    /// # Ok(())
    /// # }
    /// ```
    pub fn shutdown(&self, within: Duration) -> usize {
        self.core().shutdown(within)
    }

    /// Accepts no connections for now: untaken ones go to other workers, and the dispatcher sends
    /// none until [`resume_accepting`](Worker::resume_accepting). Live connections continue, and
    /// the worker stays in the pool. If all workers of a pool are paused, its clients wait, as if
    /// all were full. Works without a dispatcher, too.
    ///
    /// # Errors
    /// [`Error::Forked`] in a forked child.
    ///
    /// ```no_run
    /// # fn reload_caches() {}
    /// # fn reload(worker: &worker_sdk::Worker) -> Result<(), worker_sdk::Error> {
    /// worker.pause_accepting()?;
    /// reload_caches();
    /// worker.resume_accepting()
    /// # }
    /// ```
    pub fn pause_accepting(&self) -> Result<(), Error> {
        self.core().set_paused(true)
    }

    /// Ends a [pause](Worker::pause_accepting).
    ///
    /// # Errors
    /// [`Error::Forked`] in a forked child; [`Error::Io`] if a worker without a dispatcher can no
    /// longer watch its listener.
    pub fn resume_accepting(&self) -> Result<(), Error> {
        self.core().set_paused(false)
    }

    /// Whether the worker is [paused](Worker::pause_accepting).
    pub fn is_paused(&self) -> bool {
        self.core().is_paused()
    }

    /// Changes the worker's share of the load from [`WorkerConfig::weight`]; later dispatchers get
    /// the new value. A weight set by an operator (`dispatcher weight`) has priority until the
    /// worker joins again.
    ///
    /// # Errors
    /// [`Error::Config`] for 0, [`Error::Forked`] in a forked child.
    pub fn set_weight(&self, weight: u16) -> Result<(), Error> {
        self.core().set_weight(weight)
    }

    /// Changes the maximum from [`WorkerConfig::max_connections`]; later dispatchers get the new
    /// value. The maximum of the pool limits it. Live connections beyond it continue.
    ///
    /// # Errors
    /// [`Error::Config`] for 0, [`Error::Forked`] in a forked child.
    pub fn set_max_connections(&self, max: u32) -> Result<(), Error> {
        self.core().set_max_connections(max)
    }

    /// Claims a key, for example the id that the application has just given to a client in a
    /// cookie: from its next connection on, a client with this key comes to this worker. `key` is
    /// what the client will send, decoded; for `client-ip` it is an address as text.
    ///
    /// Never waits. A claim is a hint, which may arrive too late or be lost with the dispatcher;
    /// then the client goes where it would have gone without the claim. A session id that ends in a
    /// route (`ID.NAME`) needs no claim.
    ///
    /// # Errors
    /// See [`ClaimError`]; none of these errors affects the worker.
    ///
    /// ```no_run
    /// # use std::io::Write;
    /// # fn login(worker: &worker_sdk::Worker, client: &mut worker_sdk::Connection) -> std::io::Result<()> {
    /// let id = "6f1d29"; // From a good random source.
    /// if let Err(error) = worker.claim(id) {
    ///     log::debug!("session {id} may move: {error}");
    /// }
    /// write!(client, "HTTP/1.1 204 No Content\r\nSet-Cookie: SESSION={id}\r\n\r\n")
    /// # }
    /// ```
    pub fn claim(&self, key: impl AsRef<[u8]>) -> Result<(), ClaimError> {
        self.core().claim(key.as_ref())
    }

    /// Connections that are taken and have not ended, in this process.
    pub fn live(&self) -> u64 {
        self.core().live()
    }

    /// The gauge of this name, created if necessary: a number that the dispatcher sees. Any thread
    /// may set it.
    ///
    /// # Errors
    /// [`Error::Config`] for an [invalid name](dispatch_protocol::scoreboard::gauge::GaugeName) and
    /// if there are already 24 gauges; [`Error::Forked`] in a forked child.
    pub fn gauge(&self, name: &str) -> Result<Gauge, Error> {
        self.core().gauge(name)
    }

    /// The id of this worker at the dispatcher, as in its status and logs; `None` while not joined.
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

    /// Whether connections can come now: the worker has joined a dispatcher, or listens itself. A
    /// blocking worker notices the loss of its dispatcher while a thread is in `accept`.
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

/// One descriptor for the whole life of the worker, readable when [`Worker::try_accept`] has work.
/// Only poll it.
impl AsFd for Worker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.core().ready_fd()
    }
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker")
            .field("pool", &self.pool())
            .field("id", &self.id())
            .field("live", &self.live())
            .finish_non_exhaustive()
    }
}
