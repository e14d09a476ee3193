//! The built-in HTTP worker of `dispatcher demo`: an ordinary worker that uses the SDK.

use axum::Router;
use axum::extract::{ConnectInfo, State};
use axum::routing::get;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use worker_sdk::tokio::Listener;
use worker_sdk::{PeerAddr, WorkerConfig};

/// Serves until the dispatcher with this process id ends; it must be the parent process.
///
/// # Errors
/// A message if the worker cannot join.
pub fn worker(dispatcher: i32) -> Result<(), String> {
    // The demo must leave no processes, even when its dispatcher is killed. An ordinary worker
    // would continue to serve.
    set_pdeathsig(Signal::SIGTERM).map_err(|error| format!("prctl: {error}"))?;
    // The dispatcher may have ended before the signal was requested.
    if nix::unistd::getppid().as_raw() != dispatcher {
        return Ok(());
    }
    // The process inherits the limit of the shell that started the demo, often 1024; more
    // descriptors allow more connections.
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        // A lower limit does not prevent serving.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("the runtime: {error}"))?;
    runtime.block_on(serve())
}

async fn serve() -> Result<(), String> {
    let config = WorkerConfig::from_env().map_err(|error| error.to_string())?;
    let name = std::env::var("DISPATCH_NAME").unwrap_or_else(|_| "demo".to_owned());
    let listener = Listener::connect(config).await.map_err(|error| error.to_string())?;
    let app = Router::new().route("/", get(answer)).with_state((name, listener.clone()));
    axum::serve(listener, app.into_make_service_with_connect_info::<PeerAddr>())
        .await
        .map_err(|error| error.to_string())
}

async fn answer(
    State((name, listener)): State<(String, Listener)>,
    ConnectInfo(peer): ConnectInfo<PeerAddr>,
) -> String {
    let pid = std::process::id();
    let live = listener.live();
    let plural = if live == 1 { "" } else { "s" };
    format!("worker {name}, pid {pid}, holds {live} connection{plural}; you are {peer}\n")
}
