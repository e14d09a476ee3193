//! A listener for a worker without a dispatcher, so that the same program runs alone.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use super::error::Error;
use super::log_queue::{LogQueue, readable_path};
use crate::PeerAddr;

pub(super) enum StandaloneListener {
    Tcp(TcpListener),
    Unix { listener: UnixListener, path: PathBuf },
}

impl StandaloneListener {
    /// Binds `127.0.0.1:8080`, `[::]:8080`, `localhost:8080` or `unix:/path` in non-blocking mode.
    pub(super) fn bind(address: &str) -> Result<StandaloneListener, Error> {
        let failed = |error| Error::io(format!("listen on {address}"), error);
        let listener = match address.strip_prefix("unix:") {
            Some(path) => {
                let path = PathBuf::from(path);
                StandaloneListener::Unix {
                    listener: bind_unix(&path).map_err(failed)?,
                    path,
                }
            }
            // The standard library sets SO_REUSEADDR.
            None => StandaloneListener::Tcp(TcpListener::bind(address).map_err(|error| {
                if error.kind() == io::ErrorKind::InvalidInput {
                    let problem = format!(
                        "{address:?} is not an address; write 127.0.0.1:8080, [::]:8080 or unix:/path"
                    );
                    return Error::config("listen", problem);
                }
                failed(error)
            })?),
        };
        match &listener {
            StandaloneListener::Tcp(tcp) => tcp.set_nonblocking(true),
            StandaloneListener::Unix { listener, .. } => listener.set_nonblocking(true),
        }
        .map_err(failed)?;
        Ok(listener)
    }

    /// Accepts one connection; `None` if none is waiting.
    pub(super) fn accept(&self) -> io::Result<Option<(TcpStream, PeerAddr)>> {
        loop {
            let accepted = match self {
                StandaloneListener::Tcp(tcp) => {
                    tcp.accept().map(|(stream, peer)| (stream, peer.into()))
                }
                StandaloneListener::Unix { listener, .. } => listener
                    .accept()
                    .map(|(stream, _)| (OwnedFd::from(stream).into(), PeerAddr::Unix)),
            };
            match accepted {
                Ok(accepted) => return Ok(Some(accepted)),
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(None),
                    // The client of that connection is gone.
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {}
                    _ => return Err(error),
                },
            }
        }
    }

    pub(super) fn local_addr(&self) -> Option<PeerAddr> {
        match self {
            StandaloneListener::Tcp(tcp) => tcp.local_addr().ok().map(SocketAddr::into),
            StandaloneListener::Unix { .. } => Some(PeerAddr::Unix),
        }
    }

    /// Removes the socket file of a Unix listener. Not on drop, because a forked child drops its
    /// copy, too.
    pub(super) fn unlink(&self, log_queue: &LogQueue) {
        if let StandaloneListener::Unix { path, .. } = self
            && let Err(error) = std::fs::remove_file(path)
        {
            log_queue.push(log::Level::Debug, || {
                format!("cannot remove {}: {error}", readable_path(path))
            });
        }
    }
}

impl AsFd for StandaloneListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            StandaloneListener::Tcp(tcp) => tcp.as_fd(),
            StandaloneListener::Unix { listener, .. } => listener.as_fd(),
        }
    }
}

/// Binds a Unix listener. Replaces a socket file on which nothing listens.
fn bind_unix(path: &PathBuf) -> io::Result<UnixListener> {
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
        result => return result,
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            // A file that is not a socket also refuses; it must not be removed.
            use std::os::unix::fs::FileTypeExt;
            if std::fs::symlink_metadata(path)?.file_type().is_socket() {
                std::fs::remove_file(path)?;
            }
            UnixListener::bind(path)
        }
        _ => Err(io::ErrorKind::AddrInUse.into()),
    }
}
