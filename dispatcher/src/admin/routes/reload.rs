//! `/v1/reload`: reads the configuration again, and answers once it is in force, or why it is not.

use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};

use super::{App, methods, no_answer, refused};
use crate::admin::gate::NoAnswer;

pub(super) fn routes() -> Router<App> {
    Router::new().route("/v1/reload", methods("POST", post(reload)))
}

/// In a task of its own: a client that hangs up must not leave it half done.
async fn reload(State(app): State<App>) -> Response {
    let reloader = Arc::clone(&app.reloader);
    match tokio::spawn(async move { reloader.reload("request").await }).await {
        Ok(Ok(Ok(reloaded))) => Json(reloaded).into_response(),
        Ok(Ok(Err(why))) => refused(&why),
        Ok(Err(why)) => no_answer(why),
        Err(_) => no_answer(NoAnswer::Refused),
    }
}
