//! The connector for programs that block.

mod dial;

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::advice::{self, Answer, Question, Reply};
use super::core::{Attempts, Core, Lost};
use super::machine::{Refresh, Step};
use super::{Address, ConnectorConfig, Error};

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
    /// greeting of the server. An error makes the attempt fail. Reads and writes end with the time
    /// limit of the attempt, each of them.
    #[must_use]
    pub fn on_connect(
        mut self,
        handler: impl Fn(&mut TcpStream) -> io::Result<()> + Send + Sync + 'static,
    ) -> Connector {
        self.on_connect = Some(Arc::new(handler));
        self
    }

    /// Called after that with each connection that replaces a lost one, to restore the session. An
    /// error makes the attempt fail. Reads and writes end with the time limit of the attempt.
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
                    let (address, deadline) = attempts.begin(attempt);
                    match self.open(&attempts, &address, deadline, reconnects) {
                        Ok((stream, peer)) => {
                            attempts.succeeded(peer);
                            let connector = self.clone();
                            return Ok(Connection { stream, address, peer, connector });
                        }
                        Err(error) => attempts.failed(&error),
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
    ) -> io::Result<(TcpStream, SocketAddr)> {
        let (mut stream, peer) = dial::dial(&self.core, address, attempts.preferred, deadline)?;
        let on_reconnect = self.on_reconnect.as_ref().filter(|_| reconnects);
        let handlers = [self.on_connect.as_ref(), on_reconnect];
        for handler in handlers.into_iter().flatten() {
            let left = time_left(deadline)?;
            stream.set_read_timeout(Some(left))?;
            stream.set_write_timeout(Some(left))?;
            let result = handler(&mut stream).map_err(|error| match error.kind() {
                // As a socket reports the end of its time limit.
                io::ErrorKind::WouldBlock => io::Error::from(io::ErrorKind::TimedOut),
                _ => error,
            });
            if result.is_err() {
                self.core.peer_failed(peer);
            }
            result?;
        }
        if self.on_connect.is_some() || on_reconnect.is_some() {
            stream.set_read_timeout(None)?;
            stream.set_write_timeout(None)?;
        }
        Ok((stream, peer))
    }

    /// Asks for the list of addresses and for the best of them. Without an answer the last list
    /// stays.
    fn refresh(&self, attempts: &mut Attempts, what: Refresh) {
        let questions = [(what.list, Question::Addresses), (what.best, Question::Best)];
        let deadline = attempts.refresh_deadline();
        for question in questions.into_iter().filter(|(wanted, _)| *wanted).map(|(_, what)| what) {
            let limit = self.core.config.advice_timeout;
            if question == Question::Addresses {
                self.core.fetching(limit);
            }
            let (mut asked, mut is_known) = (Vec::new(), false);
            while Instant::now() < deadline
                && let Some(host) = self.core.next_host(&asked, what.urgent)
            {
                let until = deadline.min(Instant::now() + limit);
                let answer = self.ask(question, host.address(), until);
                let answered = self.core.answered(host.address(), answer);
                asked.push(host.address().clone());
                if let Ok(advised) = answered {
                    advised.into_iter().for_each(|address| attempts.advise(address));
                    is_known = true;
                    break;
                }
            }
            if !is_known {
                // Another question would get no answer either.
                return;
            }
        }
    }

    fn ask(&self, question: Question, host: &Address, deadline: Instant) -> Result<Answer, String> {
        let Some(advice) = &self.core.config.addresses.advice else {
            return Err("no host to ask".to_owned());
        };
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                "it did not answer in time".to_owned()
            }
            _ => error.to_string(),
        };
        let (mut stream, _) = dial::dial(&self.core, host, None, deadline).map_err(failed)?;
        let set = |stream: &TcpStream| {
            let left = Some(time_left(deadline)?);
            stream.set_read_timeout(left).and_then(|()| stream.set_write_timeout(left))
        };
        set(&stream).map_err(failed)?;
        stream.write_all(&advice::request(question, &advice.pool, host)).map_err(failed)?;
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
