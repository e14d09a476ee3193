//! The connector for programs that block.

mod dial;

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::advice::{self, Answer, Question, Reply};
use super::asking::Ask;
use super::core::{Attempts, Core, Lost};
use super::dialling::Reached;
use super::failure::Failure;
use super::machine::{Refresh, Step};
use super::{Address, ConnectorConfig, Error, watchdog};

type Handler = dyn Fn(&mut TcpStream) -> io::Result<()> + Send + Sync;

/// Connects to a service with several addresses, for programs that block.
///
/// Clones are handles of the same connector: they share what is known of the addresses.
///
/// ```
/// # use std::io::{BufRead, BufReader, Read, Write};
/// # use std::net::TcpListener;
/// use worker_sdk::connector::{Addresses, Connector, ConnectorConfig};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let listener = TcpListener::bind("127.0.0.1:0")?;
/// # let address = listener.local_addr()?.to_string();
/// # let server = std::thread::spawn(move || -> std::io::Result<()> {
/// #     for _ in 0..2 {
/// #         let (stream, _) = listener.accept()?;
/// #         let mut line = String::new();
/// #         BufReader::new(&stream).read_line(&mut line)?;
/// #         assert_eq!(line, "I am client 7\n");
/// #     }
/// #     Ok(())
/// # });
/// let connector = Connector::new(ConnectorConfig::new(Addresses::list([address])?))?
///     .on_connect(|stream| stream.set_nodelay(true))
///     // The new server does not know this client yet.
///     .on_reconnect(|stream| stream.write_all(b"I am client 7\n"));
/// let mut connection = connector.connect()?;
/// connection.write_all(b"I am client 7\n")?;
/// // The server closes the connection.
/// assert_eq!(connection.read(&mut [0; 16])?, 0);
/// connection.reconnect()?;
/// # server.join().unwrap()?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Connector {
    core: Arc<Core>,
    on_connect: Option<Arc<Handler>>,
    on_reconnect: Option<Arc<Handler>>,
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connector").field("core", &self.core).finish_non_exhaustive()
    }
}

impl Connector {
    /// A connector with these settings. It connects on demand.
    ///
    /// # Errors
    /// [`Error::Config`] has the setting and the problem.
    pub fn new(config: ConnectorConfig) -> Result<Connector, Error> {
        Ok(Connector { core: Core::new(config)?, on_connect: None, on_reconnect: None })
    }

    /// Called with each new connection before it is returned: to set options, or to wait for the
    /// greeting of the server. An error makes the attempt fail. At the end of the attempt's time
    /// limit the connection is shut down, so that every read and write on it ends, also in the
    /// handshake of a protocol above it. Waits for anything else are the handler's own matter.
    #[must_use]
    pub fn on_connect(
        mut self,
        handler: impl Fn(&mut TcpStream) -> io::Result<()> + Send + Sync + 'static,
    ) -> Connector {
        self.on_connect = Some(Arc::new(handler));
        self
    }

    /// Called after that with each connection that replaces a lost one, to restore the session. An
    /// error makes the attempt fail. It has the same time limit.
    #[must_use]
    pub fn on_reconnect(
        mut self,
        handler: impl Fn(&mut TcpStream) -> io::Result<()> + Send + Sync + 'static,
    ) -> Connector {
        self.on_reconnect = Some(Arc::new(handler));
        self
    }

    /// Connects to one of the addresses.
    ///
    /// # Errors
    /// [`Error::ConnectionLost`] after all attempts have failed.
    pub fn connect(&self) -> Result<Connection, Error> {
        self.run(None)
    }

    /// A connection that replaces a lost one to `address`, which `peer` served: see
    /// [`Connection::reconnect`]. For streams that have left their `Connection`, as below TLS.
    ///
    /// # Errors
    /// [`Error::ConnectionLost`] after all attempts have failed.
    pub fn reconnect(&self, address: &Address, peer: SocketAddr) -> Result<Connection, Error> {
        self.run(Some((address.clone(), peer)))
    }

    fn run(&self, lost: Option<Lost>) -> Result<Connection, Error> {
        let reconnects = lost.is_some();
        let mut attempts = Attempts::new(&self.core, lost);
        loop {
            match attempts.next() {
                Step::Refresh(what) => self.refresh(&mut attempts, what),
                Step::Wait(until) => {
                    thread::sleep(until.saturating_duration_since(Instant::now()));
                }
                Step::Attempt(attempt) => {
                    let Some((address, deadline)) = attempts.begin(attempt) else { continue };
                    match self.open(&attempts, &address, deadline, reconnects) {
                        Ok((stream, reached)) => {
                            let (peer, connector) = (reached.peer, self.clone());
                            attempts.succeeded(reached);
                            return Ok(Connection { stream, address, peer, connector });
                        }
                        Err(failure) => attempts.failed(failure),
                    }
                }
                Step::Ask | Step::GiveUp => return Err(attempts.error()),
            }
        }
    }

    /// One attempt.
    fn open(
        &self,
        attempts: &Attempts,
        address: &Address,
        deadline: Instant,
        reconnects: bool,
    ) -> Result<(TcpStream, Reached), Failure> {
        let (mut stream, reached) = dial::dial(&self.core, address, attempts.preferred, deadline)?;
        let on_reconnect = self.on_reconnect.as_ref().filter(|_| reconnects);
        let handlers = [self.on_connect.as_ref(), on_reconnect];
        match run_handlers(handlers.into_iter().flatten(), &mut stream, deadline) {
            Ok(()) => Ok((stream, reached)),
            Err(failure) => {
                reached.failed(&failure);
                Err(failure)
            }
        }
    }

    /// Asks for the list of addresses and for the best of them. Without an answer the last list
    /// stays.
    fn refresh(&self, attempts: &mut Attempts, what: Refresh) {
        let mut asking = attempts.ask(what);
        while let Some(ask) = asking.next() {
            if let Some(best) = asking.answered(self.ask(&ask)) {
                attempts.advise(best);
            }
        }
    }

    fn ask(&self, Ask { question, host, until }: &Ask) -> Result<Answer, Failure> {
        let (stream, reached) = dial::dial(&self.core, host, None, *until)?;
        let answer = self.converse(stream, *question, host, *until);
        match &answer {
            Ok(_) => reached.serves(),
            Err(failure) => reached.failed(failure),
        }
        answer
    }

    fn converse(
        &self,
        mut stream: TcpStream,
        question: Question,
        host: &Address,
        until: Instant,
    ) -> Result<Answer, Failure> {
        let failed = |error: io::Error| of_handler(&error);
        let set = |stream: &TcpStream| {
            let left = Some(time_left(until)?);
            stream.set_read_timeout(left).and_then(|()| stream.set_write_timeout(left))
        };
        set(&stream).map_err(failed)?;
        let request = advice::request(question, self.core.config.addresses.pool(), host);
        stream.write_all(&request).map_err(failed)?;
        let (mut reply, mut buffer) = (Reply::default(), [0; 4096]);
        loop {
            // The limit is that of the whole answer, however slowly it comes.
            set(&stream).map_err(failed)?;
            match stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => {
                    if reply.push(&buffer[..count])? {
                        break;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed(error)),
            }
        }
        reply.finish(question)
    }
}

/// Runs the handlers of a new connection until `deadline`.
fn run_handlers<'a>(
    handlers: impl Iterator<Item = &'a Arc<Handler>>,
    stream: &mut TcpStream,
    deadline: Instant,
) -> Result<(), Failure> {
    let mut watched = None;
    for handler in handlers {
        if watched.is_none() {
            let watch = watchdog::watch(stream, deadline);
            watched = Some(watch.map_err(|error| Failure::local(&error))?);
        }
        let set =
            |left| stream.set_read_timeout(left).and_then(|()| stream.set_write_timeout(left));
        let limited = time_left(deadline).and_then(|left| set(Some(left)));
        limited.and_then(|()| handler(stream)).map_err(|error| match time_left(deadline) {
            Ok(_) => of_handler(&error),
            // The error may only show that the socket was shut down.
            Err(late) => of_handler(&late),
        })?;
    }
    let Some(watched) = watched else { return Ok(()) };
    if !watched.ended_in_time() {
        return Err(of_handler(&io::ErrorKind::TimedOut.into()));
    }
    let unset = stream.set_read_timeout(None).and_then(|()| stream.set_write_timeout(None));
    unset.map_err(|error| of_handler(&error))
}

/// A socket reports the end of its time limit as if it were non-blocking.
fn of_handler(error: &io::Error) -> Failure {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            Failure::timed_out("it did not answer in time")
        }
        _ => Failure::of_io(error),
    }
}

fn time_left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

/// A connection to a server of the service. It reads and writes like a [`TcpStream`].
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    address: Address,
    peer: SocketAddr,
    connector: Connector,
}

impl Connection {
    /// The address of the list that was connected to.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// The address that was reached; for a host name one of those that it has.
    pub fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// The stream.
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// The stream alone, as for TLS. [`Connector::reconnect`] replaces it.
    pub fn into_stream(self) -> TcpStream {
        self.stream
    }

    /// Replaces the lost connection by a fresh one, through the same attempts and events as a
    /// connect: first to the same address, unless that is known to be down. Then the handler of
    /// [`Connector::on_reconnect`] runs. Nothing that was written before is sent again.
    ///
    /// The lost connection is shut down first, in case that the server still has it. The first
    /// attempt comes after a short random pause, because the clients of a server lose it at the
    /// same time. After an error `reconnect` can be called again.
    ///
    /// # Errors
    /// [`Error::ConnectionLost`] after all attempts have failed.
    pub fn reconnect(&mut self) -> Result<(), Error> {
        // It fails if the peer has ended the connection.
        let _ = rustix::net::shutdown(&self.stream, rustix::net::Shutdown::Both);
        *self = self.connector.reconnect(&self.address, self.peer)?;
        Ok(())
    }
}

impl Read for Connection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.read(buffer)
    }
}

impl Write for Connection {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

impl Read for &Connection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.stream).read(buffer)
    }
}

impl Write for &Connection {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (&self.stream).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        (&self.stream).flush()
    }
}
