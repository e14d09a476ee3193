//! The listening TCP sockets of this network namespace, as the kernel lists them
//! (`NETLINK_SOCK_DIAG`, `struct inet_diag_msg`; no privilege is needed).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::netlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

/// A listening socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listening {
    /// Its address; IPv4-mapped ones as IPv4.
    pub address: SocketAddr,
    /// The family of the socket: an IPv6 one may serve IPv4 clients, too.
    pub is_v6: bool,
    /// Connections in its accept queue.
    pub queued: u32,
    /// The user who made it.
    pub uid: u32,
    /// Its inode, as in `/proc/PID/fd`.
    pub inode: u32,
}

/// The longest time that the list may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// Room for a part of the list.
const PART: usize = 32 * 1024;

/// Header of a netlink message: length u32, type u16, flags u16, sequence number u32, port u32.
const HEADER: usize = 16;

/// `struct inet_diag_req_v2`.
const REQUEST: usize = 56;

/// `SOCK_DIAG_BY_FAMILY`, `NLMSG_ERROR` and `NLMSG_DONE`; `NLM_F_REQUEST | NLM_F_DUMP`.
const BY_FAMILY: u16 = 20;
const ERROR: u16 = 2;
const DONE: u16 = 3;
const DUMP: u16 = 0x301;

/// `TCP_LISTEN`, as a bit.
const LISTEN: u32 = 1 << 10;

/// In `struct inet_diag_msg`: local port and address, connections to accept, user and inode.
const LOCAL_PORT: usize = 4;
const LOCAL: usize = 8;
const QUEUED: usize = 56;
const UID: usize = 64;
const INODE: usize = 68;
const MESSAGE: usize = 72;

/// Every listening TCP socket, IPv4 and IPv6.
///
/// # Errors
/// The kernel does not answer, or not in time (2 s).
pub fn list() -> io::Result<Vec<Listening>> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let protocol = Some(netlink::SOCK_DIAG);
    let socket =
        rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, protocol)?;
    let deadline = Instant::now() + PATIENCE;
    let mut found = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        rustix::net::send(&socket, &request(family as u8), SendFlags::empty())?;
        while !read(&socket, deadline, &mut found)? {}
    }
    Ok(found)
}

fn request(family: u8) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + REQUEST);
    bytes.extend_from_slice(&((HEADER + REQUEST) as u32).to_ne_bytes());
    bytes.extend_from_slice(&BY_FAMILY.to_ne_bytes());
    bytes.extend_from_slice(&DUMP.to_ne_bytes());
    bytes.extend_from_slice(&[0; 8]);
    bytes.extend_from_slice(&[family, libc::IPPROTO_TCP as u8, 0, 0]);
    bytes.extend_from_slice(&LISTEN.to_ne_bytes());
    bytes.resize(HEADER + REQUEST, 0);
    bytes
}

/// Reads a part of the list; true if it was the last.
fn read(socket: &OwnedFd, deadline: Instant, found: &mut Vec<Listening>) -> io::Result<bool> {
    let mut buffer = vec![0; PART];
    loop {
        match rustix::net::recv(socket, &mut buffer[..], RecvFlags::DONTWAIT) {
            Ok((read, _)) => return parse(&buffer[..read], found),
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

/// Reads the messages of a part; true if the list ends with it.
fn parse(mut bytes: &[u8], found: &mut Vec<Listening>) -> io::Result<bool> {
    let broken = || io::Error::other("the list of sockets is broken");
    while bytes.len() >= HEADER {
        let len = word(bytes, 0) as usize;
        if len < HEADER || len > bytes.len() {
            return Err(broken());
        }
        let body = &bytes[HEADER..len];
        match u16::from_ne_bytes([bytes[4], bytes[5]]) {
            BY_FAMILY => found.extend(socket(body)),
            DONE => return Ok(true),
            ERROR => {
                let errno = body.get(..4).map_or(0, |_| word(body, 0).cast_signed());
                return Err(io::Error::from_raw_os_error(-errno));
            }
            _ => {}
        }
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

fn socket(body: &[u8]) -> Option<Listening> {
    let body = body.get(..MESSAGE)?;
    let is_v6 = i32::from(body[0]) == libc::AF_INET6;
    let ip: IpAddr = match is_v6 {
        true => {
            let octets: [u8; 16] = body[LOCAL..LOCAL + 16].try_into().ok()?;
            Ipv6Addr::from(octets).to_canonical()
        }
        false => {
            let octets: [u8; 4] = body[LOCAL..LOCAL + 4].try_into().ok()?;
            Ipv4Addr::from(octets).into()
        }
    };
    let port = u16::from_be_bytes([body[LOCAL_PORT], body[LOCAL_PORT + 1]]);
    Some(Listening {
        address: SocketAddr::new(ip, port),
        is_v6,
        queued: word(body, QUEUED),
        uid: word(body, UID),
        inode: word(body, INODE),
    })
}

/// Four bytes as a number; the caller has checked the length.
fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|four| four.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_listener_and_its_queue_are_listed() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address) else { continue };
            let address = listener.local_addr().expect("bound");
            let clients: Vec<_> = (0..3).map(|_| TcpStream::connect(address)).collect();
            assert!(clients.iter().all(Result::is_ok));
            let of = |all: Vec<Listening>| all.into_iter().find(|it| it.address == address);
            let found = of(list().expect("a list")).expect("it is listed");
            assert_eq!((found.queued, found.is_v6), (3, address.is_ipv6()));
            assert_eq!(found.uid, rustix::process::geteuid().as_raw());
            drop(listener);
            assert_eq!(of(list().expect("a list")), None);
        }
    }

    #[test]
    fn any_bytes_are_within_bounds() {
        let mut message = ((HEADER + MESSAGE) as u32).to_ne_bytes().to_vec();
        message.extend_from_slice(&BY_FAMILY.to_ne_bytes());
        message.resize(HEADER + MESSAGE, 0);
        for cut in 0..=message.len() {
            let mut found = Vec::new();
            let answer = parse(&message[..cut], &mut found);
            assert_eq!(found.len(), usize::from(cut == message.len()));
            assert!(answer.is_err() || matches!(answer, Ok(false)));
        }
        for len in [0_u32, 15, 1_000_000] {
            message[..4].copy_from_slice(&len.to_ne_bytes());
            assert!(parse(&message, &mut Vec::new()).is_err());
        }
    }
}
