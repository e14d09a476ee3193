//! `/metrics`: the status for Prometheus, in the requested format.

use std::sync::atomic::Ordering;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use super::{App, PATIENCE, methods, no_answer};
use crate::admin::metrics::{Process, Snapshot, openmetrics, plain};

/// The content type for clients that accept OpenMetrics.
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The content type for all other clients.
const PLAIN: &str = "text/plain; version=0.0.4; charset=utf-8";

pub(super) fn routes() -> Router<App> {
    Router::new().route("/metrics", methods("GET, HEAD", get(metrics)))
}

async fn metrics(State(app): State<App>, headers: HeaderMap) -> Response {
    let status = match app.mailbox.status(PATIENCE).await {
        Ok(status) => status,
        Err(why) => return no_answer(why),
    };
    let max_workers = app.max_workers.load(Ordering::Relaxed) as usize;
    let last_reload = app.reloader.last();
    let text = openmetrics(Snapshot { status, last_reload, max_workers }, Process::read());
    let accepts = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    if accepts.into_iter().any(|accept| accept.contains("application/openmetrics-text")) {
        ([(header::CONTENT_TYPE, OPENMETRICS)], text).into_response()
    } else {
        ([(header::CONTENT_TYPE, PLAIN)], plain(&text)).into_response()
    }
}
