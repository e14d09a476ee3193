//! A record on a real socket, with any number of descriptors, received with room for any number of
//! them. Shared by the targets of both receive paths.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::bytes::Bytes;

/// The most descriptors the kernel lets a message carry.
const MOST: usize = 253;

/// No receive takes nearly as long.
const LONG: Duration = Duration::from_secs(10);

/// The receive path that an input is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReceivePath {
    /// The dispatcher receives on a control connection.
    Dispatcher,
    /// A joined worker receives on its channel.
    Worker,
    /// A worker that joins receives the answer to its hello.
    JoiningWorker,
}

/// What is sent, and under which conditions it is received.
pub struct Delivery<'a> {
    pub path: ReceivePath,
    /// Descriptors sent beside the record.
    pub count: usize,
    /// Descriptors for which the receiver has room; `None` for enough.
    pub room: Option<usize>,
    /// Whether the sender closes its end after the record.
    pub closes: bool,
    pub record: &'a [u8],
}

impl<'a> Delivery<'a> {
    /// The input: the path, the number of descriptors, the room (255: enough), whether the sender
    /// closes, the record.
    pub fn new(data: &'a [u8]) -> Delivery<'a> {
        let mut bytes = Bytes::new(data);
        let path = match bytes.byte() % 3 {
            0 => ReceivePath::Dispatcher,
            1 => ReceivePath::Worker,
            _ => ReceivePath::JoiningWorker,
        };
        let count = bytes.below(MOST + 1);
        let room = Some(usize::from(bytes.byte())).filter(|&room| room != 255);
        let closes = bytes.byte() % 2 == 1;
        Delivery { path, count, room, closes, record: bytes.rest() }
    }
}

/// Runs `deliver`, which must not wait and must not leave a descriptor open.
pub fn checked(deliver: impl FnOnce()) {
    let before = open_descriptors();
    let start = Instant::now();
    deliver();
    assert!(start.elapsed() < LONG, "something waited");
    assert_eq!(open_descriptors(), before, "descriptors stay open");
}

/// Blocking sockets: each receive call must pass the flag itself. The timeout reveals a call that
/// waits.
pub fn pair() -> (OwnedFd, OwnedFd) {
    let (ours, theirs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .expect("a socket pair");
    let timeout = rustix::net::sockopt::Timeout::Recv;
    rustix::net::sockopt::set_socket_timeout(&ours, timeout, Some(2 * LONG)).expect("a timeout");
    (ours, theirs)
}

pub fn file() -> OwnedFd {
    rustix::fs::memfd_create(c"fuzz", rustix::fs::MemfdFlags::CLOEXEC).expect("a file")
}

pub fn identity(fd: &OwnedFd) -> (u64, u64) {
    let stat = rustix::fs::fstat(fd).expect("an open descriptor");
    (stat.st_dev, stat.st_ino)
}

pub fn alternating<'a>(one: &'a OwnedFd, other: &'a OwnedFd, count: usize) -> Vec<BorrowedFd<'a>> {
    (0..count).map(|place| if place % 2 == 0 { one.as_fd() } else { other.as_fd() }).collect()
}

/// False if this user has too many descriptors in flight: then there is nothing to receive.
pub fn send(socket: &OwnedFd, record: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(fds.is_empty() || ancillary.push(SendAncillaryMessage::ScmRights(fds)));
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    match rustix::net::sendmsg(socket, &[IoSlice::new(record)], &mut ancillary, flags) {
        Ok(sent) => assert_eq!(sent, record.len()),
        Err(Errno::TOOMANYREFS) => return false,
        Err(error) => panic!("cannot send: {error}"),
    }
    true
}

/// Calls with the limit on descriptors set so that at most `room` more can be opened.
pub fn with_room<T>(room: Option<usize>, call: impl FnOnce() -> T) -> T {
    let Some(room) = room else {
        return call();
    };
    let before = getrlimit(Resource::Nofile);
    // The kernel gives the lowest numbers that are free, and there may be gaps: the first that must
    // not be given is found by opening as many.
    let files: Vec<OwnedFd> = (0..=room).map(|_| file()).collect();
    let current = files.last().map(|file| file.as_raw_fd() as u64);
    drop(files);
    setrlimit(Resource::Nofile, Rlimit { current, maximum: before.maximum }).expect("a limit");
    let result = call();
    setrlimit(Resource::Nofile, before).expect("the limit as it was");
    result
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("/proc").count()
}
