//! The hot thread's part of the workers of the line protocol: their streams, and the connections
//! that they have not read yet.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use mio::unix::SourceFd;
use mio::{Interest, Registry};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags,
    SocketType,
};

use dispatch_protocol::line::MAX_ADDRESS;

use super::super::join::forget;
use super::super::token::{Key, Source};
use super::{LineHandle, Tracking};
use crate::listen::bind::OwnedPath;
use crate::sys;
use dispatcher_core::{ConnId, PoolId, WorkerId};

/// One worker.
#[derive(Debug)]
pub(in crate::event_loop) struct LineIo {
    pub(super) id: WorkerId,
    /// A duplicate: the thread reads from it.
    pub(super) stream: OwnedFd,
    /// Connections that it has not read, in the order in which they were sent, and what each
    /// occupies in its socket.
    pub(super) unread: VecDeque<(ConnId, u64)>,
    occupied: u64,
    /// The rest of a message that was not written whole.
    rest: Vec<u8>,
    /// It has left, and had read everything, as the thread sees it.
    pub(super) read_all: bool,
    /// A send was told that the worker's end was closed with unread messages. The kernel tells it
    /// once, so the thread may see an end like that of a stream that was read. Never cleared: what
    /// was destroyed does not come back, and a closed end is not opened again.
    reset: bool,
}

/// What became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Written {
    /// The descriptor is in the worker's socket.
    Sent,
    /// Nothing was written: the rest of the message before comes first.
    Held,
}

impl LineIo {
    pub(super) fn new(id: WorkerId, stream: OwnedFd) -> LineIo {
        LineIo {
            id,
            stream,
            unread: VecDeque::new(),
            occupied: 0,
            rest: Vec::new(),
            read_all: false,
            reset: false,
        }
    }

    /// Writes one message with one descriptor, without waiting. The descriptor goes with the first
    /// byte; what is not written stays pending, and nothing else is written before it.
    ///
    /// EPIPE and ECONNRESET are final: the worker can be sent nothing any more.
    pub(super) fn write(
        &mut self,
        costs: &mut Costs,
        conn: ConnId,
        text: &[u8],
        fd: BorrowedFd<'_>,
    ) -> Result<Written, Errno> {
        if !self.write_rest(costs)? {
            return Ok(Written::Held);
        }
        let written = self.note_reset(send(self.stream.as_fd(), text, Some(fd)))?;
        let cost = costs.of(written);
        self.unread.push_back((conn, cost));
        self.occupied += cost;
        if let Some(rest) = text.get(written..).filter(|rest| !rest.is_empty()) {
            self.rest.extend_from_slice(rest);
        }
        Ok(Written::Sent)
    }

    /// Writes what is pending; false if some is left.
    pub(super) fn write_rest(&mut self, costs: &mut Costs) -> Result<bool, Errno> {
        while !self.rest.is_empty() {
            let sent = send(self.stream.as_fd(), &self.rest, None);
            match self.note_reset(sent) {
                Ok(0) | Err(Errno::AGAIN) => return Ok(false),
                Ok(written) => {
                    self.rest.drain(..written.min(self.rest.len()));
                    // It belongs to the newest connection, unless the worker has read that.
                    if let Some((_, cost)) = self.unread.back_mut() {
                        let more = costs.of(written);
                        *cost += more;
                        self.occupied += more;
                    }
                }
                Err(errno) => return Err(errno),
            }
        }
        Ok(true)
    }

    fn note_reset(&mut self, sent: Result<usize, Errno>) -> Result<usize, Errno> {
        self.reset |= sent == Err(Errno::CONNRESET);
        sent
    }

    /// Whether the worker has left, and had read everything.
    pub(super) fn has_read_all(&self) -> bool {
        self.read_all && !self.reset
    }

    /// The next connection that the worker has read since the last call. `occupied`: what its
    /// socket holds now.
    pub(super) fn next_read(&mut self, occupied: u64) -> Option<ConnId> {
        if self.occupied <= occupied {
            return None;
        }
        let (conn, cost) = self.unread.pop_front()?;
        self.occupied -= cost;
        Some(conn)
    }

    /// What the worker's socket holds; `None` if nothing is known about that, because its end of
    /// the stream is closed: the kernel then destroys what was not read.
    ///
    /// The kernel marks this end before it destroys anything, so what was counted before the mark
    /// was not there was counted right.
    pub(super) fn unread_now(&self) -> Option<u64> {
        let occupied = self.occupied();
        if occupied >= self.occupied {
            return Some(occupied);
        }
        let mut fds = [PollFd::new(&self.stream, PollFlags::empty())];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).ok()?;
        let closed = PollFlags::HUP | PollFlags::ERR;
        (!fds[0].revents().intersects(closed)).then_some(occupied)
    }

    /// What the worker's socket holds.
    pub(super) fn occupied(&self) -> u64 {
        // An error cannot happen. Then the copies stay until the worker leaves.
        sys::unread_by_peer(&self.stream).unwrap_or(u64::MAX)
    }
}

/// Sends bytes of a stream, perhaps with a descriptor; returns how many.
fn send(socket: BorrowedFd<'_>, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> Result<usize, Errno> {
    #[cfg(test)]
    let bytes = tests::shortened(bytes)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    loop {
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds = fd.as_slice();
        if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(Errno::MSGSIZE);
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, flags) {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}

/// What a message of each length occupies in a socket: `SIOCOUTQ` counts buffers, whose sizes
/// depend on the kernel. Measured on a socket pair of this process, each length once.
#[derive(Debug)]
pub(in crate::event_loop) struct Costs {
    pair: (OwnedFd, OwnedFd),
    known: [u32; MAX_ADDRESS + 1],
}

impl Costs {
    pub(super) fn new() -> std::io::Result<Costs> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let pair = rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        Ok(Costs { pair, known: [0; MAX_ADDRESS + 1] })
    }

    /// What a message of this length occupies.
    fn of(&mut self, len: usize) -> u64 {
        let len = len.clamp(1, MAX_ADDRESS);
        if self.known[len] == 0 {
            self.known[len] = self.measure(len).max(1);
        }
        self.known[len].into()
    }

    fn measure(&self, len: usize) -> u32 {
        let bytes = [b'x'; MAX_ADDRESS];
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let sent = rustix::net::send(&self.pair.0, &bytes[..len], flags);
        let cost = sys::unread_by_peer(&self.pair.0).unwrap_or_default();
        if sent.is_ok() {
            let mut bytes = [0; MAX_ADDRESS];
            let _ = rustix::net::recv(&self.pair.1, &mut bytes, RecvFlags::DONTWAIT);
        }
        u32::try_from(cost).unwrap_or(u32::MAX)
    }
}

/// A socket that workers connect to. Dropping it removes the file.
#[derive(Debug)]
pub(in crate::event_loop) struct LinePath {
    pub(in crate::event_loop) pool: PoolId,
    pub(in crate::event_loop) path: Option<OwnedPath>,
    /// A copy of the socket, for a take-over.
    pub(in crate::event_loop) copy: Option<OwnedFd>,
}

/// All workers of the line protocol.
#[derive(Debug, Default)]
pub(in crate::event_loop) struct Lines {
    /// By `WorkerId::index`.
    table: Vec<Option<LineIo>>,
    /// `None` until there is a `line_socket`.
    pub(super) running: Option<Running>,
    pub(in crate::event_loop) sockets: Vec<LinePath>,
    /// Whether the kernel tells the ends of connections.
    pub(super) tracking: Tracking,
    /// There may be events of the thread.
    pub(in crate::event_loop) ready: bool,
    /// Counters since the start: reports, connections given to another worker, and connections
    /// that could not be recovered.
    pub(super) reports: u64,
    pub(super) recovered: u64,
    pub(super) unread_lost: u64,
}

/// What exists once there is a `line_socket`.
#[derive(Debug)]
pub(in crate::event_loop) struct Running {
    pub(super) handle: LineHandle,
    pub(super) costs: Costs,
}

impl Lines {
    /// The thread was started. Its only end is [`LineHandle::end`], so nothing can fail after that.
    pub(super) fn set_running(&mut self, handle: LineHandle, costs: Costs) {
        self.running = Some(Running { handle, costs });
    }

    pub(super) fn get(&mut self, worker: WorkerId) -> Option<&mut LineIo> {
        self.table.get_mut(worker.index as usize)?.as_mut().filter(|io| io.id == worker)
    }

    /// A worker with what writing to it needs.
    pub(super) fn with_costs(&mut self, worker: WorkerId) -> Option<(&mut LineIo, &mut Costs)> {
        let io = self.table.get_mut(worker.index as usize)?.as_mut()?;
        let costs = &mut self.running.as_mut()?.costs;
        (io.id == worker).then_some((io, costs))
    }

    /// Whether this worker speaks the line protocol.
    pub(in crate::event_loop) fn has(&self, worker: WorkerId) -> bool {
        let place = self.table.get(worker.index as usize).and_then(Option::as_ref);
        place.is_some_and(|io| io.id == worker)
    }

    pub(super) fn by_key(&self, key: Key) -> Option<WorkerId> {
        let io = self.table.get(key.index as usize)?.as_ref()?;
        key.is(io.id.serial).then_some(io.id)
    }

    pub(super) fn insert(&mut self, registry: &Registry, io: LineIo) -> std::io::Result<()> {
        let index = io.id.index as usize;
        if self.table.len() <= index {
            self.table.resize_with(index + 1, || None);
        }
        // An event comes whenever the worker has read something.
        let token = Source::LineRoom(Key::from(io.id)).token();
        let raw = io.stream.as_raw_fd();
        let watched = registry.register(&mut SourceFd(&raw), token, Interest::WRITABLE);
        self.table[index] = Some(io);
        watched
    }

    /// Takes a worker out of the table, and its stream out of the poll.
    pub(super) fn remove(&mut self, registry: &Registry, worker: WorkerId) -> Option<LineIo> {
        let place = self.table.get_mut(worker.index as usize)?;
        let io = place.take_if(|io| io.id == worker)?;
        forget(registry, &io.stream);
        Some(io)
    }

    /// Workers that have not read everything, or have a message pending.
    pub(super) fn behind(&self, index: usize) -> Option<WorkerId> {
        let io = self.table.get(index)?.as_ref()?;
        (!io.unread.is_empty() || !io.rest.is_empty()).then_some(io.id)
    }

    /// One more than the highest index.
    pub(super) fn len(&self) -> usize {
        self.table.len()
    }

    pub(in crate::event_loop) fn drain(&mut self) -> impl Iterator<Item = OwnedFd> + '_ {
        self.table.drain(..).flatten().map(|io| io.stream)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::cell::Cell;
    use std::io::IoSliceMut;

    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage};

    use super::*;

    thread_local! {
        /// The result of the next sends.
        static FAILURE: Cell<Option<Errno>> = const { Cell::new(None) };
        /// Most bytes of the next sends; `None` for all.
        static MOST: Cell<Option<usize>> = const { Cell::new(None) };
    }

    pub(super) fn shortened(bytes: &[u8]) -> Result<&[u8], Errno> {
        if let Some(errno) = FAILURE.get() {
            return Err(errno);
        }
        match MOST.get() {
            Some(0) => Err(Errno::AGAIN),
            Some(most) => Ok(&bytes[..bytes.len().min(most)]),
            None => Ok(bytes),
        }
    }

    const WORKER: WorkerId = WorkerId { index: 0, serial: 1 };

    fn conn(serial: u64) -> ConnId {
        ConnId { index: serial as u32, serial }
    }

    fn pair() -> (LineIo, OwnedFd, Costs) {
        let costs = Costs::new().unwrap();
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        (LineIo::new(WORKER, ours), theirs, costs)
    }

    /// One message as a worker reads it: its text and the number of its descriptors.
    fn read(theirs: &OwnedFd, room: usize) -> Option<(Vec<u8>, usize)> {
        let mut bytes = vec![0; room];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let message = rustix::net::recvmsg(theirs, &mut parts, &mut ancillary, flags).ok()?;
        let fds = ancillary.drain().map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => fds.count(),
            _ => 0,
        });
        let fds = fds.sum();
        bytes.truncate(message.bytes);
        Some((bytes, fds))
    }

    fn write(
        io: &mut LineIo,
        costs: &mut Costs,
        serial: u64,
        text: &str,
    ) -> Result<Written, Errno> {
        let fd = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        io.write(costs, conn(serial), text.as_bytes(), fd.as_fd())
    }

    fn reads(io: &mut LineIo) -> Vec<u64> {
        let occupied = io.occupied();
        std::iter::from_fn(|| io.next_read(occupied)).map(|conn| conn.serial).collect()
    }

    #[test]
    fn each_message_has_one_descriptor_and_what_is_read_is_known() {
        let (mut io, theirs, mut costs) = pair();
        let texts = ["10.0.0.1:1", "[2001:db8::1]:65535", "unix", &"x".repeat(255)];
        for (serial, text) in (1..).zip(texts) {
            assert_eq!(write(&mut io, &mut costs, serial, text), Ok(Written::Sent));
        }
        assert_eq!(reads(&mut io), [0u64; 0]);
        for (serial, text) in (1..).zip(texts) {
            assert_eq!(read(&theirs, 255), Some((text.as_bytes().to_vec(), 1)));
            assert_eq!(reads(&mut io), [serial]);
        }
        assert_eq!(io.occupied(), 0);
    }

    #[test]
    fn all_lengths_are_measured_as_they_are() {
        let (mut io, theirs, mut costs) = pair();
        for len in 1..=MAX_ADDRESS {
            write(&mut io, &mut costs, 1, &"x".repeat(len)).unwrap();
            assert_eq!(io.occupied(), costs.of(len), "{len}");
            read(&theirs, len).unwrap();
            assert_eq!(reads(&mut io), [1]);
        }
    }

    #[test]
    fn a_full_socket_takes_nothing_and_loses_nothing() {
        let (mut io, theirs, mut costs) = pair();
        let mut sent = 0;
        while let Ok(Written::Sent) = write(&mut io, &mut costs, sent + 1, "10.0.0.1:1") {
            sent += 1;
            assert!(sent < 100_000, "it becomes full");
        }
        assert_eq!(write(&mut io, &mut costs, sent + 1, "10.0.0.1:1"), Err(Errno::AGAIN));
        assert_eq!(io.unread.len() as u64, sent);
        for serial in 1..=sent {
            assert_eq!(read(&theirs, 255), Some((b"10.0.0.1:1".to_vec(), 1)));
            assert_eq!(reads(&mut io), [serial]);
        }
        assert_eq!(read(&theirs, 255), None);
    }

    #[test]
    fn a_message_that_is_not_written_whole_keeps_the_framing() {
        let (mut io, theirs, mut costs) = pair();
        MOST.set(Some(3));
        assert_eq!(write(&mut io, &mut costs, 1, "10.0.0.1:1"), Ok(Written::Sent));
        MOST.set(Some(0));
        assert_eq!(write(&mut io, &mut costs, 2, "10.0.0.2:2"), Ok(Written::Held));
        assert_eq!(io.write_rest(&mut costs), Ok(false));
        MOST.set(Some(5));
        assert_eq!(io.write_rest(&mut costs), Ok(true));
        MOST.set(None);
        assert_eq!(write(&mut io, &mut costs, 2, "10.0.0.2:2"), Ok(Written::Sent));
        let (mut text, mut fds) = (Vec::new(), 0);
        while let Some((part, count)) = read(&theirs, 255) {
            text.extend(part);
            fds += count;
        }
        assert_eq!((String::from_utf8(text).unwrap().as_str(), fds), ("10.0.0.1:110.0.0.2:2", 2));
        assert_eq!(reads(&mut io), [1, 2]);
    }

    #[test]
    fn what_the_kernel_destroys_does_not_count_as_read() {
        let (mut io, theirs, mut costs) = pair();
        for serial in 1..=3 {
            write(&mut io, &mut costs, serial, "10.0.0.1:1").unwrap();
        }
        read(&theirs, 255).unwrap();
        let left = io.unread_now().unwrap();
        assert_eq!(left, 2 * costs.of(10));
        drop(theirs);
        assert_eq!((io.occupied(), io.unread_now()), (0, None));
    }

    /// The kernel tells the reset to one call only: to a receive, or to a send that is under way.
    #[test]
    fn a_reset_that_a_send_was_told_is_not_taken_for_a_read_end() {
        let (mut io, theirs, mut costs) = pair();
        write(&mut io, &mut costs, 1, "10.0.0.1:1").unwrap();
        drop(theirs);
        assert_eq!(rustix::net::sockopt::socket_error(&io.stream), Ok(Err(Errno::CONNRESET)));
        let end = rustix::net::recv(&io.stream, &mut [0; 8], RecvFlags::DONTWAIT);
        assert_eq!(end, Ok((0, 0)), "the thread sees a clean end");
        io.read_all = true;

        FAILURE.set(Some(Errno::CONNRESET));
        assert_eq!(write(&mut io, &mut costs, 2, "10.0.0.1:2"), Err(Errno::CONNRESET));
        FAILURE.set(None);
        assert!(!io.has_read_all());
        assert_eq!(io.unread.len(), 1, "it is looked at");
        assert_eq!(write(&mut io, &mut costs, 2, "10.0.0.1:2"), Err(Errno::PIPE));
        assert!(!io.has_read_all(), "later sends change nothing");

        // The same with what was pending.
        let (mut io, _theirs, mut costs) = pair();
        MOST.set(Some(3));
        write(&mut io, &mut costs, 1, "10.0.0.1:1").unwrap();
        MOST.set(None);
        FAILURE.set(Some(Errno::CONNRESET));
        assert_eq!(io.write_rest(&mut costs), Err(Errno::CONNRESET));
        FAILURE.set(None);
        io.read_all = true;
        assert!(!io.has_read_all());
    }

    #[test]
    fn a_closed_stream_is_an_error() {
        let (mut io, theirs, mut costs) = pair();
        drop(theirs);
        assert_eq!(write(&mut io, &mut costs, 1, "10.0.0.1:1"), Err(Errno::PIPE));
        assert!(io.unread.is_empty());
    }
}
