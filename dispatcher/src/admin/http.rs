//! HTTP on the admin socket: the routes, and the bounds that keep a client from holding anything up.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::gate::{Gate, NoAnswer};

/// Most connections at once; more wait in the kernel's queue.
pub(super) const MAX_CONNECTIONS: usize = 64;

/// How long a request's head may take, and how long a connection may idle between requests.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// How long one connection is served; after that it may finish the request it is in for [`CONNECTION_END`].
const CONNECTION_TIME: Duration = Duration::from_secs(60);

/// See [`CONNECTION_TIME`].
const CONNECTION_END: Duration = Duration::from_secs(5);

/// Longest request head.
const MAX_HEAD: usize = 16 * 1024;

/// Longest request body.
const MAX_BODY: usize = 64 * 1024;

/// How long the hot thread may take for `/healthz`.
const HEALTHY: Duration = Duration::from_secs(1);

/// How long it may take for an answer. The CLI waits a little longer.
const PATIENCE: Duration = Duration::from_secs(3);

/// How long accepting rests when it fails (no descriptors left, usually).
const REST: Duration = Duration::from_millis(100);

/// Everything there is to ask for.
const PATHS: [&str; 2] = ["/v1/status", "/healthz"];

/// Serves for as long as it is polled.
pub(super) async fn serve(listener: UnixListener, gate: Arc<Gate>) {
    let routes = routes(gate);
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    while let Ok(slot) = Arc::clone(&slots).acquire_owned().await {
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::spawn(connection(stream, routes.clone(), slot));
            }
            Err(error) => {
                log::warn!("event=admin_accept_failed error=\"{error}\"");
                tokio::time::sleep(REST).await;
            }
        }
    }
}

async fn connection(stream: UnixStream, routes: Router, _slot: OwnedSemaphorePermit) {
    let mut connection = pin!(
        hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIMEOUT)
            .max_buf_size(MAX_HEAD)
            .serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes))
    );
    let result = match tokio::time::timeout(CONNECTION_TIME, connection.as_mut()).await {
        Ok(result) => result,
        Err(_) => {
            connection.as_mut().graceful_shutdown();
            match tokio::time::timeout(CONNECTION_END, connection).await {
                Ok(result) => result,
                Err(_) => return,
            }
        }
    };
    if let Err(error) = result {
        log::debug!("event=admin_client_failed error=\"{error}\"");
    }
}

fn routes(gate: Arc<Gate>) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/healthz", get(healthz))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(middleware::from_fn(short_body))
        .with_state(gate)
}

/// Handlers that read no body do not notice a long one; say no before it is sent.
async fn short_body(request: Request, next: Next) -> Response {
    let length = request
        .headers()
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.parse::<u64>().ok());
    if length.is_some_and(|length| length > MAX_BODY as u64) {
        return error(StatusCode::PAYLOAD_TOO_LARGE, "a body may have at most 65536 bytes");
    }
    next.run(request).await
}

async fn status(State(gate): State<Arc<Gate>>) -> Response {
    match gate.status(PATIENCE).await {
        Ok(status) => Json(&*status).into_response(),
        Err(why) => no_answer(why),
    }
}

async fn healthz(State(gate): State<Arc<Gate>>) -> Response {
    match gate.status(HEALTHY).await {
        Ok(_) => "ok\n".into_response(),
        Err(why) => no_answer(why),
    }
}

fn no_answer(why: NoAnswer) -> Response {
    error(
        StatusCode::SERVICE_UNAVAILABLE,
        match why {
            NoAnswer::Refused => "the dispatcher is busy or stopping",
            NoAnswer::Late => "the dispatcher did not answer in time",
        },
    )
}

async fn not_found() -> Response {
    let body = serde_json::json!({ "error": "no such path", "paths": PATHS });
    (StatusCode::NOT_FOUND, Json(body)).into_response()
}

async fn method_not_allowed() -> Response {
    let mut response = error(StatusCode::METHOD_NOT_ALLOWED, "only GET is possible here");
    response.headers_mut().insert(header::ALLOW, header::HeaderValue::from_static("GET, HEAD"));
    response
}

fn error(status: StatusCode, message: &str) -> Response {
    (status, Json(serde_json::json!({ "error": message }))).into_response()
}
