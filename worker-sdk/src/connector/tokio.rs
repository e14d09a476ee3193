//! The connector for tokio.
//!
//! The same attempts, events and errors as the blocking connector. Dropping the future of a connect
//! gives it up.

use std::fmt;
use std::future::{Future, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::time::{sleep_until, timeout_at};

use super::advice::{self, Answer, Question, Reply};
use super::core::{Attempts, Core, Lost};
use super::machine::{Refresh, Step};
use super::race::{Race, RaceStep};
use super::{Address, ConnectorConfig, Error, resolve};

type Handled = Pin<Box<dyn Future<Output = io::Result<TcpStream>> + Send>>;
type Handler = dyn Fn(TcpStream) -> Handled + Send + Sync;
type Connecting = Pin<Box<dyn Future<Output = io::Result<TcpStream>> + Send>>;

/// Connects to a service with several addresses, in a tokio runtime with I/O and time enabled.
///
/// Clones are handles of the same connector: they share what is known of the addresses.
///
/// ```no_run
/// use tokio::io::{AsyncReadExt, AsyncWriteExt};
/// use worker_sdk::connector::{Addresses, ConnectorConfig, Selection, tokio::Connector};
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let addresses = Addresses::advice(["10.0.0.1:9901", "10.0.0.2:9901"], "web")?;
/// let config = ConnectorConfig::new(addresses).selection(Selection::Best);
/// let connector = Connector::new(config)?
///     // A server that hangs accepts connections, and does not greet.
///     .on_connect(|mut stream| async move {
///         let mut greeting = [0; 6];
///         stream.read_exact(&mut greeting).await?;
///         Ok(stream)
///     });
/// let mut connection = connector.connect().await?;
/// if connection.write_all(b"hello\n").await.is_err() {
///     connection.reconnect().await?;
/// }
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
    /// greeting of the server. It returns the stream. An error makes the attempt fail, and so does
    /// the end of the attempt's time limit.
    #[must_use]
    pub fn on_connect<F, R>(mut self, handler: F) -> Connector
    where
        F: Fn(TcpStream) -> R + Send + Sync + 'static,
        R: Future<Output = io::Result<TcpStream>> + Send + 'static,
    {
        self.on_connect = Some(Arc::new(move |stream| Box::pin(handler(stream))));
        self
    }

    /// Called after that with each connection that replaces a lost one, to restore the session. It
    /// returns the stream. An error makes the attempt fail, and so does the end of its time limit.
    #[must_use]
    pub fn on_reconnect<F, R>(mut self, handler: F) -> Connector
    where
        F: Fn(TcpStream) -> R + Send + Sync + 'static,
        R: Future<Output = io::Result<TcpStream>> + Send + 'static,
    {
        self.on_reconnect = Some(Arc::new(move |stream| Box::pin(handler(stream))));
        self
    }

    /// Connects to one of the addresses.
    ///
    /// # Errors
    /// [`Error::ConnectionLost`] after all attempts have failed.
    pub async fn connect(&self) -> Result<Connection, Error> {
        self.run(None).await
    }

    /// A connection that replaces a lost one to `address`, which `peer` served: see
    /// [`Connection::reconnect`]. For streams that have left their `Connection`, as below TLS.
    ///
    /// # Errors
    /// [`Error::ConnectionLost`] after all attempts have failed.
    pub async fn reconnect(
        &self,
        address: &Address,
        peer: SocketAddr,
    ) -> Result<Connection, Error> {
        self.run(Some((address.clone(), peer))).await
    }

    async fn run(&self, lost: Option<Lost>) -> Result<Connection, Error> {
        let reconnects = lost.is_some();
        let mut attempts = Attempts::new(&self.core, lost);
        loop {
            match attempts.next() {
                Step::Refresh(what) => self.refresh(&mut attempts, what).await,
                Step::Wait(until) => sleep_until(until.into()).await,
                Step::Attempt(attempt) => {
                    let (address, deadline) = attempts.begin(attempt);
                    match self.open(&attempts, &address, deadline, reconnects).await {
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
    async fn open(
        &self,
        attempts: &Attempts,
        address: &Address,
        deadline: Instant,
        reconnects: bool,
    ) -> io::Result<(TcpStream, SocketAddr)> {
        let (mut stream, peer) = dial(&self.core, address, attempts.preferred, deadline).await?;
        let on_reconnect = self.on_reconnect.as_ref().filter(|_| reconnects);
        let handlers = [self.on_connect.as_ref(), on_reconnect];
        for handler in handlers.into_iter().flatten() {
            let handled = timeout_at(deadline.into(), handler(stream)).await;
            let result = handled.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
            if result.is_err() {
                self.core.peer_failed(peer);
            }
            stream = result?;
        }
        Ok((stream, peer))
    }

    /// Asks for the list of addresses and for the best of them. Without an answer the last list
    /// stays.
    async fn refresh(&self, attempts: &mut Attempts, what: Refresh) {
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
                let late = |_| Err("it did not answer in time".to_owned());
                let answer = timeout_at(until.into(), answer).await.unwrap_or_else(late);
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

    async fn ask(
        &self,
        question: Question,
        host: &Address,
        deadline: Instant,
    ) -> Result<Answer, String> {
        let Some(advice) = &self.core.config.addresses.advice else {
            return Err("no host to ask".to_owned());
        };
        let failed = |error: io::Error| error.to_string();
        let (mut stream, _) = dial(&self.core, host, None, deadline).await.map_err(failed)?;
        let request = advice::request(question, &advice.pool, host);
        stream.write_all(&request).await.map_err(failed)?;
        let (mut reply, mut buffer) = (Reply::default(), [0; 4096]);
        loop {
            match stream.read(&mut buffer).await {
                Ok(0) => break,
                Ok(count) => {
                    if reply.push(&buffer[..count])? {
                        break;
                    }
                }
                Err(error) => return Err(failed(error)),
            }
        }
        reply.finish(question)
    }
}

/// Connects to an address until `deadline`; returns the stream and its peer.
async fn dial(
    core: &Core,
    address: &Address,
    preferred: Option<SocketAddr>,
    deadline: Instant,
) -> io::Result<(TcpStream, SocketAddr)> {
    let late = || io::Error::new(io::ErrorKind::TimedOut, "no answer in the time limit");
    let ordered = match address.host_name() {
        None => address.socket_addr().into_iter().collect(),
        Some(host) => {
            let (sender, receiver) = oneshot::channel();
            let done = move |result| drop(sender.send(result));
            resolve::begin(&core.config.resolver, host, address.port(), done)?;
            let resolved = match timeout_at(deadline.into(), receiver).await {
                Ok(Ok(resolved)) => resolved?,
                Ok(Err(_)) | Err(_) => return Err(resolve::timed_out(host)),
            };
            core.order(&resolved, preferred)
        }
    };
    let mut race = Race::new(ordered);
    let mut under_way: Vec<(Connecting, SocketAddr)> = Vec::new();
    loop {
        match race.next(Instant::now()) {
            RaceStep::Failed(error) => return Err(error),
            RaceStep::Begin(peer) => under_way.push((Box::pin(connect(peer)), peer)),
            RaceStep::Wait(until) => {
                let until = until.map_or(deadline, |until| until.min(deadline));
                match timeout_at(until.into(), first(&mut under_way)).await {
                    Ok((Ok(stream), peer, place)) => {
                        // Those before it had a head start.
                        under_way[..place].iter().for_each(|(_, peer)| core.peer_failed(*peer));
                        return Ok((stream, peer));
                    }
                    Ok((Err(error), peer, _)) => {
                        core.peer_failed(peer);
                        race.failed(error);
                    }
                    Err(_) if Instant::now() >= deadline => {
                        under_way.iter().for_each(|(_, peer)| core.peer_failed(*peer));
                        return Err(late());
                    }
                    Err(_) => {}
                }
            }
        }
    }
}

async fn connect(peer: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(peer).await?;
    // Fails if the peer has reset the connection already.
    if stream.peer_addr()? == stream.local_addr()? {
        // Nothing listens on the port, and the kernel gave it to this end: it met itself.
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    Ok(stream)
}

/// The first connect with a result; also how many began before it and have none.
async fn first(
    under_way: &mut Vec<(Connecting, SocketAddr)>,
) -> (io::Result<TcpStream>, SocketAddr, usize) {
    poll_fn(|context| {
        let ready =
            under_way.iter_mut().enumerate().find_map(|(place, (connecting, _))| match connecting
                .as_mut()
                .poll(context)
            {
                Poll::Ready(result) => Some((place, result)),
                Poll::Pending => None,
            });
        match ready {
            Some((place, result)) => Poll::Ready((result, under_way.remove(place).1, place)),
            None => Poll::Pending,
        }
    })
    .await
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

    /// The stream, for its reading and writing halves, for example.
    pub fn stream_mut(&mut self) -> &mut TcpStream {
        &mut self.stream
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
    pub async fn reconnect(&mut self) -> Result<(), Error> {
        // It fails if the peer has ended the connection.
        let _ = rustix::net::shutdown(&self.stream, rustix::net::Shutdown::Both);
        *self = self.connector.reconnect(&self.address, self.peer).await?;
        Ok(())
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
