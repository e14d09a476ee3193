//! The worker: joins a dispatcher, takes connections, counts them, and comes back when it was away.
//!
//! Owns everything that the blocking, mio and tokio layers share; they only add how to wait. Knows
//! nothing of what the application does with a connection.

mod backoff;
mod channel;
mod claim;
mod clock;
mod config;
mod connection;
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
mod process;
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
pub use self::config::WorkerConfig;
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
pub use self::sample::Sampling;

use self::worker_core::WorkerCore;
use crate::PeerAddr;

/// Closes the worker when the last of its handles is gone.
pub(crate) struct Handle(pub(crate) Arc<WorkerCore>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.abandon();
    }
}

/// A worker of a dispatcher, for programs that block: one thread or many.
///
/// It joins its pool, and from then on [`accept`](Worker::accept) gives the connections the dispatcher
/// chose this process for. When the dispatcher goes away the connections go on, and the worker joins
/// again as soon as there is one. Without a dispatcher (`listen`) it accepts connections itself.
///
/// Clones are handles of the same worker, for other threads. Dropping the last one says goodbye: what
/// was not taken goes to other workers, what was taken goes on and is counted to its end. Connect after
/// forking: a fork's copy takes nothing, and its end says nothing to the dispatcher.
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
///     // Drained by an operator, or closed: goodbye, and what is live goes on to its end.
///     worker.close();
///     worker.wait_until_idle();
///     Ok(())
/// }
/// ```
///
/// Alone, as in a test, and what it says of itself:
///
/// ```
/// use std::io::{Read, Write};
/// use worker_sdk::{Worker, WorkerConfig};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let worker = Worker::connect(WorkerConfig::new().pool("web").listen("127.0.0.1:0"))?;
/// assert!(worker.is_joined() && worker.id().is_none(), "ready, and no dispatcher has numbered it");
/// assert_eq!(worker.pool(), "web");
/// let address = worker.local_addr().and_then(|addr| addr.socket_addr()).ok_or("not TCP")?;
///
/// let mut client = std::net::TcpStream::connect(address)?;
/// if let Some(mut connection) = worker.accept()? {
///     assert_eq!(worker.live(), 1);
///     connection.write_all(b"hello\n")?;
/// } // Dropped: closed, then counted as ended.
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
    /// Joins, and waits until that has worked: for ever, or for `join_timeout`.
    ///
    /// A dispatcher that is not there yet, is stopping, or has no room is waited for. Without a
    /// dispatch socket it binds `listen` instead.
    ///
    /// # Errors
    /// [`Error::Config`] for a wrong setting, [`Error::Refused`] when the dispatcher does not take this
    /// worker, [`Error::JoinTimeout`], [`Error::Protocol`] when something else answers, and [`Error::Io`] when
    /// a system call fails: the address to listen on is in use, the dispatch socket is not for us to open.
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

    /// Waits for the next connection, which is this worker's from now on; `None` once the worker is closed, and while the
    /// dispatcher drains it (an operator said `dispatcher drain`) and nothing that came before is left.
    ///
    /// A worker that is drained usually finishes what it has and ends, and another takes its place: it says
    /// [goodbye](Worker::close) and [waits](Worker::wait_until_idle). One that rather stays waits in
    /// [`resumed`](Worker::resumed). A `main` that returns ends its connections, whoever serves them.
    ///
    /// Any number of threads may wait. The connection is in blocking mode.
    ///
    /// # Errors
    /// [`Error::Forked`] in a forked child, [`Error::Io`] when even waiting fails. A lost dispatcher is no
    /// error: it is waited for.
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

    /// The same, but waits no longer than `timeout`.
    ///
    /// # Errors
    /// [`Error::TimedOut`] when no connection has come; otherwise as [`accept`](Worker::accept).
    ///
    /// ```
    /// use std::time::Duration;
    /// # use worker_sdk::{Error, Worker, WorkerConfig};
    /// # fn main() -> Result<(), worker_sdk::Error> {
    /// # let worker = Worker::connect(WorkerConfig::new().listen("127.0.0.1:0"))?;
    /// match worker.accept_timeout(Duration::from_millis(10)) {
    ///     Ok(Some(_connection)) => {}
    ///     Ok(None) => {} // Closed, or drained.
    ///     Err(Error::TimedOut) => {} // Time for something else; then call it again.
    ///     Err(error) => return Err(error),
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn accept_timeout(&self, timeout: Duration) -> Result<Option<Connection>, Error> {
        Ok(self.core().accept(Some(clock::after(timeout)))?.map(Connection::new))
    }

    /// The next connection if there is one now, in non-blocking mode; `None` if there is none.
    ///
    /// For event loops without a layer here: the worker's descriptor ([`AsFd`]) becomes readable when there
    /// is something to do. Call this then until it says `None`; that also joins again after a dispatcher was lost.
    /// While a thread waits in [`accept`](Worker::accept), that one receives for all, and the descriptor
    /// says nothing of what it has queued: use one way at a time.
    ///
    /// # Errors
    /// [`Error::Closed`] once closed, [`Error::Draining`] while the dispatcher drains this worker, [`Error::Forked`] in a
    /// forked child.
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
    ///         // Drained by an operator, or closed: goodbye, and on until the last connection has ended. From here
    ///         // on the worker is readable all the time.
    ///         Err(Error::Draining | Error::Closed) => {
    ///             worker.close();
    ///             interest = PollFlags::empty();
    ///         }
    ///         Err(error) => return Err(error.into()),
    ///     }
    ///     poll(&mut [PollFd::new(&worker, interest)], None)?; // And the connections.
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn try_accept(&self) -> Result<Option<Connection>, Error> {
        Ok(self.core().try_accept()?.map(Connection::new))
    }

    /// The connections, one after the other, until the worker is closed or drained. Errors that can't pass end it, too, and are
    /// logged. The [example above](Worker) shows it.
    pub fn incoming(&mut self) -> Incoming<'_> {
        Incoming { worker: self }
    }

    /// The same for an iterator that owns its worker, and can be given to a thread. A worker is also an [`IntoIterator`].
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

    /// Calls `callback` whenever this worker has joined a dispatcher, with the id it has there, and at once if it has
    /// already. Not without a dispatcher.
    ///
    /// All three of these callbacks are called on a thread of their own, in the order of the events, without a lock held:
    /// they may call the worker, take their time, or panic. They are called for at most 64 events that wait. A worker hears
    /// of events when it asks for connections. A callback that owns a clone of this worker is a handle;
    /// [`close`](Worker::close) lets go of all callbacks.
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

    /// Calls `callback` whenever this worker has lost its dispatcher, with the reason; it joins again by itself, and live
    /// connections go on. As [`on_joined`](Worker::on_joined).
    pub fn on_lost(&self, callback: impl Fn(&str) + Send + Sync + 'static) {
        self.core().on_lost(callback);
    }

    /// Calls `callback` whenever a drain is over and connections may come again. As [`on_joined`](Worker::on_joined).
    pub fn on_resumed(&self, callback: impl Fn() + Send + Sync + 'static) {
        self.core().on_resumed(callback);
    }

    /// Calls `callback` when the dispatcher begins to drain this worker, or at once if it does already: a moment to fail health
    /// checks, to tell clients to reconnect, to stop keep-alive. On a thread of its own, one callback after the other: it may
    /// take its time, wait for the last connection to end, or panic; the drain's deadline comes all the same.
    ///
    /// A callback that owns a clone of this worker is a handle, too: dropping the others says no goodbye then.
    /// [`close`](Worker::close) does, and lets go of all callbacks, once they have been told of a drain that is under way.
    ///
    /// The worker hears of a drain when it asks for connections: a thread must be in [`accept`](Worker::accept), or an event
    /// loop must call [`try_accept`](Worker::try_accept). From then on the deadline counts, whatever the program does: the
    /// connections that are still live are shut down, so that reading and writing them ends.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), worker_sdk::Error> {
    /// # let worker = worker_sdk::Worker::connect(worker_sdk::WorkerConfig::from_env()?)?;
    /// worker.on_drain(|drain| println!("no more connections; the last end at {:?}", drain.deadline()));
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

    /// Waits until no drain is under way: true; or until the worker is closed: false. For a worker that stays when it is
    /// drained.
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

    /// Says goodbye: no more connections, what was not taken goes elsewhere. Wakes the threads in
    /// [`accept`](Worker::accept). Live connections go on, and are counted until the last has ended.
    ///
    /// Connections whose dispatcher had gone, so that nobody else can serve them, are still given out
    /// by `accept` before it says `None`; dropping the last handle closes them.
    ///
    /// ```
    /// # fn main() -> Result<(), worker_sdk::Error> {
    /// # let config = worker_sdk::WorkerConfig::new().listen("127.0.0.1:0");
    /// let worker = worker_sdk::Worker::connect(config)?;
    /// let closing = worker.clone();
    /// let thread = std::thread::spawn(move || worker.accept()); // Waits …
    /// closing.close(); // … until here, as when SIGTERM arrives.
    /// assert!(matches!(thread.join(), Ok(Ok(None))));
    /// # Ok(())
    /// # }
    /// ```
    pub fn close(&self) {
        self.core().close();
    }

    /// Waits until no connection is live in this process: for the end of a program that serves what it has. No polling:
    /// whoever ends the last one wakes this thread.
    ///
    /// Call [`close`](Worker::close) before, so that no more come, and take what [`accept`](Worker::accept) still has: it
    /// counts as live. At the deadline of a drain the connections are shut down; they end when the application drops
    /// them. In a forked child it returns at once.
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

    /// The same, but waits no longer than `timeout`: false if connections are live then.
    pub fn wait_until_idle_timeout(&self, timeout: Duration) -> bool {
        self.core().wait_until_idle(Some(clock::after(timeout)))
    }

    /// The end of a program in one call, such as at SIGTERM: says goodbye, as [`close`](Worker::close), waits until no
    /// connection is live, and after `within` shuts down those that are left, so that reading and writing them ends. Gives
    /// how many that were.
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
    /// let serving = std::thread::spawn(move || (&connection).read(&mut [0])); // The client says nothing.
    /// assert_eq!(worker.shutdown(Duration::from_millis(10)), 1);
    /// assert!(matches!(serving.join(), Ok(Ok(0))));
    /// # Ok(())
    /// # }
    /// ```
    pub fn shutdown(&self, within: Duration) -> usize {
        self.core().shutdown(within)
    }

    /// Takes no connections for now: what is untaken goes to other workers, and the dispatcher sends nothing more until
    /// [`resume_accepting`](Worker::resume_accepting). Live connections go on, and so does the membership in the pool; a pool
    /// all of whose workers are paused lets its clients wait, as if all were full. Also alone, without a dispatcher.
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
    /// [`Error::Forked`] in a forked child; [`Error::Io`] when a worker without a dispatcher can no longer watch its listener.
    pub fn resume_accepting(&self) -> Result<(), Error> {
        self.core().set_paused(false)
    }

    /// Whether it is [paused](Worker::pause_accepting).
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

    /// Claims a key, such as the id just given to a client in a cookie: from the next connection on, a client that
    /// brings it comes to this worker. `key` is what the client will send, decoded; for `client-ip` an address as text.
    ///
    /// Never waits. It is a hint that may come too late or get lost with the dispatcher: then the client goes where it
    /// would have gone without it. A session id that ends in a route (`ID.NAME`) needs no claim.
    ///
    /// # Errors
    /// See [`ClaimError`]; none of them harms the worker.
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

    /// Connections taken and not yet ended, in this process.
    pub fn live(&self) -> u64 {
        self.core().live()
    }

    /// The gauge of this name, made if there is none: a number that the dispatcher sees. Any thread may set it.
    ///
    /// # Errors
    /// [`Error::Config`] for what is [no name](dispatch_protocol::scoreboard::gauge::GaugeName), and when there are 24 already;
    /// [`Error::Forked`] in a forked child.
    pub fn gauge(&self, name: &str) -> Result<Gauge, Error> {
        self.core().gauge(name)
    }

    /// The id the dispatcher gave this worker, as its status and logs show it; `None` while not joined.
    pub fn id(&self) -> Option<u64> {
        self.core().id()
    }

    /// Whether connections can come now: a dispatcher has us, or we listen by ourselves. A blocking worker notices that
    /// the dispatcher has gone when a thread is in `accept`.
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

/// One descriptor for the worker's whole life, readable when [`Worker::try_accept`] has something to do.
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
