//! Receiving from sockets: records with descriptors, and the frames of a stream.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;

use dispatch_protocol::relay::frame::Frame;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recv, recvmsg,
};

/// Receives once and hands out whole frames; false at the end of the stream.
pub(super) fn read_frames(
    fd: &OwnedFd,
    partial: &mut Vec<u8>,
    scratch: &mut [u8],
    most: usize,
    mut take: impl FnMut(&[u8]) -> Result<(), String>,
) -> Result<bool, String> {
    let count = match recv(fd, &mut *scratch, RecvFlags::DONTWAIT) {
        Ok((0, _)) => return Ok(false),
        Ok((count, _)) => count,
        Err(Errno::AGAIN | Errno::INTR) => return Ok(true),
        Err(Errno::CONNRESET) => return Ok(false),
        Err(error) => return Err(error.to_string()),
    };
    let mut split = |stream: &[u8]| {
        let mut used = 0;
        while let Some(len) = Frame::len_of(&stream[used..]) {
            if len > most {
                return Err(format!("a frame of {len} bytes, at most {most} are allowed"));
            }
            let Some(frame) = stream.get(used..used + len) else { break };
            take(frame)?;
            used += len;
        }
        Ok(used)
    };
    let received = &scratch[..count];
    if partial.is_empty() {
        let used = split(received)?;
        partial.extend_from_slice(&received[used..]);
    } else {
        partial.extend_from_slice(received);
        let used = split(partial)?;
        partial.drain(..used);
        if partial.is_empty() {
            // A large message should not keep its memory.
            partial.shrink_to(64 * 1024);
        }
    }
    Ok(true)
}

/// Receives a record with its descriptors; without them if some were cut off.
pub(super) fn receive_record(
    fd: &OwnedFd,
    buffer: &mut [u8],
) -> Result<(usize, Vec<OwnedFd>), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let message = recvmsg(fd, &mut [IoSliceMut::new(buffer)], &mut ancillary, flags)?;
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    if message.flags.contains(ReturnFlags::CTRUNC) {
        fds.clear();
    }
    Ok((message.bytes, fds))
}
