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
use super::asking::Ask;
use super::core::{Attempts, Core, Lost};
use super::dialling::{Dialling, Reached};
use super::failure::Failure;
use super::machine::{Refresh, Step};
use super::race::RaceStep;
use super::{Address, ConnectorConfig, Error, resolve};

type Handled = Pin<Box<dyn Future<Output = io::Result<TcpStream>> + Send>>;
type Handler = dyn Fn(TcpStream) -> Handled + Send + Sync;
/// The problem of what has not ended in time.
const LATE: &str = "it did not answer in time";

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
                    let Some((address, deadline)) = attempts.begin(attempt) else { continue };
                    match self.open(&attempts, &address, deadline, reconnects).await {
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
    async fn open(
        &self,
        attempts: &Attempts,
        address: &Address,
        deadline: Instant,
        reconnects: bool,
    ) -> Result<(TcpStream, Reached), Failure> {
        let (mut stream, reached) = dial(&self.core, address, attempts.preferred, deadline).await?;
        let on_reconnect = self.on_reconnect.as_ref().filter(|_| reconnects);
        let handlers = [self.on_connect.as_ref(), on_reconnect];
        for handler in handlers.into_iter().flatten() {
            match timeout_at(deadline.into(), handler(stream)).await {
                Ok(Ok(handled)) => stream = handled,
                Ok(Err(error)) => return Err(fail(reached, Failure::of_io(&error))),
                Err(_) => return Err(fail(reached, Failure::timed_out(LATE))),
            }
        }
        Ok((stream, reached))
    }

    /// Asks for the list of addresses and for the best of them. Without an answer the last list
    /// stays.
    async fn refresh(&self, attempts: &mut Attempts, what: Refresh) {
        let mut asking = attempts.ask(what);
        while let Some(ask) = asking.next() {
            if let Some(best) = asking.answered(self.ask(&ask).await) {
                attempts.advise(best);
            }
        }
    }

    async fn ask(&self, Ask { question, host, until }: &Ask) -> Result<Answer, Failure> {
        let (stream, reached) = dial(&self.core, host, None, *until).await?;
        let answer = timeout_at((*until).into(), self.converse(stream, *question, host)).await;
        let answer = answer.unwrap_or_else(|_| Err(Failure::timed_out(LATE)));
        match &answer {
            Ok(_) => reached.serves(),
            Err(failure) => reached.failed(failure),
        }
        answer
    }

    async fn converse(
        &self,
        mut stream: TcpStream,
        question: Question,
        host: &Address,
    ) -> Result<Answer, Failure> {
        let failed = |error: io::Error| Failure::of_io(&error);
        let request = advice::request(question, self.core.config.addresses.pool(), host);
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

fn fail(reached: Reached, failure: Failure) -> Failure {
    reached.failed(&failure);
    failure
}

/// Connects to an address until `deadline`; returns the stream and its server.
async fn dial(
    core: &Arc<Core>,
    address: &Address,
    preferred: Option<SocketAddr>,
    deadline: Instant,
) -> Result<(TcpStream, Reached), Failure> {
    let ordered = match address.host_name() {
        None => address.socket_addr().into_iter().collect(),
        Some(host) => {
            let (sender, receiver) = oneshot::channel();
            let done = move |result| drop(sender.send(result));
            let name = (host, address.port());
            let asked = resolve::begin(&core.config.resolver, name, deadline, done)?;
            let resolved = match timeout_at(deadline.into(), receiver).await {
                Ok(Ok(resolved)) => resolved?,
                Ok(Err(_)) | Err(_) => return Err(asked.timed_out()),
            };
            core.order(&resolved, preferred)
        }
    };
    let mut dialling = Dialling::new(core, ordered, deadline);
    // In the order in which they began.
    let mut under_way: Vec<(Connecting, SocketAddr)> = Vec::new();
    loop {
        match dialling.next() {
            RaceStep::Failed(failure) => return Err(failure),
            RaceStep::Begin(peer) => under_way.push((Box::pin(connect(peer)), peer)),
            RaceStep::Wait(until) => match timeout_at(until.into(), first(&mut under_way)).await {
                Ok((Ok(stream), peer)) => return Ok((stream, dialling.won(peer))),
                Ok((Err(error), peer)) => dialling.failed(peer, &error),
                Err(_) => {}
            },
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

/// The first connect with a result.
async fn first<T>(under_way: &mut Vec<(Pin<Box<T>>, SocketAddr)>) -> (T::Output, SocketAddr)
where
    T: Future + ?Sized,
{
    poll_fn(|context| {
        for place in 0..under_way.len() {
            if let Poll::Ready(result) = under_way[place].0.as_mut().poll(context) {
                return Poll::Ready((result, under_way.remove(place).1));
            }
        }
        Poll::Pending
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

#[test]
fn of_several_results_the_first_is_that_of_the_connect_that_began_first() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let peers = [1, 2, 3].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
    let mut under_way: Vec<_> = peers.map(|peer| (Box::pin(std::future::ready(peer)), peer)).into();
    for peer in peers {
        assert_eq!(runtime.block_on(first(&mut under_way)), (peer, peer));
    }
}
