//! The records of a take-over, and the connection that carries them.
//!
//! A new dispatcher connects to the take-over socket of the running one, beside its dispatch
//! socket. Each record is one message of a SEQPACKET socket, in JSON, with descriptors
//! (`SCM_RIGHTS`):
//!
//! | from | record | meaning |
//! |---|---|---|
//! | new | `hello` | version of these records |
//! | old | `welcome` | its process id |
//! | old | `socket` | one listening socket, and the lock of its file if it has one; repeated |
//! | old | `end` | number of sockets |
//! | new | `unused` | the configuration of the new one has no such listener; repeated |
//! | new | `ready` | everything is bound and started |
//! | old | `clients` | connections that no worker has; repeated |
//! | new | `received` | the number of these connections |
//! | old | `commit` | from here on the new one serves |
//! | new | `committed` | |
//!
//! The old one may send `refused` instead of any record. Until `commit` was sent the old one is the
//! dispatcher: its copies of all descriptors stay open, and the new one accepts nothing and sends
//! nothing to a worker. If the connection ends without `refused` and the old process has ended, the
//! new one serves with what it has received.
//!
//! Every wait has a deadline. No record has more than [`MAX_DESCRIPTORS`] descriptors.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use serde::{Deserialize, Serialize};

/// The version of the records. Both dispatchers must have the same.
pub(crate) const VERSION: u32 = 1;

/// Most descriptors in one record.
pub(crate) const MAX_DESCRIPTORS: usize = 64;

/// Longest record in bytes.
const MAX_RECORD: usize = 32 * 1024;

/// Pause before a record is sent again that the kernel could not queue.
const AGAIN: Duration = Duration::from_millis(1);

/// The socket beside the dispatch socket.
pub(crate) fn path_of(dispatch_socket: &Path) -> PathBuf {
    let mut name = dispatch_socket.as_os_str().to_owned();
    name.push(".take-over");
    name.into()
}

/// The purpose of a listening socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Kind {
    Dispatch,
    Admin,
    AdminHttp,
    Advice,
    /// For HAProxy's agent check; `name` is the pool.
    Agent,
    TakeOver,
    Line,
    Listener,
}

/// A listening socket that is passed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct About {
    pub(crate) kind: Kind,
    /// The name of the listener; empty for other sockets.
    pub(crate) name: String,
    /// The address as it is configured: see `bind::identity`.
    pub(crate) configured: String,
    /// The address that it is bound to.
    pub(crate) address: String,
    /// Its file. The second descriptor of the record is the lock of the file.
    pub(crate) file: Option<FileId>,
}

/// A socket file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct FileId {
    pub(crate) path: PathBuf,
    pub(crate) device: u64,
    pub(crate) inode: u64,
}

/// A connection that is passed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct PassedClient {
    /// The number of its socket, in the order of the `socket` records.
    pub(crate) socket: u32,
    /// Its address; `None` for a client of a Unix listener.
    pub(crate) peer: Option<SocketAddr>,
    /// How long ago it was accepted.
    pub(crate) waited: Duration,
    /// A worker may have a copy.
    pub(crate) resent: bool,
    /// Its PROXY header has not been read.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) awaits_header: bool,
    /// What a proxy said about it, if its PROXY header has been read: `peer` is the client then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) proxy: Option<PassedHeader>,
}

/// What a proxy said about a connection that is passed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PassedHeader {
    /// The address of the proxy; `None` for one that came through a Unix listener.
    pub(crate) address: Option<SocketAddr>,
    /// It named no client.
    pub(crate) local: bool,
    pub(crate) tlvs: Vec<u8>,
}

/// Most connections with a [`PassedHeader`] in one record: a byte of a TLV is up to four
/// characters.
pub(crate) const MAX_PROXIED: usize = 12;

/// One record.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "snake_case")]
pub(crate) enum Record {
    Hello { version: u32, program: String },
    Welcome { pid: i32 },
    Refused { reason: String },
    Socket { about: About },
    End { sockets: u32 },
    Unused { socket: u32 },
    Ready,
    Clients { clients: Vec<PassedClient> },
    Received { clients: u32 },
    Commit,
    Committed,
}

/// Why a take-over cannot go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Broken {
    /// The other dispatcher has closed the connection, or has ended.
    Ended,
    /// The other dispatcher did not answer in time.
    Late,
    /// The other dispatcher refuses.
    Refused(String),
    /// Anything else.
    Other(String),
}

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Broken::Ended => f.write_str("the other dispatcher has ended or closed the connection"),
            Broken::Late => f.write_str("the other dispatcher did not answer in time"),
            Broken::Refused(reason) | Broken::Other(reason) => f.write_str(reason),
        }
    }
}

impl From<Errno> for Broken {
    fn from(errno: Errno) -> Broken {
        match errno {
            Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN => Broken::Ended,
            errno => Broken::Other(format!("the take-over socket: {errno}")),
        }
    }
}

/// A connection between two dispatchers.
#[derive(Debug)]
pub(crate) struct Channel(OwnedFd);

impl Channel {
    /// An accepted connection.
    pub(crate) fn new(socket: OwnedFd) -> Channel {
        Channel(socket)
    }

    /// Connects to the take-over socket of a running dispatcher. Waits for as long as another
    /// take-over is under way, at most until `deadline`.
    pub(crate) fn connect(path: &Path, deadline: Instant) -> rustix::io::Result<Channel> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        loop {
            match rustix::net::connect(&socket, &SocketAddrUnix::new(path)?) {
                Ok(()) => return Ok(Channel(socket)),
                // Its queue is full.
                Err(Errno::AGAIN | Errno::INTR) if Instant::now() < deadline => {
                    std::thread::sleep(AGAIN);
                }
                Err(errno) => return Err(errno),
            }
        }
    }

    pub(crate) fn socket(&self) -> &OwnedFd {
        &self.0
    }

    /// Sends one record, whole or not at all.
    pub(crate) fn send(
        &self,
        record: &Record,
        fds: &[BorrowedFd<'_>],
        deadline: Instant,
    ) -> Result<(), Broken> {
        let bytes = serde_json::to_vec(record).map_err(|e| Broken::Other(e.to_string()))?;
        if bytes.len() > MAX_RECORD {
            return Err(Broken::Other(format!("a record of {} bytes is too long", bytes.len())));
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        loop {
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(Broken::Other("too many descriptors for one record".to_owned()));
            }
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::net::sendmsg(&self.0, &[IoSlice::new(&bytes)], &mut ancillary, flags) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT, deadline)?,
                // Too many descriptors of this user are on their way: the other side receives them.
                Err(Errno::TOOMANYREFS | Errno::NOBUFS) if Instant::now() < deadline => {
                    std::thread::sleep(AGAIN);
                }
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Receives one record. A `refused` is an error.
    pub(crate) fn receive(&self, deadline: Instant) -> Result<(Record, Vec<OwnedFd>), Broken> {
        let mut bytes = vec![0; MAX_RECORD];
        loop {
            let mut space =
                [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            let mut parts = [IoSliceMut::new(&mut bytes)];
            let message = match rustix::net::recvmsg(&self.0, &mut parts, &mut ancillary, flags) {
                Ok(message) => message,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => {
                    self.wait(PollFlags::IN, deadline)?;
                    continue;
                }
                Err(errno) => return Err(errno.into()),
            };
            let fds: Vec<OwnedFd> = ancillary
                .drain()
                .filter_map(|message| match message {
                    RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                    _ => None,
                })
                .flatten()
                .collect();
            if message.bytes == 0 {
                return Err(Broken::Ended);
            }
            if message.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
                return Err(Broken::Other(
                    "a record was cut off: too few descriptors are left (LimitNOFILE=)".to_owned(),
                ));
            }
            return match serde_json::from_slice(&bytes[..message.bytes]) {
                Ok(Record::Refused { reason }) => Err(Broken::Refused(reason)),
                Ok(record) => Ok((record, fds)),
                Err(error) => Err(Broken::Other(format!("not a record of a take-over: {error}"))),
            };
        }
    }

    fn wait(&self, event: PollFlags, deadline: Instant) -> Result<(), Broken> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Broken::Late);
        }
        let timeout = Timespec::try_from(left).ok();
        match poll(&mut [PollFd::from_borrowed_fd(self.0.as_fd(), event)], timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    fn pair() -> (Channel, Channel) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (one, other) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
                .expect("a pair");
        (Channel(one), Channel(other))
    }

    #[test]
    fn a_full_batch_of_connections_arrives() {
        let (one, other) = pair();
        let deadline = Instant::now() + SOON;
        let client = PassedClient {
            socket: u32::MAX,
            peer: Some("[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535".parse().expect("it")),
            waited: Duration::MAX,
            resent: false,
            awaits_header: true,
            proxy: None,
        };
        let record = Record::Clients { clients: vec![client; MAX_DESCRIPTORS] };
        let fds = vec![one.socket().as_fd(); MAX_DESCRIPTORS];
        one.send(&record, &fds, deadline).expect("sent");
        let (received, fds) = other.receive(deadline).expect("received");
        let Record::Clients { clients } = received else { panic!("{received:?}") };
        assert_eq!((clients.len(), fds.len()), (MAX_DESCRIPTORS, MAX_DESCRIPTORS));
        assert_eq!(clients[0].waited, Duration::MAX);
    }

    #[test]
    fn full_headers_of_proxies_fit_into_a_record() {
        let (one, other) = pair();
        let deadline = Instant::now() + SOON;
        let address = "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535".parse().expect("it");
        let tlvs = vec![255; dispatch_protocol::wire::MAX_PROXY_TLVS];
        let client = PassedClient {
            socket: u32::MAX,
            peer: Some(address),
            waited: Duration::MAX,
            resent: false,
            awaits_header: false,
            proxy: Some(PassedHeader { address: Some(address), local: false, tlvs }),
        };
        let record = Record::Clients { clients: vec![client.clone(); MAX_PROXIED] };
        let fds = vec![one.socket().as_fd(); MAX_PROXIED];
        one.send(&record, &fds, deadline).expect("sent");
        let (received, _) = other.receive(deadline).expect("received");
        let Record::Clients { clients } = received else { panic!("{received:?}") };
        assert_eq!(clients[MAX_PROXIED - 1].proxy, client.proxy);
    }

    #[test]
    fn every_wait_ends() {
        let (one, other) = pair();
        let soon = Instant::now() + Duration::from_millis(20);
        assert_eq!(one.receive(soon).map(drop), Err(Broken::Late));
        let mut sent = 0;
        let full = loop {
            match one.send(&Record::Ready, &[], soon) {
                Ok(()) => sent += 1,
                Err(broken) => break broken,
            }
        };
        assert_eq!(full, Broken::Late);
        drop(one);
        let deadline = Instant::now() + SOON;
        (0..sent).for_each(|_| drop(other.receive(deadline).expect("queued")));
        assert_eq!(other.receive(deadline).map(drop), Err(Broken::Ended));
        assert_eq!(other.send(&Record::Commit, &[], deadline), Err(Broken::Ended));
    }

    #[test]
    fn garbage_and_refusals_are_errors() {
        let (one, other) = pair();
        let deadline = Instant::now() + SOON;
        for garbage in [&b"x"[..], b"{}", br#"{"record":"new"}"#, &[0xff; 40_000]] {
            rustix::net::send(one.socket(), garbage, SendFlags::empty()).expect("sent");
            let broken = other.receive(deadline).map(drop).expect_err("garbage");
            assert!(matches!(broken, Broken::Other(_)), "{broken:?}");
        }
        let reason = "no".to_owned();
        one.send(&Record::Refused { reason: reason.clone() }, &[], deadline).expect("sent");
        assert_eq!(other.receive(deadline).map(drop), Err(Broken::Refused(reason)));
    }
}
