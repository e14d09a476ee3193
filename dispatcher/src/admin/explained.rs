//! The refusals that the HTTP library writes by itself, before any route is asked: for what is no request, a head that is too
//! long. They have no body; here they get one, like every other answer that is no success.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What an empty refusal says of itself.
const EMPTY: &str = "content-length: 0\r\n";

/// A connection, of which only that is changed.
pub(super) struct Explained<S> {
    stream: S,
    /// What was written in place of a refusal and has not left yet.
    unsent: Vec<u8>,
}

impl<S> Explained<S> {
    pub(super) fn new(stream: S) -> Explained<S> {
        Explained { stream, unsent: Vec::new() }
    }
}

/// The refusal with a body; `None` for anything else.
fn explained(written: &[u8]) -> Option<Vec<u8>> {
    let head = std::str::from_utf8(written).ok()?;
    let status = head.strip_prefix("HTTP/1.1 4")?.split("\r\n").next()?;
    if !head.ends_with("\r\n\r\n") || !head.contains(EMPTY) {
        return None;
    }
    let reason = status.get(3..).unwrap_or("refused");
    let error = format!("this is no request that can be answered: {reason}");
    let body = serde_json::json!({ "problem": "invalid", "error": error }).to_string();
    let lines = format!("content-type: application/json\r\ncontent-length: {}\r\n", body.len());
    Some((head.replacen(EMPTY, &lines, 1) + &body).into_bytes())
}

impl<S: AsyncWrite + Unpin> Explained<S> {
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

impl<S: AsyncRead + Unpin> AsyncRead for Explained<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Explained<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_unsent(context))?;
        match explained(buffer) {
            None => Pin::new(&mut self.stream).poll_write(context, buffer),
            Some(answer) => {
                self.unsent = answer;
                // What does not leave now leaves with the flush that follows.
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
