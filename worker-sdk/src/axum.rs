//! Makes a [`Listener`] work with `axum::serve`.

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
/// // Untaken connections go to other workers; axum finishes the live ones.
/// let closing = listener.clone();
/// let stop = async move {
///     // A server also waits for SIGTERM here.
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

    /// Waits without end once the listener is closed or drained: end serving with axum's graceful
    /// shutdown.
    async fn accept(&mut self) -> (Connection, PeerAddr) {
        loop {
            match Listener::accept(self).await {
                Ok(connection) => {
                    let peer = connection.peer_addr();
                    return (connection, peer);
                }
                Err(Error::Closed) => pending().await,
                // A graceful shutdown that waits for `drained` ends this call; without one, the
                // drain may be resumed.
                Err(Error::Draining) => {
                    if !matches!(self.resumed().await, Ok(true)) {
                        pending().await
                    }
                }
                Err(error @ Error::Forked) => {
                    log_now(log::Level::Error, format_args!("no more connections: {error}"));
                    pending().await
                }
                // The error concerns one connection only.
                Err(error) => self.core().log_accept_error(&error),
            }
        }
    }

    /// The address of a worker without a dispatcher.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] with a dispatcher, which has the address.
    fn local_addr(&self) -> io::Result<PeerAddr> {
        Listener::local_addr(self).ok_or_else(|| io::ErrorKind::Unsupported.into())
    }
}

/// Gives a handler the client's address: `ConnectInfo<PeerAddr>`.
impl Connected<IncomingStream<'_, Listener>> for PeerAddr {
    fn connect_info(stream: IncomingStream<'_, Listener>) -> PeerAddr {
        *stream.remote_addr()
    }
}
