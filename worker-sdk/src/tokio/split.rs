//! A connection in two halves for two tasks.

use std::fmt;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use ::tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::Connection;

/// The reading half of a [`Connection`]; from [`Connection::into_split`].
#[derive(Debug)]
pub struct OwnedReadHalf(Arc<Connection>);

/// The writing half of a [`Connection`]; from [`Connection::into_split`].
///
/// Dropping it ends the sending direction, as with tokio's own.
#[derive(Debug)]
pub struct OwnedWriteHalf {
    connection: Arc<Connection>,
    shut_down_on_drop: bool,
}

/// The halves belong to different connections. The error contains both.
#[derive(Debug)]
pub struct ReuniteError(pub OwnedReadHalf, pub OwnedWriteHalf);

impl fmt::Display for ReuniteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("these are halves of two different connections")
    }
}

impl std::error::Error for ReuniteError {}

pub(super) fn split(connection: Connection) -> (OwnedReadHalf, OwnedWriteHalf) {
    let connection = Arc::new(connection);
    let read = OwnedReadHalf(Arc::clone(&connection));
    (read, OwnedWriteHalf { connection, shut_down_on_drop: true })
}

impl OwnedReadHalf {
    /// Joins both halves to a connection.
    ///
    /// # Errors
    /// [`ReuniteError`] if the halves belong to two connections.
    pub fn reunite(self, other: OwnedWriteHalf) -> Result<Connection, ReuniteError> {
        if !Arc::ptr_eq(&self.0, &other.connection) {
            return Err(ReuniteError(self, other));
        }
        let OwnedReadHalf(connection) = self;
        other.forget();
        match Arc::try_unwrap(connection) {
            Ok(connection) => Ok(connection),
            // There are two handles, and the other one is gone.
            Err(connection) => Err(ReuniteError(
                OwnedReadHalf(Arc::clone(&connection)),
                OwnedWriteHalf { connection, shut_down_on_drop: true },
            )),
        }
    }
}

impl OwnedWriteHalf {
    /// Joins both halves to a connection; as [`OwnedReadHalf::reunite`].
    ///
    /// # Errors
    /// [`ReuniteError`] if the halves belong to two connections.
    pub fn reunite(self, other: OwnedReadHalf) -> Result<Connection, ReuniteError> {
        other.reunite(self)
    }

    /// Drops the half without ending the sending direction.
    pub fn forget(mut self) {
        self.shut_down_on_drop = false;
    }
}

impl Drop for OwnedWriteHalf {
    fn drop(&mut self) {
        // The copy of a forked child ends nothing.
        if self.shut_down_on_drop && self.connection.is_ours() {
            // It fails if the client is gone.
            let _ = self.connection.stream().shut_down_writing();
        }
    }
}

/// The connection, for its addresses, options and readiness.
impl AsRef<Connection> for OwnedReadHalf {
    fn as_ref(&self) -> &Connection {
        &self.0
    }
}

/// The connection, for its addresses, options and readiness.
impl AsRef<Connection> for OwnedWriteHalf {
    fn as_ref(&self) -> &Connection {
        &self.connection
    }
}

impl AsyncRead for OwnedReadHalf {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.0.stream().poll_read(cx, buffer)
    }
}

impl AsyncWrite for OwnedWriteHalf {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.connection.stream().poll_write(cx, buffer)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.connection.stream().poll_write_vectored(cx, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = self.connection.stream().shut_down_writing();
        if result.is_ok() {
            self.shut_down_on_drop = false;
        }
        Poll::Ready(result)
    }
}
