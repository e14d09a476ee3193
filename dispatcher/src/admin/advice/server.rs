//! HTTP at `advice_listen`: two questions of clients and one of peers, read-only.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::extract::{Extension, Path, RawQuery, State};
use axum::http::{StatusCode, header};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};

use super::records::address_record;
use super::{Adviser, Refused, bounds};
use crate::admin::client_limits::{AcceptPace, ClientId, ClientLimits};
use crate::admin::http::{self, Times};
use crate::admin::routes::{self, refused};
use crate::api::advice::{AddressesAnswer, BestAnswer};
use crate::api::command::{CommandError, Problem};
use crate::background::logger::quoted;
use dispatcher_core::advice::Asked;

/// Most connections at once; further ones wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 256;

/// Most of them from one address.
const MOST_OF_CLIENT: usize = MAX_CONNECTIONS * 3 / 4;

/// Requests of one address in a second; more wait.
const CLIENT_RATE: u32 = 2_000;

/// Shortest average interval between two accepted connections.
const ACCEPT_INTERVAL: Duration = Duration::from_micros(250);

/// Most simultaneous connections that get a refusal. Connections beyond that are closed without an
/// answer.
const MAX_REFUSED: usize = 16;

/// Time limits of a connection. The whole request of a client includes one `request_timeout`.
const SERVED: Times = Times {
    head: Duration::from_secs(5),
    connection: Duration::from_secs(60),
    end: Duration::from_secs(15),
    drain: Duration::from_secs(1),
};

/// All paths, for the answer to an unknown path.
const PATHS: [&str; 3] = ["/v1/pools/NAME/best", "/v1/pools/NAME/addresses", "/v1/own"];

/// Serves for as long as it is polled.
pub(in crate::admin) async fn serve(
    listener: Arc<TcpListener>,
    adviser: Arc<Adviser>,
    mut gate: watch::Receiver<bool>,
) {
    let routes = routes(Arc::clone(&adviser));
    let limits = ClientLimits::new(MOST_OF_CLIENT);
    limits.rate().store(CLIENT_RATE, Ordering::Relaxed);
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let refusals = Arc::new(Semaphore::new(MAX_REFUSED));
    let mut pace = AcceptPace::new(ACCEPT_INTERVAL);
    while let Ok(slot) = Arc::clone(&slots).acquire_owned().await {
        pace.pace().await;
        let (stream, id) = match http::next(&*listener, &mut gate).await {
            Ok(accepted) => accepted,
            Err(error) => {
                log::warn!("event=advice_accept_failed error={}", quoted(&error));
                tokio::time::sleep(http::REST).await;
                continue;
            }
        };
        let ClientId::Address(ip) = id else { continue };
        let refusal = if !adviser.settings().allows(ip) {
            adviser.refuse(Refused::Denied, denied())
        } else if let Some(client) = limits.connect(id) {
            let routes = routes.clone().layer(Extension(ip));
            tokio::spawn(http::connection(stream, routes, client, SERVED, slot));
            continue;
        } else {
            let message = format!("this address has {MOST_OF_CLIENT} connections already");
            adviser.refuse(Refused::Busy, CommandError::new(Problem::Unavailable, message))
        };
        // The refusal uses a slot that does not count against other clients.
        if let Ok(slot) = Arc::clone(&refusals).try_acquire_owned() {
            let client = limits.refused(id);
            let routes = refuse_all(refusal);
            tokio::spawn(http::connection(stream, routes, client, http::REFUSED, slot));
        }
    }
}

fn denied() -> CommandError {
    CommandError::new(Problem::Forbidden, "your address may not ask for advice")
        .hint("add its network to advice_allow")
}

fn refuse_all(error: CommandError) -> Router {
    Router::new().fallback(move || {
        let answer = ([(header::CONNECTION, "close")], refused(&error)).into_response();
        async move { answer }
    })
}

fn routes(adviser: Arc<Adviser>) -> Router {
    Router::new()
        .route("/v1/pools/{name}/best", routes::methods("GET, HEAD", get(best)))
        .route("/v1/pools/{name}/addresses", routes::methods("GET, HEAD", get(addresses)))
        .route("/v1/own", routes::methods("GET, HEAD", get(own)))
        .fallback(not_found)
        .with_state(adviser)
        .layer(middleware::from_fn(routes::short_body))
        .layer(middleware::from_fn(routes::all_as_json))
}

async fn not_found() -> Response {
    let message = format!("no such path; the paths are {}", PATHS.join(", "));
    refused(&CommandError::new(Problem::NotFound, message))
}

async fn best(
    State(adviser): State<Arc<Adviser>>,
    Extension(client): Extension<IpAddr>,
    Path(pool): Path<String>,
) -> Response {
    let answer = match adviser.advise(&pool, Asked::Best, client).await {
        Ok(answer) => answer,
        Err(error) => return refused(&error),
    };
    match answer.ranking.usable.first() {
        Some(best) => json(&BestAnswer {
            address: best.address.to_string(),
            score: best.score,
            valid_for_ms: super::milliseconds(answer.valid_for),
        }),
        None => {
            let message = format!("no address of pool `{pool}` is usable now");
            let error = CommandError::new(Problem::Unavailable, message);
            refused(&adviser.refuse(Refused::NoAddress, error))
        }
    }
}

async fn addresses(
    State(adviser): State<Arc<Adviser>>,
    Extension(client): Extension<IpAddr>,
    Path(pool): Path<String>,
    RawQuery(query): RawQuery,
) -> Response {
    let all = match query.as_deref() {
        None | Some("") => false,
        Some("all" | "all=" | "all=1" | "all=true") => true,
        Some(_) => {
            let message = "`?all` is the only parameter";
            return refused(&CommandError::new(Problem::Invalid, message));
        }
    };
    let answer = match adviser.advise(&pool, Asked::Addresses, client).await {
        Ok(answer) => answer,
        Err(error) => return refused(&error),
    };
    let others = if all { answer.ranking.others.as_slice() } else { &[] };
    let total = answer.ranking.usable.len() + others.len();
    let first = answer.ranking.usable.iter().chain(others).take(bounds::MOST_OF_POOL);
    let detail = adviser.settings().detail;
    let record = |one| {
        let mut record = address_record(one, &answer.records);
        if !detail {
            record.gauges.clear();
            record.workers.clear();
        }
        record
    };
    let list = AddressesAnswer {
        valid_for_ms: super::milliseconds(answer.valid_for),
        left_out: 0,
        addresses: first.map(record).collect(),
        pool: pool.clone(),
    };
    let list = bounds::list(list, total);
    adviser.note_left_out(Some(&pool), &list);
    written(list.body)
}

async fn own(State(adviser): State<Arc<Adviser>>) -> Response {
    match adviser.own().await {
        Ok(body) => written(body),
        Err(error) => refused(&error),
    }
}

/// JSON that no cache keeps.
fn json<T: Serialize>(answer: &T) -> Response {
    (StatusCode::OK, [(header::CACHE_CONTROL, "no-store")], Json(answer)).into_response()
}

/// The same, already written.
fn written(body: Vec<u8>) -> Response {
    let kind = (header::CONTENT_TYPE, "application/json");
    (StatusCode::OK, [kind, (header::CACHE_CONTROL, "no-store")], body).into_response()
}

/// The address that a listener is bound to.
pub(in crate::admin) fn bound(listener: &std::net::TcpListener) -> std::io::Result<SocketAddr> {
    listener.local_addr()
}
