//! `/healthz` (the event loop runs) and `/readyz` (clients can be served).

use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::Serialize;

use super::{App, PATIENCE, methods, no_answer};
use crate::api::command::Problem;

/// Longest wait for the event loop in `/healthz`.
const HEALTHY: Duration = Duration::from_secs(1);

pub(super) fn routes() -> Router<App> {
    Router::new()
        .route("/healthz", methods("GET, HEAD", get(healthz)))
        .route("/readyz", methods("GET, HEAD", get(readyz)))
}

/// Depends only on the event loop: a restart of the dispatcher would not repair its workers.
async fn healthz(State(app): State<App>) -> Response {
    match app.mailbox.alive(HEALTHY).await {
        Ok(()) => "ok\n".into_response(),
        Err(why) => no_answer(why),
    }
}

/// Ready means: every pool with a listener has a usable worker, neither a stop nor a drain of the
/// host is in progress, and the files of all sockets exist. Back-pressure counts as ready: the pool
/// serves its clients later, and another dispatcher is not faster.
async fn readyz(State(app): State<App>) -> Response {
    let status = match app.mailbox.status(PATIENCE).await {
        Ok(status) => status,
        Err(why) => return no_answer(why),
    };
    let waiting: Vec<&str> = status
        .pools
        .iter()
        .filter(|pool| status.listeners.iter().any(|listener| listener.pool == pool.name))
        .filter(|pool| matches!(pool.state.as_str(), "no-worker" | "refusing"))
        .map(|pool| pool.name.as_str())
        .collect();
    let missing: Vec<&str> =
        status.socket_files_missing.iter().map(|file| file.path.as_str()).collect();
    let error = if status.stopping {
        "the dispatcher is stopping".to_owned()
    } else if status.draining.is_some() {
        "the host is draining".to_owned()
    } else if !missing.is_empty() {
        format!("missing socket files, which a reload creates again: {}", missing.join(", "))
    } else if waiting.is_empty() {
        return "ready\n".into_response();
    } else {
        format!("no usable worker in: {}", waiting.join(", "))
    };
    let body = NotReady {
        error,
        hint: "see: dispatcher status",
        pools: waiting,
        problem: Problem::NotReady,
    };
    (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
}

/// A [`CommandError`](crate::api::command::CommandError) with the pools that have no usable worker.
#[derive(Serialize)]
struct NotReady<'a> {
    error: String,
    hint: &'static str,
    pools: Vec<&'a str>,
    problem: Problem,
}
