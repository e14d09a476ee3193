//! `/v1/reload`: reads the configuration again, and answers once it is in force, or why it is not.

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

/// In a task of its own: a client that hangs up must not leave it half done.
async fn reload(State(app): State<App>) -> Response {
    let reloader = Arc::clone(&app.reloader);
    let task = tokio::spawn(async move { reloader.reload("request").await });
    outcome(task.await.unwrap_or(Err(NoAnswer::Refused)))
}
