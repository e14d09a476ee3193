//! Lets `axum::serve` take connections from a [`Listener`].

use std::future::pending;
use std::io;

use axum::extract::connect_info::Connected;
use axum::serve::IncomingStream;

use crate::PeerAddr;
use crate::client::{Error, log_now};
use crate::tokio::{Connection, Listener};

/// ```no_run
/// use axum::{Router, extract::ConnectInfo, routing::get};
/// use worker_sdk::{PeerAddr, WorkerConfig, tokio::Listener};
///
/// # async fn serve() -> Result<(), Box<dyn std::error::Error>> {
/// let listener = Listener::connect(WorkerConfig::from_env()?).await?;
/// let app = Router::new()
///     .route("/", get(|ConnectInfo(peer): ConnectInfo<PeerAddr>| async move { format!("hello {peer}\n") }))
///     .into_make_service_with_connect_info::<PeerAddr>();
///
/// // At the end: goodbye first, so that what waits for us goes elsewhere; then finish what we have.
/// let closing = listener.clone();
/// let stop = async move {
///     // Wait for SIGTERM here, too.
///     closing.drained().await;
///     closing.close();
/// };
/// axum::serve(listener, app).with_graceful_shutdown(stop).await?;
/// # Ok(())
/// # }
/// ```
impl axum::serve::Listener for Listener {
    type Io = Connection;
    type Addr = PeerAddr;

    /// Waits for ever once the listener is closed, and while it is drained: use axum's graceful shutdown to end serving.
    async fn accept(&mut self) -> (Connection, PeerAddr) {
        loop {
            match Listener::accept(self).await {
                Ok(connection) => {
                    let peer = connection.peer_addr();
                    return (connection, peer);
                }
                Err(Error::Closed) => pending().await,
                // A graceful shutdown that waits for `drained` ends this; without one, it may be resumed.
                Err(Error::Draining) => {
                    if !matches!(self.resumed().await, Ok(true)) {
                        pending().await
                    }
                }
                Err(error @ Error::Forked) => {
                    log_now(log::Level::Error, format_args!("no more connections: {error}"));
                    pending().await
                }
                // A single connection's; the next may be better.
                Err(error) => self.core().log_accept_error(&error),
            }
        }
    }

    /// The address of a worker without a dispatcher.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] with a dispatcher: the address is the dispatcher's.
    fn local_addr(&self) -> io::Result<PeerAddr> {
        Listener::local_addr(self).ok_or_else(|| io::ErrorKind::Unsupported.into())
    }
}

/// Lets a handler have the client's address: `ConnectInfo<PeerAddr>`.
impl Connected<IncomingStream<'_, Listener>> for PeerAddr {
    fn connect_info(stream: IncomingStream<'_, Listener>) -> PeerAddr {
        *stream.remote_addr()
    }
}
