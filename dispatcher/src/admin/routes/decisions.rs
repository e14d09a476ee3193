//! `/v1/pools/NAME/history` and `/v1/pools/NAME/explain`: past and next decisions with their
//! reasons.

use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use axum::Router;
use axum::extract::{Path, RawQuery, State};
use axum::response::Response;
use axum::routing::get;
use dispatch_protocol::ClientAddr;

use super::{App, PATIENCE, methods, outcome, refused};
use crate::api::command::{CommandError, Problem};
use crate::mailbox::Request;

pub(super) fn routes() -> Router<App> {
    Router::new()
        .route("/v1/pools/{name}/history", methods("GET, HEAD", get(history)))
        .route("/v1/pools/{name}/explain", methods("GET, HEAD", get(explain)))
}

async fn history(
    State(app): State<App>,
    Path(pool): Path<String>,
    RawQuery(query): RawQuery,
) -> Response {
    let after = match parameter(query.as_deref(), "after", "the number of a decision") {
        Ok(after) => after.unwrap_or(0),
        Err(why) => return refused(&why),
    };
    let name = pool.clone();
    let ask = move |answer| Request::History { pool, after, answer };
    let answer = app.mailbox.ask_for(ask, PATIENCE).await;
    outcome(answer.map(|past| past.map(|past| past.write(name))))
}

async fn explain(
    State(app): State<App>,
    Path(pool): Path<String>,
    RawQuery(query): RawQuery,
) -> Response {
    let from = parameter::<IpAddr>(query.as_deref(), "from", "the client's IP address");
    let peer = match from {
        // The port of a future client is unknown; no decision depends on it.
        Ok(Some(ip)) => ClientAddr::from(SocketAddr::new(ip, 0)),
        Ok(None) => ClientAddr::Unix,
        Err(why) => return refused(&why),
    };
    let name = pool.clone();
    let ask = move |answer| Request::Explain { pool, peer, answer };
    let answer = app.mailbox.ask_for(ask, PATIENCE).await;
    outcome(answer.map(|next| next.map(|next| next.write(name))))
}

/// The value of the route's only parameter, if it is set.
fn parameter<T: FromStr>(
    query: Option<&str>,
    name: &str,
    what: &str,
) -> Result<Option<T>, CommandError> {
    let Some(query) = query.filter(|query| !query.is_empty()) else { return Ok(None) };
    // In an address or a number, only the colon can be percent-encoded.
    let value = query.strip_prefix(name).and_then(|rest| rest.strip_prefix('='));
    let value = value.map(|value| value.replace("%3A", ":").replace("%3a", ":"));
    match value.and_then(|value| value.parse().ok()) {
        Some(value) => Ok(Some(value)),
        None => {
            let message = format!("`?{name}=` is all that can be asked for: {what}");
            Err(CommandError::new(Problem::Invalid, message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_parameter() {
        let ip = |query| parameter::<IpAddr>(query, "from", "an address").map_err(|_| ());
        assert_eq!(ip(None), Ok(None));
        assert_eq!(ip(Some("")), Ok(None));
        assert_eq!(ip(Some("from=192.0.2.7")), Ok("192.0.2.7".parse().ok()));
        assert_eq!(ip(Some("from=2001%3adb8::1")), Ok("2001:db8::1".parse().ok()));
        for bad in ["from", "from=", "from=here", "fromm=192.0.2.7", "from=192.0.2.7&a=b"] {
            assert_eq!(ip(Some(bad)), Err(()), "{bad}");
        }
    }
}
