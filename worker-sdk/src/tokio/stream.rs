//! The socket of a connection. It is registered with the runtime only when an operation has to
//! wait.
//!
//! A runtime learns of readiness only after registration and the next poll. A new connection is
//! writable immediately, and often its first bytes are there. So every operation is tried first,
//! and a connection that never waits is never registered.

use std::io::{self, IoSlice, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll, ready};

use ::tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};
use ::tokio::io::{Interest, ReadBuf, Ready};
use ::tokio::runtime::Handle;
use ::tokio::task::coop;

use crate::sys;

/// A socket in non-blocking mode. All operations need only a shared reference, so that it can be
/// split.
pub(super) struct Stream {
    // Declared first, so dropped first: it is deregistered before the socket is closed.
    registered: OnceLock<AsyncFd<Arc<TcpStream>>>,
    /// Held during the registration, because a socket can be registered only once.
    registering: Mutex<()>,
    /// The runtime for the registration, independent of the calling thread.
    runtime: Handle,
    tcp: Arc<TcpStream>,
}

/// The result of one system call, and whether it exhausted the data or the room.
type Did<T> = io::Result<(T, bool)>;

/// [`AsyncFd::poll_read_ready`] or [`AsyncFd::poll_write_ready`].
type PollReady = for<'a> fn(
    &'a AsyncFd<Arc<TcpStream>>,
    &mut Context<'_>,
) -> Poll<io::Result<AsyncFdReadyGuard<'a, Arc<TcpStream>>>>;

impl Stream {
    pub(super) fn new(tcp: TcpStream, runtime: Handle) -> Stream {
        Stream {
            registered: OnceLock::new(),
            registering: Mutex::new(()),
            runtime,
            tcp: Arc::new(tcp),
        }
    }

    pub(super) fn tcp(&self) -> &TcpStream {
        &self.tcp
    }

    pub(super) fn runtime(&self) -> &Handle {
        &self.runtime
    }

    /// The registered socket; registers it if necessary.
    fn registered(&self) -> io::Result<&AsyncFd<Arc<TcpStream>>> {
        if let Some(registered) = self.registered.get() {
            return Ok(registered);
        }
        let _lock = self.registering.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(registered) = self.registered.get() {
            return Ok(registered);
        }
        // The calling thread may belong to no runtime, or to another.
        let _entered = self.runtime.enter();
        let registered = sys::register(Arc::clone(&self.tcp))?;
        Ok(self.registered.get_or_init(|| registered))
    }

    /// Tries `call`; if it would block, waits with `ready` and tries again.
    fn poll<T>(
        &self,
        cx: &mut Context<'_>,
        ready: PollReady,
        mut call: impl FnMut(&TcpStream) -> Did<T>,
    ) -> Poll<io::Result<T>> {
        if self.registered.get().is_none() {
            // Uses the task's budget, as a wait does.
            let turn = ready!(coop::poll_proceed(cx));
            match call(&self.tcp) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                did => {
                    turn.made_progress();
                    return Poll::Ready(did.map(|(value, _)| value));
                }
            }
        }
        let registered = self.registered()?;
        loop {
            let mut guard = ready!(ready(registered, cx))?;
            match guard.try_io(|_| call(&self.tcp)) {
                Ok(did) => {
                    let (value, exhausted) = did?;
                    // The kernel reports the next change; another attempt now would be a wasted
                    // system call.
                    if exhausted {
                        guard.clear_ready();
                    }
                    return Poll::Ready(Ok(value));
                }
                Err(_would_block) => {}
            }
        }
    }

    pub(super) fn poll_read(
        &self,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.poll(cx, AsyncFd::poll_read_ready, |tcp| {
            let room = buffer.remaining();
            let count = sys::receive_into(tcp.as_fd(), buffer)?;
            Ok(((), 0 < count && count < room))
        })
    }

    pub(super) fn poll_peek(
        &self,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        // The data stays, so the socket stays ready.
        self.poll(cx, AsyncFd::poll_read_ready, |tcp| Ok((tcp.peek(buffer)?, false)))
    }

    pub(super) fn poll_write(&self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll(cx, AsyncFd::poll_write_ready, |mut tcp| {
            let count = tcp.write(bytes)?;
            Ok((count, 0 < count && count < bytes.len()))
        })
    }

    pub(super) fn poll_write_vectored(
        &self,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll(cx, AsyncFd::poll_write_ready, |mut tcp| {
            let len: usize = slices.iter().map(|slice| slice.len()).sum();
            let count = tcp.write_vectored(slices)?;
            Ok((count, 0 < count && count < len))
        })
    }

    /// Ends the sending direction. A client that is gone is not an error, as with tokio's own
    /// stream.
    pub(super) fn shut_down_writing(&self) -> io::Result<()> {
        match self.tcp.shutdown(Shutdown::Write) {
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
            result => result,
        }
    }

    pub(super) async fn ready(&self, interest: Interest) -> io::Result<Ready> {
        Ok(self.registered()?.ready(interest).await?.ready())
    }

    /// One system call now. If it would block, readiness is cleared, so that a wait works.
    pub(super) fn try_io<T>(
        &self,
        interest: Interest,
        call: impl FnOnce(&TcpStream) -> io::Result<T>,
    ) -> io::Result<T> {
        match self.registered.get() {
            Some(registered) => registered.try_io(interest, |tcp| call(tcp)),
            None => call(&self.tcp),
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.tcp.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;

    use std::pin::Pin;

    use ::tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

    use super::*;

    fn pair() -> (Stream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        server.set_nonblocking(true).unwrap();
        (Stream::new(server, Handle::current()), client)
    }

    impl AsyncRead for Stream {
        fn poll_read(
            self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buffer: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            Stream::poll_read(&self, cx, buffer)
        }
    }

    impl AsyncWrite for Stream {
        fn poll_write(
            self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            Stream::poll_write(&self, cx, bytes)
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(self.shut_down_writing())
        }
    }

    #[tokio::test]
    async fn what_never_waits_is_never_registered() {
        let (mut server, mut client) = pair();
        client.write_all(b"question").unwrap();
        let mut question = [0; 8];
        // On loopback the bytes are there when the write returns.
        server.read_exact(&mut question).await.unwrap();
        assert_eq!(&question, b"question");
        server.write_all(b"answer").await.unwrap();
        server.shutdown().await.unwrap();
        assert!(server.registered.get().is_none());
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "answer");
    }

    #[tokio::test]
    async fn what_is_not_there_yet_is_waited_for() {
        let (mut server, mut client) = pair();
        let asking = tokio::spawn(async move {
            let mut text = String::new();
            server.read_to_string(&mut text).await.unwrap();
            assert!(server.registered.get().is_some());
            text
        });
        // The task runs now, finds nothing and waits.
        tokio::task::yield_now().await;
        // In pieces: after a partial read the rest must wake the task, too.
        for piece in ["one ", "two ", "three"] {
            client.write_all(piece.as_bytes()).unwrap();
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        drop(client);
        assert_eq!(asking.await.unwrap(), "one two three");
    }

    #[tokio::test]
    async fn a_full_socket_takes_the_rest_when_there_is_room() {
        let (mut server, mut client) = pair();
        let bytes: Vec<u8> = (0..16_000_000_u32).map(|n| n as u8).collect();
        let expected = bytes.clone();
        let writing = tokio::spawn(async move {
            server.write_all(&bytes).await.unwrap();
            server.registered.get().is_some()
        });
        let reading = tokio::task::spawn_blocking(move || {
            let mut all = Vec::new();
            client.read_to_end(&mut all).unwrap();
            all
        });
        assert!(writing.await.unwrap(), "more than any socket holds");
        assert!(reading.await.unwrap() == expected);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn who_never_waits_lets_others_run() {
        let (mut server, mut client) = pair();
        let draining = std::thread::spawn(move || io::copy(&mut client, &mut io::sink()));
        let busy = tokio::spawn(async move { while server.write_all(b"x").await.is_ok() {} });
        // The yields do not return while the other task keeps the only thread.
        for _ in 0..3 {
            tokio::task::yield_now().await;
        }
        busy.abort();
        assert!(busy.await.unwrap_err().is_cancelled());
        draining.join().unwrap().unwrap();
    }
}
