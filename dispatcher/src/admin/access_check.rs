//! Access check of HTTP requests. Over TCP every user of the machine can connect, so TCP allows
//! only reads. On both sockets, web pages in a browser are kept out: a browser can reach the Unix
//! socket through a tunnel, which every page in that browser can use.

use std::net::IpAddr;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::{Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::api::command::{CommandError, Problem};
use crate::mailbox::hosts::{Hosts, name_of};

/// Over TCP: allows only reads, and only with a `Host` that names this machine. This prevents DNS
/// rebinding, in which the name of a foreign page resolves to an address of this machine. Browsers
/// always send `Host`; health checks may omit it.
pub(super) async fn read_only(
    State(hosts): State<Hosts>,
    request: Request,
    next: Next,
) -> Response {
    let method = request.method();
    if method != Method::GET && method != Method::HEAD {
        return forbidden(
            "TCP is read-only",
            "use the admin socket: the dispatcher command, or curl --unix-socket PATH",
        );
    }
    let headers = request.headers().get_all(header::HOST).into_iter();
    let mut named =
        headers.map(|host| host.to_str().unwrap_or_default()).chain(request.uri().host());
    if !named.all(|host| hosts.allow(host)) {
        return strange_host(
            "use an IP address, localhost or the host name, or add the name to admin_http_hosts",
        );
    }
    next.run(request).await
}

/// On the admin socket: rejects changes by web pages, and all requests with a foreign host name.
///
/// Browsers send `Origin` or `Sec-Fetch-Site` with every request that is not a plain read, and a
/// page cannot suppress these headers; commands and scripts do not send them. Names that scripts
/// use for a socket (`http://d/`) have no dot. A name that a page can register and point to this
/// machine has one. An address cannot resolve to another address.
pub(super) async fn no_web_pages(request: Request, next: Next) -> Response {
    let (method, headers) = (request.method(), request.headers());
    let reads = method == Method::GET || method == Method::HEAD;
    if !reads && BY_A_BROWSER.iter().any(|name| headers.contains_key(*name)) {
        return forbidden(
            "changes from a browser are refused: any web page could send them",
            "use the dispatcher command, or curl --unix-socket PATH",
        );
    }
    // A header that is not text counts as a foreign name.
    let host = headers.get(header::HOST).map(|host| host.to_str().unwrap_or("no.text"));
    if host.is_some_and(|host| !names_this_machine(host) && is_name_of_others(host)) {
        return strange_host("use http://127.0.0.1:PORT/ or http://localhost:PORT/");
    }
    next.run(request).await
}

/// Headers that only browsers send, with every request that is not a plain read.
const BY_A_BROWSER: [&str; 2] = ["origin", "sec-fetch-site"];

fn strange_host(hint: &str) -> Response {
    forbidden("the Host header does not name this machine", hint)
}

/// Whether the host is a name that others can register: not an address, and not a word without a
/// dot.
fn is_name_of_others(host: &str) -> bool {
    let name = name_of(host);
    name.trim_end_matches('.').contains('.') && name.parse::<IpAddr>().is_err()
}

/// `localhost` or a loopback address, with or without a port.
fn names_this_machine(host: &str) -> bool {
    let name = name_of(host);
    name.eq_ignore_ascii_case("localhost")
        || name.parse().is_ok_and(|address: IpAddr| address.is_loopback())
}

fn forbidden(error: &str, hint: &str) -> Response {
    let error = CommandError::new(Problem::Forbidden, error).hint(hint);
    (StatusCode::FORBIDDEN, Json(error)).into_response()
}

#[cfg(test)]
mod tests {
    use super::{Hosts, is_name_of_others, names_this_machine};
    use crate::mailbox::hosts::is_own_name;

    #[test]
    fn accepted_host_names() {
        let hosts = Hosts::default();
        hosts.set(vec!["status.example.org".to_owned()]);
        for host in [
            "localhost",
            "localhost.:9900",
            "127.0.0.1:9900",
            "10.0.0.7",
            "[2001:db8::1]:9900",
            "status.example.org",
            "Status.Example.ORG:9900",
        ] {
            assert!(hosts.allow(host), "{host}");
        }
        for host in
            ["", ":80", ".", "example.org", "evil.status.example.org", "127.0.0.1.nip.io", "::1"]
        {
            assert!(!hosts.allow(host), "{host}");
        }
        for (name, own) in [
            ("web1", "web1"),
            ("WEB1", "web1.example.org"),
            ("web1.example.org", "web1.example.org"),
        ] {
            assert!(is_own_name(name, own), "{name}");
        }
        for (name, own) in [("web2", "web1"), ("web1.example.org", "web1"), ("", ""), ("", "web1")]
        {
            assert!(!is_own_name(name, own), "{name}");
        }
    }

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

    #[test]
    fn names_that_others_can_register() {
        for host in ["evil.example:9900", "EVIL.example", "127.0.0.1.nip.io", "a.b.", "."] {
            assert_eq!(is_name_of_others(host), host != ".", "{host}");
        }
        for host in ["d", "dispatcher", "x:80", "10.0.0.1:9900", "[2001:db8::1]:80", "localhost."] {
            assert!(!is_name_of_others(host), "{host}");
        }
    }
}
