//! A connection in two halves, each of which can go to a task of its own.

use std::fmt;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use ::tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::Connection;

/// The half of a [`Connection`] that is read; from [`Connection::into_split`].
#[derive(Debug)]
pub struct OwnedReadHalf(Arc<Connection>);

/// The half of a [`Connection`] that is written; from [`Connection::into_split`].
///
/// Dropping it tells the client that there is no more to read, as with tokio's own.
#[derive(Debug)]
pub struct OwnedWriteHalf {
    connection: Arc<Connection>,
    shut_down_on_drop: bool,
}

/// The halves are not of the same connection; here they are again.
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
    /// The connection again, from both its halves.
    ///
    /// # Errors
    /// [`ReuniteError`] when the halves are of two connections.
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
    /// The connection again; as [`OwnedReadHalf::reunite`].
    ///
    /// # Errors
    /// [`ReuniteError`] when the halves are of two connections.
    pub fn reunite(self, other: OwnedReadHalf) -> Result<Connection, ReuniteError> {
        other.reunite(self)
    }

    /// Drops the half and leaves the direction open.
    pub fn forget(mut self) {
        self.shut_down_on_drop = false;
    }
}

impl Drop for OwnedWriteHalf {
    fn drop(&mut self) {
        // A forked child's copy ends nothing.
        if self.shut_down_on_drop && self.connection.is_ours() {
            // It fails when the client is gone already.
            let _ = self.connection.stream().shut_down_writing();
        }
    }
}

/// The connection, for its addresses, options and waits.
impl AsRef<Connection> for OwnedReadHalf {
    fn as_ref(&self) -> &Connection {
        &self.0
    }
}

/// The connection, for its addresses, options and waits.
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
