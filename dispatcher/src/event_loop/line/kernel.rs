//! The kernel tells which TCP sockets have ended: netlink, `NETLINK_SOCK_DIAG`, the groups
//! `SKNLGRP_INET_TCP_DESTROY` and `SKNLGRP_INET6_TCP_DESTROY`, which need no privilege.
//!
//! One message per socket, with its cookie. If the queue of the netlink socket overflows, messages
//! are lost; then a list of all TCP sockets shows which ones are left.

use std::collections::HashSet;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, sockopt};

use crate::sys;

/// `SKNLGRP_INET_TCP_DESTROY` and `SKNLGRP_INET6_TCP_DESTROY`, as bits.
const GROUPS: u32 = 0b101;

/// Room for messages that were not read yet; the kernel may allow less. A message takes about 1
/// KiB.
const ROOM: usize = 8 * 1024 * 1024;

/// Longest message about one socket.
const MESSAGE: usize = 4096;

/// Most messages read at once.
const MOST: usize = 4096;

/// Room for a part of a list of sockets.
const PART: usize = 64 * 1024;

/// The longest time that a list may take.
const LIST: Duration = Duration::from_secs(5);

/// Header of a netlink message: length u32, type u16, flags u16, sequence number u32, port u32.
const HEADER: usize = 16;

/// `SOCK_DIAG_BY_FAMILY`, `NLMSG_ERROR` and `NLMSG_DONE`.
const BY_FAMILY: u16 = 20;
const ERROR: u16 = 2;
const DONE: u16 = 3;

/// The port of the socket itself, after family, state, timer and retransmissions.
const PORT: usize = 4;

/// The cookie, two u32 with the lower half first, in `struct inet_diag_msg`: after family, state,
/// timer, retransmissions (one byte each), two ports, two addresses of 16 bytes and the interface.
const COOKIE: usize = 4 + 2 * 2 + 2 * 16 + 4;

/// The inode, after the cookie, the timer, two queue lengths and the user. It is 0 if no process
/// has the socket: what is left of it only completes the end of the connection.
const INODE: usize = COOKIE + 8 + 4 * 4;

/// The netlink socket.
#[derive(Debug)]
pub(super) struct Kernel {
    pub(super) socket: OwnedFd,
    /// The network namespace whose sockets it hears of, if the kernel tells.
    pub(super) namespace: Option<u64>,
    /// The local ports of sockets whose ends matter: other programs of the machine have many more.
    pub(super) ports: HashSet<u16>,
}

/// What was read.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Ends {
    pub(super) cookies: Vec<u64>,
    /// The queue had overflowed.
    pub(super) overrun: bool,
    /// There may be more.
    pub(super) more: bool,
}

fn open() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let protocol = Some(netlink::SOCK_DIAG);
    Ok(rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, protocol)?)
}

impl Kernel {
    /// Subscribes to the ends of all TCP sockets of this network namespace.
    pub(super) fn subscribe() -> io::Result<Kernel> {
        let socket = open()?;
        // Only with privilege beyond the limit of the system.
        if sockopt::set_socket_recv_buffer_size_force(&socket, ROOM).is_err() {
            let _ = sockopt::set_socket_recv_buffer_size(&socket, ROOM);
        }
        rustix::net::bind(&socket, &SocketAddrNetlink::new(0, GROUPS))?;
        let namespace = sys::network_namespace(&socket).ok();
        Ok(Kernel { socket, namespace, ports: HashSet::new() })
    }

    /// The cookies of the sockets whose ends matter and that are open now.
    ///
    /// # Errors
    /// The kernel does not answer; loads may then be higher than they are.
    pub(super) fn list(&self) -> io::Result<HashSet<u64>> {
        list(&self.ports)
    }

    /// Reads what has come, without waiting.
    ///
    /// # Errors
    /// The socket cannot be used any more.
    pub(super) fn read(&self) -> io::Result<Ends> {
        let mut ends = Ends::default();
        let mut buffer = [0; MESSAGE];
        for _ in 0..MOST {
            match rustix::net::recv(&self.socket, &mut buffer, RecvFlags::DONTWAIT) {
                Ok((read, _)) => {
                    cookies(&buffer[..read], |socket| {
                        if self.ports.contains(&socket.port) {
                            ends.cookies.push(socket.cookie);
                        }
                    });
                }
                Err(Errno::AGAIN) => return Ok(ends),
                Err(Errno::NOBUFS) => ends.overrun = true,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        ends.more = true;
        Ok(ends)
    }
}

/// A socket in a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Socket {
    cookie: u64,
    /// Its own port.
    port: u16,
    /// A process has it.
    held: bool,
}

/// Calls `found` with every socket in a message; returns how the part ends.
fn cookies(mut bytes: &[u8], mut found: impl FnMut(Socket)) -> Part {
    let word = |bytes: &[u8], at: usize| {
        bytes.get(at..at + 4).and_then(|four| four.try_into().ok()).map(u32::from_ne_bytes)
    };
    while bytes.len() >= HEADER {
        let len = word(bytes, 0).map_or(0, |len| len as usize);
        let kind = [bytes[4], bytes[5]];
        if len < HEADER || len > bytes.len() {
            return Part::Broken;
        }
        let body = &bytes[HEADER..len];
        match u16::from_ne_bytes(kind) {
            BY_FAMILY => {
                if let (Some(low), Some(high)) = (word(body, COOKIE), word(body, COOKIE + 4)) {
                    let held = word(body, INODE).is_some_and(|inode| inode != 0);
                    let port = u16::from_be_bytes([body[PORT], body[PORT + 1]]);
                    let cookie = u64::from(high) << 32 | u64::from(low);
                    found(Socket { cookie, port, held });
                }
            }
            DONE => return Part::Last,
            ERROR => return Part::Broken,
            _ => {}
        }
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Part::More
}

/// How a part of a list ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    More,
    Last,
    Broken,
}

/// The cookies of the TCP sockets of this network namespace that a process has, on these local
/// ports. Waits for at most [`LIST`].
fn list(ports: &HashSet<u16>) -> io::Result<HashSet<u64>> {
    let socket = open()?;
    let mut cookies = HashSet::new();
    let deadline = Instant::now() + LIST;
    for family in [libc::AF_INET as u8, libc::AF_INET6 as u8] {
        rustix::net::send(&socket, &request(family), SendFlags::empty())?;
        while !read_part(&socket, deadline, ports, &mut cookies)? {}
    }
    Ok(cookies)
}

/// A request for all TCP sockets of a family: `struct inet_diag_req_v2` after the header.
fn request(family: u8) -> Vec<u8> {
    const REQUEST: u16 = 1;
    const DUMP: u16 = 0x300;
    const BODY: usize = 56;
    // Every state of a socket that a process can have: not SYN_RECV (3), TIME_WAIT (6), LISTEN (10)
    // and NEW_SYN_RECV (12).
    const STATES: u32 = !(1 << 3 | 1 << 6 | 1 << 10 | 1 << 12);
    let mut bytes = Vec::with_capacity(HEADER + BODY);
    bytes.extend_from_slice(&((HEADER + BODY) as u32).to_ne_bytes());
    bytes.extend_from_slice(&BY_FAMILY.to_ne_bytes());
    bytes.extend_from_slice(&(REQUEST | DUMP).to_ne_bytes());
    bytes.extend_from_slice(&[0; 8]);
    bytes.extend_from_slice(&[family, libc::IPPROTO_TCP as u8, 0, 0]);
    bytes.extend_from_slice(&STATES.to_ne_bytes());
    bytes.resize(HEADER + BODY, 0);
    bytes
}

/// Reads one part of the list; true if it was the last.
fn read_part(
    socket: &OwnedFd,
    deadline: Instant,
    ports: &HashSet<u16>,
    all: &mut HashSet<u64>,
) -> io::Result<bool> {
    let mut buffer = vec![0; PART];
    loop {
        match rustix::net::recv(socket, &mut buffer[..], RecvFlags::DONTWAIT) {
            Ok((read, _)) => {
                let part = cookies(&buffer[..read], |socket| {
                    if socket.held && ports.contains(&socket.port) {
                        all.insert(socket.cookie);
                    }
                });
                return match part {
                    Part::More => Ok(false),
                    Part::Last => Ok(true),
                    Part::Broken => Err(io::Error::other("the list of sockets is broken")),
                };
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                let mut fds = [PollFd::new(socket, PollFlags::IN)];
                match poll(&mut fds, Timespec::try_from(left).ok().as_ref()) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(errno) => return Err(errno.into()),
                }
            }
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::net::{TcpListener, TcpStream};

    use super::*;

    fn message(kind: u16, body: &[u8]) -> Vec<u8> {
        let mut bytes = ((HEADER + body.len()) as u32).to_ne_bytes().to_vec();
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&[0; 10]);
        bytes.extend_from_slice(body);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn all(bytes: &[u8]) -> (Vec<u64>, Part) {
        let mut found = Vec::new();
        let part = cookies(bytes, |socket| found.push(socket.cookie));
        (found, part)
    }

    #[test]
    fn any_bytes_are_within_bounds() {
        let mut body = vec![0; COOKIE];
        body.extend_from_slice(&7u32.to_ne_bytes());
        body.extend_from_slice(&1u32.to_ne_bytes());
        let one = message(BY_FAMILY, &body);
        assert_eq!(all(&one), (vec![1 << 32 | 7], Part::More));
        let two = [one.clone(), message(DONE, &[0; 4]), one.clone()].concat();
        assert_eq!(all(&two), (vec![1 << 32 | 7], Part::Last));
        assert_eq!(all(&message(BY_FAMILY, &body[..COOKIE + 7])), (vec![], Part::More));
        for cut in 0..one.len() {
            let (found, _) = all(&one[..cut]);
            assert!(found.is_empty(), "{cut}");
        }
        let mut wrong = one;
        for len in [0u32, 15, 1_000_000] {
            wrong[..4].copy_from_slice(&len.to_ne_bytes());
            assert_eq!(all(&wrong), (vec![], Part::Broken), "{len}");
        }
    }

    /// A queue without room: the loss is told, and the list makes up for it.
    #[test]
    fn an_overflow_is_told() {
        let Ok(kernel) = Kernel::subscribe() else {
            return test_support::skip("no netlink socket");
        };
        sockopt::set_socket_recv_buffer_size(&kernel.socket, 1).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            for _ in 0..50 {
                let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
                drop((listener.accept().unwrap(), client));
            }
            if kernel.read().unwrap().overrun {
                return;
            }
            assert!(Instant::now() < deadline, "it overflows");
        }
    }

    /// Sockets of this process: the kernel tells their ends, and lists those that are open.
    #[test]
    fn the_kernel_tells_ends_and_lists_what_is_open() {
        let mut kernel = match Kernel::subscribe() {
            Ok(kernel) => kernel,
            Err(error) => {
                return test_support::skip(&format!("no netlink socket: {error}"));
            }
        };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        kernel.ports.insert(listener.local_addr().unwrap().port());
        assert_eq!(sys::network_namespace(&server).ok(), kernel.namespace);
        let cookie = sockopt::socket_cookie(&server).unwrap();
        assert!(kernel.list().unwrap().contains(&cookie), "it is open");
        drop((server, client));
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut told = false;
        while !told && Instant::now() < deadline {
            let ends = kernel.read().unwrap();
            // Other tests may cause an overrun, which is told too.
            told = ends.cookies.contains(&cookie) || ends.overrun;
            std::thread::yield_now();
        }
        assert!(told, "the end of the socket");
        while kernel.list().unwrap().contains(&cookie) {
            assert!(Instant::now() < deadline, "it is not listed any more");
        }
    }
}
