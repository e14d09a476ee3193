//! The client of the admin socket: one request, one answer, one deadline.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;

use crate::api::command::CommandError;

/// Longest wait of a command for its whole answer.
pub const TIMEOUT: Duration = Duration::from_secs(5);

/// Longest answer: a status of several hundred thousand workers.
const MAX_ANSWER: usize = 64 * 1024 * 1024;

/// The reason why there is no answer, by what the user can do about it.
#[derive(Debug)]
pub enum ClientError {
    /// No process listens there: start the dispatcher, or use another path.
    NotRunning(PathBuf, io::Error),
    /// This user may not connect to the socket.
    Permission(PathBuf),
    /// The dispatcher did not answer in time: try again.
    Timeout(PathBuf),
    /// The dispatcher is too busy to answer: try again.
    Busy(String),
    /// The dispatcher refused the command.
    Rejected(CommandError),
    /// The answer does not come from a dispatcher of this version.
    Unexpected(String),
    /// A system call failed.
    System(io::Error),
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ClientError::NotRunning(path, error) => {
                write!(f, "no process listens on {}: {error}", path.display())
            }
            ClientError::Permission(path) => {
                write!(f, "{}: permission denied", path.display())
            }
            ClientError::Timeout(path) => {
                write!(f, "the dispatcher at {} did not answer in time", path.display())
            }
            ClientError::Busy(message) => f.write_str(message),
            ClientError::Rejected(error) => error.fmt(f),
            ClientError::Unexpected(what) => write!(f, "unexpected answer: {what}"),
            ClientError::System(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for ClientError {}

/// Sends `GET target` to the socket at `path`; the answer is the body of a 200 response.
///
/// # Errors
/// See [`ClientError`].
pub fn get(path: &Path, target: &str, timeout: Duration) -> Result<Vec<u8>, ClientError> {
    run(path, hyper::Method::GET, target, Bytes::new(), timeout)
}

/// Sends `POST target` with a JSON body; the answer is the body of a 200 response.
///
/// # Errors
/// See [`ClientError`].
pub fn post(
    path: &Path,
    target: &str,
    body: &impl Serialize,
    timeout: Duration,
) -> Result<Vec<u8>, ClientError> {
    let body = serde_json::to_vec(body).map_err(|error| ClientError::System(error.into()))?;
    run(path, hyper::Method::POST, target, Bytes::from(body), timeout)
}

fn run(
    path: &Path,
    method: hyper::Method,
    target: &str,
    body: Bytes,
    timeout: Duration,
) -> Result<Vec<u8>, ClientError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(ClientError::System)?;
    runtime.block_on(async {
        tokio::time::timeout(timeout, exchange(path, method, target, body))
            .await
            .unwrap_or_else(|_| Err(ClientError::Timeout(path.to_owned())))
    })
}

async fn exchange(
    path: &Path,
    method: hyper::Method,
    target: &str,
    body: Bytes,
) -> Result<Vec<u8>, ClientError> {
    let stream = UnixStream::connect(path).await.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound
        | io::ErrorKind::ConnectionRefused
        | io::ErrorKind::NotADirectory => ClientError::NotRunning(path.to_owned(), error),
        io::ErrorKind::PermissionDenied => ClientError::Permission(path.to_owned()),
        // The queue of a listening Unix socket is full.
        io::ErrorKind::WouldBlock => ClientError::Timeout(path.to_owned()),
        _ => ClientError::System(error),
    })?;
    let unexpected = |error: hyper::Error| ClientError::Unexpected(error.to_string());
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(unexpected)?;
    // The task ends with the runtime at the latest. `send_request` returns its errors as well.
    tokio::spawn(connection);
    let request = hyper::Request::builder()
        .method(method)
        .uri(target)
        .header(hyper::header::HOST, "dispatcher")
        .header(hyper::header::CONNECTION, "close")
        .header(hyper::header::CONTENT_TYPE, "application/json")
        .body(Full::new(body))
        .map_err(|error| ClientError::Unexpected(error.to_string()))?;
    let response = sender.send_request(request).await.map_err(unexpected)?;
    let status = response.status();
    let body = Limited::new(response.into_body(), MAX_ANSWER)
        .collect()
        .await
        .map_err(|error| ClientError::Unexpected(error.to_string()))?
        .to_bytes();
    if status == hyper::StatusCode::OK {
        return Ok(body.to_vec());
    }
    let busy = status == hyper::StatusCode::SERVICE_UNAVAILABLE;
    if let Ok(error) = serde_json::from_slice::<CommandError>(&body)
        && !busy
    {
        return Err(ClientError::Rejected(error));
    }
    let message = serde_json::from_slice::<ErrorText>(&body)
        .map_or_else(|_| status.to_string(), |answer| answer.error);
    if busy {
        Err(ClientError::Busy(message))
    } else {
        Err(ClientError::Unexpected(format!("{status}: {message}")))
    }
}

/// The field of an error answer that every version of the dispatcher sends.
#[derive(Deserialize)]
struct ErrorText {
    error: String,
}
