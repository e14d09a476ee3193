//! `/v1/status`: the whole status.

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};

use super::{App, PATIENCE, methods, no_answer};

pub(super) fn routes() -> Router<App> {
    Router::new().route("/v1/status", methods("GET, HEAD", get(status)))
}

async fn status(State(app): State<App>) -> Response {
    match app.mailbox.status(PATIENCE).await {
        Ok(status) => Json(&*status).into_response(),
        Err(why) => no_answer(why),
    }
}
