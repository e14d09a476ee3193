//! The connections of processes, without programs in the kernel: its list of sockets, matched with
//! the descriptors of the processes. No privilege is needed for processes of the same user.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::SocketAddr;

use dispatch_steer::listening::{self, Connected};

use super::ports::is_at;

/// Most processes of one worker that are looked at: it and its descendants.
const MOST: usize = 1024;

/// The connections at the ports of pools, at one time.
pub(super) struct Sample {
    /// By inode.
    accepted: HashMap<u32, u64>,
    waiting: Vec<Connected>,
}

impl Sample {
    /// # Errors
    /// The kernel does not list them.
    pub(super) fn read(at: impl Fn(u16) -> bool) -> io::Result<Sample> {
        let all = listening::connected(at)?;
        let (waiting, accepted): (Vec<_>, Vec<_>) = all.into_iter().partition(|it| it.inode == 0);
        let accepted = accepted.into_iter().map(|it| (it.inode, it.cookie)).collect();
        Ok(Sample { accepted, waiting })
    }

    /// The connections that these descriptors are.
    pub(super) fn of(&self, inodes: &HashSet<u32>) -> HashSet<u64> {
        inodes.iter().filter_map(|inode| self.accepted.get(inode).copied()).collect()
    }

    /// The connections at these addresses that no process has accepted.
    pub(super) fn waiting(&self, at: impl Fn(SocketAddr) -> bool) -> HashSet<u64> {
        let waiting = self.waiting.iter().filter(|it| at(it.local));
        waiting.map(|it| it.cookie).collect()
    }
}

/// A process and its descendants, which may have ended.
pub(super) fn tree_of(pid: i32) -> Vec<i32> {
    let (mut found, mut seen) = (vec![pid], HashSet::from([pid]));
    let mut at = 0;
    while let Some(&pid) = found.get(at) {
        at += 1;
        for child in children_of(pid) {
            if found.len() < MOST && seen.insert(child) {
                found.push(child);
            }
        }
    }
    found
}

/// The inodes of the sockets that a process and its descendants have.
///
/// # Errors
/// One of them may not be looked at.
pub(super) fn sockets_of(pid: i32) -> io::Result<HashSet<u32>> {
    let mut found = HashSet::new();
    for pid in tree_of(pid) {
        let entries = match std::fs::read_dir(format!("/proc/{pid}/fd")) {
            Ok(entries) => entries,
            // It has ended.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        for entry in entries.flatten() {
            match std::fs::read_link(entry.path()) {
                Ok(link) => found.extend(link.to_str().and_then(socket_inode)),
                // Root may list them without the capability to see what they are.
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Err(error),
                // It was closed meanwhile.
                Err(_) => {}
            }
        }
    }
    Ok(found)
}

/// Whether one of these sockets listens at an address of `at`.
///
/// # Errors
/// The kernel does not list them.
pub(super) fn listens(sockets: &HashSet<u32>, at: impl Fn(SocketAddr) -> bool) -> io::Result<bool> {
    Ok(listening::list()?.iter().any(|it| sockets.contains(&it.inode) && at(it.address)))
}

/// Whether a process has connections at its own port or one of these, and no listener of its own
/// any more: it ends after its last connection. What may not be looked at is taken for one that
/// listens.
pub(super) fn has_closed(pid: i32, own: SocketAddr, at: impl Fn(u16) -> bool) -> bool {
    let looked = || -> io::Result<bool> {
        let sockets = sockets_of(pid)?;
        let is_own = |it: SocketAddr| it.port() == own.port() && is_at(it.ip(), own.ip());
        if listens(&sockets, is_own)? {
            return Ok(false);
        }
        let connected = listening::connected(|port| port == own.port() || at(port))?;
        Ok(connected.iter().any(|it| sockets.contains(&it.inode)))
    };
    looked().unwrap_or(false)
}

/// The inode in `socket:[INODE]`.
fn socket_inode(link: &str) -> Option<u32> {
    link.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

fn children_of(pid: i32) -> Vec<i32> {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    let lists = threads.flatten().map(|thread| thread.path().join("children"));
    let lists = lists.filter_map(|path| std::fs::read_to_string(path).ok());
    lists
        .flat_map(|list| list.split(' ').filter_map(|it| it.parse().ok()).collect::<Vec<_>>())
        .collect()
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn connections_are_found_with_the_process_that_has_them() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let address = listener.local_addr().expect("bound");
        let clients = [0; 3].map(|_| TcpStream::connect(address).expect("a connection"));
        let (accepted, _) = listener.accept().expect("a connection");
        // A child of this process has only what it inherits.
        let (given, _) = listener.accept().expect("a connection");
        let mut child = Command::new("sleep");
        let child = child.arg("100").stdin(Stdio::from(std::os::fd::OwnedFd::from(given)));
        let mut child = child.spawn().expect("a process");
        let sample = Sample::read(|port| port == address.port()).expect("a list");
        let own = sockets_of(std::process::id().cast_signed()).expect("this process");
        let of_child = sockets_of(child.id().cast_signed()).expect("the child");
        child.kill().and_then(|()| child.wait()).expect("its end");
        assert_eq!(sample.of(&own).len(), 2, "with the one of the child");
        assert_eq!(sample.of(&of_child).len(), 1);
        assert_eq!(sample.waiting(|it| it == address).len(), 1);
        assert_eq!(sample.waiting(|_| false).len(), 0);
        drop((clients, accepted));
        assert_eq!(sockets_of(i32::MAX).expect("none").len(), 0);
    }

    #[test]
    fn links_of_sockets_have_the_inode() {
        assert_eq!(socket_inode("socket:[123]"), Some(123));
        for other in ["socket:[x]", "socket:[1", "pipe:[1]", "/socket:[1]", "socket:[99999999999]"]
        {
            assert_eq!(socket_inode(other), None);
        }
    }
}
