//! Ready checks: whether the worker of a new process takes a connection, and answers on it.
//!
//! Each attempt makes a TCP connection over the loopback device. The event loop sends one end to
//! the worker like a client's connection; this task keeps the other end. Guarantees: one result for
//! each check, at its deadline at the latest.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
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
    /// Receives whether the worker's application has taken it. Dropped if it could not be sent.
    pub taken: oneshot::Sender<bool>,
}

/// Where the event loop gets the connections.
pub(super) type CheckConnections = mpsc::Sender<CheckConnection>;

/// Carries out a check, and reports its result.
pub(super) async fn run(request: CheckRequest, connections: CheckConnections, reports: Reports) {
    let deadline = Instant::now() + request.timeout;
    let mut last = String::new();
    let result = loop {
        let attempt = attempt(&request, &connections, &reports);
        match tokio::time::timeout_at(deadline, attempt).await {
            Ok(Ok(())) => break Ok(()),
            Ok(Err(error)) => last = error,
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
    connections: &CheckConnections,
    reports: &Reports,
) -> Result<(), String> {
    let (own, theirs) = connect().await.map_err(|error| format!("no connection: {error}"))?;
    let peer = own.local_addr().map_err(|error| format!("no address: {error}"))?;
    let fd = theirs.into_std().map_err(|error| format!("no connection: {error}"))?.into();
    let (sender, taken) = oneshot::channel();
    let process = request.process;
    let gone = || "the dispatcher is stopping".to_owned();
    connections.send(CheckConnection { process, fd, peer, taken: sender }).map_err(|_| gone())?;
    (reports.wake)();
    match taken.await {
        Ok(true) => {}
        Ok(false) => return Err("the connection did not reach its application".to_owned()),
        Err(_) => return Err("its worker could not be sent a connection".to_owned()),
    }
    match &request.check {
        ReadyCheck::None | ReadyCheck::Tcp => Ok(()),
        ReadyCheck::Http(path) => get(own, path).await,
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
    let failed = |error: hyper::Error| format!("GET {path}: {error}");
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(failed)?;
    let request = hyper::Request::get(path)
        .header(hyper::header::HOST, "localhost")
        .header(hyper::header::CONNECTION, "close")
        .header(hyper::header::USER_AGENT, "dispatcher-ready-check")
        .body(Empty::<Bytes>::new())
        .map_err(|error| format!("GET {path}: {error}"))?;
    let connection = AbortOnDrop(tokio::spawn(async { drop(connection.await) }));
    let response = sender.send_request(request).await.map_err(failed)?;
    drop(connection);
    match response.status().as_u16() {
        200..400 => Ok(()),
        _ => Err(format!("GET {path} was answered with {}", response.status())),
    }
}

/// The task of a connection, which ends with the check.
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
