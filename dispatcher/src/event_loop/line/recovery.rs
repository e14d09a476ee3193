//! Finds out what became of connections that were in the socket of a worker when it left.
//!
//! The kernel destroys what is in the socket, and nothing tells the dispatcher how much the worker
//! had read at the end. So each connection is looked at: if no program has read or written a byte
//! of it, and the worker cannot have it any more, it can be given to another worker.

use std::collections::{HashMap, HashSet};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use super::Unread;
use crate::sys;
use dispatcher_core::{ConnId, Recovery};

/// `TCP_ESTABLISHED` and `TCP_CLOSE_WAIT`.
const ESTABLISHED: u8 = 1;
const CLOSE_WAIT: u8 = 8;

/// Most workers whose unread connections are looked at at the same time; those of further ones are
/// closed.
const RECOVERIES: usize = 128;

/// The threads that look at unread connections, by the user of the worker. Such a thread waits for
/// as long as a process of that user holds the lock of a socket.
///
/// A user has at most as many of them as are free for others, so none can take them all: alone it
/// gets half of them, of two each gets a third.
#[derive(Debug, Default)]
pub(super) struct Recoveries {
    /// Each thread has a copy.
    users: HashMap<u32, Arc<()>>,
}

impl Recoveries {
    /// Counts one more thread of this user while the result exists; `None` if it has too many.
    pub(super) fn begin(&mut self, uid: u32) -> Option<Arc<()>> {
        let running = |user: &Arc<()>| Arc::strong_count(user) - 1;
        self.users.retain(|_, user| running(user) > 0);
        let free = RECOVERIES.saturating_sub(self.users.values().map(running).sum());
        let own = self.users.get(&uid).map_or(0, running);
        (own < free).then(|| Arc::clone(self.users.entry(uid).or_default()))
    }
}

/// Looks at all connections of a worker that has left.
pub(super) fn recover(unread: Unread) -> Vec<(ConnId, Recovery)> {
    let Unread { pid, died, closed, connections, .. } = unread;
    // A worker that lives may have read some of them.
    let held = if died { Some(HashSet::new()) } else { sockets_of(pid) };
    let look = |(id, fd, read): (ConnId, Option<std::os::fd::OwnedFd>, u64)| {
        let recovery = match &fd {
            Some(fd) => recovery(fd, read, closed, held.as_ref()),
            None => Recovery::Unknown,
        };
        (id, recovery)
    };
    connections.into_iter().map(look).collect()
}

fn recovery(
    fd: impl AsFd + Copy,
    read: u64,
    closed: bool,
    held: Option<&HashSet<u64>>,
) -> Recovery {
    if held.is_some_and(|held| inode(fd).is_none_or(|inode| held.contains(&inode))) {
        return Recovery::Read;
    }
    match is_untouched(fd, read) {
        Some(false) => Recovery::Read,
        // What is still in a socket that is open can be read later: a process that has died may
        // have left the socket to another one.
        Some(true) if closed && held.is_some() => Recovery::Untouched,
        Some(true) | None => Recovery::Unknown,
    }
}

/// Whether no program has read or written a byte, except the `read` ones that the dispatcher has
/// read. `None` for other sockets than TCP.
fn is_untouched(fd: impl AsFd + Copy, read: u64) -> Option<bool> {
    let info = sys::tcp_use(fd).ok()?;
    let waiting = rustix::io::ioctl_fionread(fd).ok()?;
    // The end of the stream counts as one more.
    let end = u64::from(info.state == CLOSE_WAIT);
    let taken = info.received.saturating_sub(waiting);
    let fresh = taken == read || taken == read + end;
    Some(fresh && info.sent == 0 && matches!(info.state, ESTABLISHED | CLOSE_WAIT))
}

fn inode(fd: impl AsFd) -> Option<u64> {
    Some(rustix::fs::fstat(fd).ok()?.st_ino)
}

/// The inodes of all sockets of a process; `None` if they cannot be seen.
fn sockets_of(pid: i32) -> Option<HashSet<u64>> {
    let mut sockets = HashSet::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).ok()? {
        // A descriptor that was closed meanwhile is none of the unread ones.
        let Ok(entry) = entry else { continue };
        match std::fs::metadata(entry.path()) {
            Ok(about) => _ = sockets.insert(about.ino()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(_) => return None,
        }
    }
    Some(sockets)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::io::{Read, Write};
    use std::net::{Shutdown, TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;
    use std::time::{Duration, Instant};

    use super::*;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (client, listener.accept().unwrap().0)
    }

    /// Waits until so many bytes, or the end, have arrived.
    fn arrived(server: &TcpStream, received: u64) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while sys::tcp_use(server).unwrap().received < received {
            assert!(Instant::now() < deadline, "{:?}", sys::tcp_use(server));
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_byte_read_or_written_shows() {
        let (mut client, mut server) = pair();
        assert_eq!(is_untouched(&server, 0), Some(true));
        client.write_all(b"hello").unwrap();
        arrived(&server, 5);
        assert_eq!(is_untouched(&server, 0), Some(true), "nothing was read");
        let mut two = [0; 2];
        server.peek(&mut two).unwrap();
        assert_eq!(is_untouched(&server, 0), Some(true));
        server.read_exact(&mut two).unwrap();
        assert_eq!(is_untouched(&server, 0), Some(false));
        assert_eq!(is_untouched(&server, 2), Some(true), "the dispatcher has read a header");
        client.shutdown(Shutdown::Write).unwrap();
        arrived(&server, 6);
        assert_eq!(is_untouched(&server, 2), Some(true), "the end of the stream");
        server.write_all(b"x").unwrap();
        assert_eq!(is_untouched(&server, 2), Some(false));

        let (client, server) = pair();
        client.shutdown(Shutdown::Write).unwrap();
        arrived(&server, 1);
        assert_eq!(is_untouched(&server, 0), Some(true), "an end without data");
        server.shutdown(Shutdown::Write).unwrap();
        assert_eq!(is_untouched(&server, 0), Some(false), "a worker has ended it");
        assert_eq!(is_untouched(&UnixStream::pair().unwrap().0, 0), None);
    }

    #[test]
    fn a_user_cannot_take_all_recoveries() {
        let mut recoveries = Recoveries::default();
        let mut all =
            |uid| std::iter::from_fn(|| recoveries.begin(uid)).take(RECOVERIES).collect::<Vec<_>>();
        let first = all(1);
        assert_eq!(first.len(), RECOVERIES / 2);
        let second = all(2);
        assert!(second.len() >= RECOVERIES / 4, "{}", second.len());
        // Many users that hold all they can leave one for the next.
        let others: Vec<_> = (3..8).map(&mut all).collect();
        assert!(others.iter().all(|own| !own.is_empty()), "{others:?}");
        assert_eq!(all(1).len(), 0);
        drop((second, others));
        drop(first);
        assert_eq!(all(1).len(), RECOVERIES / 2, "what has ended does not count");
        assert_eq!(recoveries.users.len(), 1, "nor does it need memory");
    }

    #[test]
    fn a_connection_that_a_process_has_is_read() {
        let (_client, server) = pair();
        let own = sockets_of(std::process::id() as i32).unwrap();
        assert!(own.contains(&inode(&server).unwrap()));
        assert_eq!(recovery(&server, 0, true, Some(&own)), Recovery::Read);
        let none = HashSet::new();
        assert_eq!(recovery(&server, 0, true, Some(&none)), Recovery::Untouched);
        let open = recovery(&server, 0, false, Some(&none));
        assert_eq!(open, Recovery::Unknown, "the worker may still read it");
        assert_eq!(recovery(&server, 0, true, None), Recovery::Unknown);
        let (unix, _other) = UnixStream::pair().unwrap();
        assert_eq!(recovery(&unix, 0, true, Some(&none)), Recovery::Unknown);
    }
}
