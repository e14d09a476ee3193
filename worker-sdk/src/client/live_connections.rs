//! The descriptors of all live connections, so that the deadline of a drain can end them.
//!
//! This module owns a table of descriptor numbers. An entry has a number only while its owner keeps
//! the descriptor open (the number leaves the table, under the lock, before the close), or together
//! with the cookie of the socket, which is unique.

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

#[derive(Debug, Default)]
pub(super) struct LiveConnections(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    entries: Vec<Entry>,
    free: Vec<u32>,
    /// The number of starts and ends of drains so far.
    round: u64,
    /// The deadline of this round's drain has passed. Connections registered later are ended, too.
    deadline_passed: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    /// The SDK's descriptor. It leaves the table before it is closed.
    own_fd: Option<RawFd>,
    /// The descriptor from `into_parts` and its cookie. The application may close it at any time.
    given_away: Option<(RawFd, u64)>,
}

impl LiveConnections {
    /// Registers a connection; returns its index.
    pub(super) fn insert(&self, fd: BorrowedFd<'_>) -> u32 {
        let mut table = self.lock();
        if table.deadline_passed {
            let _ = crate::sys::shut_down(fd.as_raw_fd());
        }
        let entry = Entry { own_fd: Some(fd.as_raw_fd()), given_away: None };
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

    /// The application owns this duplicate now.
    pub(super) fn give_away(&self, at: u32, fd: BorrowedFd<'_>) {
        // Without cookies in the kernel, only the owner can end the connection.
        let cookie = rustix::net::sockopt::socket_cookie(fd).ok();
        if let Some(entry) = self.lock().entries.get_mut(at as usize) {
            entry.given_away = cookie.map(|cookie| (fd.as_raw_fd(), cookie));
        }
    }

    /// The SDK is about to close its descriptor.
    pub(super) fn forget_own_fd(&self, at: u32) {
        if let Some(entry) = self.lock().entries.get_mut(at as usize) {
            entry.own_fd = None;
        }
    }

    /// The connection has ended.
    pub(super) fn remove(&self, at: u32) {
        let mut table = self.lock();
        table.entries[at as usize] = Entry::default();
        table.free.push(at);
    }

    /// Starts a round: a drain begins, gets another deadline, or ends. Returns the number of the
    /// round, so that a late deadline of an earlier round has no effect.
    pub(super) fn next_round(&self) -> u64 {
        let mut table = self.lock();
        table.round += 1;
        table.deadline_passed = false;
        table.round
    }

    /// Ends all connections in any round, for a worker that takes no more.
    pub(super) fn end_now(&self) -> usize {
        let round = self.next_round();
        self.end_all(round).unwrap_or(0)
    }

    /// Shuts every connection down in both directions and returns their number. Written data is
    /// still sent. `None` if the round has passed.
    pub(super) fn end_all(&self, round: u64) -> Option<usize> {
        let mut table = self.lock();
        if table.round != round {
            return None;
        }
        table.deadline_passed = true;
        let mut count = 0;
        for entry in &table.entries {
            let ended = match entry {
                Entry { own_fd: Some(fd), .. } => {
                    // It fails if the client is gone, which is an end, too.
                    let _ = crate::sys::shut_down(*fd);
                    true
                }
                Entry { given_away: Some((fd, cookie)), .. } => end_given_away(*fd, *cookie),
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

/// The number may belong to another file by now. A duplicate does not change, and its cookie
/// identifies the socket.
///
/// The first check needs no duplicate: closing a duplicate of another file would release the
/// process's locks (`fcntl`) on that file.
fn end_given_away(fd: RawFd, cookie: u64) -> bool {
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
    fn only_registered_connections_are_ended() {
        let live = LiveConnections::default();
        let pairs: Vec<_> = (0..4).map(|_| UnixStream::pair().unwrap()).collect();
        let (ours, mut theirs): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
        let indexes: Vec<u32> = ours.iter().map(|stream| live.insert(stream.as_fd())).collect();
        // 0: closed. 1: given away and open. 2: given away and closed, its number reused. 3: owned
        // by the SDK.
        live.forget_own_fd(indexes[0]);
        live.remove(indexes[0]);
        let given_away = ours[1].try_clone().unwrap();
        live.give_away(indexes[1], given_away.as_fd());
        live.forget_own_fd(indexes[1]);
        let (other, mut others) = UnixStream::pair().unwrap();
        live.give_away(indexes[2], ours[2].as_fd());
        live.forget_own_fd(indexes[2]);
        if let Some((fd, _)) = &mut live.lock().entries[indexes[2] as usize].given_away {
            *fd = other.as_raw_fd();
        }
        let round = live.next_round();
        assert_eq!(live.end_all(round - 1), None, "a deadline of an earlier drain");
        assert_eq!(live.end_all(round), Some(2));
        let found: Vec<bool> = theirs.iter_mut().map(ended).collect();
        assert_eq!(found, [false, true, false, true]);
        assert!(!ended(&mut others), "another socket");
        assert_eq!(live.insert(others.as_fd()), indexes[0], "a free index is reused");
    }

    #[test]
    fn connections_after_the_deadline_end_until_the_drain_ends() {
        let live = LiveConnections::default();
        let round = live.next_round();
        assert_eq!(live.end_all(round), Some(0));
        let (late, mut client) = UnixStream::pair().unwrap();
        live.insert(late.as_fd());
        assert!(ended(&mut client), "taken before the deadline, registered after it");
        live.next_round();
        let (next, mut client) = UnixStream::pair().unwrap();
        live.insert(next.as_fd());
        assert!(!ended(&mut client));
    }

    #[test]
    fn locks_on_a_file_with_the_reused_number_stay() {
        use nix::fcntl::{FcntlArg, fcntl};
        use rustix::fs::{FlockOperation, fcntl_lock};

        let live = LiveConnections::default();
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let at = live.insert(ours.as_fd());
        live.give_away(at, ours.as_fd());
        live.forget_own_fd(at);
        let file = tempfile::NamedTempFile::new().unwrap();
        fcntl_lock(file.as_file(), FlockOperation::NonBlockingLockExclusive).unwrap();
        if let Some((fd, _)) = &mut live.lock().entries[at as usize].given_away {
            *fd = file.as_file().as_raw_fd();
        }
        assert_eq!(live.end_all(0), Some(0));
        // A lock of the other kind conflicts with it, within the process too.
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
