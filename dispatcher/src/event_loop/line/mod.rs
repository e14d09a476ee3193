//! Workers of the line protocol.
//!
//! A thread of its own ([`thread`]) accepts their streams, identifies their peers, reads their
//! reports and is told by the kernel which TCP sockets have ended ([`kernel`]). It starts with the
//! first `line_socket`, and reports to the hot thread over a bounded mailbox. The hot thread only
//! writes to the streams ([`workers`], [`hot`]): one descriptor per message.
//!
//! The hot thread keeps its copy of a connection until the worker has read it. If the worker
//! leaves before, the thread finds out whether the worker had it ([`recovery`]), because these
//! calls may wait for locks.

mod hot;
mod kernel;
mod recovery;
mod streams;
mod thread;
mod workers;

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::time::Duration;

use dispatch_protocol::line::{LineError, Report};
use rustix::event::EventfdFlags;

use self::thread::LineThread;
use super::peer_thread::Outbox;
use super::token::Key;
use crate::background::closer::{Bin, Watch};
use crate::config;
use crate::wake::Wake;
use dispatcher_core::{ConnId, Departure, LineJoin, Recovery, Refusal, Time, WorkerId};

pub(super) use workers::Lines;

/// Most events that wait for the hot thread.
const MAILBOX: usize = 256;

/// What the thread reports to the hot thread.
#[derive(Debug)]
pub(super) enum LineEvent {
    /// A worker has written its first report, and gets one answer: [`LineCommand::Accept`] or
    /// [`LineCommand::Refuse`] with this key. `stream` is a duplicate for the hot thread.
    Joins { key: Key, join: Box<LineJoin>, stream: OwnedFd },
    /// A worker has reported.
    Report(WorkerId, Box<Report>),
    /// A worker has closed its stream, or its process has ended. `read`: it had read everything
    /// that was sent to it.
    Left { worker: WorkerId, why: Departure, read: bool },
    /// A worker wrote something else than reports.
    Broke(WorkerId, Fault),
    /// A stream was refused. `more` refusals of this user before it were suppressed.
    Refused { pid: i32, uid: u32, gid: u32, reason: String, key: Option<String>, more: u64 },
    /// Suppressed refusals of a user.
    RefusedMore { uid: u32, count: u64 },
    /// No descriptor or memory for another stream: accepting pauses.
    Short(String),
    /// Whether the kernel tells the ends of sockets, from now on.
    Tracking(Tracking),
    /// TCP sockets with these cookies have ended.
    Ended(Vec<u64>),
    /// Ends were missed. These TCP sockets were open after `began`.
    Alive { began: Time, cookies: HashSet<u64> },
    /// What became of the unread connections of a worker that has left.
    Recovered(WorkerId, Vec<(ConnId, Recovery)>),
}

/// What is wrong with the bytes of a worker.
#[derive(Debug)]
pub(super) enum Fault {
    /// A line that is no report.
    Line(LineError),
    /// Descriptors came with them.
    Descriptors,
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Fault::Line(error) => error.fmt(f),
            Fault::Descriptors => f.write_str("file descriptors came with a report"),
        }
    }
}

/// Whether the kernel tells the ends of connections.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Tracking {
    /// There is no `line_socket`.
    #[default]
    Off,
    /// It does, for TCP sockets of this network namespace. So often ends were missed, and found
    /// by a list of all sockets.
    Exact { namespace: Option<u64>, overruns: u64 },
    /// It does not, for this reason: loads are the last counts and what was sent since.
    Counts(String),
}

/// What the hot thread asks the thread to do.
#[derive(Debug)]
pub(super) enum LineCommand {
    /// The worker has joined: read its reports.
    Accept { key: Key, worker: WorkerId },
    /// Refuse the worker.
    Refuse { key: Key, refusal: Refusal },
    /// Close the stream of this worker.
    Forget(WorkerId),
    /// Find out what became of these connections.
    Recover(Box<Unread>),
    /// Accept from exactly these sockets. A socket without a descriptor is one from before.
    Sockets(Vec<Socket>),
    /// The ports of all listeners: only the ends of connections to them matter. Ports of before
    /// stay, because connections to them may.
    Ports(Vec<u16>),
    /// Apply new limits.
    Limits(Box<config::Limits>),
    /// Accept nothing while this is true.
    Hold(bool),
    /// End the thread.
    End,
}

/// A socket that workers connect to.
#[derive(Debug)]
pub(super) struct Socket {
    /// The pool of workers whose type is not in the map.
    pub(super) pool: String,
    /// Pools by type.
    pub(super) types: Arc<BTreeMap<String, String>>,
    pub(super) fd: Option<OwnedFd>,
}

/// The connections in the socket of a worker that has left.
#[derive(Debug)]
pub(super) struct Unread {
    pub(super) worker: WorkerId,
    pub(super) pid: i32,
    /// Its process has ended.
    pub(super) died: bool,
    /// Its end of the stream is closed, so nothing can be read from it any more.
    pub(super) closed: bool,
    /// A duplicate of each connection, and the number of bytes that the dispatcher has read of it.
    /// Without a duplicate nothing can be found out.
    pub(super) connections: Vec<(ConnId, Option<OwnedFd>, u64)>,
}

/// The hot thread's handle.
#[derive(Debug)]
pub(super) struct LineHandle {
    events: Receiver<LineEvent>,
    /// Bounded in effect: answers to events, and commands of reloads.
    commands: Sender<LineCommand>,
    /// An eventfd, because the thread may have to register it with a new poll.
    waker: Arc<OwnedFd>,
    ended: Receiver<Vec<OwnedFd>>,
}

impl LineHandle {
    /// Starts the thread. `wake` is called when there are events.
    pub(super) fn start(
        limits: &config::Limits,
        held: bool,
        wake: Wake,
        bin: Bin,
        watch: Option<Watch>,
    ) -> io::Result<LineHandle> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let waker = Arc::new(rustix::event::eventfd(0, flags)?);
        let (event_sender, events): (SyncSender<LineEvent>, _) = sync_channel(MAILBOX);
        let (commands, command_receiver) = channel();
        let (end, ended) = channel();
        let outbox = Outbox::new(event_sender, wake);
        let thread = LineThread::new(&waker, held, limits.clone(), outbox, command_receiver, bin)?;
        std::thread::Builder::new().name("line".to_owned()).spawn(move || {
            let watched = watch.map(Watch::join);
            // Sending fails only if the dispatcher has ended without waiting.
            let _ = end.send(thread.run(watched.as_ref()));
        })?;
        Ok(LineHandle { events, commands, waker, ended })
    }

    /// The next event.
    pub(super) fn next(&self) -> Option<LineEvent> {
        self.events.try_recv().ok()
    }

    pub(super) fn send(&self, command: LineCommand) {
        // The thread ends only when told to.
        if self.commands.send(command).is_ok() {
            // The write fails only when the counter is full, and then the thread is woken anyway.
            let _ = rustix::io::write(&self.waker, &1_u64.to_ne_bytes());
        }
    }

    /// Closes every stream and returns the listening sockets. Only at the end: waits for at most
    /// `patience`.
    pub(super) fn end(self, patience: Duration) -> Vec<OwnedFd> {
        self.send(LineCommand::End);
        // The thread may be waiting for room.
        drop(self.events);
        self.ended.recv_timeout(patience).unwrap_or_default()
    }
}
