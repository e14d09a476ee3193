//! The worker for programs with a [mio] event loop.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use ::mio::event::Source;
use ::mio::unix::SourceFd;
use ::mio::{Interest, Registry, Token};

use crate::PeerAddr;
use crate::client::worker_core::WorkerCore;
use crate::client::{ClaimError, Connection, Drain, Error, Gauge, Handle, WorkerConfig};

/// A worker that never blocks and whose connections are non-blocking. Register it once, as
/// readable. Each call of [`try_accept`](MioWorker::try_accept) also joins, and joins again after a
/// loss of the dispatcher.
///
/// ```no_run
/// use mio::{Events, Interest, Poll, Token};
/// use worker_sdk::{Error, WorkerConfig, mio::MioWorker};
///
/// fn main() -> Result<(), Box<dyn std::error::Error>> {
///     let mut poll = Poll::new()?;
///     let mut worker = MioWorker::new(WorkerConfig::from_env()?)?;
///     poll.registry().register(&mut worker, Token(0), Interest::READABLE)?;
///     let mut events = Events::with_capacity(64);
///     let mut closing = false;
///     // The worker has an event when the last connection has ended, on any thread.
///     while !closing || worker.live() > 0 {
///         poll.poll(&mut events, None)?;
///         for event in &events {
///             while event.token() == Token(0) && !closing {
///                 match worker.try_accept() {
///                     Ok(Some(connection)) => drop(connection), // Serve it here.
///                     Ok(None) => break,
///                     // Drained or closed: continue until the last connection has ended.
///                     Err(Error::Draining | Error::Closed) => {
///                         worker.close();
///                         closing = true;
///                     }
///                     Err(error) => return Err(error.into()),
///                 }
///             }
///         }
///     }
///     Ok(())
/// }
/// ```
///
/// A worker alone, as in a test:
///
/// ```
/// use mio::{Events, Interest, Poll, Token};
/// use worker_sdk::{WorkerConfig, mio::MioWorker};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let (mut poll, mut events) = (Poll::new()?, Events::with_capacity(64));
/// let mut worker = MioWorker::new(WorkerConfig::new().pool("web").listen("127.0.0.1:0"))?;
/// poll.registry().register(&mut worker, Token(0), Interest::READABLE)?;
/// assert!(worker.is_joined() && worker.id().is_none(), "no id without a dispatcher");
/// assert_eq!(worker.pool(), "web");
///
/// let address = worker.local_addr().and_then(|addr| addr.socket_addr()).ok_or("not TCP")?;
/// let _client = std::net::TcpStream::connect(address)?;
/// let mut connection = loop {
///     match worker.try_accept()? {
///         Some(connection) => break connection,
///         None => poll.poll(&mut events, None)?,
///     }
/// };
/// assert_eq!(worker.live(), 1);
/// poll.registry().register(&mut connection, Token(1), Interest::READABLE)?;
///
/// poll.registry().deregister(&mut connection)?;
/// drop(connection);
/// assert_eq!(worker.live(), 0);
///
/// worker.close(); // At SIGTERM.
/// assert!(worker.try_accept().is_err());
/// # Ok(())
/// # }
/// ```
pub struct MioWorker(Handle);

impl MioWorker {
    /// Creates a worker that joins once it is registered and polled. Does not wait.
    ///
    /// # Errors
    /// [`Error::Config`] for a wrong setting, [`Error::Io`] if a system call fails, for example if
    /// the address is in use.
    pub fn new(config: WorkerConfig) -> Result<MioWorker, Error> {
        Ok(MioWorker(Handle(WorkerCore::new(&config)?)))
    }

    /// The next connection, non-blocking; `None` if none is available now. After an event, call it
    /// until it returns `None`.
    ///
    /// # Errors
    /// Until the first join: [`Error::Refused`], [`Error::JoinTimeout`], [`Error::Protocol`],
    /// [`Error::Io`], and [`Error::Config`] for a dispatch socket whose path is too long; if the
    /// caller continues to wait for events, the worker tries again. Later: [`Error::Closed`] after
    /// [`close`](MioWorker::close), [`Error::Draining`] while the dispatcher drains this worker
    /// (finish the live connections, then end; or continue to poll, in case the drain is resumed),
    /// [`Error::Forked`] in a forked child.
    pub fn try_accept(&self) -> Result<Option<Connection>, Error> {
        Ok(self.0.0.try_accept()?.map(Connection::new))
    }

    /// Calls `callback` when the dispatcher starts to drain this worker: as
    /// [`Worker::on_drain`](crate::Worker::on_drain).
    pub fn on_drain(&self, callback: impl Fn(&Drain) + Send + Sync + 'static) {
        self.0.0.draining().on_drain(&self.0.0, Arc::new(callback));
    }

    /// Calls `callback` each time this worker has joined a dispatcher: as
    /// [`Worker::on_joined`](crate::Worker::on_joined).
    pub fn on_joined(&self, callback: impl Fn(u64) + Send + Sync + 'static) {
        self.0.0.on_joined(callback);
    }

    /// Calls `callback` each time this worker has lost its dispatcher: as
    /// [`Worker::on_lost`](crate::Worker::on_lost).
    pub fn on_lost(&self, callback: impl Fn(&str) + Send + Sync + 'static) {
        self.0.0.on_lost(callback);
    }

    /// Calls `callback` each time a drain ends: as
    /// [`Worker::on_resumed`](crate::Worker::on_resumed).
    pub fn on_resumed(&self, callback: impl Fn() + Send + Sync + 'static) {
        self.0.0.on_resumed(callback);
    }

    /// Says goodbye, and after `within` shuts down the connections that are still live: as
    /// [`Worker::shutdown`](crate::Worker::shutdown), but without waiting. Continue until
    /// [`live`](MioWorker::live) returns 0.
    pub fn shutdown(&self, within: Duration) {
        self.0.0.shutdown_in_thread(within, drop);
    }

    /// Whether the dispatcher drains this worker.
    pub fn is_draining(&self) -> bool {
        self.0.0.draining().now().is_some()
    }

    /// Says goodbye: as [`Worker::close`](crate::Worker::close). Continue until
    /// [`live`](MioWorker::live) returns 0: the worker has an event when the last connection has
    /// ended, on any thread.
    pub fn close(&self) {
        self.0.0.close();
    }

    /// Accepts no connections for now: as
    /// [`Worker::pause_accepting`](crate::Worker::pause_accepting).
    ///
    /// # Errors
    /// [`Error::Forked`] in a forked child.
    pub fn pause_accepting(&self) -> Result<(), Error> {
        self.0.0.set_paused(true)
    }

    /// Ends a [pause](MioWorker::pause_accepting).
    ///
    /// # Errors
    /// [`Error::Forked`] in a forked child; [`Error::Io`] if a worker without a dispatcher can no
    /// longer watch its listener.
    pub fn resume_accepting(&self) -> Result<(), Error> {
        self.0.0.set_paused(false)
    }

    /// Whether the worker is [paused](MioWorker::pause_accepting).
    pub fn is_paused(&self) -> bool {
        self.0.0.is_paused()
    }

    /// Changes the worker's share of the load: as
    /// [`Worker::set_weight`](crate::Worker::set_weight).
    ///
    /// # Errors
    /// [`Error::Config`] for 0, [`Error::Forked`] in a forked child.
    pub fn set_weight(&self, weight: u16) -> Result<(), Error> {
        self.0.0.set_weight(weight)
    }

    /// Changes the maximum number of connections: as
    /// [`Worker::set_max_connections`](crate::Worker::set_max_connections).
    ///
    /// # Errors
    /// [`Error::Config`] for 0, [`Error::Forked`] in a forked child.
    pub fn set_max_connections(&self, max: u32) -> Result<(), Error> {
        self.0.0.set_max_connections(max)
    }

    /// Claims a key for this worker: as [`Worker::claim`](crate::Worker::claim). Never waits.
    ///
    /// # Errors
    /// See [`ClaimError`].
    pub fn claim(&self, key: impl AsRef<[u8]>) -> Result<(), ClaimError> {
        self.0.0.claim(key.as_ref())
    }

    /// Connections that are taken and have not ended, in this process.
    pub fn live(&self) -> u64 {
        self.0.0.live()
    }

    /// The gauge of this name, created if necessary: a number that the dispatcher sees. See
    /// [`Gauge`].
    ///
    /// # Errors
    /// [`Error::Config`] for an [invalid name](dispatch_protocol::scoreboard::gauge::GaugeName) and
    /// if there are already 24 gauges; [`Error::Forked`] in a forked child.
    pub fn gauge(&self, name: &str) -> Result<Gauge, Error> {
        self.0.0.gauge(name)
    }

    /// The id of this worker at the dispatcher; `None` while not joined.
    pub fn id(&self) -> Option<u64> {
        self.0.0.id()
    }

    /// Whether connections can come now: the worker has joined a dispatcher, or listens itself.
    pub fn is_joined(&self) -> bool {
        self.0.0.is_joined()
    }

    /// The pool of this worker.
    pub fn pool(&self) -> &str {
        self.0.0.pool()
    }

    /// The address on which a worker without a dispatcher listens, with its real port; `None` with
    /// a dispatcher.
    pub fn local_addr(&self) -> Option<PeerAddr> {
        self.0.0.local_addr()
    }

    fn raw_fd(&self) -> RawFd {
        self.0.0.ready_fd().as_raw_fd()
    }
}

impl Source for MioWorker {
    fn register(
        &mut self,
        registry: &Registry,
        token: Token,
        interests: Interest,
    ) -> io::Result<()> {
        SourceFd(&self.raw_fd()).register(registry, token, interests)
    }

    fn reregister(
        &mut self,
        registry: &Registry,
        token: Token,
        interests: Interest,
    ) -> io::Result<()> {
        SourceFd(&self.raw_fd()).reregister(registry, token, interests)
    }

    fn deregister(&mut self, registry: &Registry) -> io::Result<()> {
        SourceFd(&self.raw_fd()).deregister(registry)
    }
}

impl fmt::Debug for MioWorker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MioWorker")
            .field("pool", &self.pool())
            .field("id", &self.id())
            .field("live", &self.live())
            .finish_non_exhaustive()
    }
}

/// Register a connection like any stream. Deregister it before you drop it: the dispatcher or
/// another process may have a copy, and then the close does not remove it from the poll.
impl Source for Connection {
    fn register(
        &mut self,
        registry: &Registry,
        token: Token,
        interests: Interest,
    ) -> io::Result<()> {
        SourceFd(&self.registered_fd()).register(registry, token, interests)
    }

    fn reregister(
        &mut self,
        registry: &Registry,
        token: Token,
        interests: Interest,
    ) -> io::Result<()> {
        SourceFd(&self.registered_fd()).reregister(registry, token, interests)
    }

    fn deregister(&mut self, registry: &Registry) -> io::Result<()> {
        SourceFd(&self.registered_fd()).deregister(registry)
    }
}
