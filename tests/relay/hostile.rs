//! Peers that break the protocol hurt only themselves.

use std::os::fd::{AsFd, OwnedFd};

use dispatch_protocol::relay::{FromDirectory, MAX_RECORD, Name, ToDirectory, VERSION};
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
    use dispatch_protocol::relay::frame;
    use rustix::net::recvmsg;

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
    let mut guessed_key = Vec::new();
    frame::data(&mut guessed_key, 0, 1, 12345, b"alice", b"forged");
    let too_long = u32::MAX.to_le_bytes().to_vec();
    let cases = [vec![1, 0, 0, 0, 9], wrong_sequence, false_answer, forward, too_long];
    for (n, bytes) in cases.into_iter().enumerate() {
        // A member of its own, and a link to b.
        let number = 1000 + n as u64;
        let control = entered(&directory, number);
        say(
            &control,
            &ToDirectory::Lookup { request: 1, id: id("alice"), newest: 0, ended: false },
        );
        let Some(FromDirectory::Found { places, .. }) = hear(&control) else { panic!("no place") };
        say(&control, &ToDirectory::Connect { member: places[0].member, after: 0 });
        let mut buffer = [0; 4096];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = rustix::net::RecvAncillaryBuffer::new(&mut space);
        let io = &mut [std::io::IoSliceMut::new(&mut buffer)];
        recvmsg(&control, io, &mut ancillary, RecvFlags::CMSG_CLOEXEC).unwrap();
        let link = ancillary.drain().find_map(|message| match message {
            rustix::net::RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        let link = link.expect("a link");
        rustix::io::ioctl_fionbio(&link, false).unwrap();
        send(&link, &bytes, SendFlags::NOSIGNAL).unwrap();
        assert!(matches!(recv(&link, &mut [0; 64][..], RecvFlags::empty()), Ok((0, _)) | Err(_)));
        assert_eq!(a.send(&id("alice"), "x").wait(), Outcome::Delivered, "case {n}");
    }
    let received: Vec<_> = std::iter::from_fn(|| alice.try_recv()).collect();
    assert!(received.iter().all(|message| message.bytes() == b"x" || message.bytes() == b"0"));
}
