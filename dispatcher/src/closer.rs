//! Closes descriptors whose close may take long (`SO_LINGER`), away from the hot thread.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};

/// Most descriptors waiting to be closed.
const MAX_WAITING: usize = 1024;

/// A thread that only closes. It ends when this is dropped and all is closed; nobody waits for that.
#[derive(Debug)]
pub struct Closer {
    sender: SyncSender<OwnedFd>,
}

impl Closer {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn start() -> io::Result<Closer> {
        let (sender, receiver) = sync_channel::<OwnedFd>(MAX_WAITING);
        std::thread::Builder::new()
            .name("closer".to_owned())
            .spawn(move || receiver.into_iter().for_each(drop))?;
        Ok(Closer { sender })
    }

    /// Closes `fd` soon. Never waits.
    ///
    /// # Errors
    /// Gives `fd` back when 1024 are waiting already.
    pub fn close(&self, fd: OwnedFd) -> Result<(), OwnedFd> {
        self.sender.try_send(fd).map_err(|error| match error {
            TrySendError::Full(fd) | TrySendError::Disconnected(fd) => fd,
        })
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
        closer.close(ours.into()).expect("room");
        // Returns as soon as the other end is closed.
        assert_eq!(theirs.read(&mut [0]).expect("the end"), 0);
    }
}
