//! Checks whether descriptors can be passed at all. ETOOMANYREFS means that the machine has no room
//! for descriptors in flight, or that this one descriptor cannot be passed; the error does not say
//! which.
//!
//! Before Linux 6.10 a Unix socket whose queue contains nested Unix sockets cannot be passed; a
//! client of a `unix:` listener can put its own socket into that state.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::EventfdFlags;
use rustix::net::{AddressFamily, RecvAncillaryBuffer, RecvFlags, SocketFlags, SocketType};

use super::worker_io::send_record;

/// A socket pair of this process, and a harmless descriptor to pass.
#[derive(Debug)]
pub(super) struct HandoffCheck {
    way: (OwnedFd, OwnedFd),
    passed: OwnedFd,
}

impl HandoffCheck {
    pub(super) fn new() -> std::io::Result<HandoffCheck> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let way = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        let passed = rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?;
        Ok(HandoffCheck { way, passed })
    }

    /// Passes a descriptor of the dispatcher to itself. Touches only its own sockets.
    pub(super) fn passes(&self) -> bool {
        if send_record(self.way.0.as_fd(), b"x", &[self.passed.as_fd()]).is_err() {
            return false;
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        // Dropping the buffer closes the received descriptor.
        let mut record = [0];
        let mut parts = [IoSliceMut::new(&mut record)];
        rustix::net::recvmsg(&self.way.1, &mut parts, &mut ancillary, flags).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_of_our_own_passes_again_and_again() {
        let handoff_check = HandoffCheck::new().expect("a socket pair");
        let before = std::fs::read_dir("/proc/self/fd").expect("descriptors").count();
        assert!((0..1000).all(|_| handoff_check.passes()));
        // Other tests of this process open and close descriptors meanwhile.
        assert!(std::fs::read_dir("/proc/self/fd").expect("descriptors").count() < before + 500);
    }
}
