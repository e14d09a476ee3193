//! Whether descriptors can be passed at all: ETOOMANYREFS says that the machine is short of room for them, or that this one
//! descriptor cannot be passed, and not which.
//!
//! Before Linux 6.10 a Unix socket in whose queue there are Unix sockets, and so on, is such a descriptor; a client of a
//! `unix:` listener can send itself into that state.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::EventfdFlags;
use rustix::net::{AddressFamily, RecvAncillaryBuffer, RecvFlags, SocketFlags, SocketType};

use super::worker_io::send_record;

/// A way from this process to itself, and something harmless to pass.
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

    /// Passes a descriptor of our own to ourselves. Nothing but our own is touched.
    pub(super) fn passes(&self) -> bool {
        if send_record(self.way.0.as_fd(), b"x", &[self.passed.as_fd()]).is_err() {
            return false;
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        // Dropping the buffer closes what it received.
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
