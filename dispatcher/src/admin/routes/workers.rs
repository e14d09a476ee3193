//! `/v1/workers` and `/v1/workers/ID`: the workers, and commands for them. ID may be POOL/NAME,
//! with the slash as `%2F`.

use axum::Router;
use axum::extract::{Path, State};
use axum::response::Response;
use axum::routing::get;

use super::{App, Body, PATIENCE, carry_out, methods, no_answer, refused, sorted};
use crate::api::action::{Action, WorkerEntry, WorkerList};
use crate::api::command::{CommandError, Target, WorkerRef};
use crate::api::status::Status;

pub(super) fn routes() -> Router<App> {
    Router::new()
        .route("/v1/workers", methods("GET, HEAD, POST", get(list).post(act_on_all)))
        .route("/v1/workers/{id}", methods("GET, HEAD, POST", get(show).post(act)))
}

fn resolve(text: &str, status: &Status) -> Result<u64, CommandError> {
    let workers = status.pools.iter().flat_map(|pool| {
        pool.workers.iter().map(|worker| (worker.id, pool.name.as_str(), worker.name.as_str()))
    });
    text.parse::<WorkerRef>()?.resolve(&status.instance, workers)
}

async fn list(State(app): State<App>) -> Response {
    match app.mailbox.status(PATIENCE).await {
        Ok(status) => sorted(&WorkerList {
            instance: Some(status.instance.clone()),
            workers: WorkerEntry::all(&status).collect(),
        }),
        Err(why) => no_answer(why),
    }
}

async fn show(State(app): State<App>, Path(id): Path<String>) -> Response {
    let status = match app.mailbox.status(PATIENCE).await {
        Ok(status) => status,
        Err(why) => return no_answer(why),
    };
    match resolve(&id, &status) {
        Ok(id) => sorted(&WorkerEntry::all(&status).find(|worker| worker.status.id == id)),
        Err(why) => refused(&why),
    }
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
