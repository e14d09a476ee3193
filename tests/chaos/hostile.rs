//! A hostile peer of the dispatch socket: it floods, breaks the protocol, joins and takes nothing,
//! and reports false counters. It never claims a connection, so every client sent to it must be
//! served by another worker.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use dispatch_protocol::scoreboard::Scoreboard;
use dispatch_protocol::wire::{Control, Hello, VERSION, Welcome};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use simulator::Random;

use crate::chaos::protocol::now;

pub fn work() {
    let path = PathBuf::from(std::env::var_os("DISPATCH_SOCKET").unwrap());
    let mut random = Random::new(now());
    loop {
        // After any failure it connects again.
        let Some(socket) = connect(&path) else {
            std::thread::sleep(Duration::from_millis(20));
            continue;
        };
        match random.below(6) {
            0 => silent(&socket, &mut random),
            1 => garbage(&socket, &mut random),
            2 => with_descriptors(&socket),
            3 => join_and_leave(&path, &mut random),
            _ => lie(&socket, &mut random),
        }
        std::thread::sleep(Duration::from_millis(random.below(200)));
    }
}

fn connect(path: &PathBuf) -> Option<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    let kind = SocketType::SEQPACKET;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None).ok()?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path).ok()?).ok()?;
    let patience = Some(Duration::from_secs(2));
    rustix::net::sockopt::set_socket_timeout(
        &socket,
        rustix::net::sockopt::Timeout::Recv,
        patience,
    )
    .ok()?;
    Some(socket)
}

fn send(socket: &OwnedFd, record: &[u8], fds: &[&OwnedFd]) {
    let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    let _ = rustix::net::sendmsg(socket, &[IoSlice::new(record)], &mut ancillary, flags);
}

fn hello(name: &str, base: u64) -> Vec<u8> {
    let hello = Hello {
        version: VERSION,
        pool: "web".to_owned(),
        name: name.to_owned(),
        max_connections: 100,
        base,
        ..Hello::default()
    };
    let mut record = Vec::new();
    hello.encode(&mut record);
    record
}

/// The channel, the scoreboard and the eventfd, if it may join.
fn joined(socket: &OwnedFd, base: u64) -> Option<(Welcome, Vec<OwnedFd>)> {
    send(socket, &hello("hostile", base), &[]);
    let mut record = vec![0; 16 * 1024];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut record)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let bytes = rustix::net::recvmsg(socket, &mut parts, &mut ancillary, flags).ok()?.bytes;
    let rights = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let fds: Vec<OwnedFd> = rights.flatten().collect();
    match Control::decode(record.get(..bytes)?) {
        Ok(Control::Welcome(welcome)) => Some((welcome, fds)),
        _ => None,
    }
}

fn silent(_socket: &OwnedFd, random: &mut Random) {
    std::thread::sleep(Duration::from_millis(random.below(300)));
}

fn garbage(socket: &OwnedFd, random: &mut Random) {
    for _ in 0..random.below(50) {
        let bytes: Vec<u8> = (0..random.below(5000)).map(|_| random.below(256) as u8).collect();
        send(socket, &bytes, &[]);
    }
}

fn with_descriptors(socket: &OwnedFd) {
    send(socket, &hello("hostile", 0), &[socket, socket, socket]);
}

fn join_and_leave(path: &PathBuf, random: &mut Random) {
    for _ in 0..random.below(20) {
        let Some(socket) = connect(path) else { return };
        drop(joined(&socket, 0));
    }
}

/// Takes nothing, rings all the time, and reports more finished connections than it ever had.
fn lie(socket: &OwnedFd, random: &mut Random) {
    let base = if random.once_in(2) { u64::MAX - random.below(3) } else { 0 };
    let Some((welcome, fds)) = joined(socket, base) else { return };
    let Ok([_channel, board, doorbell]) = <[OwnedFd; 3]>::try_from(fds) else { return };
    let Ok(board) = Scoreboard::open(board, welcome.slots) else { return };
    let until = Instant::now() + Duration::from_millis(random.below(1500));
    while Instant::now() < until {
        board.raise_finished(random.number());
        let _ = rustix::io::write(&doorbell, &1u64.to_ne_bytes());
        if random.once_in(50) {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
