//! Admin HTTP over TCP: anybody on the machine can reach it, so nothing can be changed there, and a browser cannot be
//! made to ask on behalf of a page from elsewhere.

use std::net::IpAddr;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::{Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

/// Lets only reads pass. On a loopback address `Host` must name this machine: otherwise a page from elsewhere whose name
/// suddenly resolves to 127.0.0.1 could read everything (DNS rebinding). Elsewhere any name may be a good one.
pub(super) async fn check(State(loopback): State<bool>, request: Request, next: Next) -> Response {
    let method = request.method();
    if method != Method::GET && method != Method::HEAD {
        return forbidden(
            "over TCP nothing can be changed",
            "use the admin socket: the dispatcher command, or curl --unix-socket PATH",
        );
    }
    let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
    if loopback && !host.is_some_and(names_this_machine) {
        return forbidden(
            "the Host header does not name this machine",
            "ask for http://127.0.0.1:PORT/ or http://localhost:PORT/",
        );
    }
    next.run(request).await
}

/// `localhost` or a loopback address, with or without a port.
fn names_this_machine(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(rest),
        None => host.split(':').next().unwrap_or(host),
    };
    name.eq_ignore_ascii_case("localhost")
        || name.parse().is_ok_and(|address: IpAddr| address.is_loopback())
}

fn forbidden(error: &str, hint: &str) -> Response {
    let body = serde_json::json!({ "error": error, "hint": hint });
    (StatusCode::FORBIDDEN, Json(body)).into_response()
}

#[cfg(test)]
mod tests {
    use super::names_this_machine;

    #[test]
    fn names_of_this_machine() {
        for host in ["localhost", "LOCALHOST:9900", "127.0.0.1", "127.1.2.3:9900", "[::1]:9900"] {
            assert!(names_this_machine(host), "{host}");
        }
        for host in [
            "",
            "example.com",
            "localhost.example.com",
            "10.0.0.1:9900",
            "[::2]",
            "127.0.0.1.nip.io",
        ] {
            assert!(!names_this_machine(host), "{host}");
        }
    }
}
