//! The routes, one file per subject, and their common parts: state, errors, limits of bodies.
//!
//! To add a route, write a function `routes()` in a file of its own, merge it in [`all`], and add
//! its path to [`PATHS`].

mod acl;
mod advice;
mod decisions;
mod health;
mod log;
mod metrics;
mod page;
mod pools;
mod reload;
mod status;
mod workers;

use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use axum::extract::rejection::JsonRejection;
use axum::extract::{DefaultBodyLimit, FromRequest, Request};
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::MethodRouter;
use axum::{Json, Router};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::advice::Adviser;
use super::client_limits::MOST_CONNECTIONS;
use super::reload::Reloader;
use crate::api::command::{Command, CommandError, Problem};
use crate::mailbox::client::{MailboxClient, NoAnswer};

/// Longest request body.
const MAX_BODY: usize = 64 * 1024;

/// Longest wait for an answer of the event loop. The commands wait a little longer.
pub(super) const PATIENCE: Duration = Duration::from_secs(3);

/// All paths, for the answer to an unknown path.
const PATHS: [&str; 15] = [
    "/",
    "/v1/status",
    "/v1/pools/NAME",
    "/v1/pools/NAME/history",
    "/v1/pools/NAME/explain",
    "/v1/pools/NAME/advice",
    "/v1/pools/NAME/advice/history",
    "/v1/workers",
    "/v1/workers/ID",
    "/v1/log_level",
    "/v1/reload",
    "/acl/status",
    "/metrics",
    "/healthz",
    "/readyz",
];

/// The state of the handlers.
#[derive(Clone)]
pub(super) struct App {
    pub(super) mailbox: Arc<MailboxClient>,
    /// Most workers with metrics of their own.
    pub(super) max_workers: Arc<AtomicU32>,
    pub(super) reloader: Arc<Reloader>,
    /// `None` without `advice_listen`.
    pub(super) adviser: Option<Arc<Adviser>>,
}

/// All routes.
pub(super) fn all(app: App) -> Router {
    Router::new()
        .merge(page::routes())
        .merge(status::routes())
        .merge(acl::routes())
        .merge(advice::routes())
        .merge(decisions::routes())
        .merge(pools::routes())
        .merge(workers::routes())
        .merge(health::routes())
        .merge(metrics::routes())
        .merge(log::routes())
        .merge(reload::routes())
        .fallback(not_found)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(middleware::from_fn(short_body))
        .with_state(app)
}

/// The routes for a client with too many connections: every request is refused and the connection
/// closed.
pub(super) fn too_many() -> Router {
    Router::new().fallback(|| async {
        let message = format!("this user has {MOST_CONNECTIONS} connections already");
        let error = CommandError::new(Problem::Unavailable, message);
        ([(header::CONNECTION, "close")], refused(&error.hint("close some, or try again")))
    })
}

/// The methods of a route; other methods get an answer that lists the allowed ones: `methods("GET,
/// HEAD", get(handler))`.
pub(super) fn methods<S: Clone + Send + Sync + 'static>(
    allowed: &'static str,
    router: MethodRouter<S>,
) -> MethodRouter<S> {
    router.fallback(move |method: Method| async move {
        let message = format!("{method} is not possible here; possible: {allowed}");
        let mut response = refused(&CommandError::new(Problem::Method, message));
        response.headers_mut().insert(header::ALLOW, HeaderValue::from_static(allowed));
        response
    })
}

/// Refuses long bodies before they are sent. Handlers that read no body do not check its length.
pub(super) async fn short_body(request: Request, next: Next) -> Response {
    let length = request
        .headers()
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.parse::<u64>().ok());
    if length.is_some_and(|length| length > MAX_BODY as u64) {
        return refused(&CommandError::new(
            Problem::TooLarge,
            format!("a body may have at most {MAX_BODY} bytes"),
        ));
    }
    next.run(request).await
}

async fn not_found() -> Response {
    let body = UnknownPath {
        error: "no such path",
        hint: "`paths` lists the known paths",
        paths: PATHS,
        problem: Problem::NotFound,
    };
    (StatusCode::NOT_FOUND, Json(body)).into_response()
}

/// A [`CommandError`] with the paths that exist.
#[derive(Serialize)]
struct UnknownPath {
    error: &'static str,
    hint: &'static str,
    paths: [&'static str; PATHS.len()],
    problem: Problem,
}

/// JSON with the fields in alphabetical order. Flattened types would otherwise mix theirs with
/// those of the outer type.
pub(super) fn sorted(answer: &impl Serialize) -> Response {
    match serde_json::to_value(answer) {
        Ok(answer) => Json(answer).into_response(),
        Err(error) => refused(&CommandError::new(Problem::Internal, error.to_string())),
    }
}

/// A JSON body. Errors are answered in the format of [`CommandError`].
pub(super) struct Body<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Response;

    async fn from_request(request: Request, state: &S) -> Result<Body<T>, Response> {
        match Json::<T>::from_request(request, state).await {
            Ok(Json(body)) => Ok(Body(body)),
            Err(rejection) => Err(bad_body(&rejection)),
        }
    }
}

fn bad_body(rejection: &JsonRejection) -> Response {
    let hint = match rejection {
        JsonRejection::MissingJsonContentType(_) => {
            "send a JSON body with the header `content-type: application/json`"
        }
        _ => "see docs/ADMIN_API.md for what belongs here",
    };
    let status = rejection.status();
    let error = CommandError::new(problem_of(status), rejection.body_text()).hint(hint);
    (status, Json(error)).into_response()
}

/// Sends a command to the event loop and returns its answer as a response.
pub(super) async fn carry_out(app: &App, command: Command) -> Response {
    outcome(app.mailbox.command(command, PATIENCE).await)
}

/// The response for the result of a request to the event loop.
pub(super) fn outcome<T: Serialize>(answer: Result<Result<T, CommandError>, NoAnswer>) -> Response {
    match answer {
        Ok(Ok(value)) => Json(value).into_response(),
        Ok(Err(why)) => refused(&why),
        Err(why) => no_answer(why),
    }
}

/// The response for a command that failed.
pub(super) fn refused(error: &CommandError) -> Response {
    (status_of(error.problem), Json(error)).into_response()
}

fn status_of(problem: Problem) -> StatusCode {
    match problem {
        Problem::NotFound => StatusCode::NOT_FOUND,
        Problem::Invalid => StatusCode::BAD_REQUEST,
        Problem::Ambiguous | Problem::Conflict => StatusCode::CONFLICT,
        Problem::Config => StatusCode::UNPROCESSABLE_ENTITY,
        Problem::Forbidden => StatusCode::FORBIDDEN,
        Problem::Method => StatusCode::METHOD_NOT_ALLOWED,
        Problem::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        Problem::Unavailable | Problem::NotReady => StatusCode::SERVICE_UNAVAILABLE,
        Problem::Internal => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

fn problem_of(status: StatusCode) -> Problem {
    match status {
        StatusCode::NOT_FOUND => Problem::NotFound,
        StatusCode::FORBIDDEN => Problem::Forbidden,
        StatusCode::METHOD_NOT_ALLOWED => Problem::Method,
        StatusCode::PAYLOAD_TOO_LARGE => Problem::TooLarge,
        StatusCode::SERVICE_UNAVAILABLE => Problem::Unavailable,
        status if status.is_server_error() => Problem::Internal,
        _ => Problem::Invalid,
    }
}

pub(super) fn no_answer(why: NoAnswer) -> Response {
    refused(&CommandError::new(
        Problem::Unavailable,
        match why {
            NoAnswer::Refused => "the dispatcher is busy or stopping",
            NoAnswer::Late => "the dispatcher did not answer in time",
        },
    ))
}

/// Longest error text of a library that is passed on.
const MAX_TEXT: usize = 4096;

/// Gives every error the format of [`CommandError`], including errors of the HTTP library: a path
/// that is not UTF-8, an invalid parameter.
pub(super) async fn all_as_json(request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    let status = response.status();
    let json = response
        .headers()
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|kind| kind.starts_with("application/json"));
    if json || !(status.is_client_error() || status.is_server_error()) {
        return response;
    }
    let text = axum::body::to_bytes(response.into_body(), MAX_TEXT).await.unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let message = match text.trim() {
        "" => status.canonical_reason().unwrap_or("refused"),
        text => text,
    };
    (status, Json(CommandError::new(problem_of(status), message))).into_response()
}

#[cfg(test)]
mod tests {
    use super::PATHS;

    #[test]
    fn every_path_is_documented() {
        let page = include_str!("../../../../docs/ADMIN_API.md");
        let (_, table) = page.split_once("| path | GET |").expect("the table of paths");
        let table = table.split("\n\n").next().expect("its rows");
        for path in PATHS {
            assert!(
                table.contains(&format!("\n| `{path}` |")),
                "{path} is not in docs/ADMIN_API.md"
            );
        }
        assert_eq!(table.lines().count(), PATHS.len() + 2, "and no others are");
    }
}
