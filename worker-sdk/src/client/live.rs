//! Which descriptor each live connection has, so that all can be ended at once, at the deadline of a drain.
//!
//! Owns a table of descriptor numbers, nothing else. A number is in it only while its owner certainly has it open
//! (it leaves the table, under the lock, before the close), or together with the socket's cookie, which no other socket
//! ever has.

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

#[derive(Debug, Default)]
pub(super) struct Live(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    entries: Vec<Entry>,
    free: Vec<u32>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    /// Closed only after it has left the table.
    owned: Option<RawFd>,
    /// Given away by `into_parts`: closed by the application, whenever it likes.
    parted: Option<(RawFd, u64)>,
}

impl Live {
    /// Enters a connection; gives its place.
    pub(super) fn enter(&self, fd: BorrowedFd<'_>) -> u32 {
        let mut table = self.lock();
        let entry = Entry { owned: Some(fd.as_raw_fd()), parted: None };
        match table.free.pop() {
            Some(at) => {
                table.entries[at as usize] = entry;
                at
            }
            None => {
                table.entries.push(entry);
                (table.entries.len() - 1) as u32
            }
        }
    }

    /// The application has this duplicate now.
    pub(super) fn part(&self, at: u32, fd: BorrowedFd<'_>) {
        // A kernel without cookies: then its owner alone can end it.
        let cookie = rustix::net::sockopt::socket_cookie(fd).ok();
        if let Some(entry) = self.lock().entries.get_mut(at as usize) {
            entry.parted = cookie.map(|cookie| (fd.as_raw_fd(), cookie));
        }
    }

    /// Our own descriptor is about to be closed.
    pub(super) fn disown(&self, at: u32) {
        if let Some(entry) = self.lock().entries.get_mut(at as usize) {
            entry.owned = None;
        }
    }

    /// The connection has ended.
    pub(super) fn leave(&self, at: u32) {
        let mut table = self.lock();
        table.entries[at as usize] = Entry::default();
        table.free.push(at);
    }

    /// Shuts every connection down, both ways; gives how many there were. What was written is still sent.
    pub(super) fn end_all(&self) -> usize {
        let table = self.lock();
        let mut count = 0;
        for entry in &table.entries {
            let ended = match entry {
                Entry { owned: Some(fd), .. } => {
                    // It fails when the client is gone already; that is an end, too.
                    let _ = crate::sys::shut_down(*fd);
                    true
                }
                Entry { parted: Some((fd, cookie)), .. } => end_parted(*fd, *cookie),
                Entry { .. } => false,
            };
            count += usize::from(ended);
        }
        count
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A number may be another file's by now: a duplicate stays what it is, and the cookie says what that is.
fn end_parted(fd: RawFd, cookie: u64) -> bool {
    let Ok(copy) = crate::sys::duplicate(fd) else { return false };
    if rustix::net::sockopt::socket_cookie(&copy) != Ok(cookie) {
        return false;
    }
    let _ = rustix::net::shutdown(copy, rustix::net::Shutdown::Both);
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    fn ended(stream: &mut UnixStream) -> bool {
        stream.set_nonblocking(true).unwrap();
        matches!(stream.read(&mut [0]), Ok(0))
    }

    #[test]
    fn what_is_in_the_table_is_ended_and_nothing_else() {
        let live = Live::default();
        let pairs: Vec<_> = (0..4).map(|_| UnixStream::pair().unwrap()).collect();
        let (ours, mut theirs): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
        let places: Vec<u32> = ours.iter().map(|stream| live.enter(stream.as_fd())).collect();
        // 0: closed. 1: given away and open. 2: given away, closed, and its number another socket's. 3: owned.
        live.disown(places[0]);
        live.leave(places[0]);
        let parted = ours[1].try_clone().unwrap();
        live.part(places[1], parted.as_fd());
        live.disown(places[1]);
        let (other, mut others) = UnixStream::pair().unwrap();
        live.part(places[2], ours[2].as_fd());
        live.disown(places[2]);
        if let Some((fd, _)) = &mut live.lock().entries[places[2] as usize].parted {
            *fd = other.as_raw_fd();
        }
        assert_eq!(live.end_all(), 2);
        let found: Vec<bool> = theirs.iter_mut().map(ended).collect();
        assert_eq!(found, [false, true, false, true]);
        assert!(!ended(&mut others), "somebody else's socket");
        assert_eq!(live.enter(ours[0].as_fd()), places[0], "a place is used again");
    }
}
