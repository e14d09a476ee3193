//! Ready checks: whether the worker of a new process takes a connection, and answers on it.
//!
//! Each attempt makes a TCP connection over the loopback device. The event loop sends one end to
//! the worker like a client's connection; this task keeps the other end. A worker that listens is
//! connected to. Guarantees: one result for each check, at its deadline at the latest, unless the
//! process has ended meanwhile.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::time::Duration;

use http_body_util::Empty;
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::{Report, Reports};
use crate::config::ReadyCheck;
use dispatcher_core::ProcessId;

/// Pause between two attempts.
const RETRY: Duration = Duration::from_millis(250);

/// A check to carry out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckRequest {
    /// The process whose worker is checked.
    pub process: ProcessId,
    /// What is checked.
    pub check: ReadyCheck,
    /// How long the check may take.
    pub timeout: Duration,
    /// The way to the worker.
    pub reach: Reach,
}

/// How a check reaches a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// The event loop sends it a connection.
    Passed,
    /// It listens at an address of its own.
    At(SocketAddr),
    /// It shares its port: the kernel is told which connection is for it.
    Directed,
}

/// What an attempt needs of the event loop.
#[derive(Debug)]
pub enum CheckNeed {
    /// Its connection is to be sent to the worker.
    Passed(CheckConnection),
    /// It has no connection yet.
    Directed {
        /// The process.
        process: ProcessId,
        /// Receives a connection to its worker, or why there is none. Dropped if the process has
        /// ended, or gets no clients any more: its check is over.
        connection: oneshot::Sender<Result<DirectConnection, String>>,
    },
}

/// A connection to the worker of a process that shares its port.
#[derive(Debug)]
pub struct DirectConnection {
    /// The check's end, in non-blocking mode.
    pub fd: OwnedFd,
    /// No other worker gets the connection until it is dropped.
    pub guard: oneshot::Sender<()>,
}

/// A connection for the worker of a process.
#[derive(Debug)]
pub struct CheckConnection {
    /// The process.
    pub process: ProcessId,
    /// The worker's end, in non-blocking mode.
    pub fd: OwnedFd,
    /// The address of the other end.
    pub peer: SocketAddr,
    /// Receives what became of it. Dropped if it could not be sent now.
    pub taken: oneshot::Sender<CheckFate>,
}

/// What became of a [`CheckConnection`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckFate {
    /// The worker's application has taken it.
    Taken,
    /// It did not reach the application.
    Lost,
    /// The process has ended, or gets no clients any more: its check is over.
    Over,
}

/// Why an attempt did not succeed.
enum Failed {
    /// It is to be tried again.
    Because(String),
    /// See [`CheckFate::Over`].
    Over,
}

/// Where the event loop gets the connections.
pub(super) type CheckNeeds = mpsc::Sender<CheckNeed>;

/// Carries out a check, and reports its result.
pub(super) async fn run(request: CheckRequest, needs: CheckNeeds, reports: Reports) {
    let deadline = Instant::now() + request.timeout;
    let mut last = String::new();
    let result = loop {
        let attempt = attempt(&request, &needs, &reports);
        match tokio::time::timeout_at(deadline, attempt).await {
            Ok(Ok(())) => break Ok(()),
            Ok(Err(Failed::Because(error))) => last = error,
            Ok(Err(Failed::Over)) => return,
            Err(_) if last.is_empty() => break Err(silence(&request)),
            Err(_) => break Err(last),
        }
        if Instant::now() + RETRY >= deadline {
            break Err(last);
        }
        tokio::time::sleep(RETRY).await;
    };
    reports.send(Report::Checked { process: request.process, result });
}

/// What a worker did not do in the whole time.
fn silence(request: &CheckRequest) -> String {
    let within = humantime::format_duration(request.timeout);
    match &request.check {
        ReadyCheck::None | ReadyCheck::Tcp => {
            format!("its application took no connection within ready_timeout ({within})")
        }
        ReadyCheck::Http(path) => {
            format!("no answer to GET {path} within ready_timeout ({within})")
        }
    }
}

async fn attempt(
    request: &CheckRequest,
    needs: &CheckNeeds,
    reports: &Reports,
) -> Result<(), Failed> {
    let mut _guard = None;
    let own = match request.reach {
        Reach::Passed => pass(request, needs, reports).await?,
        Reach::At(address) => connect_to(address).await?,
        Reach::Directed => {
            let DirectConnection { fd, guard } = direct(request, needs, reports).await?;
            _guard = Some(guard);
            let stream = TcpStream::from_std(fd.into());
            stream.map_err(|error| Failed::Because(format!("its connection: {error}")))?
        }
    };
    match &request.check {
        ReadyCheck::None | ReadyCheck::Tcp => Ok(()),
        ReadyCheck::Http(path) => get(own, path).await.map_err(Failed::Because),
    }
}

/// Connects to a worker that listens.
async fn connect_to(address: SocketAddr) -> Result<TcpStream, Failed> {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    let connected = TcpStream::connect((ip, address.port())).await;
    connected.map_err(|error| Failed::Because(format!("cannot connect to {address}: {error}")))
}

/// Gets a connection to a worker that shares its port.
async fn direct(
    request: &CheckRequest,
    needs: &CheckNeeds,
    reports: &Reports,
) -> Result<DirectConnection, Failed> {
    let (sender, connection) = oneshot::channel();
    let need = CheckNeed::Directed { process: request.process, connection: sender };
    needs.send(need).map_err(|_| Failed::Over)?;
    (reports.wake)();
    connection.await.map_err(|_| Failed::Over)?.map_err(Failed::Because)
}

/// Has the event loop send the worker a connection, and waits until its application has taken it.
async fn pass(
    request: &CheckRequest,
    needs: &CheckNeeds,
    reports: &Reports,
) -> Result<TcpStream, Failed> {
    let failed =
        |error| Failed::Because(format!("the dispatcher has no connection for it: {error}"));
    let (own, theirs) = connect().await.map_err(failed)?;
    let peer = own.local_addr().map_err(failed)?;
    let fd = theirs.into_std().map_err(failed)?.into();
    let (sender, taken) = oneshot::channel();
    let process = request.process;
    let connection = CheckConnection { process, fd, peer, taken: sender };
    // Without an event loop nothing is checked any more.
    needs.send(CheckNeed::Passed(connection)).map_err(|_| Failed::Over)?;
    (reports.wake)();
    let because = |text: &str| Err(Failed::Because(text.to_owned()));
    match taken.await {
        Ok(CheckFate::Taken) => Ok(own),
        Ok(CheckFate::Lost) => because(
            "the connection did not reach its application; the worker may be out of file \
                 descriptors",
        ),
        Ok(CheckFate::Over) => Err(Failed::Over),
        Err(_) => because("its worker could not be sent a connection"),
    }
}

/// Both ends of a connection over the loopback device.
async fn connect() -> std::io::Result<(TcpStream, TcpStream)> {
    let v4 = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let v6 = SocketAddr::from((Ipv6Addr::LOCALHOST, 0));
    let listener = match TcpListener::bind(v4).await {
        Ok(listener) => listener,
        Err(_) => TcpListener::bind(v6).await?,
    };
    let own = TcpStream::connect(listener.local_addr()?).await?;
    loop {
        // Another program on this machine may connect first.
        let (theirs, peer) = listener.accept().await?;
        if peer == own.local_addr()? {
            return Ok((own, theirs));
        }
    }
}

async fn get(stream: TcpStream, path: &str) -> Result<(), String> {
    let failed = |error: hyper::Error| match std::error::Error::source(&error) {
        Some(source) => format!("GET {path}: {error}: {source}"),
        None => format!("GET {path}: {error}"),
    };
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(failed)?;
    let request = hyper::Request::get(path)
        .header(hyper::header::HOST, "localhost")
        .header(hyper::header::CONNECTION, "close")
        .header(hyper::header::USER_AGENT, "dispatcher-ready-check")
        .body(Empty::<Bytes>::new())
        .map_err(|error| format!("GET {path}: {error}"))?;
    let mut connection = AbortOnDrop(tokio::spawn(connection));
    let response = match sender.send_request(request).await {
        Ok(response) => response,
        // What was wrong is known to the task of the connection.
        Err(canceled) if canceled.is_canceled() => {
            let ended = (&mut connection.0).await;
            return Err(failed(ended.ok().and_then(Result::err).unwrap_or(canceled)));
        }
        Err(error) => return Err(failed(error)),
    };
    drop(connection);
    match response.status().as_u16() {
        200..400 => Ok(()),
        _ => Err(format!("GET {path} was answered with {}", response.status())),
    }
}

/// The task of a connection, which ends with the check.
struct AbortOnDrop(tokio::task::JoinHandle<hyper::Result<()>>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
