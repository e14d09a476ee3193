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
use crate::numbers::NUMBERS;

/// Connections at once; more are closed.
const MAX_CONNECTIONS: usize = 16;

/// How long one connection may take.
const LIMIT: Duration = Duration::from_secs(5);

/// Most bytes of a request.
const MAX_REQUEST: usize = 8192;

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
        let help = NUMBERS.iter().find(|(of, _)| *of == name).map_or(name, |(_, help)| help);
        text.push_str(&format!("# HELP dispatch_relay_{name} {help}.\n"));
        text.push_str(&format!("# TYPE dispatch_relay_{name} {kind}\n"));
        text.push_str(&format!("dispatch_relay_{name} {}\n", count.value));
    }
    text
}

/// Whether a number has a help text of its own.
#[cfg(test)]
pub(super) fn has_help(name: &str) -> bool {
    NUMBERS.iter().any(|(of, _)| *of == name)
}
