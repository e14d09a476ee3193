//! `/v1/pools/NAME/advice` and `/v1/pools/NAME/advice/history`: the figures behind advice, and the
//! last answers. Neither counts as an advice.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};

use super::{App, methods, refused};
use crate::admin::advice::Adviser;
use crate::api::command::{CommandError, Problem};

pub(super) fn routes() -> Router<App> {
    Router::new()
        .route("/v1/pools/{name}/advice", methods("GET, HEAD", get(advice)))
        .route("/v1/pools/{name}/advice/history", methods("GET, HEAD", get(history)))
}

async fn advice(State(app): State<App>, Path(pool): Path<String>) -> Response {
    let adviser = match adviser(&app) {
        Ok(adviser) => adviser,
        Err(why) => return refused(&why),
    };
    match adviser.view(&pool).await {
        Ok(answer) => Json(answer).into_response(),
        Err(why) => refused(&why),
    }
}

async fn history(State(app): State<App>, Path(pool): Path<String>) -> Response {
    match adviser(&app).and_then(|adviser| adviser.history(&pool)) {
        Ok(answer) => Json(answer).into_response(),
        Err(why) => refused(&why),
    }
}

fn adviser(app: &App) -> Result<&Arc<Adviser>, CommandError> {
    app.adviser.as_ref().ok_or_else(|| {
        CommandError::new(Problem::Conflict, "this dispatcher gives no advice")
            .hint("set advice_listen in the configuration, and restart the dispatcher")
    })
}
