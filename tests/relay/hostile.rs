//! Peers that break the protocol hurt only themselves.

use std::os::fd::{AsFd, OwnedFd};

use dispatch_protocol::relay::{FromDirectory, MAX_RECORD, Name, ToDirectory, VERSION, frame};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, connect, recv, send, sendmsg, socket_with,
};
use test_support::{PATIENCE, wait_until};
use worker_sdk::relay::Outcome;

use super::{Directory, id, text_of};

fn raw(directory: &Directory) -> OwnedFd {
    let flags = SocketFlags::CLOEXEC;
    let fd = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    connect(&fd, &SocketAddrUnix::new(directory.socket()).unwrap()).unwrap();
    let timeout = rustix::net::sockopt::Timeout::Recv;
    rustix::net::sockopt::set_socket_timeout(&fd, timeout, Some(PATIENCE)).unwrap();
    fd
}

fn say(fd: &OwnedFd, record: &ToDirectory) {
    let mut bytes = Vec::new();
    record.encode(&mut bytes);
    // It may have been cut.
    let _ = send(fd, &bytes, SendFlags::NOSIGNAL);
}

fn hear(fd: &OwnedFd) -> Option<FromDirectory> {
    let mut buffer = vec![0; MAX_RECORD];
    match recv(fd, &mut buffer[..], RecvFlags::empty()) {
        Ok((0, _)) | Err(_) => None,
        Ok((len, _)) => Some(FromDirectory::decode(&buffer[..len]).unwrap()),
    }
}

fn hello(number: u64) -> ToDirectory {
    ToDirectory::Hello {
        version: VERSION,
        namespace: Name::new("default").unwrap(),
        member: number,
        worker: Name::new("hostile").unwrap(),
        ticket: Vec::new(),
    }
}

fn entered(directory: &Directory, number: u64) -> OwnedFd {
    let fd = raw(directory);
    say(&fd, &hello(number));
    assert!(matches!(hear(&fd), Some(FromDirectory::Welcome { .. })));
    fd
}

#[test]
fn bad_records_cost_their_sender_its_connection_and_nobody_else_anything() {
    let directory = Directory::start("hello_timeout = \"300ms\"");
    let (a, b) = (directory.relay("a"), directory.relay("b"));
    let alice = b.register(&id("alice")).wait().unwrap();
    let before = directory.pid().fds();

    let silent = raw(&directory);
    assert!(hear(&silent).is_none(), "no hello in time");
    let garbage = raw(&directory);
    send(&garbage, &[255; 100], SendFlags::NOSIGNAL).unwrap();
    assert!(hear(&garbage).is_none());
    let other_version = raw(&directory);
    let mut record = Vec::new();
    hello(1).encode(&mut record);
    record[2] = 99;
    send(&other_version, &record, SendFlags::NOSIGNAL).unwrap();
    assert!(matches!(hear(&other_version), Some(FromDirectory::Refused { .. })));

    let late_garbage = entered(&directory, 5);
    send(&late_garbage, &[255; 100], SendFlags::NOSIGNAL).unwrap();
    assert!(hear(&late_garbage).is_none());
    // Descriptors that were not asked for.
    let with_fds = entered(&directory, 6);
    let own = with_fds.as_fd();
    let fds = [own; 20];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(20))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
    let io = [std::io::IoSlice::new(b"\x0e\x00aaaaaaaa")];
    sendmsg(&with_fds, &io, &mut ancillary, SendFlags::NOSIGNAL).unwrap();
    assert!(hear(&with_fds).is_none());
    // A number that another member has.
    let first = entered(&directory, 7);
    let second = raw(&directory);
    say(&second, &hello(7));
    assert!(matches!(hear(&second), Some(FromDirectory::Refused { transient: true, .. })));

    drop((silent, garbage, other_version, late_garbage, with_fds, first, second));
    assert_eq!(a.send(&id("alice"), "still").wait(), Outcome::Delivered);
    assert_eq!(text_of!(alice).as_deref(), Some("still"));
    wait_until("their descriptors to be closed", || directory.pid().fds() <= before + 1);
}

#[test]
fn a_member_that_does_not_read_is_cut_and_delays_nobody() {
    let directory = Directory::start("");
    let deaf = entered(&directory, 9);
    let (a, b) = (directory.relay("a"), directory.relay("b"));
    let alice = b.register(&id("alice")).wait().unwrap();
    // It asks without reading the answers, far more than may wait for it.
    let asks = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        ToDirectory::Stats { request: 1 }.encode(&mut bytes);
        let mut sent = 0u64;
        while send(&deaf, &bytes, SendFlags::NOSIGNAL).is_ok() {
            sent += 1;
        }
        sent
    });
    let mut sent = 0;
    while !asks.is_finished() {
        assert_eq!(a.send(&id("alice"), "x").wait(), Outcome::Delivered);
        assert_eq!(text_of!(alice).as_deref(), Some("x"));
        sent += 1;
    }
    assert!(asks.join().unwrap() > 1000 && sent > 0);
    assert!(directory.log().contains("it does not read"), "{}", directory.log());
}

#[test]
fn a_member_that_speaks_nonsense_on_a_link_loses_only_that_link() {
    let directory = Directory::start("grace = \"0s\"");
    let (a, b) = (directory.relay("a"), directory.relay("b"));
    let alice = b.register(&id("alice")).wait().unwrap();
    assert_eq!(a.send(&id("alice"), "0").wait(), Outcome::Delivered);
    let mut wrong_sequence = Vec::new();
    frame::data(&mut wrong_sequence, 0, 5, 1, b"alice", b"");
    let mut false_answer = Vec::new();
    frame::answers(&mut false_answer, &[(1, u32::MAX, frame::Status::Delivered)]);
    let mut forward = Vec::new();
    frame::forward(&mut forward, 1, 2, (3, 4), false, &[]);
    let too_long = u32::MAX.to_le_bytes().to_vec();
    let cases = [vec![1, 0, 0, 0, 9], wrong_sequence, false_answer, forward, too_long];
    let count = cases.len();
    for (n, bytes) in cases.into_iter().enumerate() {
        // A member of its own, and a link to b.
        let (_control, link) = linked(&directory, 1000 + n as u64, "alice");
        send(&link, &bytes, SendFlags::NOSIGNAL).unwrap();
        assert!(matches!(recv(&link, &mut [0; 64][..], RecvFlags::empty()), Ok((0, _)) | Err(_)));
        assert_eq!(a.send(&id("alice"), "x").wait(), Outcome::Delivered, "case {n}");
    }
    let received: Vec<_> = std::iter::from_fn(|| alice.try_recv()).collect();
    let received: Vec<_> = received.iter().map(|message| message.bytes().to_vec()).collect();
    let mut expected = vec![b"0".to_vec()];
    expected.resize(1 + count, b"x".to_vec());
    assert_eq!(received, expected, "nothing forged, nothing lost");
}

/// A member that follows the protocol so far, and its link to the member that has this id.
fn linked(directory: &Directory, number: u64, to: &str) -> (OwnedFd, OwnedFd) {
    let control = entered(directory, number);
    say(&control, &ToDirectory::Lookup { request: 1, id: id(to), newest: 0, ended: false });
    let Some(FromDirectory::Found { places, .. }) = hear(&control) else { panic!("no place") };
    say(&control, &ToDirectory::Connect { member: places[0].member, after: 0 });
    let (_, link) = hear_link(&control);
    (control, link)
}

/// The next record, which is a link: its number and the link.
fn hear_link(control: &OwnedFd) -> (u64, OwnedFd) {
    let mut buffer = [0; 4096];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = rustix::net::RecvAncillaryBuffer::new(&mut space);
    let io = &mut [std::io::IoSliceMut::new(&mut buffer)];
    let received =
        rustix::net::recvmsg(control, io, &mut ancillary, RecvFlags::CMSG_CLOEXEC).unwrap();
    let link = ancillary.drain().find_map(|message| match message {
        rustix::net::RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    let link = link.expect("a link");
    rustix::io::ioctl_fionbio(&link, false).unwrap();
    let timeout = rustix::net::sockopt::Timeout::Recv;
    rustix::net::sockopt::set_socket_timeout(&link, timeout, Some(PATIENCE)).unwrap();
    match FromDirectory::decode(&buffer[..received.bytes]).unwrap() {
        FromDirectory::Link { number, .. } => (number, link),
        other => panic!("{other:?}"),
    }
}

/// The next frame of a link, with its length field.
fn frame_of(link: &OwnedFd) -> Vec<u8> {
    let mut bytes = Vec::new();
    loop {
        if let Some(len) = frame::Frame::len_of(&bytes).filter(|len| bytes.len() >= *len) {
            assert_eq!(bytes.len(), len, "one frame");
            return bytes;
        }
        let wanted = frame::Frame::len_of(&bytes).unwrap_or(4) - bytes.len();
        let mut buffer = vec![0; wanted];
        let (count, _) = recv(link, &mut buffer[..], RecvFlags::empty()).unwrap();
        assert!(count > 0, "the link was closed");
        bytes.extend_from_slice(&buffer[..count]);
    }
}

#[test]
fn a_message_to_a_guessed_key_reaches_no_registration() {
    let directory = Directory::start("");
    let b = directory.relay("b");
    let alice = b.register(&id("alice")).wait().unwrap();
    let (control, link) = linked(&directory, 1000, "alice");
    say(&control, &ToDirectory::Lookup { request: 2, id: id("alice"), newest: 0, ended: false });
    let Some(FromDirectory::Found { places, .. }) = hear(&control) else { panic!("no place") };
    let key = u64::from(places[0].key);
    let status = |sequence, key| {
        let mut data = Vec::new();
        frame::data(&mut data, 0, sequence, key, b"alice", b"forged");
        send(&link, &data, SendFlags::NOSIGNAL).unwrap();
        let answer = frame_of(&link);
        let frame::Frame::Answers(mut answers) = frame::Frame::decode(&answer).unwrap() else {
            panic!("no answer")
        };
        let (first, count, status) = answers.next().unwrap();
        assert_eq!((first, count), (sequence, 1));
        status
    };
    assert_eq!(status(1, key ^ 12345), frame::Status::NotHere);
    assert_eq!(status(2, key + (1 << 32)), frame::Status::NotHere);
    assert!(alice.try_recv().is_none(), "it has arrived");
    // The right one, so the attempts have failed because of their keys.
    assert_eq!(status(3, key), frame::Status::Delivered);
    assert_eq!(text_of!(alice).as_deref(), Some("forged"));
}

#[test]
fn answers_to_nothing_end_the_link_of_their_sender_alone() {
    let directory = Directory::start("grace = \"0s\"");
    let (a, b) = (directory.relay("a"), directory.relay("b"));
    let alice = b.register(&id("alice")).wait().unwrap();
    let mallory = entered(&directory, 1000);
    say(&mallory, &ToDirectory::Register { request: 1, id: id("mallory"), stamp: 0, key: 1 });
    assert!(matches!(hear(&mallory), Some(FromDirectory::Registered { .. })));
    let sends: Vec<_> = (0..3).map(|_| a.send(&id("mallory"), "x")).collect();
    let (_, link) = hear_link(&mallory);
    let mut answers = Vec::new();
    frame::answers(&mut answers, &[(1, 3, frame::Status::Delivered)]);
    // Whatever has come: all three were sent before.
    wait_until("the messages to come", || {
        let mut bytes = [0; 1024];
        let (count, _) = recv(&link, &mut bytes[..], RecvFlags::PEEK).unwrap();
        count >= 3 * 30
    });
    send(&link, &answers, SendFlags::NOSIGNAL).unwrap();
    assert!(sends.into_iter().all(|one| one.wait() == Outcome::Delivered));
    // The same again, as often as a frame can say it.
    answers.clear();
    frame::answers(&mut answers, &vec![(0, u32::MAX, frame::Status::Delivered); 1000]);
    let _ = send(&link, &answers, SendFlags::NOSIGNAL);
    wait_until("the link to be closed", || {
        matches!(recv(&link, &mut [0; 1024][..], RecvFlags::empty()), Ok((0, _)) | Err(_))
    });
    assert_eq!(a.send(&id("alice"), "x").wait(), Outcome::Delivered);
    assert_eq!(text_of!(alice).as_deref(), Some("x"));
    assert!(a.is_joined());
}

#[test]
fn false_link_numbers_and_links_without_end_cost_their_sender_alone() {
    let directory = Directory::start("");
    let (a, b) = (directory.relay("a"), directory.relay("b"));
    let alice = b.register(&id("alice")).wait().unwrap();
    assert_eq!(a.send(&id("alice"), "0").wait(), Outcome::Delivered);
    let mallory = entered(&directory, 1000);
    let lookup = ToDirectory::Lookup { request: 1, id: id("alice"), newest: 0, ended: false };
    say(&mallory, &lookup);
    let Some(FromDirectory::Found { places, .. }) = hear(&mallory) else { panic!("no place") };
    let member = places[0].member;
    // True numbers, one link after the other, while b's thread has no turn to take them.
    let mut after = 0;
    for _ in 0..400 {
        say(&mallory, &ToDirectory::Connect { member, after });
        say(&mallory, &lookup);
        loop {
            let mut buffer = vec![0; 4096];
            let (len, _) = recv(&mallory, &mut buffer[..], RecvFlags::empty()).unwrap();
            match FromDirectory::decode(&buffer[..len]).unwrap() {
                FromDirectory::Link { number, .. } => after = number,
                FromDirectory::Found { .. } => break,
                FromDirectory::NoLink { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }
    for false_number in [u64::MAX, after + 1] {
        let other = entered(&directory, 2000);
        say(&other, &ToDirectory::Connect { member, after: false_number });
        assert!(hear(&other).is_none(), "it is cut");
        wait_until("it to have left", || directory.count("members") == 3);
    }
    assert!(directory.log().contains("a link that does not exist"), "{}", directory.log());
    assert_eq!(directory.log().matches("member_cut").count(), 2, "{}", directory.log());
    assert_eq!(a.send(&id("alice"), "1").wait(), Outcome::Delivered);
    assert_eq!(text_of!(alice).as_deref(), Some("0"));
    assert_eq!(text_of!(alice).as_deref(), Some("1"));
}

#[test]
fn an_observer_cannot_register() {
    let directory = Directory::start("");
    let a = directory.relay("a");
    let observer = entered(&directory, 0);
    say(&observer, &ToDirectory::Stats { request: 1 });
    assert!(matches!(hear(&observer), Some(FromDirectory::Counts { .. })));
    say(&observer, &ToDirectory::Register { request: 2, id: id("alice"), stamp: 0, key: 1 });
    assert!(hear(&observer).is_none(), "it is cut");
    assert!(directory.log().contains("an observer may only ask"), "{}", directory.log());
    assert_eq!(a.who(&id("alice")).wait().unwrap().places, []);
}

#[test]
fn what_waits_for_members_of_one_user_is_bounded_and_the_largest_queue_goes() {
    let directory = Directory::start("max_queued_bytes_per_user = 1100000");
    let (a, b) = (directory.relay("a"), directory.relay("b"));
    let alice = b.register(&id("alice")).wait().unwrap();
    let before = directory.count("queued_bytes");
    let deaf: Vec<_> = (0..2)
        .map(|n| {
            let deaf = entered(&directory, 1000 + n);
            std::thread::spawn(move || {
                let mut bytes = Vec::new();
                ToDirectory::Stats { request: 1 }.encode(&mut bytes);
                while send(&deaf, &bytes, SendFlags::NOSIGNAL).is_ok() {}
            })
        })
        .collect();
    while !deaf.iter().all(std::thread::JoinHandle::is_finished) {
        assert_eq!(a.send(&id("alice"), "x").wait(), Outcome::Delivered);
        assert_eq!(text_of!(alice).as_deref(), Some("x"));
    }
    deaf.into_iter().for_each(|thread| thread.join().unwrap());
    let log = directory.log();
    assert!(log.contains("max_queued_bytes_per_user"), "{log}");
    assert_eq!(log.matches("member_cut").count(), 2, "no other member: {log}");
    assert!(a.is_joined() && b.is_joined());
    wait_until("the bytes to be given back", || directory.count("queued_bytes") <= before);
}
