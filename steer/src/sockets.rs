//! The kernel's own list of TCP sockets (`NETLINK_SOCK_DIAG`), each with its entry in `owners`.
//!
//! An entry is read by the kernel, by the map's descriptor: that needs CAP_BPF. The list is that of
//! the network namespace of the calling thread, and is no snapshot: the kernel goes from socket to
//! socket while others open and close. It answers at once, so a read does not wait.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with,
};

/// States of TCP, as bits of a request.
pub(crate) const LISTENING: u32 = 1 << 10;
/// Established, handshake under way (TCP Fast Open), half-closed by the client.
pub(crate) const CONNECTED: u32 = 1 << 1 | 1 << 3 | 1 << 8;

/// `struct nlmsghdr`.
const HEADER: usize = 16;
/// `struct inet_diag_req_v2`.
const REQUEST: usize = 56;
/// The attribute that asks for entries of one map.
const STORAGES: usize = 12;
/// `struct inet_diag_msg`.
const MESSAGE: usize = 72;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_REQUEST_DUMP: u16 = 0x301;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLA_F_NESTED: u16 = 1 << 15;
const NLA_TYPE: u16 = 0x3fff;
const INET_DIAG_REQ_SK_BPF_STORAGES: u16 = 2;
const SK_DIAG_BPF_STORAGE_REQ_MAP_FD: u16 = 1;
const INET_DIAG_SK_BPF_STORAGES: u16 = 20;
const INET_DIAG_CGROUP_ID: u16 = 21;
const SK_DIAG_BPF_STORAGE: u16 = 1;
const SK_DIAG_BPF_STORAGE_MAP_VALUE: u16 = 3;

/// Room for one message of the kernel: it fills at most 32 KiB.
const BUFFER: usize = 1 << 16;

/// One socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Socket {
    pub local: SocketAddr,
    pub is_v6: bool,
    /// Of a listener: connections to be accepted.
    pub queued: u32,
    /// The user that opened it.
    pub uid: u32,
    /// The number that descriptors of it have; 0 if no process has it.
    pub inode: u32,
    /// `SO_COOKIE`.
    pub cookie: u64,
    /// The cgroup in which it was opened.
    pub cgroup: Option<u64>,
    /// Its entry in `owners`.
    pub owner: Option<Owner>,
}

/// An entry of `owners`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Owner {
    pub worker: u32,
    /// Whether it counts in `live`.
    pub is_counted: bool,
}

/// Calls `each` for all sockets in these states, of both families. Without `owners` no entries are
/// read, and no privilege is needed.
pub(crate) fn read(
    owners: Option<BorrowedFd<'_>>,
    states: u32,
    each: &mut dyn FnMut(Socket),
) -> io::Result<()> {
    let netlink = open()?;
    let mut buffer = vec![0; BUFFER];
    for family in [libc::AF_INET, libc::AF_INET6] {
        send(&netlink, &request(family as u8, states, owners), SendFlags::empty())?;
        while answers(&netlink, &mut buffer, each)? {}
    }
    Ok(())
}

/// The connected socket with these ends. `inode` is 0 as long as no process has accepted it.
pub(crate) fn find(local: SocketAddr, remote: SocketAddr) -> io::Result<Option<Socket>> {
    let netlink = open()?;
    send(&netlink, &exact(local, remote), SendFlags::empty())?;
    let (mut buffer, mut found) = (vec![0; BUFFER], None);
    match answers(&netlink, &mut buffer, &mut |socket| found = Some(socket)) {
        Ok(_) => Ok(found),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Asks for one socket.
fn exact(local: SocketAddr, remote: SocketAddr) -> Vec<u8> {
    let family = if local.is_ipv6() { libc::AF_INET6 } else { libc::AF_INET };
    let mut request = request(family as u8, u32::MAX, None);
    request[6..8].copy_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    request.truncate(HEADER + 8);
    // `struct inet_diag_sockid`.
    request.extend(local.port().to_be_bytes());
    request.extend(remote.port().to_be_bytes());
    for ip in [local.ip(), remote.ip()] {
        let start = request.len();
        match ip {
            IpAddr::V4(ip) => request.extend(ip.octets()),
            IpAddr::V6(ip) => request.extend(ip.octets()),
        }
        request.resize(start + 16, 0);
    }
    // Any interface, any cookie.
    request.extend([0; 4]);
    request.extend([0xff; 8]);
    request
}

/// The descriptor through which the list is read.
fn open() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    Ok(socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(netlink::SOCK_DIAG))?)
}

fn request(family: u8, states: u32, owners: Option<BorrowedFd<'_>>) -> Vec<u8> {
    let length = HEADER + REQUEST + if owners.is_some() { STORAGES } else { 0 };
    let mut request = Vec::with_capacity(length);
    request.extend((length as u32).to_ne_bytes());
    request.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request.extend(NLM_F_REQUEST_DUMP.to_ne_bytes());
    // Sequence and port: one request at a time.
    request.extend([0; 8]);
    request.extend([family, libc::IPPROTO_TCP as u8, 0, 0]);
    request.extend(states.to_ne_bytes());
    request.resize(HEADER + REQUEST, 0);
    let Some(owners) = owners else { return request };
    for (length, kind) in [
        (STORAGES as u16, INET_DIAG_REQ_SK_BPF_STORAGES | NLA_F_NESTED),
        (8, SK_DIAG_BPF_STORAGE_REQ_MAP_FD),
    ] {
        request.extend(length.to_ne_bytes());
        request.extend(kind.to_ne_bytes());
    }
    request.extend((owners.as_raw_fd() as u32).to_ne_bytes());
    request
}

/// Reads one datagram; false after the last one.
fn answers(netlink: &OwnedFd, buffer: &mut [u8], each: &mut dyn FnMut(Socket)) -> io::Result<bool> {
    let (_, length) = rustix::io::retry_on_intr(|| recv(netlink, &mut *buffer, RecvFlags::TRUNC))?;
    parse(buffer.get(..length).ok_or_else(malformed)?, each)
}

/// Reads the messages of a datagram; false after the last one of all.
fn parse(mut rest: &[u8], each: &mut dyn FnMut(Socket)) -> io::Result<bool> {
    while !rest.is_empty() {
        let length = u32_at(rest, 0)? as usize;
        let message = rest.get(HEADER..length).ok_or_else(malformed)?;
        match u16_at(rest, 4)? {
            NLMSG_DONE => {
                // It has an error if the list ends early.
                return failure(u32_at(message, 0).unwrap_or(0)).map(|()| false);
            }
            NLMSG_ERROR => return failure(u32_at(message, 0)?).map(|()| false),
            SOCK_DIAG_BY_FAMILY => each(socket(message)?),
            _ => {}
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or(&[]);
    }
    Ok(true)
}

/// The kernel's number for an error is negative; 0 is none.
fn failure(number: u32) -> io::Result<()> {
    match number as i32 {
        0 => Ok(()),
        number => Err(io::Error::from_raw_os_error(number.wrapping_neg())),
    }
}

fn socket(message: &[u8]) -> io::Result<Socket> {
    let is_v6 = i32::from(*message.first().ok_or_else(malformed)?) == libc::AF_INET6;
    let port = u16::from_be_bytes(bytes_at(message, 4)?);
    let ip: IpAddr = if is_v6 {
        Ipv6Addr::from(bytes_at::<16>(message, 8)?).into()
    } else {
        Ipv4Addr::from(bytes_at::<4>(message, 8)?).into()
    };
    let mut found = Socket {
        local: SocketAddr::new(ip, port),
        is_v6,
        queued: u32_at(message, 56)?,
        uid: u32_at(message, 64)?,
        inode: u32_at(message, 68)?,
        cookie: u64::from_ne_bytes(bytes_at(message, 44)?),
        cgroup: None,
        owner: None,
    };
    for attribute in attributes(message.get(MESSAGE..).ok_or_else(malformed)?) {
        match attribute? {
            (INET_DIAG_CGROUP_ID, value) => {
                found.cgroup = Some(u64::from_ne_bytes(bytes_at(value, 0)?));
            }
            (INET_DIAG_SK_BPF_STORAGES, value) => found.owner = owner(value)?,
            _ => {}
        }
    }
    Ok(found)
}

fn owner(storages: &[u8]) -> io::Result<Option<Owner>> {
    for storage in attributes(storages) {
        let (SK_DIAG_BPF_STORAGE, storage) = storage? else { continue };
        for attribute in attributes(storage) {
            if let (SK_DIAG_BPF_STORAGE_MAP_VALUE, value) = attribute? {
                let (worker, counted) = (u32_at(value, 0)?, u32_at(value, 4)?);
                return Ok(Some(Owner { worker, is_counted: counted != 0 }));
            }
        }
    }
    Ok(None)
}

/// Attributes, each with its type.
fn attributes(mut rest: &[u8]) -> impl Iterator<Item = io::Result<(u16, &[u8])>> {
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let mut next = || {
            let length = usize::from(u16_at(rest, 0)?);
            let value = rest.get(4..length).ok_or_else(malformed)?;
            let found = (u16_at(rest, 2)? & NLA_TYPE, value);
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or(&[]);
            Ok(found)
        };
        let found = next();
        if found.is_err() {
            rest = &[];
        }
        Some(found)
    })
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the kernel's list of sockets is malformed")
}

fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> io::Result<[u8; N]> {
    bytes.get(at..).and_then(|bytes| bytes.first_chunk()).copied().ok_or_else(malformed)
}

fn u32_at(bytes: &[u8], at: usize) -> io::Result<u32> {
    bytes_at(bytes, at).map(u32::from_ne_bytes)
}

fn u16_at(bytes: &[u8], at: usize) -> io::Result<u16> {
    bytes_at(bytes, at).map(u16::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_bytes_are_within_bounds() {
        let mut message = ((HEADER + MESSAGE) as u32).to_ne_bytes().to_vec();
        message.extend_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        message.resize(HEADER + MESSAGE, 0);
        for cut in 0..=message.len() {
            let mut found = 0;
            let answer = parse(&message[..cut], &mut |_| found += 1);
            assert_eq!(found, usize::from(cut == message.len()));
            assert_eq!(answer.is_ok(), cut == 0 || cut == message.len(), "{cut}");
        }
        for length in [0_u32, 15, 1_000_000] {
            message[..4].copy_from_slice(&length.to_ne_bytes());
            assert!(parse(&message, &mut |_| ()).is_err());
        }
    }

    #[test]
    fn malformed_answers_are_errors() {
        let mut message = vec![0; MESSAGE];
        assert_eq!(socket(&message).unwrap().owner, None);
        message.extend([5, 0, 21, 0, 1]);
        assert!(socket(&message).is_err(), "an identifier of one byte");
        message.truncate(MESSAGE);
        message.extend([200, 0, 21, 0, 1, 0, 0, 0]);
        assert!(socket(&message).is_err(), "longer than the message");
        message.truncate(MESSAGE);
        message.extend([3, 0]);
        assert!(socket(&message).is_err(), "no room for a type");
        assert!(socket(&message[..70]).is_err());
        assert!(failure(-1i32 as u32).is_err() && failure(i32::MIN as u32).is_err());
    }
}
