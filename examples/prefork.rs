//! An HTTP server that loads a table once and is forked for each worker of its pool.
//!
//! With `fork = true` in `[pool.NAME.spawn]` of a dispatcher the workers share the table; each one
//! has a runtime of its own. Alone it is one process that listens on 127.0.0.1:8080.

use std::time::Instant;

use axum::Router;
use axum::extract::Path;
use axum::routing::get;
use tokio::signal::unix::{SignalKind, signal};
use worker_sdk::tokio::Listener;
use worker_sdk::{Error, WorkerConfig};

/// Squares, in place of something that takes long to load.
fn load() -> Vec<u64> {
    let started = Instant::now();
    let table = (0..5_000_000u64).map(|number| number * number).collect();
    eprintln!("loaded in {:?}", started.elapsed());
    table
}

fn main() -> Result<(), Error> {
    env_logger::init();
    // Leaked, so that every request can use it without counting references: a count is written, and
    // what is written is no longer shared.
    let table: &'static [u64] = load().leak();
    // No thread yet: the runtime is made in each worker.
    worker_sdk::prefork(|config| {
        tokio::runtime::Runtime::new()
            .map_err(|error| Box::new(error) as Box<dyn std::error::Error>)?
            .block_on(serve(config, table))
    })
}

async fn serve(
    config: WorkerConfig,
    table: &'static [u64],
) -> Result<(), Box<dyn std::error::Error>> {
    let listener = Listener::connect(config.listen("127.0.0.1:8080").with_env()?).await?;
    let mut terminate = signal(SignalKind::terminate())?;
    let drained = listener.clone();
    let square = move |Path(number): Path<usize>| async move {
        table.get(number).map_or_else(|| "too large\n".to_owned(), |square| format!("{square}\n"))
    };
    axum::serve(listener, Router::new().route("/{number}", get(square)))
        .with_graceful_shutdown(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = drained.drained() => {}
            }
            drained.close();
        })
        .await?;
    Ok(())
}
