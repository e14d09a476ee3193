//! Which descriptor each live connection has, so that all can be ended at once, at the deadline of a drain.
//!
//! Owns a table of descriptor numbers, nothing else. A number is in it only while its owner certainly has it open
//! (it leaves the table, under the lock, before the close), or together with the socket's cookie, which no other socket
//! ever has.

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

#[derive(Debug, Default)]
pub(super) struct LiveConnections(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    entries: Vec<Entry>,
    free: Vec<u32>,
    /// Counts the beginnings and ends of drains.
    round: u64,
    /// The deadline of this round's drain has come. Who has just been taken, and enters only now, is ended, too.
    over: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    /// Closed only after it has left the table.
    owned: Option<RawFd>,
    /// Given away by `into_parts`: closed by the application, whenever it likes.
    parted: Option<(RawFd, u64)>,
}

impl LiveConnections {
    /// Enters a connection; gives its place.
    pub(super) fn enter(&self, fd: BorrowedFd<'_>) -> u32 {
        let mut table = self.lock();
        if table.over {
            let _ = crate::sys::shut_down(fd.as_raw_fd());
        }
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

    /// A drain begins, is announced with another deadline, or is over: no deadline has come in what begins now. Gives
    /// its number, so that a deadline which comes late ends nothing.
    pub(super) fn next_round(&self) -> u64 {
        let mut table = self.lock();
        table.round += 1;
        table.over = false;
        table.round
    }

    /// The same in whatever round it is, for a worker that takes no more connections.
    pub(super) fn end_now(&self) -> usize {
        let round = self.next_round();
        self.end_all(round).unwrap_or(0)
    }

    /// Shuts every connection down, both ways; gives how many there were. What was written is still sent. `None` in
    /// another round.
    pub(super) fn end_all(&self, round: u64) -> Option<usize> {
        let mut table = self.lock();
        if table.round != round {
            return None;
        }
        table.over = true;
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
        Some(count)
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A number may be another file's by now: a duplicate stays what it is, and the cookie says what that is.
///
/// First without a duplicate: closing one of some other file would take the process's locks (`fcntl`) off that file.
fn end_parted(fd: RawFd, cookie: u64) -> bool {
    if crate::sys::socket_cookie(fd) != Some(cookie) {
        return false;
    }
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
        let live = LiveConnections::default();
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
        let round = live.next_round();
        assert_eq!(live.end_all(round - 1), None, "a deadline of an earlier drain");
        assert_eq!(live.end_all(round), Some(2));
        let found: Vec<bool> = theirs.iter_mut().map(ended).collect();
        assert_eq!(found, [false, true, false, true]);
        assert!(!ended(&mut others), "somebody else's socket");
        assert_eq!(live.enter(others.as_fd()), places[0], "a place is used again");
    }

    #[test]
    fn who_enters_after_the_deadline_is_ended_until_the_drain_is_over() {
        let live = LiveConnections::default();
        let round = live.next_round();
        assert_eq!(live.end_all(round), Some(0));
        let (late, mut client) = UnixStream::pair().unwrap();
        live.enter(late.as_fd());
        assert!(ended(&mut client), "taken before, entered after");
        live.next_round();
        let (next, mut client) = UnixStream::pair().unwrap();
        live.enter(next.as_fd());
        assert!(!ended(&mut client));
    }

    #[test]
    fn the_locks_on_a_file_that_has_the_number_now_stay() {
        use nix::fcntl::{FcntlArg, fcntl};
        use rustix::fs::{FlockOperation, fcntl_lock};

        let live = LiveConnections::default();
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let at = live.enter(ours.as_fd());
        live.part(at, ours.as_fd());
        live.disown(at);
        let file = tempfile::NamedTempFile::new().unwrap();
        fcntl_lock(file.as_file(), FlockOperation::NonBlockingLockExclusive).unwrap();
        if let Some((fd, _)) = &mut live.lock().entries[at as usize].parted {
            *fd = file.as_file().as_raw_fd();
        }
        assert_eq!(live.end_all(0), Some(0));
        // A lock of the other kind is in the way of ours, within the process too.
        let other = file.reopen().unwrap();
        let lock = libc::flock {
            l_type: libc::F_WRLCK as _,
            l_whence: libc::SEEK_SET as _,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        let locked = fcntl(&other, FcntlArg::F_OFD_SETLK(&lock));
        assert_eq!(locked, Err(nix::errno::Errno::EAGAIN), "the file is still locked");
    }
}
