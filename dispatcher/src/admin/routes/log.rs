//! `/v1/log_level`: shows and sets the log level.

use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use log::LevelFilter;

use super::{App, Body, methods, refused};
use crate::api::command::{CommandError, Problem};
use crate::api::log_level::{LogLevel, SetLogLevel};
use crate::background::logger;

pub(super) fn routes() -> Router<App> {
    Router::new().route("/v1/log_level", methods("GET, HEAD, POST", get(show).post(set)))
}

async fn show() -> Response {
    Json(LogLevel { level: logger::selected(), previous: None }).into_response()
}

/// The event loop is not involved: the logger is shared, and setting the level does not block.
async fn set(Body(wanted): Body<SetLogLevel>) -> Response {
    match wanted.level.parse::<LevelFilter>() {
        Ok(level) => {
            let previous = Some(logger::set_level(level));
            Json(LogLevel { level: logger::selected(), previous }).into_response()
        }
        Err(_) => refused(
            &CommandError::new(Problem::Invalid, "this is not a level")
                .hint("the levels are off, error, warn, info, debug and trace"),
        ),
    }
}
