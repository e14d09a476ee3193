//! HTTP with hyper: one task per connection, and a shutdown that finishes requests.
//!
//! Any error ends an accept loop: `accept` handles passing conditions itself.

use std::convert::Infallible;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use hyper_util::server::graceful::GracefulShutdown;
use tokio::signal::unix::{SignalKind, signal};
use worker_sdk::tokio::Listener;
use worker_sdk::{Error, WorkerConfig};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    env_logger::init();
    let listener = Listener::connect(WorkerConfig::from_env()?).await?;
    let mut terminate = signal(SignalKind::terminate())?;
    let graceful = GracefulShutdown::new();
    let end = loop {
        let connection = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(connection) => connection,
                Err(end) => break end,
            },
            // The next accept returns `Closed`.
            _ = terminate.recv() => {
                listener.close();
                continue;
            }
        };
        let peer = connection.peer_addr();
        let service = service_fn(move |request: Request<Incoming>| async move {
            let text = format!("{} for {peer}\n", request.uri().path());
            Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(text))))
        });
        let serving = hyper::server::conn::http1::Builder::new()
            .serve_connection(TokioIo::new(connection), service);
        let serving = graceful.watch(serving);
        tokio::spawn(async move {
            if let Err(error) = serving.await {
                eprintln!("{peer}: {error}");
            }
        });
    };
    // After the goodbye, idle connections are closed and requests are answered; the deadline ends
    // the rest.
    listener.close();
    tokio::join!(graceful.shutdown(), listener.shutdown(Duration::from_secs(10)));
    match end {
        Error::Draining | Error::Closed => Ok(()),
        error => Err(error.into()),
    }
}
