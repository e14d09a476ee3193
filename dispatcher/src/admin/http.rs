//! HTTP on the admin socket, and for reading over TCP: the bounds that keep a client from holding anything up. What it answers is in `routes`.

use crate::logger::quoted;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::{Router, middleware};
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::explained::Explained;
use super::guests::{Connection, Connects, Guests, Who};
use super::routes::{self, App};
use super::who_may::{self, Hosts};

/// Most connections at once; more wait in the kernel's queue.
pub(super) const MAX_CONNECTIONS: usize = 64;

/// How long a request's head may take, and how long a connection may idle between requests.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// How long one connection is served; after that it may finish the request it is in for [`CONNECTION_END`].
const CONNECTION_TIME: Duration = Duration::from_secs(60);

/// See [`CONNECTION_TIME`].
const CONNECTION_END: Duration = Duration::from_secs(5);

/// Longest request head.
const MAX_HEAD: usize = 16 * 1024;

/// How long accepting rests when it fails (no descriptors left, usually).
const REST: Duration = Duration::from_millis(100);

/// Serves for as long as it is polled.
pub(super) async fn serve(listener: Arc<AdminSocket>, app: App, guests: Guests) {
    let routes = routes::all(app).layer(middleware::from_fn(who_may::no_pages));
    accept_all(listener, routes, guests).await;
}

/// The same over TCP, for reading only. It has connections of its own, so that its clients keep nobody from the socket.
pub(super) async fn serve_tcp(listener: Arc<TcpListener>, app: App, guests: Guests, hosts: Hosts) {
    let check = middleware::from_fn_with_state(hosts, who_may::read_only);
    let routes = routes::all(app).layer(check);
    accept_all(listener, routes, guests).await;
}

/// What both kinds of listener do.
trait Accept {
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    fn next(&self) -> impl Future<Output = io::Result<(Self::Stream, Who)>> + Send;
}

impl Accept for UnixListener {
    type Stream = UnixStream;

    async fn next(&self) -> io::Result<(UnixStream, Who)> {
        let (stream, _) = self.accept().await?;
        let who = stream.peer_cred().map_or(Who::Unknown, |peer| Who::User(peer.uid()));
        Ok((stream, who))
    }
}

impl Accept for TcpListener {
    type Stream = TcpStream;

    async fn next(&self) -> io::Result<(TcpStream, Who)> {
        let (stream, address) = self.accept().await?;
        Ok((stream, Who::Address(address.ip())))
    }
}

/// The admin socket, which a reload makes again if its file was removed.
pub(super) struct AdminSocket(watch::Receiver<Arc<UnixListener>>);

impl AdminSocket {
    pub(super) fn new(listener: watch::Receiver<Arc<UnixListener>>) -> AdminSocket {
        AdminSocket(listener)
    }
}

impl Accept for AdminSocket {
    type Stream = UnixStream;

    async fn next(&self) -> io::Result<(UnixStream, Who)> {
        let mut changes = self.0.clone();
        loop {
            let listener = Arc::clone(&changes.borrow_and_update());
            tokio::select! {
                // Whoever has reached the old one is served.
                biased;
                accepted = listener.next() => return accepted,
                changed = changes.changed() => if changed.is_err() {
                    return listener.next().await;
                },
            }
        }
    }
}

async fn accept_all(listener: Arc<impl Accept>, routes: Router, guests: Guests) {
    // Outermost, so that it sees every answer.
    let routes = routes.layer(middleware::from_fn(routes::all_as_json));
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connects = Connects::new();
    while let Ok(slot) = Arc::clone(&slots).acquire_owned().await {
        connects.pace().await;
        match listener.next().await {
            Ok((stream, who)) => {
                // Of a user that has too many: the connection is closed.
                if let Some(guest) = guests.connect(who) {
                    tokio::spawn(connection(stream, routes.clone(), guest, slot));
                }
            }
            Err(error) => {
                log::warn!("event=admin_accept_failed error={error}", error = quoted(&error));
                tokio::time::sleep(REST).await;
            }
        }
    }
}

async fn connection<S>(stream: S, routes: Router, guest: Connection, _slot: OwnedSemaphorePermit)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let guest = Arc::new(guest);
    let routes = TowerToHyperService::new(routes);
    let paced = service_fn(move |request| {
        let (guest, routes) = (Arc::clone(&guest), routes.clone());
        async move {
            guest.pace().await;
            routes.call(request).await
        }
    });
    let mut connection = pin!(
        hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIMEOUT)
            .max_buf_size(MAX_HEAD)
            .serve_connection(TokioIo::new(Explained::new(stream)), paced)
    );
    let result = match tokio::time::timeout(CONNECTION_TIME, connection.as_mut()).await {
        Ok(result) => result,
        Err(_) => {
            connection.as_mut().graceful_shutdown();
            match tokio::time::timeout(CONNECTION_END, connection).await {
                Ok(result) => result,
                Err(_) => return,
            }
        }
    };
    if let Err(error) = result {
        log::debug!("event=admin_client_failed error={error}", error = quoted(&error));
    }
}
