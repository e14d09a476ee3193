//! `/v1/pools/NAME`: one pool, and commands for all workers in it.

use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};

use super::{App, Body, PATIENCE, carry_out, methods, no_answer, refused};
use crate::api::action::Action;
use crate::api::command::{Target, unknown_pool};

pub(super) fn routes() -> Router<App> {
    Router::new().route("/v1/pools/{name}", methods("GET, HEAD, POST", get(show).post(act)))
}

async fn show(State(app): State<App>, Path(name): Path<String>) -> Response {
    let status = match app.mailbox.status(PATIENCE).await {
        Ok(status) => status,
        Err(why) => return no_answer(why),
    };
    match status.pools.iter().find(|pool| pool.name == name) {
        Some(pool) => Json(pool).into_response(),
        None => refused(&unknown_pool(&name, status.pools.iter().map(|pool| pool.name.as_str()))),
    }
}

async fn act(
    State(app): State<App>,
    Path(name): Path<String>,
    Body(action): Body<Action>,
) -> Response {
    match action.command(Target::Pool(name)) {
        Ok(command) => carry_out(&app, command).await,
        Err(why) => refused(&why),
    }
}
