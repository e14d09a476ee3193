//! The directory's numbers for Prometheus, over HTTP at `metrics_listen`: those of
//! `dispatcher relay stats`, with the same names.

use std::cell::Cell;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use dispatch_protocol::relay::Count;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::{Handle, PAUSE};

/// Connections at once; more are closed.
const MAX_CONNECTIONS: usize = 16;

/// How long one connection may take.
const LIMIT: Duration = Duration::from_secs(5);

/// Most bytes of a request.
const MAX_REQUEST: usize = 8192;

/// What the numbers mean, by name.
const HELP: [(&str, &str); 25] = [
    ("ids", "Registered client ids of all hosts"),
    ("ids_in_grace", "Ids whose client has gone and may come back"),
    ("members", "Workers that are known, those of other hosts included"),
    ("hosts", "Hosts that are known, the own one included"),
    ("groups", "Groups that a member is in, sends to or watches"),
    ("memberships", "Memberships of this host, and groups that its members send to"),
    ("watches", "Ids and groups that members of this host watch"),
    ("linked_pairs", "Pairs of workers that were given a link"),
    ("lookups_waiting", "Look-ups that wait for the end of a grace"),
    ("registered_total", "Registrations"),
    ("superseded_total", "Registrations that a newer one of the same id has ended"),
    ("lookups_total", "Look-ups of ids"),
    ("lookups_found_total", "Look-ups that found a registration"),
    ("lookups_waited_total", "Look-ups that waited for a client to come back"),
    ("lookups_overdue_total", "Look-ups that waited for a whole grace"),
    ("stamps_ahead_total", "Registrations whose stamp was too far ahead of the clock"),
    ("links_total", "Links given to two workers"),
    ("not_accepted_total", "Registrations, memberships, watches and links refused at a limit"),
    ("queued_bytes", "Bytes that wait to be sent to workers"),
    ("gateway_bytes", "Bytes of messages to and from other hosts that wait"),
    ("connections_waiting", "Connections that have not said hello"),
    ("refused_total", "Connections refused"),
    ("cut_total", "Connections ended because they broke the protocol or did not read"),
    ("scrapes_total", "Requests for these metrics"),
    ("scrapes_refused_total", "Connections for metrics that were too many"),
];

/// Binds the address.
///
/// # Errors
/// The address cannot be bound.
pub(super) async fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|error| {
        io::Error::new(error.kind(), format!("metrics_listen = \"{address}\": {error}"))
    })
}

/// Serves until the program ends.
pub(super) async fn serve(state: Handle, listener: TcpListener) {
    let open = Rc::new(Cell::new(0));
    loop {
        match listener.accept().await {
            Ok(_) if open.get() >= MAX_CONNECTIONS => state.borrow_mut().scrapes_refused += 1,
            Ok((stream, _)) => {
                open.set(open.get() + 1);
                let (state, open) = (Rc::clone(&state), Rc::clone(&open));
                tokio::task::spawn_local(async move {
                    // A client that goes or is slow has no answer, and nothing else happens.
                    let _ = tokio::time::timeout(LIMIT, answer(&state, stream)).await;
                    open.set(open.get() - 1);
                });
            }
            Err(error) => {
                log::error!("event=accept_failed address=metrics_listen error=\"{error}\"");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

async fn answer(state: &Handle, mut stream: TcpStream) -> io::Result<()> {
    let mut request = Vec::new();
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        if request.len() >= MAX_REQUEST {
            return respond(&mut stream, "431 Request Header Fields Too Large", "").await;
        }
        let mut part = [0; 1024];
        let count = stream.read(&mut part).await?;
        if count == 0 {
            return Ok(());
        }
        request.extend_from_slice(&part[..count]);
    }
    let line = request.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let mut words = line.split(|byte| *byte == b' ');
    match (words.next(), words.next()) {
        (Some(b"GET"), Some(b"/metrics")) => {
            let text = {
                let mut state = state.borrow_mut();
                state.scrapes += 1;
                page(&state.counts())
            };
            respond(&mut stream, "200 OK", &text).await
        }
        (Some(b"GET"), Some(_)) => {
            respond(&mut stream, "404 Not Found", "The metrics are at /metrics.\n").await
        }
        _ => respond(&mut stream, "405 Method Not Allowed", "Only GET is served.\n").await,
    }
}

async fn respond(stream: &mut TcpStream, status: &str, body: &str) -> io::Result<()> {
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await
}

/// The text format of Prometheus.
fn page(counts: &[Count]) -> String {
    let mut text = String::new();
    for count in counts {
        let name = count.name.as_str();
        let kind = if name.ends_with("_total") { "counter" } else { "gauge" };
        let help = HELP.iter().find(|(of, _)| *of == name).map_or(name, |(_, help)| help);
        text.push_str(&format!("# HELP dispatch_relay_{name} {help}.\n"));
        text.push_str(&format!("# TYPE dispatch_relay_{name} {kind}\n"));
        text.push_str(&format!("dispatch_relay_{name} {}\n", count.value));
    }
    text
}

/// Whether a number has a help text of its own.
#[cfg(test)]
pub(super) fn has_help(name: &str) -> bool {
    HELP.iter().any(|(of, _)| *of == name)
}
