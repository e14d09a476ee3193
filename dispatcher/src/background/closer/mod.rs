//! Closes descriptors, and makes every other call on a socket that another process may hold.
//!
//! The close of the last reference to a socket may linger in the closing thread. `setsockopt`,
//! `shutdown`, `send` and `recv` wait for the socket's lock, which a process inside `send` can hold
//! for any time. So the hot thread makes none of these calls. It gathers tasks during a turn and
//! hands them over once, with at most one wake-up, and with none while the first closer is awake.
//!
//! - The first closer closes what does not linger, then writes RELEASED; it passes the rest to the
//!   slow lane. A linger set between its check and its close blocks it until the watchdog
//!   interrupts it.
//! - The second closer does the same while the first makes no progress, and the closes of the slow
//!   lane while all its threads are blocked.
//! - The slow lane (one thread, and more on demand) does lingering closes, responses to clients
//!   that are turned away, and purges. The peer of a descriptor can block it: at most one thread
//!   for each peer.
//! - The watchdog interrupts threads without progress, calls the second closer, and starts threads
//!   of the slow lane. Nothing blocks it.
//!
//! `getsockopt(SO_LINGER)` takes no lock. `close` takes one only for the last reference, when no
//! other process has the socket, and a signal ends the wait that follows. So only a task that is
//! more than a close (clearing linger, a response, a purge) can block a thread of the slow lane for
//! good. If all threads are blocked, such tasks are dropped: the closers close the waiting
//! descriptors, and an interruption ends each close. So the number of waiting tasks always shrinks.
//!
//! A panic ends none of these threads: it is logged, and the thread continues with its state.

mod lanes;
mod slow;
mod watchdog;

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use dispatch_protocol::scoreboard::Scoreboard;

use self::slow::{Slot, Slow};
use self::watchdog::Member;
use crate::sys;
use crate::wake::Wake;
use dispatcher_core::WorkerId;

#[cfg(test)]
mod tests;

/// Bounds; see `Limits` of the configuration.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// `closing_threads`: most threads of the slow lane.
    pub threads: u32,
    /// `max_closing`: if more descriptors wait, linger is cleared before a close; if twice as many
    /// wait, no client is accepted.
    pub waiting: u32,
}

/// The dispatcher's copy of a connection that a worker has taken.
#[derive(Debug)]
struct Copy {
    fd: OwnedFd,
    /// `None`: the scoreboard of the copy before.
    board: Option<Arc<Scoreboard>>,
    slot: u32,
    seq: u64,
    worker: u64,
}

/// The owner of a descriptor: the slow lane has at most one thread for each owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Owner {
    /// A worker, by the serial number of its id.
    Worker(u64),
    /// A client that was never sent to a worker, or anything else; each is an owner of its own.
    Other,
}

/// A task for a descriptor.
#[derive(Debug)]
pub enum Task {
    /// Close it.
    Close(OwnedFd),
    /// Turn a client away: send `response`, if there is one, shut the connection down in both
    /// directions for every process that has a copy, and close it.
    End {
        /// The client.
        fd: OwnedFd,
        /// The pool's `unavailable_response`.
        response: Option<Arc<[u8]>>,
        /// The owner that may hold the socket's lock. `None` for a TCP client that was never sent
        /// to a worker: then no call can block.
        owner: Option<Owner>,
    },
    /// Empty a worker's channel through the retained end, then report the worker as purged.
    Purge {
        /// The worker.
        worker: WorkerId,
        /// The dispatcher's duplicate of the worker's end.
        retained: Arc<OwnedFd>,
        /// Most records that the channel can hold.
        most: u32,
    },
    /// Drop an object: a channel with its queue, or a listening socket.
    Drop(Owner, Box<dyn Rubbish>),
    /// A defect in the closer itself.
    #[cfg(test)]
    Panic,
}

/// An object that any thread may drop.
pub trait Rubbish: Send + std::fmt::Debug {}
impl<T: Send + std::fmt::Debug> Rubbish for T {}

/// The state of the closers, for the status.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Closing {
    /// Descriptors that wait to be closed or are being closed.
    pub waiting: u64,
    /// Interruptions of threads that made no progress.
    pub interrupted: u64,
    /// Tasks dropped because all threads of the slow lane were blocked.
    pub left_out: u64,
}

/// The hot thread's side: gathers tasks and hands them over.
#[derive(Debug)]
pub struct Closers {
    shared: Arc<Shared>,
    copies: Vec<Copy>,
    tasks: Vec<Task>,
    /// The address of the scoreboard of the last copy gathered since the last hand-over; only
    /// compared.
    board: usize,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// The first closer sleeps here.
    first: Condvar,
    /// The second closer sleeps here.
    second: Condvar,
    /// Threads of the slow lane sleep here.
    lane: Condvar,
    /// The watchdog sleeps here.
    watch: Condvar,
    /// Descriptors handed over and not yet closed.
    waiting: AtomicUsize,
    most_waiting: AtomicUsize,
    most_threads: AtomicUsize,
    interrupted: AtomicU64,
    left_out: AtomicU64,
    purged: Purged,
}

struct Purged {
    sender: Sender<WorkerId>,
    wake: Wake,
}

impl std::fmt::Debug for Purged {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Purged")
    }
}

#[derive(Debug)]
struct State {
    copies: Vec<Copy>,
    tasks: Vec<Task>,
    slow: Slow,
    /// Jobs of the slow lane when all its threads were blocked: the second closer closes them, and
    /// each close is interrupted.
    last: VecDeque<(OwnedFd, Option<Slot>)>,
    /// The second closer has been called.
    called: bool,
    /// The first closer sleeps until it is woken.
    asleep: bool,
    /// The first closer naps: it wakes by itself, or is woken if there is much to close.
    napping: bool,
    /// The watchdog is awake.
    watching: bool,
    /// Everything is done and the threads end.
    over: bool,
    /// All threads but the watchdog.
    members: Vec<Arc<Member>>,
}

impl State {
    fn has_work(&self) -> bool {
        !self.copies.is_empty() || !self.tasks.is_empty()
    }
}

/// So many copies justify waking the first closer from a nap. Fewer than the connections that a
/// worker gets before a slot is used again.
const MANY: usize = 64;

/// Capacity reserved beforehand, so that the hot thread allocates nothing in a usual turn.
const ROOM: usize = 1024;

impl Closers {
    /// Starts the closers and the watchdog. `purged` and then `wake` are called when a purge is
    /// done.
    ///
    /// # Errors
    ///
    /// When the system has no thread left.
    pub fn start(bounds: Bounds, purged: Sender<WorkerId>, wake: Wake) -> io::Result<Closers> {
        sys::handle_interrupts()?;
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                copies: Vec::with_capacity(ROOM),
                tasks: Vec::with_capacity(ROOM),
                slow: Slow::default(),
                last: VecDeque::new(),
                called: false,
                asleep: false,
                napping: false,
                watching: false,
                over: false,
                members: Vec::new(),
            }),
            first: Condvar::new(),
            second: Condvar::new(),
            lane: Condvar::new(),
            watch: Condvar::new(),
            waiting: AtomicUsize::new(0),
            most_waiting: AtomicUsize::new(0),
            most_threads: AtomicUsize::new(0),
            interrupted: AtomicU64::new(0),
            left_out: AtomicU64::new(0),
            purged: Purged { sender: purged, wake },
        });
        let closers = Closers {
            shared,
            copies: Vec::with_capacity(ROOM),
            tasks: Vec::with_capacity(ROOM),
            board: 0,
        };
        closers.set_bounds(bounds);
        let start = |name: &'static str, run: fn(&Arc<Shared>)| {
            let shared = Arc::clone(&closers.shared);
            let thread = std::thread::Builder::new().name(name.to_owned());
            thread.spawn(move || run(&shared)).map(drop)
        };
        start("closer-1", lanes::first)?;
        start("closer-2", lanes::second)?;
        start("watchdog", watchdog::run)?;
        // One thread starts here: later the system may have no thread left.
        closers.shared.lock().slow.threads = 1;
        start("closer-slow", lanes::slow)?;
        Ok(closers)
    }

    /// Changes the bounds.
    pub fn set_bounds(&self, bounds: Bounds) {
        self.shared.most_threads.store(bounds.threads.max(1) as usize, Ordering::Relaxed);
        self.shared.most_waiting.store(bounds.waiting.max(1) as usize, Ordering::Relaxed);
    }

    /// Closes the dispatcher's copy of a connection that the worker has taken, then marks its slot
    /// RELEASED.
    pub fn release(
        &mut self,
        fd: OwnedFd,
        board: &Arc<Scoreboard>,
        (slot, seq): (u32, u64),
        worker: WorkerId,
    ) {
        let place = Arc::as_ptr(board) as usize;
        let board = (std::mem::replace(&mut self.board, place) != place).then(|| Arc::clone(board));
        self.copies.push(Copy { fd, board, slot, seq, worker: worker.serial });
    }

    /// Adds a task.
    pub fn task(&mut self, task: Task) {
        self.tasks.push(task);
    }

    /// Hands over what was gathered. False if the queue is locked at this moment: try again soon.
    pub fn hand_over(&mut self) -> bool {
        let count = self.copies.len() + self.tasks.len();
        if count == 0 {
            return true;
        }
        let mut state = match self.shared.state.try_lock() {
            Ok(state) => state,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        self.shared.waiting.fetch_add(count, Ordering::Relaxed);
        state.copies.append(&mut self.copies);
        state.tasks.append(&mut self.tasks);
        let many = state.copies.len() >= MANY;
        let wake = std::mem::take(&mut state.asleep) || many && std::mem::take(&mut state.napping);
        drop(state);
        self.board = 0;
        if wake {
            self.shared.first.notify_one();
        }
        true
    }

    /// Whether so many descriptors wait that no client should be accepted.
    pub fn is_full(&self) -> bool {
        let most = self.shared.most_waiting.load(Ordering::Relaxed);
        self.shared.waiting.load(Ordering::Relaxed) > most.saturating_mul(2)
    }

    /// Whether a descriptor will be free soon.
    pub fn is_busy(&self) -> bool {
        !self.copies.is_empty() || self.shared.waiting.load(Ordering::Relaxed) > 0
    }

    /// The state of the closers.
    pub fn closing(&self) -> Closing {
        Closing {
            waiting: self.shared.waiting.load(Ordering::Relaxed) as u64,
            interrupted: self.shared.interrupted.load(Ordering::Relaxed),
            left_out: self.shared.left_out.load(Ordering::Relaxed),
        }
    }

    /// A handle for another thread that has descriptors to close.
    pub fn bin(&self) -> Bin {
        Bin { shared: Arc::clone(&self.shared) }
    }

    /// A handle for another thread whose calls may block: the watchdog watches it, too.
    pub fn watch(&self) -> Watch {
        Watch { shared: Arc::clone(&self.shared) }
    }

    /// Waits until everything is closed, for at most `patience`. Only at the end of the process:
    /// this may block.
    pub fn finish(mut self, patience: Duration) {
        let deadline = Instant::now() + patience;
        while !self.hand_over() {
            std::thread::yield_now();
        }
        while self.shared.waiting.load(Ordering::Acquire) > 0 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Closers {
    fn drop(&mut self) {
        self.shared.lock().over = true;
        for condition in
            [&self.shared.first, &self.shared.second, &self.shared.lane, &self.shared.watch]
        {
            condition.notify_all();
        }
    }
}

/// The handle by which other threads pass descriptors to the closers.
#[derive(Clone, Debug)]
pub struct Bin {
    shared: Arc<Shared>,
}

impl Bin {
    /// Passes descriptors to be closed. The queue of a Unix socket is dropped with the socket, so
    /// each close may block.
    pub fn close(&self, fds: Vec<OwnedFd>) {
        if fds.is_empty() {
            return;
        }
        let tasks = fds.into_iter().map(|fd| Task::Drop(Owner::Other, Box::new(fd)));
        self.shared.put(tasks.collect());
    }
}

/// Lets the watchdog watch the calling thread.
#[derive(Clone, Debug)]
pub struct Watch {
    shared: Arc<Shared>,
}

impl Watch {
    /// Registers the calling thread: it is interrupted while it makes no progress.
    pub fn join(self) -> Watched {
        Watched { member: self.shared.enter(), shared: self.shared }
    }
}

/// A thread that the watchdog watches.
#[derive(Debug)]
pub struct Watched {
    member: Arc<Member>,
    shared: Arc<Shared>,
}

impl Watched {
    /// A call that may block begins.
    pub fn begin(&self) {
        self.shared.wake_watchdog(&mut self.shared.lock());
        self.member.begin();
    }

    /// One call that may block ends, and the next begins.
    pub fn next(&self) {
        self.member.next();
    }

    /// The call has ended.
    pub fn end(&self) {
        self.member.end();
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.shared.leave(&self.member);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No code can panic halfway through a change of the state.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self) -> Arc<Member> {
        let member = Arc::new(Member::here());
        self.lock().members.push(Arc::clone(&member));
        member
    }

    fn leave(&self, member: &Arc<Member>) {
        self.lock().members.retain(|other| !Arc::ptr_eq(other, member));
    }

    fn wake_watchdog(&self, state: &mut State) {
        if !std::mem::replace(&mut state.watching, true) {
            self.watch.notify_one();
        }
    }

    fn put(&self, tasks: Vec<Task>) {
        self.waiting.fetch_add(tasks.len(), Ordering::Relaxed);
        let mut state = self.lock();
        state.tasks.extend(tasks);
        if std::mem::take(&mut state.asleep) {
            self.first.notify_one();
        }
    }

    /// Counts descriptors that were closed or given up.
    fn closed(&self, count: usize) {
        self.waiting.fetch_sub(count, Ordering::Release);
    }

    fn is_crowded(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > self.most_waiting.load(Ordering::Relaxed)
    }
}
