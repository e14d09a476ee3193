//! A WebSocket echo with tokio-tungstenite: long-lived connections, of which each worker should
//! have the same number.

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use tokio::signal::unix::{SignalKind, signal};
use tokio_tungstenite::tungstenite;
use worker_sdk::tokio::{Connection, Listener};
use worker_sdk::{Error, WorkerConfig};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    env_logger::init();
    let listener = Listener::connect(WorkerConfig::from_env()?).await?;
    let mut terminate = signal(SignalKind::terminate())?;
    let closing = listener.clone();
    tokio::spawn(async move {
        terminate.recv().await;
        closing.close();
    });
    let end = loop {
        match listener.accept().await {
            Ok(connection) => {
                let drained = listener.clone();
                tokio::spawn(async move {
                    let peer = connection.peer_addr();
                    if let Err(error) = echo(connection, &drained).await {
                        eprintln!("{peer}: {error}");
                    }
                });
            }
            Err(end) => break end,
        }
    };
    listener.shutdown(Duration::from_secs(10)).await;
    match end {
        Error::Draining | Error::Closed => Ok(()),
        error => Err(error.into()),
    }
}

async fn echo(connection: Connection, listener: &Listener) -> Result<(), tungstenite::Error> {
    let mut socket = tokio_tungstenite::accept_async(connection).await?;
    loop {
        let message = tokio::select! {
            message = socket.next() => message,
            // The client connects again and gets another worker.
            () = listener.drained() => return socket.close(None).await,
        };
        match message {
            Some(Ok(message)) if message.is_text() || message.is_binary() => {
                socket.send(message).await?;
            }
            Some(Ok(_)) => {}
            // The normal end of a WebSocket.
            None | Some(Err(tungstenite::Error::ConnectionClosed)) => return Ok(()),
            Some(Err(error)) => return Err(error),
        }
    }
}
