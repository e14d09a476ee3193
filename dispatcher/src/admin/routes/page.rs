//! `/`, the status page: one HTML file that requests `/v1/status` like other clients.

use std::fmt::Write as _;

use axum::Router;
use axum::http::{HeaderName, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use rustix::rand::{GetRandomFlags, getrandom};

use super::{App, methods, refused};
use crate::api::command::{CommandError, Problem};

const PAGE: &str = include_str!("page.html");

/// The place of the nonce in the page.
const PLACEHOLDER: &str = "nonce=\"NONCE\"";

pub(super) fn routes() -> Router<App> {
    Router::new().route("/", methods("GET, HEAD", get(page)))
}

/// The nonce, new for each answer, allows only the script and style of the page itself. Markup in a
/// worker's name could not run a script.
async fn page() -> Response {
    let Some(nonce) = nonce() else {
        let why = "the system has no random numbers yet";
        return refused(&CommandError::new(Problem::Unavailable, why));
    };
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; \
         img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    let headers: [(HeaderName, &str); 4] = [
        (header::CONTENT_SECURITY_POLICY, &policy),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-store"),
    ];
    let text = PAGE.replace(PLACEHOLDER, &format!("nonce=\"{nonce}\""));
    (headers, Html(text)).into_response()
}

fn nonce() -> Option<String> {
    let mut bytes = [0u8; 16];
    let count = getrandom(&mut bytes, GetRandomFlags::NONBLOCK).ok()?;
    if count != bytes.len() {
        return None;
    }
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    Some(text)
}
