//! Drains: runs the callbacks, waits for the deadline, then ends the remaining connections.
//!
//! This module owns two threads, one for the callbacks and one for the deadline. So a callback may
//! block or panic without delaying the deadline, and the deadline comes even if no thread is in
//! `accept`. A thread exists only while it has work.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use super::clock::after;
use super::log_queue::log_now;
use super::worker_core::WorkerCore;
use dispatch_protocol::wire;

/// A drain of this worker, as announced by the dispatcher, or because the dispatcher is lost. See
/// [`Worker::on_drain`](crate::Worker::on_drain).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drain {
    deadline: Option<Instant>,
}

impl Drain {
    /// When the remaining live connections are shut down; `None` for never.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    pub(super) fn without_deadline() -> Drain {
        Drain { deadline: None }
    }
}

impl From<wire::Drain> for Drain {
    fn from(record: wire::Drain) -> Drain {
        // The time left has priority, because this process may have another clock (a time
        // namespace).
        let left = record.left.or_else(|| {
            let now: Duration = clock_gettime(ClockId::Monotonic).try_into().unwrap_or_default();
            let deadline = (record.deadline_ns != 0).then_some(record.deadline_ns)?;
            Some(Duration::from_nanos(deadline).saturating_sub(now))
        });
        Drain { deadline: left.map(after) }
    }
}

type DrainCallback = Arc<dyn Fn(&Drain) + Send + Sync>;

#[derive(Default)]
pub(crate) struct Draining {
    state: Mutex<DrainState>,
    /// Wakes the thread that waits for the deadline.
    changed: Condvar,
    /// Wakes tasks that wait for a drain to begin.
    #[cfg(feature = "tokio")]
    begun: tokio::sync::Notify,
}

#[derive(Default)]
struct DrainState {
    now: Option<Drain>,
    callbacks: Vec<DrainCallback>,
    /// How many callbacks, counted from the last, have not run for this drain yet.
    untold: usize,
    /// Whether a thread runs the callbacks.
    telling: bool,
    /// The deadline for which a thread waits, if `waiting`. Cleared when it has passed.
    deadline: Option<Instant>,
    waiting: bool,
    /// The round that the connections have: see
    /// [`LiveConnections::next_round`](super::live_connections::LiveConnections::next_round).
    round: u64,
    /// No further drain follows; a callback is kept only until it has run for this one.
    closed: bool,
}

impl DrainState {
    /// The callbacks that will not be called any more. Drop them without the lock, because they may
    /// own anything.
    fn done(&mut self) -> Vec<DrainCallback> {
        if self.closed && !self.telling { std::mem::take(&mut self.callbacks) } else { Vec::new() }
    }
}

impl fmt::Debug for Draining {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Draining").field("now", &self.now()).finish_non_exhaustive()
    }
}

impl Draining {
    pub(crate) fn now(&self) -> Option<Drain> {
        self.lock().now
    }

    /// The dispatcher has announced a drain, perhaps repeatedly.
    pub(super) fn begin(&self, core: &Arc<WorkerCore>, drain: Drain) {
        let mut state = self.lock();
        if state.now.is_none() {
            state.untold = state.callbacks.len();
        }
        state.now = Some(drain);
        state.deadline = drain.deadline;
        state.round = core.live_connections().next_round();
        start_telling(core, &mut state);
        self.await_deadline(core, &mut state);
        drop(state);
        #[cfg(feature = "tokio")]
        self.begun.notify_waiters();
    }

    /// The drain has ended, by a resume or with the dispatcher. Its deadline no longer counts.
    /// Returns whether a drain was in progress.
    pub(super) fn end(&self, core: &WorkerCore) -> bool {
        let mut state = self.lock();
        let was = state.now.take().is_some();
        state.round = core.live_connections().next_round();
        state.deadline = None;
        self.changed.notify_all();
        was
    }

    /// The worker is closed: callbacks still run for a drain in progress, then they are dropped.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        let done = state.done();
        drop(state);
        drop(done);
    }

    /// The last connection of a closed worker has ended, so the deadline has nothing to end.
    pub(super) fn forget_deadline(&self) {
        self.lock().deadline = None;
        self.changed.notify_all();
    }

    pub(crate) fn on_drain(&self, core: &Arc<WorkerCore>, callback: DrainCallback) {
        let mut state = self.lock();
        state.callbacks.push(callback);
        if state.now.is_some() {
            state.untold += 1;
            start_telling(core, &mut state);
        }
        let done = state.done();
        drop(state);
        drop(done);
    }

    /// Waits until a drain is in progress.
    #[cfg(feature = "tokio")]
    pub(crate) async fn begun(&self) {
        let mut begun = std::pin::pin!(self.begun.notified());
        // Registers before the check, so that no notification is missed. The drop unregisters.
        begun.as_mut().enable();
        if self.now().is_none() {
            begun.await;
        }
    }

    fn await_deadline(&self, core: &Arc<WorkerCore>, state: &mut DrainState) {
        if state.waiting {
            self.changed.notify_all();
        } else if state.deadline.is_some() {
            let for_thread = Arc::clone(core);
            state.waiting = start_thread(core, "worker-drain", move || {
                for_thread.draining().wait(&for_thread);
            });
        }
    }

    fn wait(&self, core: &WorkerCore) {
        let mut state = self.lock();
        while let Some(deadline) = state.deadline {
            let now = Instant::now();
            if deadline <= now {
                state.deadline = None;
                let round = state.round;
                drop(state);
                core.end_all(round);
                state = self.lock();
            } else {
                let waited = self.changed.wait_timeout(state, deadline - now);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
        }
        state.waiting = false;
    }

    fn tell(&self) {
        let mut state = self.lock();
        while state.untold > 0 {
            let first = state.callbacks.len().saturating_sub(state.untold);
            let (callback, drain) = (state.callbacks.get(first).cloned(), state.now);
            state.untold -= 1;
            drop(state);
            // A drain that has already ended is not reported.
            if let (Some(callback), Some(drain)) = (callback, drain) {
                // The panic hook has printed the message. The callback is not used again.
                if catch_unwind(AssertUnwindSafe(|| callback(&drain))).is_err() {
                    let line = "a callback of on_drain panicked; the other callbacks still run";
                    log_now(log::Level::Error, format_args!("{line}"));
                }
            }
            state = self.lock();
        }
        state.telling = false;
        let done = state.done();
        drop(state);
        drop(done);
    }

    fn lock(&self) -> MutexGuard<'_, DrainState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn start_telling(core: &Arc<WorkerCore>, state: &mut DrainState) {
    if !state.telling && state.untold > 0 {
        let for_thread = Arc::clone(core);
        state.telling = start_thread(core, "drain-callbacks", move || for_thread.draining().tell());
    }
}

/// Starts a thread; false if that failed. May be called under any lock.
pub(super) fn start_thread(
    core: &WorkerCore,
    name: &str,
    run: impl FnOnce() + Send + 'static,
) -> bool {
    match std::thread::Builder::new().name(name.to_owned()).spawn(run) {
        Ok(_) => true,
        Err(error) => {
            core.log_queue().push(log::Level::Error, || {
                format!("cannot start the thread {name}: {error}; its work is not done")
            });
            false
        }
    }
}
