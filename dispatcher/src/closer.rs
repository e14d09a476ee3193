//! Ends connections where it may take long, away from the hot thread: a close that lingers (`SO_LINGER`), and a shutdown
//! of a socket of which another process may hold a copy, and with it the socket's lock.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, Sender, SyncSender, TrySendError, channel, sync_channel};
use std::time::Duration;

use rustix::net::{RecvFlags, SendFlags, Shutdown};

/// Most connections waiting to be closed.
const MAX_WAITING: usize = 1024;

/// A connection that is to end.
#[derive(Debug)]
pub struct Closing {
    fd: OwnedFd,
    /// Ends it for whoever has a copy, too; with these last words.
    shut_down: Option<Vec<u8>>,
}

impl Closing {
    /// Our copy is to be closed.
    pub fn copy(fd: OwnedFd) -> Closing {
        Closing { fd, shut_down: None }
    }

    /// The connection is to be shut down, after these last words, and closed: its client notices at once, whoever else has
    /// a copy.
    pub fn whole(fd: OwnedFd, last_words: Option<&[u8]>) -> Closing {
        Closing { fd, shut_down: Some(last_words.unwrap_or_default().to_owned()) }
    }

    fn carry_out(self) {
        if let Some(last_words) = self.shut_down {
            if !last_words.is_empty() {
                answer(&self.fd, &last_words);
            }
            // It fails when the client is gone already.
            let _ = rustix::net::shutdown(&self.fd, Shutdown::Both);
        }
    }
}

/// Sends what fits of a prepared response, without waiting for room.
///
/// Bytes the client has already sent are discarded: closing with unread bytes resets the connection, and the reset can
/// overtake the response.
pub fn answer(fd: &OwnedFd, response: &[u8]) {
    let _ = rustix::net::send(fd, response, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
    let _ = rustix::net::shutdown(fd, Shutdown::Write);
    let mut scratch = [0; 16 * 1024];
    for _ in 0..4 {
        match rustix::net::recv(fd, &mut scratch[..], RecvFlags::DONTWAIT) {
            Ok((_, received)) if received > 0 => {}
            Ok(_) | Err(_) => break,
        }
    }
}

/// A thread that only closes. It ends when this is dropped and all is closed.
#[derive(Debug)]
pub struct Closer {
    sender: SyncSender<Closing>,
    /// Ends with the thread.
    ended: Receiver<()>,
}

impl Closer {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn start() -> io::Result<Closer> {
        let (sender, receiver) = sync_channel::<Closing>(MAX_WAITING);
        let (alive, ended): (Sender<()>, _) = channel();
        std::thread::Builder::new().name("closer".to_owned()).spawn(move || {
            let _alive = alive;
            receiver.into_iter().for_each(Closing::carry_out);
        })?;
        Ok(Closer { sender, ended })
    }

    /// Ends a connection soon. Never waits.
    ///
    /// # Errors
    /// Gives it back when 1024 are waiting already.
    pub fn close(&self, closing: Closing) -> Result<(), Closing> {
        self.sender.try_send(closing).map_err(|error| match error {
            TrySendError::Full(closing) | TrySendError::Disconnected(closing) => closing,
        })
    }

    /// Waits until all is closed, at most for this long.
    pub fn finish(self, most: Duration) {
        drop(self.sender);
        let _ = self.ended.recv_timeout(most);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn what_is_handed_over_is_closed() {
        let closer = Closer::start().expect("a thread");
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        closer.close(Closing::copy(ours.into())).expect("room");
        // Returns as soon as the other end is closed.
        assert_eq!(theirs.read(&mut [0]).expect("the end"), 0);
    }

    #[test]
    fn a_client_notices_its_end_although_a_copy_lives_on() {
        let closer = Closer::start().expect("a thread");
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        let _copy = ours.try_clone().expect("a copy");
        closer.close(Closing::whole(ours.into(), Some(b"busy"))).expect("room");
        let mut text = String::new();
        theirs.read_to_string(&mut text).expect("the end");
        assert_eq!(text, "busy");
        closer.finish(Duration::from_secs(10));
    }
}
