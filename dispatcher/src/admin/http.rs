//! HTTP on the admin socket, and read-only over TCP. The bounds here keep one client from blocking
//! others; the answers are in `routes`.

use crate::background::logger::quoted;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::{Router, middleware};
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::access_check;
use super::client_limits::{AcceptPace, ClientId, ClientLimits, Connection};
use super::error_bodies::{Refusal, Unanswered, WithErrorBodies};
use super::routes::{self, App};
use crate::mailbox::hosts::Hosts;

/// Most connections at once; further ones wait in the kernel's queue.
pub(super) const MAX_CONNECTIONS: usize = 64;

/// Most simultaneous connections of each listener that get a refusal because their client has too
/// many. Connections beyond that are closed without an answer.
const MAX_REFUSED: usize = 16;

/// Time limits of one connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    /// For the head of a request, and for an idle connection between requests.
    pub(super) head: Duration,
    /// For the whole connection.
    pub(super) connection: Duration,
    /// For the current request, after the limit of the connection.
    pub(super) end: Duration,
    /// For reading the rest of the input, at the end.
    pub(super) drain: Duration,
}

/// A connection that is served.
const SERVED: Times = Times {
    head: Duration::from_secs(5),
    connection: Duration::from_secs(60),
    end: Duration::from_secs(5),
    drain: Duration::from_secs(2),
};

/// A connection that is refused.
pub(super) const REFUSED: Times = Times {
    head: Duration::from_secs(1),
    connection: Duration::from_secs(2),
    end: Duration::from_secs(1),
    drain: Duration::from_secs(1),
};

/// Most bytes discarded at the end of a connection. Closing a socket with unread bytes resets the
/// connection, and the reset can overtake the answer.
const MAX_DRAIN: usize = 4 * 1024 * 1024;

/// Shortest average interval between two accepted connections of one listener.
const ACCEPT_INTERVAL: Duration = Duration::from_micros(2_000);

/// Longest request head.
const MAX_HEAD: usize = 16 * 1024;

/// Pause after a failed accept (usually no descriptors are left).
pub(super) const REST: Duration = Duration::from_millis(100);

/// Serves for as long as it is polled.
pub(super) async fn serve(
    listener: Arc<AdminSocket>,
    app: App,
    limits: ClientLimits,
    gate: watch::Receiver<bool>,
) {
    let routes = routes::all(app).layer(middleware::from_fn(access_check::no_web_pages));
    accept_all(listener, routes, limits, gate).await;
}

/// The same over TCP, read-only. TCP has a connection limit of its own, so TCP clients cannot block
/// the admin socket.
pub(super) async fn serve_tcp(
    listener: Arc<TcpListener>,
    app: App,
    limits: ClientLimits,
    hosts: Hosts,
    gate: watch::Receiver<bool>,
) {
    let check = middleware::from_fn_with_state(hosts, access_check::read_only);
    let routes = routes::all(app).layer(check);
    accept_all(listener, routes, limits, gate).await;
}

/// The common part of both kinds of listener.
pub(super) trait Accept {
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    fn next(&self) -> impl Future<Output = io::Result<(Self::Stream, ClientId)>> + Send;
}

impl Accept for UnixListener {
    type Stream = UnixStream;

    async fn next(&self) -> io::Result<(UnixStream, ClientId)> {
        let (stream, _) = self.accept().await?;
        let id = stream.peer_cred().map_or(ClientId::Unknown, |peer| ClientId::User(peer.uid()));
        Ok((stream, id))
    }
}

impl Accept for TcpListener {
    type Stream = TcpStream;

    async fn next(&self) -> io::Result<(TcpStream, ClientId)> {
        let (stream, address) = self.accept().await?;
        Ok((stream, ClientId::Address(address.ip())))
    }
}

/// The admin socket. A reload creates it again if its file was removed.
pub(super) struct AdminSocket(watch::Receiver<Arc<UnixListener>>);

impl AdminSocket {
    pub(super) fn new(listener: watch::Receiver<Arc<UnixListener>>) -> AdminSocket {
        AdminSocket(listener)
    }
}

impl Accept for AdminSocket {
    type Stream = UnixStream;

    async fn next(&self) -> io::Result<(UnixStream, ClientId)> {
        let mut changes = self.0.clone();
        loop {
            let listener = Arc::clone(&changes.borrow_and_update());
            tokio::select! {
                // Connections that have reached the old listener are served.
                biased;
                accepted = listener.next() => return accepted,
                changed = changes.changed() => if changed.is_err() {
                    return listener.next().await;
                },
            }
        }
    }
}

/// The next connection that comes while `gate` is true. Until then connections wait in the socket's
/// queue, where another dispatcher may accept them.
pub(super) async fn next<A: Accept>(
    listener: &A,
    gate: &mut watch::Receiver<bool>,
) -> io::Result<(A::Stream, ClientId)> {
    loop {
        if gate.wait_for(|open| *open).await.is_err() {
            // The event loop has ended, and the end of this thread follows.
            std::future::pending::<()>().await;
        }
        let mut changes = gate.clone();
        let closed = async move { changes.wait_for(|open| !*open).await.is_ok() };
        tokio::select! {
            biased;
            closed = closed => if !closed {
                return listener.next().await;
            },
            accepted = listener.next() => return accepted,
        }
    }
}

async fn accept_all(
    listener: Arc<impl Accept>,
    routes: Router,
    limits: ClientLimits,
    mut gate: watch::Receiver<bool>,
) {
    // The outermost layer sees every answer.
    let routes = routes.layer(middleware::from_fn(routes::all_as_json));
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let refusals = Arc::new(Semaphore::new(MAX_REFUSED));
    let mut pace = AcceptPace::new(ACCEPT_INTERVAL);
    while let Ok(slot) = Arc::clone(&slots).acquire_owned().await {
        pace.pace().await;
        match next(&*listener, &mut gate).await {
            Ok((stream, id)) => match limits.connect(id) {
                Some(client) => {
                    tokio::spawn(connection(stream, routes.clone(), client, SERVED, slot));
                }
                // The client has too many connections. The refusal uses a slot that does not count
                // against other clients.
                None => {
                    if let Ok(slot) = Arc::clone(&refusals).try_acquire_owned() {
                        let client = limits.refused(id);
                        tokio::spawn(connection(stream, routes::too_many(), client, REFUSED, slot));
                    }
                }
            },
            Err(error) => {
                log::warn!("event=admin_accept_failed error={error}", error = quoted(&error));
                tokio::time::sleep(REST).await;
            }
        }
    }
}

pub(super) async fn connection<S>(
    mut stream: S,
    routes: Router,
    client: Connection,
    times: Times,
    _slot: OwnedSemaphorePermit,
) where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let unanswered = Unanswered::default();
    let why = serve_requests(&mut stream, routes, client, times, &unanswered).await;
    let end = async {
        if let Some(refusal) = why.filter(|_| unanswered.is_set()) {
            stream.write_all(&refusal.as_http()).await?;
        }
        stream.shutdown().await?;
        let mut scratch = vec![0; 16 * 1024];
        let mut left = MAX_DRAIN;
        while left > 0 {
            match stream.read(&mut scratch).await? {
                0 => break,
                count => left = left.saturating_sub(count),
            }
        }
        io::Result::Ok(())
    };
    // On an error the client has closed the connection.
    let _ = tokio::time::timeout(times.drain, end).await;
}

/// Serves until the client or the time limit ends the connection. The result is the refusal to send
/// if a request has no answer yet.
async fn serve_requests<S>(
    stream: &mut S,
    routes: Router,
    client: Connection,
    times: Times,
    unanswered: &Unanswered,
) -> Option<Refusal>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let client = Arc::new(client);
    let routes = TowerToHyperService::new(routes);
    let paced = service_fn(move |request| {
        let (client, routes) = (Arc::clone(&client), routes.clone());
        async move {
            client.pace().await;
            routes.call(request).await
        }
    });
    let mut connection = pin!(
        hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(times.head)
            .max_buf_size(MAX_HEAD)
            .serve_connection(
                TokioIo::new(WithErrorBodies::new(stream, unanswered.clone())),
                paced
            )
    );
    let result = match tokio::time::timeout(times.connection, connection.as_mut()).await {
        Ok(result) => result,
        Err(_) => {
            connection.as_mut().graceful_shutdown();
            match tokio::time::timeout(times.end, connection).await {
                Ok(result) => result,
                Err(_) => return Some(Refusal::TooSlow),
            }
        }
    };
    let error = result.err()?;
    log::debug!("event=admin_client_failed error={error}", error = quoted(&error));
    match error.is_timeout() {
        true => Some(Refusal::TooSlow),
        false => Some(Refusal::Malformed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMES: Times = Times {
        head: Duration::from_millis(50),
        connection: Duration::from_millis(300),
        end: Duration::from_millis(50),
        drain: Duration::from_secs(30),
    };

    /// What a client reads that sends this and waits.
    fn answer_to(sent: &'static [u8], times: Times) -> String {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(async {
            let (ours, mut theirs) = UnixStream::pair().expect("a pair");
            let limits = ClientLimits::default();
            limits.rate().store(1_000, std::sync::atomic::Ordering::SeqCst);
            let client = limits.connect(ClientId::Unknown).expect("room");
            let slot = Arc::new(Semaphore::new(1)).acquire_owned().await.expect("a slot");
            let read = |body: axum::body::Bytes| async move { body.len().to_string() };
            let routes = Router::new().fallback(read);
            let served = tokio::spawn(connection(ours, routes, client, times, slot));
            theirs.write_all(sent).await.expect("sent");
            let mut answer = String::new();
            let read = theirs.read_to_string(&mut answer);
            let read = tokio::time::timeout(Duration::from_secs(30), read).await;
            read.expect("an end in time").expect("no reset");
            drop(theirs);
            served.await.expect("no panic");
            answer
        })
    }

    #[test]
    fn a_slow_request_gets_status_408() {
        for sent in [
            // In its head; in its body.
            b"GET /v1/sta".as_slice(),
            b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{",
        ] {
            let answer = answer_to(sent, TIMES);
            assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
            let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
            assert!(head.contains("content-type: application/json"), "{head}");
            let body: serde_json::Value = serde_json::from_str(body).expect("JSON");
            assert_eq!(body["problem"], "invalid");
        }
    }

    #[test]
    fn an_idle_connection_ends_without_an_answer() {
        assert_eq!(answer_to(b"", TIMES), "");
        let answer = answer_to(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", TIMES);
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("\r\n\r\n0"), "{answer}");
    }

    #[test]
    fn malformed_http_gets_a_json_error() {
        for sent in [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".as_slice(), b"\x16\x03\x01\x02\x00"] {
            let answer = answer_to(sent, TIMES);
            assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
            assert!(answer.contains("\"problem\":\"invalid\""), "{answer}");
        }
    }

    #[test]
    fn endless_input_of_a_client_is_bounded() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(async {
            for (drain, limit) in
                [(Duration::from_secs(600), "bytes"), (Duration::from_millis(50), "time")]
            {
                let (ours, mut theirs) = UnixStream::pair().expect("a pair");
                let limits = ClientLimits::default();
                limits.rate().store(1_000, std::sync::atomic::Ordering::SeqCst);
                let client = limits.connect(ClientId::Unknown).expect("room");
                let slot = Arc::new(Semaphore::new(1)).acquire_owned().await.expect("a slot");
                let times = Times { drain, ..TIMES };
                let served = tokio::spawn(connection(ours, Router::new(), client, times, slot));
                theirs.write_all(b"what is this\r\n\r\n").await.expect("sent");
                let sending = async {
                    let bytes = vec![b'x'; 64 * 1024];
                    loop {
                        match limit {
                            "bytes" if theirs.write_all(&bytes).await.is_err() => break,
                            "bytes" => {}
                            _ if theirs.write_all(b"x").await.is_err() => break,
                            _ => tokio::time::sleep(Duration::from_millis(1)).await,
                        }
                    }
                };
                let ended = tokio::time::timeout(Duration::from_secs(60), sending).await;
                ended.unwrap_or_else(|_| panic!("without a bound of {limit}"));
                served.await.expect("no panic");
            }
        });
    }
}
