//! Receives records from the channel and pairs their entries with their file descriptors.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg as recv,
};

use dispatch_protocol::wire::{
    Channel, Drain, Entry, MAX_CHANNEL_RECORD, MAX_FDS_PER_RECORD, Probe, ProxyHeader,
};

/// Whether to wait for a record. The flag belongs to each call, because `O_NONBLOCK` on the channel
/// would also apply to the dispatcher's duplicate.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum ReceiveMode {
    Blocking,
    NonBlocking,
}

/// A connection of a handoff.
pub(super) struct Arrived {
    pub(super) entry: Entry,
    pub(super) fd: OwnedFd,
    pub(super) proxy: Option<Box<ProxyHeader>>,
}

pub(super) enum Received {
    Handoff {
        arrived: Vec<Arrived>,
        /// Entries without descriptors: this process has no room for more.
        lost: Vec<Entry>,
    },
    Probe(Probe),
    Drain(Drain),
    Resume,
    /// No record is available now.
    Empty,
    /// The dispatcher has closed its end, and every record has been received.
    End,
    /// Not a valid record of a dispatcher. Its descriptors are closed.
    Broken(String),
}

/// The size of a buffer for [`receive`]: one byte more than the longest record.
pub(super) const BUFFER: usize = MAX_CHANNEL_RECORD + 1;

pub(super) fn receive(channel: BorrowedFd<'_>, buffer: &mut [u8], mode: ReceiveMode) -> Received {
    let mut flags = RecvFlags::CMSG_CLOEXEC;
    if mode == ReceiveMode::NonBlocking {
        flags |= RecvFlags::DONTWAIT;
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS_PER_RECORD))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let message = loop {
        match recv(channel, &mut [IoSliceMut::new(buffer)], &mut ancillary, flags) {
            Ok(message) => break message,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Received::Empty,
            Err(error) => return Received::Broken(format!("cannot receive: {error}")),
        }
    };
    let fds = take_fds(&mut ancillary);
    if message.bytes == 0 && fds.is_empty() {
        return Received::End;
    }
    if message.flags.contains(ReturnFlags::TRUNC) {
        return Received::Broken("a record is too long".to_owned());
    }
    let record = match Channel::decode(&buffer[..message.bytes]) {
        Ok(record) => record,
        Err(error) => return Received::Broken(error.to_string()),
    };
    let cut = message.flags.contains(ReturnFlags::CTRUNC);
    if fds.len() > record.fds() || cut && fds.len() == record.fds() {
        return Received::Broken("a record has more file descriptors than entries".to_owned());
    }
    match record {
        Channel::Probe(probe) => Received::Probe(probe),
        Channel::Drain(drain) => Received::Drain(drain),
        Channel::Resume(_) => Received::Resume,
        Channel::Handoff(handoff) => {
            // The kernel installs the descriptors in order and stops at the first failure.
            let lost = handoff.entries[fds.len()..].to_vec();
            let connections = handoff.entries.into_iter().zip(fds);
            let mut arrived: Vec<Arrived> =
                connections.map(|(entry, fd)| Arrived { entry, fd, proxy: None }).collect();
            for (index, header) in handoff.proxy_headers {
                if let Some(arrived) = arrived.get_mut(usize::from(index)) {
                    arrived.proxy = Some(Box::new(header));
                }
            }
            Received::Handoff { arrived, lost }
        }
    }
}

pub(super) fn take_fds(ancillary: &mut RecvAncillaryBuffer<'_>) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        // Other messages, such as credentials, are ignored.
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    fds
}
