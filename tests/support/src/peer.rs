//! A hand-made worker: it speaks the protocol record by record, and can deviate at each step.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

use dispatch_protocol::wire::{Control, Hello, Refused, Welcome};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

use crate::PATIENCE;

/// A peer on the dispatch socket that sends arbitrary records.
pub struct Peer {
    pub socket: OwnedFd,
}

impl Peer {
    pub fn connect(path: &Path) -> Peer {
        let flags = SocketFlags::CLOEXEC;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
                .unwrap();
        rustix::net::connect(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
        let patience = Some(PATIENCE);
        rustix::net::sockopt::set_socket_timeout(
            &socket,
            rustix::net::sockopt::Timeout::Recv,
            patience,
        )
        .unwrap();
        Peer { socket }
    }

    pub fn send(&self, record: &[u8], fds: &[BorrowedFd<'_>]) -> rustix::io::Result<usize> {
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let flags = SendFlags::NOSIGNAL;
        rustix::net::sendmsg(&self.socket, &[IoSlice::new(record)], &mut ancillary, flags)
    }

    /// The next record and its descriptors; `None` at the end.
    pub fn receive(&self) -> Option<(Vec<u8>, Vec<OwnedFd>)> {
        receive(&self.socket)
    }

    pub fn refusal(&self) -> Refused {
        let (record, fds) = self.receive().expect("an answer");
        assert!(fds.is_empty());
        let Control::Refused(refused) = Control::decode(&record).unwrap() else {
            panic!("not a refusal: {record:?}")
        };
        assert!(self.receive().is_none(), "it closes after a refusal");
        refused
    }

    /// Joins properly; returns the channel, the scoreboard, the eventfd.
    pub fn join(&self, hello: &Hello) -> (Welcome, Vec<OwnedFd>) {
        self.send(&encode(hello), &[]).unwrap();
        let (record, fds) = self.receive().expect("an answer");
        let Control::Welcome(welcome) = Control::decode(&record).unwrap() else {
            panic!("not a welcome: {:?}", Control::decode(&record))
        };
        assert_eq!(fds.len(), 3);
        (welcome, fds)
    }

    pub fn ended(&self) -> bool {
        // A record may still be queued (a refusal); the end must follow.
        for _ in 0..2 {
            if self.receive().is_none() {
                return true;
            }
        }
        false
    }
}

pub fn receive(socket: &OwnedFd) -> Option<(Vec<u8>, Vec<OwnedFd>)> {
    receive_with(socket, RecvFlags::empty())
}

/// Receives with other flags, such as PEEK.
pub fn receive_with(socket: &OwnedFd, flags: RecvFlags) -> Option<(Vec<u8>, Vec<OwnedFd>)> {
    let mut record = vec![0; 16 * 1024];
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = flags | RecvFlags::CMSG_CLOEXEC;
    let mut parts = [IoSliceMut::new(&mut record)];
    match rustix::net::recvmsg(socket, &mut parts, &mut ancillary, flags) {
        Ok(message) if message.bytes > 0 => {
            let fds = ancillary
                .drain()
                .filter_map(|message| match message {
                    RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                    _ => None,
                })
                .flatten()
                .collect();
            record.truncate(message.bytes);
            Some((record, fds))
        }
        Ok(_) | Err(rustix::io::Errno::CONNRESET | rustix::io::Errno::PIPE) => None,
        Err(errno) => panic!("no answer: {errno}"),
    }
}

pub fn hello() -> Hello {
    Hello {
        pool: "web".to_owned(),
        name: "bad".to_owned(),
        max_connections: 100,
        ..Hello::default()
    }
}

pub fn encode(hello: &Hello) -> Vec<u8> {
    let mut record = Vec::new();
    hello.encode(&mut record);
    record
}
