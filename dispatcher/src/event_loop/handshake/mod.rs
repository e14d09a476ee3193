//! The handshake thread: accepts control connections, identifies their peers, receives hellos and,
//! afterwards, every record of the workers. It reports events to the hot thread over one bounded
//! mailbox; the hot thread asks the core, and answers with commands.
//!
//! A record can carry descriptors. Linux 6.16 refuses them at the sender (`SO_PASSRIGHTS`). Before
//! that the thread receives them, with room for as many as a message can carry, and passes them to
//! the closers. Without room the kernel would close them in the receiving thread, and a close may
//! linger. That still happens in a process without free descriptor numbers; the watchdog then
//! interrupts this thread.
//!
//! Bounds: `connect_rate` for all, `join_rate` and `join_burst` for each user, `max_handshakes` and
//! `max_pending_hellos` for unanswered control connections, `hello_timeout`, [`MAILBOX`] events,
//! and a number of records of each worker in one round. This thread may wait for the hot thread;
//! the hot thread never waits for this thread.
//!
//! After a panic or a failed poll the thread logs the failure and continues with its connections,
//! all registered with a new poll.

mod pending;
pub(super) mod rates;
mod thread;
mod ticket;

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::time::Duration;

use dispatch_protocol::wire::{Claim, Update};
use rustix::event::EventfdFlags;

use self::thread::HandshakeThread;
use super::control::Fault;
use super::peer_thread::Outbox;
use super::token::Key;
use super::worker_io::{Lane, LaneFds};
use crate::background::closer::{Bin, Watch};
use crate::config;
use crate::wake::Wake;
use dispatcher_core::{Departure, Join, Refusal, WorkerId};

/// Most events that wait for the hot thread.
const MAILBOX: usize = 256;

/// What the thread reports to the hot thread.
#[derive(Debug)]
pub(super) enum HandshakeEvent {
    /// A worker said hello, and gets one answer: [`HandshakeCommand::Welcome`] or
    /// [`HandshakeCommand::Refuse`] with this key.
    Hello(Box<JoinRequest>),
    /// A worker claims a key.
    Claim(WorkerId, Claim),
    /// A worker changes what its hello said.
    Update(WorkerId, Update),
    /// A worker says goodbye.
    Goodbye(WorkerId),
    /// A worker has closed its control connection, or its process has ended.
    Left(WorkerId, Departure),
    /// A worker broke the protocol.
    Broke(WorkerId, Fault),
    /// A control connection was refused. `more` refusals of this user before it were suppressed.
    Refused { pid: i32, uid: u32, gid: u32, reason: String, key: Option<String>, more: u64 },
    /// Suppressed refusals of a user.
    RefusedMore { uid: u32, count: u64 },
    /// No descriptor or memory for another control connection: accepting pauses.
    Short(String),
}

/// A worker that wants to join.
#[derive(Debug)]
pub(super) struct JoinRequest {
    pub(super) key: Key,
    /// Without `spawned`: only the hot thread knows the tokens of processes.
    pub(super) join: Join,
    /// The channel and scoreboard; `None` if the thread does not know the pool.
    pub(super) lane: Option<Result<(Lane, LaneFds), String>>,
}

/// What the hot thread asks the thread to do.
#[derive(Debug)]
pub(super) enum HandshakeCommand {
    /// Send this welcome with these descriptors. The core already knows the worker.
    Welcome { key: Key, worker: WorkerId, record: Vec<u8>, fds: [OwnedFd; 3] },
    /// Refuse the worker.
    Refuse { key: Key, refusal: Refusal },
    /// Shut a worker's control connection down; its end is still reported.
    Cut(WorkerId),
    /// Drop the state of this worker.
    Forget(WorkerId),
    /// Apply new settings.
    Settings(Settings),
    /// Accept from this socket from now on: it replaces a socket whose file was removed.
    Listen(OwnedFd),
    /// Accept no control connections while this is true: another dispatcher accepts from the same
    /// socket.
    Hold(bool),
    /// End the thread.
    End,
}

/// The settings of the thread.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub(super) limits: config::Limits,
    /// The number of scoreboard slots, by the pool's name.
    pub(super) slots: HashMap<String, u32>,
}

/// The hot thread's handle.
#[derive(Debug)]
pub(super) struct Handshakes {
    events: Receiver<HandshakeEvent>,
    /// Bounded in effect: one answer for each hello, and two commands for each worker.
    commands: Sender<HandshakeCommand>,
    /// An eventfd, because the thread may have to register it with a new poll.
    waker: Arc<OwnedFd>,
    /// There may be events.
    pub(super) ready: bool,
    ended: Receiver<OwnedFd>,
}

impl Handshakes {
    /// Starts the thread; with `held` it accepts nothing until [`HandshakeCommand::Hold`]. `wake`
    /// is called when there are events.
    pub(super) fn start(
        (listener, held): (OwnedFd, bool),
        settings: Settings,
        wake: Wake,
        bin: Bin,
        watch: Option<Watch>,
    ) -> io::Result<Handshakes> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let waker = Arc::new(rustix::event::eventfd(0, flags)?);
        let (event_sender, events): (SyncSender<HandshakeEvent>, _) = sync_channel(MAILBOX);
        let (commands, command_receiver) = channel();
        let (end, ended) = channel();
        let thread = HandshakeThread::new(
            &waker,
            (listener, held),
            settings,
            Outbox::new(event_sender, wake),
            command_receiver,
            bin,
        )?;
        std::thread::Builder::new().name("handshakes".to_owned()).spawn(move || {
            let watched = watch.map(Watch::join);
            // Sending fails only if the dispatcher has ended without waiting.
            let _ = end.send(thread.run(watched.as_ref()));
        })?;
        Ok(Handshakes { events, commands, waker, ready: false, ended })
    }

    /// The next event.
    pub(super) fn next(&mut self) -> Option<HandshakeEvent> {
        let next = self.events.try_recv().ok();
        self.ready = next.is_some();
        next
    }

    pub(super) fn send(&self, command: HandshakeCommand) {
        // The thread ends only when told to.
        if self.commands.send(command).is_ok() {
            // The write fails only when the counter is full, and then the thread is woken anyway.
            let _ = rustix::io::write(&self.waker, &1_u64.to_ne_bytes());
        }
    }

    /// Closes every control connection and returns the listening socket. Only at the end: waits for
    /// at most `patience`.
    pub(super) fn end(self, patience: Duration) -> Option<OwnedFd> {
        self.send(HandshakeCommand::End);
        // The thread may be waiting for room.
        drop(self.events);
        self.ended.recv_timeout(patience).ok()
    }
}
