//! Closing descriptors, and everything else that touches a description which another process holds or has prepared.
//!
//! The process that drops the last reference to a socket executes its lingering close, in the thread that closes; and
//! `setsockopt`, `shutdown`, `send` and `recv` wait for the socket's lock, which a process inside `send` can hold for as
//! long as it likes. So the hot thread does none of this. It gathers descriptors and tasks during a turn and hands them
//! over once, with at most one wake-up, and none while the first closer is awake.
//!
//! | thread | does | can be held up |
//! |---|---|---|
//! | first closer | closes what does not linger, then writes RELEASED; sorts the rest into the slow lane | by a linger set between its look and its close: until the watchdog interrupts it |
//! | second closer | the same while the first does not get on, and the slow lane's closes while all of it is held up | likewise |
//! | slow lane, one thread and more on demand | lingering closes, clients told why they are turned away, purges | by the peer whose descriptor it is; one thread for each peer at most |
//! | watchdog | interrupts whoever does not get on, calls the second closer, starts threads of the slow lane | by nothing |
//!
//! `getsockopt(SO_LINGER)` takes no lock. `close` takes one, but only if it is the last, and then nobody else has it; the
//! wait that follows is ended by a signal. A thread of the slow lane can thus be held up for good only by a task that a
//! close does not need (clearing linger, telling, purging). If all of them are, such tasks are left out: the closers close
//! what waits for the slow lane, and each close ends by an interruption. So what waits always becomes less.
//!
//! A panic ends none of these threads: it is reported, and the thread goes on with what it had.

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
    /// `max_closing`: with more descriptors than this waiting, linger is cleared before a close; with twice as many, no
    /// client is accepted.
    pub waiting: u32,
}

/// The copy of a connection that a worker has.
#[derive(Debug)]
struct Copy {
    fd: OwnedFd,
    /// `None`: that of the copy before.
    board: Option<Arc<Scoreboard>>,
    slot: u32,
    seq: u64,
    worker: u64,
}

/// Whose descriptor it is: one thread of the slow lane for each at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Owner {
    /// A worker, by the serial number of its id.
    Worker(u64),
    /// A client that never was at a worker, or anything else; each is one of its own.
    Other,
}

/// Something to do with a descriptor besides closing it.
#[derive(Debug)]
pub enum Task {
    /// Close it.
    Close(OwnedFd),
    /// A client is turned away: send it `response`, if there is one, end the connection in both directions for everybody
    /// that has a copy, and close it.
    End {
        /// The client.
        fd: OwnedFd,
        /// The pool's `unavailable_response`.
        response: Option<Arc<[u8]>>,
        /// Who may hold its lock. `None` for a TCP client that never was at a worker: then nothing can block.
        owner: Option<Owner>,
    },
    /// Empty a worker's channel through the retained end, then report the worker as purged.
    Purge {
        /// Whose channel.
        worker: WorkerId,
        /// The end of it that the worker has, too.
        retained: Arc<OwnedFd>,
        /// Most records that can be in it.
        most: u32,
    },
    /// Drop it: a channel with what is queued in it, a listening socket.
    Drop(Owner, Box<dyn Rubbish>),
    /// A defect in the closer itself.
    #[cfg(test)]
    Panic,
}

/// What can be dropped anywhere.
pub trait Rubbish: Send + std::fmt::Debug {}
impl<T: Send + std::fmt::Debug> Rubbish for T {}

/// How it stands; for the status.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Closing {
    /// Descriptors that wait to be closed, or are being closed.
    pub waiting: u64,
    /// Times a thread was interrupted because it did not get on.
    pub interrupted: u64,
    /// Tasks left out because all threads of the slow lane were held up.
    pub left_out: u64,
}

/// The hot thread's side: gathers, and hands over.
#[derive(Debug)]
pub struct Closers {
    shared: Arc<Shared>,
    copies: Vec<Copy>,
    tasks: Vec<Task>,
    /// Where the board of the last copy is that was gathered since the last hand-over; only compared.
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
    /// What waited for the slow lane when all of it was held up: closed by the second closer, each close interrupted.
    last: VecDeque<(OwnedFd, Option<Slot>)>,
    /// The second closer is called.
    called: bool,
    /// The first closer sleeps until it is woken.
    asleep: bool,
    /// The first closer naps: it comes by itself, and is called if there is much to do.
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

/// So many copies are worth waking the first closer from a nap. Less than the connections that go to a worker before a slot
/// is used again.
const MANY: usize = 64;

/// Room made beforehand, so that the hot thread allocates nothing for a usual turn.
const ROOM: usize = 1024;

impl Closers {
    /// Starts the closers and the watchdog. `purged` and then `wake` are called when a purge is done.
    ///
    /// # Errors
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
        // One is there from the start: later there may be no thread for it.
        closers.shared.lock().slow.threads = 1;
        start("closer-slow", lanes::slow)?;
        Ok(closers)
    }

    /// Other bounds, from now on.
    pub fn set_bounds(&self, bounds: Bounds) {
        self.shared.most_threads.store(bounds.threads.max(1) as usize, Ordering::Relaxed);
        self.shared.most_waiting.store(bounds.waiting.max(1) as usize, Ordering::Relaxed);
    }

    /// Closes the copy of a connection that the worker has taken, and then writes RELEASED into its slot.
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

    /// Has something else done.
    pub fn task(&mut self, task: Task) {
        self.tasks.push(task);
    }

    /// Hands over what has been gathered. False if the closers have the queue at this very moment: try again soon.
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

    /// So many descriptors wait to be closed that no others should be accepted.
    pub fn is_full(&self) -> bool {
        let most = self.shared.most_waiting.load(Ordering::Relaxed);
        self.shared.waiting.load(Ordering::Relaxed) > most.saturating_mul(2)
    }

    /// Whether a descriptor is going to be free soon.
    pub fn is_busy(&self) -> bool {
        !self.copies.is_empty() || self.shared.waiting.load(Ordering::Relaxed) > 0
    }

    /// How it stands.
    pub fn closing(&self) -> Closing {
        Closing {
            waiting: self.shared.waiting.load(Ordering::Relaxed) as u64,
            interrupted: self.shared.interrupted.load(Ordering::Relaxed),
            left_out: self.shared.left_out.load(Ordering::Relaxed),
        }
    }

    /// For another thread that has descriptors to be closed.
    pub fn bin(&self) -> Bin {
        Bin { shared: Arc::clone(&self.shared) }
    }

    /// For another thread whose calls may hang: the watchdog looks after it, too.
    pub fn watch(&self) -> Watch {
        Watch { shared: Arc::clone(&self.shared) }
    }

    /// Waits until everything is closed, at most so long. For the very end: this may block.
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

/// Where other threads put what is to be closed.
#[derive(Clone, Debug)]
pub struct Bin {
    shared: Arc<Shared>,
}

impl Bin {
    /// Has these closed. What is queued in a Unix socket goes with it, so each may hang.
    pub fn close(&self, fds: Vec<OwnedFd>) {
        if fds.is_empty() {
            return;
        }
        let tasks = fds.into_iter().map(|fd| Task::Drop(Owner::Other, Box::new(fd)));
        self.shared.put(tasks.collect());
    }
}

/// Lets the watchdog look after the calling thread.
#[derive(Clone, Debug)]
pub struct Watch {
    shared: Arc<Shared>,
}

impl Watch {
    /// The calling thread becomes one that is interrupted while it does not get on.
    pub fn join(self) -> Watched {
        Watched { member: self.shared.enter(), shared: self.shared }
    }
}

/// A thread that the watchdog looks after.
#[derive(Debug)]
pub struct Watched {
    member: Arc<Member>,
    shared: Arc<Shared>,
}

impl Watched {
    /// What follows may hang.
    pub fn begin(&self) {
        self.shared.wake_watchdog(&mut self.shared.lock());
        self.member.begin();
    }

    /// From one call that may hang to the next.
    pub fn next(&self) {
        self.member.next();
    }

    /// It has not, or was interrupted.
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
        // Nothing here can panic halfway through a change.
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

    /// So many descriptors are closed, or given up.
    fn closed(&self, count: usize) {
        self.waiting.fetch_sub(count, Ordering::Release);
    }

    fn is_crowded(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > self.most_waiting.load(Ordering::Relaxed)
    }
}
