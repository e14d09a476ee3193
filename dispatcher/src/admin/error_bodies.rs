//! Refusals before any route runs: malformed requests, too long heads, too slow requests. The HTTP
//! library answers some of them without a body; [`WithErrorBodies`] adds a JSON body. The library
//! closes the connection without an answer in the other cases; [`Refusal`] is then sent after the
//! library has finished.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::api::command::{CommandError, Problem};

/// The header by which an answer without a body is recognized.
const EMPTY: &str = "content-length: 0\r\n";

/// Whether the client has sent bytes since the last answer began. It is read after the HTTP library
/// has finished.
#[derive(Clone, Debug, Default)]
pub(super) struct Unanswered(Arc<AtomicBool>);

impl Unanswered {
    pub(super) fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    fn set(&self, unanswered: bool) {
        self.0.store(unanswered, Ordering::Relaxed);
    }
}

/// The answer to a request that the HTTP library dropped without an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    TooSlow,
    Malformed,
}

impl Refusal {
    /// The complete HTTP response.
    pub(super) fn as_http(self) -> Vec<u8> {
        let (status, error) = match self {
            Refusal::TooSlow => ("408 Request Timeout", "the request took too long"),
            Refusal::Malformed => ("400 Bad Request", "the request is malformed"),
        };
        let body = body_of(status, error);
        let lines = lines_of(&body);
        format!("HTTP/1.1 {status}\r\nconnection: close\r\n{lines}\r\n{body}").into_bytes()
    }
}

fn body_of(status: &str, error: &str) -> String {
    let problem = match status.get(..3) {
        Some("413" | "414" | "431") => Problem::TooLarge,
        _ => Problem::Invalid,
    };
    // A `Value` has its fields in alphabetical order.
    let body = serde_json::to_value(CommandError::new(problem, error)).unwrap_or_default();
    body.to_string()
}

fn lines_of(body: &str) -> String {
    format!("content-type: application/json\r\ncontent-length: {}\r\n", body.len())
}

/// A stream that adds bodies to refusals and changes nothing else.
pub(super) struct WithErrorBodies<S> {
    stream: S,
    unanswered: Unanswered,
    /// The part of a replaced refusal that has not been written yet.
    unsent: Vec<u8>,
}

impl<S> WithErrorBodies<S> {
    pub(super) fn new(stream: S, unanswered: Unanswered) -> WithErrorBodies<S> {
        WithErrorBodies { stream, unanswered, unsent: Vec::new() }
    }
}

/// The refusal with a body; `None` for all other output.
fn with_body(written: &[u8]) -> Option<Vec<u8>> {
    let head = std::str::from_utf8(written).ok()?;
    let status = head.strip_prefix("HTTP/1.1 ")?.split("\r\n").next()?;
    if !status.starts_with('4') || !head.ends_with("\r\n\r\n") || !head.contains(EMPTY) {
        return None;
    }
    let reason = status.get(4..).unwrap_or("refused");
    let error = format!("the request is malformed: {reason}");
    let body = body_of(status, &error);
    let lines = lines_of(&body);
    Some((head.replacen(EMPTY, &lines, 1) + &body).into_bytes())
}

impl<S: AsyncWrite + Unpin> WithErrorBodies<S> {
    fn poll_unsent(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.unsent.is_empty() {
            let sent = ready!(Pin::new(&mut self.stream).poll_write(context, &self.unsent))?;
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.unsent.drain(..sent);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for WithErrorBodies<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        if buffer.filled().len() > before {
            self.unanswered.set(true);
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for WithErrorBodies<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_unsent(context))?;
        self.unanswered.set(false);
        match with_body(buffer) {
            None => Pin::new(&mut self.stream).poll_write(context, buffer),
            Some(answer) => {
                self.unsent = answer;
                // The next flush sends the rest.
                match self.poll_unsent(context) {
                    Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
                    Poll::Ready(Ok(())) | Poll::Pending => Poll::Ready(Ok(buffer.len())),
                }
            }
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_unsent(context))?;
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_unsent(context))?;
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
