//! `/v1/log_level`: how much is logged, until it is changed again or the dispatcher ends.

use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use log::LevelFilter;
use serde::Deserialize;

use super::{App, Body, methods, refused};
use crate::api::command::{CommandError, Problem};
use crate::background::logger;

pub(super) fn routes() -> Router<App> {
    Router::new().route("/v1/log_level", methods("GET, HEAD, POST", get(show).post(set)))
}

/// `{"level": "debug"}`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    level: String,
}

async fn show() -> Response {
    Json(serde_json::json!({ "level": logger::selected() })).into_response()
}

/// The hot thread is not asked: the logger is nobody's, and changing it takes a moment that nobody waits for.
async fn set(Body(wanted): Body<Wanted>) -> Response {
    match wanted.level.parse::<LevelFilter>() {
        Ok(level) => {
            let previous = logger::set_level(level);
            let level = logger::selected();
            Json(serde_json::json!({ "level": level, "previous": previous })).into_response()
        }
        Err(_) => refused(
            &CommandError::new(Problem::Invalid, "this is not a level")
                .hint("the levels are off, error, warn, info, debug and trace"),
        ),
    }
}
