//! The sockets, the scoreboard and the gathered records of one worker.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use dispatch_protocol::scoreboard::{Scoreboard, ScoreboardError};
use dispatch_protocol::wire::{Entry, MAX_FDS_PER_RECORD};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, SocketFlags,
    SocketType,
};

use super::doorbell_limit::DoorbellLimit;
use super::gauges::Gauges;
use dispatcher_core::{ConnId, Notice, PoolId, SendFailure, Ticket, WorkerId};

/// The event loop's state of a worker.
#[derive(Debug)]
pub(super) struct WorkerIo {
    pub(super) id: WorkerId,
    pub(super) lane: Lane,
    /// Connections for the record that is being gathered, in order.
    pub(super) outbox: Vec<(ConnId, Entry)>,
    /// `Some` while another thread empties the channel: records sent now might be removed.
    pub(super) purge: Option<Deferred>,
    pub(super) doorbell_limit: DoorbellLimit,
    /// The `finished` counter as last reported to the core.
    pub(super) finished: u64,
    /// The reported idle threads, as last passed to the core.
    pub(super) threads: Option<(u32, Option<Duration>)>,
    /// The gauges that the pool scores by, if it does.
    pub(super) gauges: Option<Gauges>,
    /// The pool that started its process, if one did and the worker understands a drain.
    pub(super) started_by: Option<PoolId>,
}

/// Records to send once the channel is empty. Their slots already read SENT, because the core
/// relies on that.
#[derive(Debug, Default)]
pub(super) struct Deferred {
    pub(super) entries: Vec<(ConnId, Entry)>,
    pub(super) probe: Option<Ticket>,
    pub(super) notice: Option<Notice>,
}

/// The way to a worker: channel, scoreboard and doorbell eventfd, made before its welcome.
#[derive(Debug)]
pub(super) struct Lane {
    /// The dispatcher's end of the channel; only for sending.
    pub(super) channel: OwnedFd,
    /// A duplicate of the worker's end, for emptying the queue. Another thread does that, because a
    /// worker inside a receive blocks it.
    pub(super) retained: Arc<OwnedFd>,
    pub(super) board: Arc<Scoreboard>,
    pub(super) doorbell: OwnedFd,
}

/// The worker's ends, which are sent with the welcome and then closed.
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
        // The worker must not be able to send to the dispatcher.
        rustix::net::shutdown(&channel, Shutdown::Read).map_err(std::io::Error::from)?;
        // Room for a full ring of records with one connection each; the kernel caps it, and EAGAIN
        // is handled.
        let wanted = 2048 * slots as usize;
        if rustix::net::sockopt::socket_send_buffer_size(&channel).is_ok_and(|size| size < wanted) {
            let _ = rustix::net::sockopt::set_socket_send_buffer_size(&channel, wanted);
        }
        let retained = theirs.try_clone()?;
        let (board, board_fd) = Scoreboard::create(slots, finished)?;
        let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
        let doorbell = rustix::event::eventfd(0, flags).map_err(std::io::Error::from)?;
        let lane = Lane { channel, retained: Arc::new(retained), board: Arc::new(board), doorbell };
        Ok((lane, LaneFds { channel: theirs, board: board_fd }))
    }

    /// Sends one record without descriptors, without waiting.
    pub(super) fn send(&self, record: &[u8]) -> Result<(), SendFailure> {
        send_record(self.channel.as_fd(), record, &[]).map_err(classify)
    }

    /// Most records in the channel: a full ring, notices, and a probe, with room for records that
    /// the worker only peeks at.
    pub(super) fn most_records(&self) -> u32 {
        2 * self.board.slots()
    }

    /// Ends sending and receiving. No other process has the dispatcher's end, so this cannot block;
    /// the worker first reads what is queued in the channel.
    pub(super) fn shut(&self) {
        let _ = rustix::net::shutdown(&self.channel, Shutdown::Both);
    }
}

/// Sends one record of a SEQPACKET socket, whole or not at all.
pub(super) fn send_record(
    socket: BorrowedFd<'_>,
    record: &[u8],
    fds: &[BorrowedFd<'_>],
) -> rustix::io::Result<()> {
    #[cfg(test)]
    if refusing::refuses(fds) {
        return Err(Errno::TOOMANYREFS);
    }
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

pub(super) fn classify(errno: Errno) -> SendFailure {
    match errno {
        Errno::AGAIN => SendFailure::Full,
        Errno::TOOMANYREFS | Errno::NOMEM | Errno::NOBUFS | Errno::MFILE | Errno::NFILE => {
            SendFailure::Resources
        }
        // A closed end answers EPIPE or ECONNRESET. A socket pair gives no other errors, and a
        // channel with another error cannot be used either.
        _ => SendFailure::Closed,
    }
}

/// For tests: descriptors that count as refused by the kernel.
#[cfg(test)]
pub(super) mod refusing {
    use std::cell::RefCell;
    use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

    thread_local! {
        static REFUSED: RefCell<Vec<RawFd>> = const { RefCell::new(Vec::new()) };
    }

    pub(in crate::event_loop) fn refuse(fds: Vec<RawFd>) {
        REFUSED.set(fds);
    }

    pub(super) fn refuses(fds: &[BorrowedFd<'_>]) -> bool {
        REFUSED.with_borrow(|refused| fds.iter().any(|fd| refused.contains(&fd.as_raw_fd())))
    }
}
