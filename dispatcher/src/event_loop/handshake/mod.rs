//! Workers at the door: a thread of its own accepts control connections, identifies who is behind them, receives hello,
//! and afterwards everything that joined workers say. The hot thread hears of it in typed messages over one bounded
//! mailbox, decides through the core, and answers with commands.
//!
//! A record can come with descriptors. Linux 6.16 refuses them at the sender (`SO_PASSRIGHTS`). Before that they are
//! received, with room for as many as a message can carry, and given to the closers: without room the kernel closes them
//! in the thread that receives, and a close that lingers would hang here. Where a process has no numbers left for them
//! that happens all the same; the watchdog looks after this thread then.
//!
//! Bounds: `connect_rate` for all, `join_rate` and `join_burst` for each user, `max_handshakes` and `max_pending_hellos`
//! control connections that have not been answered, `hello_timeout`; [`MAILBOX`] messages in the mailbox, and in one round
//! so many records of each worker. This thread may wait for the hot thread; the hot thread never waits for this one.
//!
//! If the thread panics or cannot poll any more, that is reported, and it begins again with the connections it has, all
//! registered with a new poll.

mod pending;
mod rates;
mod thread;

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
use super::token::Key;
use super::worker_io::{Lane, LaneFds};
use crate::background::closer::{Bin, Watch};
use crate::config;
use crate::wake::Wake;
use dispatcher_core::{Departure, Join, Refusal, WorkerId};

/// Most messages waiting for the hot thread.
const MAILBOX: usize = 256;

/// What the hot thread hears.
#[derive(Debug)]
pub(super) enum HandshakeEvent {
    /// Somebody said hello, and gets one answer: [`HandshakeCommand::Welcome`] or [`HandshakeCommand::Refuse`] with this key.
    Hello(Box<JoinRequest>),
    /// A worker claims a key.
    Claim(WorkerId, Claim),
    /// A worker says anew what its hello said.
    Update(WorkerId, Update),
    /// A worker says goodbye.
    Goodbye(WorkerId),
    /// A worker has closed its control connection, or its process has ended.
    Left(WorkerId, Departure),
    /// A worker has sent what it may not.
    Broke(WorkerId, Fault),
    /// A control connection was refused: `more` others of this user before it were not told of.
    Refused { pid: i32, uid: u32, gid: u32, reason: String, key: Option<String>, more: u64 },
    /// As many of a user were refused and not told of.
    RefusedMore { uid: u32, count: u64 },
    /// No descriptor or memory for another control connection: accepting rests.
    Short(String),
}

/// Somebody who wants to join.
#[derive(Debug)]
pub(super) struct JoinRequest {
    pub(super) key: Key,
    /// Without `spawned`: which process a token belongs to is known to the hot thread.
    pub(super) join: Join,
    /// Its channel and scoreboard; `None` if the pool was not known here.
    pub(super) lane: Option<Result<(Lane, LaneFds), String>>,
}

/// What the hot thread wants done.
#[derive(Debug)]
pub(super) enum HandshakeCommand {
    /// Send this welcome with these descriptors. The core knows the worker already.
    Welcome { key: Key, worker: WorkerId, record: Vec<u8>, fds: [OwnedFd; 3] },
    /// Say why not.
    Refuse { key: Key, refusal: Refusal },
    /// End a worker's control connection; it is still heard of.
    Cut(WorkerId),
    /// Nothing refers to this worker any more.
    Forget(WorkerId),
    /// Other bounds.
    Settings(Settings),
    /// Accept from this socket from now on: it was made again, because its file was removed.
    Listen(OwnedFd),
    /// End.
    End,
}

/// What the thread goes by.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub(super) limits: config::Limits,
    /// Slots of a scoreboard, by the pool's name.
    pub(super) slots: HashMap<String, u32>,
}

/// The hot thread's side.
#[derive(Debug)]
pub(super) struct Handshakes {
    events: Receiver<HandshakeEvent>,
    /// At most one answer for each hello, and two commands for each worker: so not unbounded.
    commands: Sender<HandshakeCommand>,
    /// An eventfd: the thread may register it again elsewhere.
    waker: Arc<OwnedFd>,
    /// There may be events.
    pub(super) ready: bool,
    ended: Receiver<OwnedFd>,
}

impl Handshakes {
    /// Starts the thread. `wake` is called when there are events.
    pub(super) fn start(
        listener: OwnedFd,
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
            listener,
            settings,
            (event_sender, wake),
            command_receiver,
            bin,
        )?;
        std::thread::Builder::new().name("handshakes".to_owned()).spawn(move || {
            let watched = watch.map(Watch::join);
            // Nobody waits for it if the dispatcher is gone without a goodbye.
            let _ = end.send(thread.run(watched.as_ref()));
        })?;
        Ok(Handshakes { events, commands, waker, ready: false, ended })
    }

    /// The next message.
    pub(super) fn next(&mut self) -> Option<HandshakeEvent> {
        let next = self.events.try_recv().ok();
        self.ready = next.is_some();
        next
    }

    pub(super) fn send(&self, command: HandshakeCommand) {
        // It ends only when told to.
        if self.commands.send(command).is_ok() {
            // It fails only when the counter is full, and then it is set.
            let _ = rustix::io::write(&self.waker, &1_u64.to_ne_bytes());
        }
    }

    /// Closes every control connection; gives back the listening socket. For the very end: this waits, at most so long.
    pub(super) fn end(self, patience: Duration) -> Option<OwnedFd> {
        self.send(HandshakeCommand::End);
        // It may be waiting for room.
        drop(self.events);
        self.ended.recv_timeout(patience).ok()
    }
}
