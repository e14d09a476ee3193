//! `/v1/reload`: reloads the configuration and answers when it is in force or refused.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::response::Response;
use axum::routing::post;

use super::{App, methods, outcome};
use crate::mailbox::client::NoAnswer;

pub(super) fn routes() -> Router<App> {
    Router::new().route("/v1/reload", methods("POST", post(reload)))
}

/// A separate task completes the reload even if the client disconnects.
async fn reload(State(app): State<App>) -> Response {
    let reloader = Arc::clone(&app.reloader);
    let task = tokio::spawn(async move { reloader.reload("request").await });
    outcome(task.await.unwrap_or(Err(NoAnswer::Refused)))
}
