//! The receive paths of both sides on real sockets: any record, with any number of descriptors, received with room for
//! any number of them. Nothing is left open, nothing waits, and what is said of a record is true.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use dispatch_protocol::scoreboard::Scoreboard;
use dispatch_protocol::wire::{Channel, Control, MAX_CONTROL_RECORD, Resume, VERSION, WELCOME_FDS};
use dispatcher::event_loop::fuzzing::{FromControl, from_control};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use worker_sdk::fuzzing::{FromChannel, answer, from_channel};

use super::bytes::Bytes;

/// The most descriptors the kernel lets a message carry.
const MOST: usize = 253;

/// Nothing here takes nearly as long, and what waits does not come back sooner.
const LONG: Duration = Duration::from_secs(10);

/// The input: which path, how many descriptors, for how many there is room (255: enough), whether the sender closes its
/// end, and the record.
pub fn control_path(data: &[u8]) {
    let mut bytes = Bytes::new(data);
    let path = bytes.byte();
    let count = bytes.below(MOST + 1);
    let room = Some(usize::from(bytes.byte())).filter(|&room| room != 255);
    let closes = bytes.byte() % 2 == 1;
    let record = bytes.rest();
    let before = open_descriptors();
    let start = Instant::now();
    match path % 3 {
        0 => to_dispatcher(record, count, room, closes),
        1 => to_worker(record, count, room, closes),
        _ => to_joining_worker(record, count, room, closes),
    }
    assert!(start.elapsed() < LONG, "something waited");
    assert_eq!(open_descriptors(), before, "descriptors stay open");
}

fn to_dispatcher(record: &[u8], count: usize, room: Option<usize>, closes: bool) {
    let (ours, theirs) = pair();
    let (one, other) = (file(), file());
    if !send(&theirs, record, &alternating(&one, &other, count)) {
        return;
    }
    let _theirs = (!closes).then_some(theirs);
    let received = with_room(room, || from_control(&ours));
    match (received, Control::decode(record)) {
        (FromControl::Broken(why), _) if count > 0 => assert!(why.contains("descriptors")),
        (_, _) if count > 0 => panic!("{count} descriptors were overlooked"),
        (FromControl::End, _) => assert!(record.is_empty()),
        (FromControl::Record(received), Ok(sent)) => assert_eq!(received, sent),
        (FromControl::Broken(why), Err(error)) => {
            let long = record.len() > MAX_CONTROL_RECORD;
            assert!(long && why.contains("longer") || why == error.to_string(), "{why}");
        }
        (received, sent) => panic!("{sent:?} became {received:?}"),
    }
    match from_control(&ours) {
        FromControl::End => assert!(closes),
        FromControl::Empty => assert!(!closes),
        more => panic!("{more:?}"),
    }
}

fn to_worker(record: &[u8], count: usize, room: Option<usize>, closes: bool) {
    let (ours, theirs) = pair();
    let (one, other) = (file(), file());
    if !send(&theirs, record, &alternating(&one, &other, count)) {
        return;
    }
    let _theirs = (!closes).then_some(theirs);
    let received = with_room(room, || from_channel(ours.as_fd()));
    // With less room than came, nobody can tell how many came.
    let short = room.is_some_and(|room| room < count);
    match (received, Channel::decode(record)) {
        // A record without anything is the end; one whose descriptors found no room looks the same.
        (FromChannel::End, Err(_)) => assert!(record.is_empty() && (count == 0 || short)),
        (FromChannel::Broken(_), Err(_)) => {}
        (FromChannel::Broken(why), Ok(sent)) => assert!(count > sent.fds(), "{sent:?}: {why}"),
        (FromChannel::Probe(received), Ok(sent)) => {
            assert_eq!(Channel::Probe(received), sent);
            assert!(count == 0 || short);
        }
        (FromChannel::Drain(received), Ok(sent)) => {
            assert_eq!(Channel::Drain(received), sent);
            assert!(count == 0 || short);
        }
        (FromChannel::Resume, Ok(sent)) => {
            assert_eq!(Channel::Resume(Resume), sent);
            assert!(count == 0 || short);
        }
        (FromChannel::Handoff { arrived, lost }, Ok(Channel::Handoff(sent))) => {
            assert!(short && arrived.len() < count || !short && arrived.len() == count);
            let entries = arrived.iter().map(|(entry, _)| entry).chain(&lost);
            assert!(entries.eq(&sent.entries), "in order, and none is missing");
            for (place, (_, fd)) in arrived.iter().enumerate() {
                let expected = if place % 2 == 0 { &one } else { &other };
                assert_eq!(identity(fd), identity(expected), "each with its own descriptor");
            }
        }
        (received, sent) => panic!("{sent:?} became {received:?}"),
    }
    match from_channel(ours.as_fd()) {
        FromChannel::End => assert!(closes),
        FromChannel::Empty => assert!(!closes),
        more => panic!("{more:?}"),
    }
}

/// The answer to a hello. The first descriptors are what they should be, as far as the record says what that is.
fn to_joining_worker(record: &[u8], count: usize, room: Option<usize>, closes: bool) {
    let (ours, theirs) = pair();
    let sent = Control::decode(record);
    let slots = match &sent {
        Ok(Control::Welcome(welcome)) => welcome.slots.min(64),
        _ => 4,
    };
    let (_board, board) = Scoreboard::create(slots, 0).expect("a scoreboard");
    let (channel, _far) = pair();
    let doorbell = file();
    let mut fds = vec![channel.as_fd(), board.as_fd(), doorbell.as_fd()];
    fds.resize(count.max(fds.len()), doorbell.as_fd());
    if !send(&theirs, record, &fds[..count]) {
        return;
    }
    let _theirs = (!closes).then_some(theirs);
    match with_room(room, || answer(&ours)) {
        Ok(Some(welcome)) => {
            assert_eq!((welcome.version, count), (VERSION, WELCOME_FDS));
            assert_eq!(sent, Ok(Control::Welcome(welcome)));
        }
        Ok(None) => panic!("an answer was overlooked"),
        Err(why) => {
            assert!(!why.is_empty());
            let short = room.is_some_and(|room| room < count);
            match sent {
                Ok(Control::Welcome(w)) if w.version == VERSION && w.slots <= 64 => {
                    assert!(short || count != WELCOME_FDS, "a good welcome: {why}");
                }
                _ => {}
            }
        }
    }
    match answer(&ours) {
        Ok(None) => assert!(!closes),
        Err(_) => assert!(closes),
        Ok(Some(more)) => panic!("{more:?}"),
    }
}

/// Blocking sockets: the flag has to come with each call. Whatever waits all the same is noticed.
fn pair() -> (OwnedFd, OwnedFd) {
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

fn file() -> OwnedFd {
    rustix::fs::memfd_create(c"fuzz", rustix::fs::MemfdFlags::CLOEXEC).expect("a file")
}

fn identity(fd: &OwnedFd) -> (u64, u64) {
    let stat = rustix::fs::fstat(fd).expect("an open descriptor");
    (stat.st_dev, stat.st_ino)
}

fn alternating<'a>(one: &'a OwnedFd, other: &'a OwnedFd, count: usize) -> Vec<BorrowedFd<'a>> {
    (0..count).map(|place| if place % 2 == 0 { one.as_fd() } else { other.as_fd() }).collect()
}

/// False if this user has too many descriptors in flight: then there is nothing to receive.
fn send(socket: &OwnedFd, record: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
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
fn with_room<T>(room: Option<usize>, call: impl FnOnce() -> T) -> T {
    let Some(room) = room else {
        return call();
    };
    let before = getrlimit(Resource::Nofile);
    // The kernel gives the lowest numbers that are free, and there may be gaps: the first that must not be given is found
    // by opening as many.
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
