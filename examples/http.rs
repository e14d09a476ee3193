//! An HTTP server with axum. It answers with its process id, its live connections and the client's
//! address; `/health` is for the ready check of a restart.
//!
//! Alone it listens on 127.0.0.1:8080; with `DISPATCH_SOCKET` it is a worker of a dispatcher.

use axum::extract::{ConnectInfo, State};
use axum::{Router, routing::get};
use tokio::signal::unix::{SignalKind, signal};
use worker_sdk::tokio::Listener;
use worker_sdk::{PeerAddr, WorkerConfig};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    env_logger::init();
    let config = WorkerConfig::new().listen("127.0.0.1:8080").with_env()?;
    let listener = Listener::connect(config).await?;

    let (mut terminate, mut interrupt) =
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let closing = listener.clone();
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            // An operator drains this worker: another process takes its place.
            () = closing.drained() => {}
        }
        // Untaken connections go to other workers; this process finishes its live connections.
        closing.close();
    };

    let app = Router::new()
        .route("/", get(answer))
        // For `ready_check = "/health"`: it can serve once the router exists.
        .route("/health", get(|| async { "ready\n" }))
        .with_state(listener.clone())
        .into_make_service_with_connect_info::<PeerAddr>();
    axum::serve(listener, app).with_graceful_shutdown(stop).await?;
    Ok(())
}

async fn answer(
    State(listener): State<Listener>,
    ConnectInfo(peer): ConnectInfo<PeerAddr>,
) -> String {
    let (pid, live) = (std::process::id(), listener.live());
    format!("pid {pid}, connections held: {live}; you are {peer}\n")
}
