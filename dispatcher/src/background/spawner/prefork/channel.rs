//! The control channel to a parent that forks workers, and the identity of what it reports.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::super::group;

/// The dispatcher's end, and the parent's end.
pub(super) fn channel() -> io::Result<(OwnedFd, OwnedFd)> {
    let (own, its) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    rustix::io::ioctl_fionbio(&own, true)?;
    Ok((own, its))
}

/// A pidfd of a worker that was reported by the parent whose process group is `group`, and the
/// process id of the process that has forked it.
///
/// The dispatcher signals this process, possibly as root, so it does not believe the parent: the
/// process must be a child of a member of the parent's group, and lead a group. It is the same
/// process before and after the pidfd was opened.
pub(super) fn identify(pid: u32, group: nix::unistd::Pid) -> Result<(OwnedFd, i32), String> {
    let pid = pid.cast_signed();
    let wrong = || {
        format!("process {pid} is not a child of the process that forks, or leads no process group")
    };
    let is_it = || {
        let stat = group::stat(pid)?;
        let parent = group::stat(stat.parent)?;
        (parent.group == group.as_raw() && stat.group == pid && !stat.ended).then_some(stat)
    };
    let before = is_it().ok_or_else(wrong)?;
    let pid = Pid::from_raw(pid).ok_or_else(wrong)?;
    let pidfd = pidfd_open(pid, PidfdFlags::NONBLOCK).map_err(|error| error.to_string())?;
    if is_it() == Some(before) { Ok((pidfd, before.parent)) } else { Err(wrong()) }
}

pub(super) fn send(
    channel: BorrowedFd<'_>,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(fds));
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    loop {
        match sendmsg(channel, &[IoSlice::new(bytes)], &mut ancillary, flags) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
}

/// Receives a record. One that is too long has more bytes than the buffer. `None` when there is
/// none now.
pub(super) fn receive(channel: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<Option<usize>, Errno> {
    // Without room for them, descriptors that come with an answer are closed by the kernel.
    let mut ancillary = RecvAncillaryBuffer::default();
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    loop {
        match recvmsg(channel, &mut [IoSliceMut::new(buffer)], &mut ancillary, flags) {
            Ok(message) if message.flags.contains(ReturnFlags::TRUNC) => {
                return Ok(Some(usize::MAX));
            }
            Ok(message) => return Ok(Some(message.bytes)),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(None),
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;
    use std::process::{Child, Command};

    use super::*;

    struct Sleeps(Child);

    impl Drop for Sleeps {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn sleeps(own_group: bool) -> Sleeps {
        let mut command = Command::new("sleep");
        command.arg("1000");
        if own_group {
            command.process_group(0);
        }
        Sleeps(command.spawn().expect("sleep"))
    }

    /// The parent names a process that the dispatcher will signal, possibly as root.
    #[test]
    fn only_children_that_lead_a_group_are_believed() {
        let own = nix::unistd::getpgrp();
        let (leader, member) = (sleeps(true), sleeps(false));
        identify(leader.0.id(), own).expect("a child that leads a group");
        let other = nix::unistd::Pid::from_raw(leader.0.id().cast_signed());
        for (pid, group) in [
            (member.0.id(), own),
            (leader.0.id(), other),
            (leader.0.id(), nix::unistd::Pid::from_raw(1)),
            (1, own),
            (i32::MAX.cast_unsigned(), own),
        ] {
            let error = identify(pid, group).expect_err("not a worker");
            assert!(error.contains("is not a child of the process that forks"), "{error}");
        }
        let mut ended = sleeps(true);
        let pid = ended.0.id();
        ended.0.kill().expect("it runs");
        rustix::process::waitid(
            rustix::process::WaitId::Pid(Pid::from_child(&ended.0)),
            rustix::process::WaitIdOptions::EXITED | rustix::process::WaitIdOptions::NOWAIT,
        )
        .expect("it ends");
        identify(pid, own).expect_err("a zombie");
    }
}
