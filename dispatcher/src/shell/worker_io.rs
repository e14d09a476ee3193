//! What the shell keeps for one worker: its sockets, its scoreboard, and the records of this turn.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, Shutdown, SocketFlags, SocketType,
};
use worker_sdk::scoreboard::{Scoreboard, ScoreboardError};
use worker_sdk::wire::{Entry, MAX_CHANNEL_RECORD, MAX_FDS_PER_RECORD};

use super::gauges::Gauges;
use crate::pool::{ConnId, SendFailure, WorkerId};

/// Everything the shell keeps for a worker.
#[derive(Debug)]
pub(super) struct WorkerIo {
    pub(super) id: WorkerId,
    pub(super) control: OwnedFd,
    pub(super) lane: Lane,
    /// Readable once the process has ended; `None` on kernels that cannot say.
    pub(super) pidfd: Option<OwnedFd>,
    /// Connections for the record that is being gathered, in the order they were chosen.
    pub(super) outbox: Vec<(ConnId, Entry)>,
    /// The `finished` counter as last reported to the core.
    pub(super) finished: u64,
    /// What the pool scores by, if it does.
    pub(super) gauges: Option<Gauges>,
    /// It said goodbye; anything more on its control connection is an error.
    pub(super) said_goodbye: bool,
    /// It is among those whose control connection is read on in the next turn: an event for it tells nothing new.
    pub(super) unread: bool,
}

/// The way to a worker: channel, scoreboard and poke eventfd, made before its welcome.
#[derive(Debug)]
pub(super) struct Lane {
    /// Our end of the channel; only for sending.
    pub(super) channel: OwnedFd,
    /// A dup of the worker's end, by which its queue can be emptied.
    pub(super) retained: OwnedFd,
    pub(super) board: Scoreboard,
    pub(super) poke: OwnedFd,
}

/// The worker's halves, to be sent with the welcome and then closed here.
#[derive(Debug)]
pub(super) struct LaneFds {
    pub(super) channel: OwnedFd,
    pub(super) board: OwnedFd,
}

impl Lane {
    /// Makes a channel, a scoreboard of `slots`, and an eventfd.
    pub(super) fn new(slots: u32, finished: u64) -> Result<(Lane, LaneFds), ScoreboardError> {
        let (channel, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(std::io::Error::from)?;
        // The worker must not be able to queue anything towards us.
        rustix::net::shutdown(&channel, Shutdown::Read).map_err(std::io::Error::from)?;
        // Room for a full ring of one-connection records; the kernel caps it, and EAGAIN is handled.
        let wanted = 2048 * slots as usize;
        if rustix::net::sockopt::socket_send_buffer_size(&channel).is_ok_and(|size| size < wanted) {
            let _ = rustix::net::sockopt::set_socket_send_buffer_size(&channel, wanted);
        }
        let retained = theirs.try_clone()?;
        let (board, board_fd) = Scoreboard::create(slots, finished)?;
        let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
        let poke = rustix::event::eventfd(0, flags).map_err(std::io::Error::from)?;
        let lane = Lane { channel, retained, board, poke };
        Ok((lane, LaneFds { channel: theirs, board: board_fd }))
    }

    /// Sends one record with these descriptors, without waiting.
    pub(super) fn send(&self, record: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), SendFailure> {
        send_record(self.channel.as_fd(), record, fds).map_err(classify)
    }

    /// Receives and closes everything in the worker's queue; bounded by what the queue can hold.
    pub(super) fn purge(&self) {
        let mut record = [0; MAX_CHANNEL_RECORD];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS_PER_RECORD))];
        for _ in 0..=2 * self.board.slots() {
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let received = rustix::net::recvmsg(
                &self.retained,
                &mut [IoSliceMut::new(&mut record)],
                &mut ancillary,
                RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC,
            );
            match received {
                // Dropping the buffer closes what it received.
                Ok(message) if message.bytes > 0 => {}
                Err(Errno::INTR) => {}
                Ok(_) | Err(_) => return,
            }
        }
    }
}

/// Sends one record of a SEQPACKET socket, whole or not at all.
pub(super) fn send_record(
    socket: BorrowedFd<'_>,
    record: &[u8],
    fds: &[BorrowedFd<'_>],
) -> rustix::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS_PER_RECORD))];
    loop {
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(Errno::MSGSIZE);
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match rustix::net::sendmsg(socket, &[IoSlice::new(record)], &mut ancillary, flags) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

fn classify(errno: Errno) -> SendFailure {
    match errno {
        Errno::AGAIN => SendFailure::Full,
        Errno::TOOMANYREFS | Errno::NOMEM | Errno::NOBUFS | Errno::MFILE | Errno::NFILE => {
            SendFailure::Resources
        }
        // EPIPE and ECONNRESET are what a closed end answers. Nothing else is known to happen on a
        // socketpair of ours, and a channel that answers something else can't be used either.
        _ => SendFailure::Closed,
    }
}
