//! `/v1/workers` and `/v1/workers/ID`: who is there, and what they shall do. ID may be POOL/NAME, with the slash as `%2F`.

use std::time::Duration;

use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::Deserialize;

use super::{App, Body, PATIENCE, carry_out, methods, no_answer, refused};
use crate::api::command::{Command, CommandError, Problem, Target, Wanted, WorkerRef};
use crate::api::status::Status;

pub(super) fn routes() -> Router<App> {
    Router::new()
        .route("/v1/workers", methods("GET, HEAD, POST", get(list).post(act_on_all)))
        .route("/v1/workers/{id}", methods("GET, HEAD, POST", get(show).post(act)))
}

/// What to do, as the body of a POST: `{"action": "drain", "deadline": "30s"}`.
#[derive(Debug, Deserialize)]
#[serde(tag = "action", rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Action {
    /// No new connections.
    Drain {
        #[serde(default)]
        deadline: Option<String>,
    },
    /// Connections again.
    Resume {},
    /// Another share of new connections.
    Weight { weight: u32 },
    /// More or fewer processes of a pool: one of the two.
    Scale {
        #[serde(default)]
        processes: Option<u32>,
        #[serde(default)]
        by: Option<i32>,
    },
}

impl Action {
    /// The command, if what it says makes sense.
    pub(super) fn command(self, target: Target) -> Result<Command, CommandError> {
        Ok(match self {
            Action::Drain { deadline } => {
                Command::Drain { target, deadline: deadline.map(|text| wait(&text)).transpose()? }
            }
            Action::Resume {} => Command::Resume { target },
            Action::Weight { weight } => {
                let valid = u16::try_from(weight).ok().filter(|&weight| weight > 0);
                let weight = valid.ok_or_else(|| {
                    let message = format!("a weight is from 1 to 65535, not {weight}");
                    CommandError::new(Problem::Invalid, message)
                        .hint("to give a worker nothing, drain it")
                })?;
                Command::Weight { target, weight }
            }
            Action::Scale { processes, by } => {
                let wanted = match (processes, by) {
                    (Some(processes), None) => Wanted::So(processes),
                    (None, Some(by)) => Wanted::By(by),
                    (Some(_), Some(_)) | (None, None) => {
                        let message = "say either `processes` or `by`";
                        return Err(CommandError::new(Problem::Invalid, message)
                            .hint("such as {\"action\": \"scale\", \"processes\": 8}"));
                    }
                };
                let Target::Pool(pool) = target else {
                    let message = "only a pool can be scaled";
                    return Err(CommandError::new(Problem::Invalid, message)
                        .hint("post it to /v1/pools/NAME"));
                };
                Command::Scale { pool, wanted }
            }
        })
    }
}

fn wait(text: &str) -> Result<Duration, CommandError> {
    humantime::parse_duration(text).map_err(|error| {
        CommandError::new(Problem::Invalid, format!("deadline: {error}"))
            .hint("write a duration, such as \"30s\" or \"5min\"")
    })
}

fn resolve(text: &str, status: &Status) -> Result<u64, CommandError> {
    let workers = status.pools.iter().flat_map(|pool| {
        pool.workers.iter().map(|worker| (worker.id, pool.name.as_str(), worker.name.as_str()))
    });
    text.parse::<WorkerRef>()?.resolve(&status.instance, workers)
}

async fn list(State(app): State<App>) -> Response {
    match app.gate.status(PATIENCE).await {
        Ok(status) => {
            let body =
                serde_json::json!({ "instance": status.instance, "workers": rows(&status, None) });
            Json(body).into_response()
        }
        Err(why) => no_answer(why),
    }
}

async fn show(State(app): State<App>, Path(id): Path<String>) -> Response {
    let status = match app.gate.status(PATIENCE).await {
        Ok(status) => status,
        Err(why) => return no_answer(why),
    };
    match resolve(&id, &status) {
        Ok(id) => Json(rows(&status, Some(id)).pop()).into_response(),
        Err(why) => refused(&why),
    }
}

/// Workers as the status has them, each with its pool.
fn rows(status: &Status, only: Option<u64>) -> Vec<serde_json::Value> {
    let with_pool = |pool: &str, worker| {
        let mut row = serde_json::to_value(worker).unwrap_or_default();
        if let Some(object) = row.as_object_mut() {
            object.insert("pool".to_owned(), pool.into());
        }
        row
    };
    let pools = status.pools.iter();
    pools
        .flat_map(|pool| pool.workers.iter().map(move |worker| (pool, worker)))
        .filter(|(_, worker)| only.is_none_or(|id| worker.id == id))
        .map(|(pool, worker)| with_pool(&pool.name, worker))
        .collect()
}

async fn act(
    State(app): State<App>,
    Path(id): Path<String>,
    Body(action): Body<Action>,
) -> Response {
    let command = id.parse().and_then(|worker| action.command(Target::Worker(worker)));
    match command {
        Ok(command) => carry_out(&app, command).await,
        Err(why) => refused(&why),
    }
}

async fn act_on_all(State(app): State<App>, Body(action): Body<Action>) -> Response {
    match action.command(Target::All) {
        Ok(command) => carry_out(&app, command).await,
        Err(why) => refused(&why),
    }
}
