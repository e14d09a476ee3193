//! Being drained: telling the application, waiting for the deadline, ending what is left then.
//!
//! Owns the thread on which all that happens: an application's callback may do what it likes, and a deadline comes even
//! when nobody is in `accept`. The thread lives only while there is something to tell or to wait for.

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use super::core::Core;
use crate::wire;

/// What the dispatcher said when it began to drain this worker. See [`Worker::on_drain`](crate::Worker::on_drain).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drain {
    deadline: Option<Instant>,
}

impl Drain {
    /// When the connections that are still live will be shut down; `None` for never.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }
}

impl From<wire::Drain> for Drain {
    fn from(record: wire::Drain) -> Drain {
        let now: Duration = clock_gettime(ClockId::Monotonic).try_into().unwrap_or_default();
        let left = || Duration::from_nanos(record.deadline_ns).saturating_sub(now);
        // A deadline beyond what the clock can say is none.
        let deadline = (record.deadline_ns != 0).then(|| Instant::now().checked_add(left()));
        Drain { deadline: deadline.flatten() }
    }
}

type Callback = Arc<dyn Fn(&Drain) + Send + Sync>;

#[derive(Default)]
pub(crate) struct Draining {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    now: Option<Drain>,
    callbacks: Vec<Callback>,
    /// The drain was announced, and not yet told to so many of the callbacks, the last ones.
    untold: usize,
    /// Until then the thread waits. Cleared when it has come.
    deadline: Option<Instant>,
    thread: bool,
    /// Tasks that wait for a drain to begin.
    wakers: Vec<Waker>,
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

    /// The dispatcher has said so, perhaps again.
    pub(super) fn begin(&self, core: &Arc<Core>, drain: Drain) {
        let mut state = self.lock();
        if state.now.is_none() {
            state.untold = state.callbacks.len();
        }
        state.now = Some(drain);
        state.deadline = drain.deadline;
        self.wake_thread(core, &mut state);
        let wakers = std::mem::take(&mut state.wakers);
        drop(state);
        wakers.into_iter().for_each(Waker::wake);
    }

    /// It is over: the dispatcher said so, or is gone. What its deadline was does not matter any more.
    pub(super) fn end(&self) {
        let mut state = self.lock();
        state.now = None;
        state.deadline = None;
        self.changed.notify_all();
    }

    pub(crate) fn on_drain(&self, core: &Arc<Core>, callback: Callback) {
        let mut state = self.lock();
        state.callbacks.push(callback);
        if state.now.is_some() {
            state.untold += 1;
            self.wake_thread(core, &mut state);
        }
    }

    /// Whether a drain is under way; if not, `waker` is woken when one begins.
    #[cfg(feature = "tokio")]
    pub(crate) fn poll(&self, waker: &Waker) -> bool {
        let mut state = self.lock();
        if state.now.is_some() {
            return true;
        }
        if !state.wakers.iter().any(|other| other.will_wake(waker)) {
            state.wakers.push(waker.clone());
        }
        false
    }

    fn wake_thread(&self, core: &Arc<Core>, state: &mut State) {
        if state.thread || state.untold == 0 && state.deadline.is_none() {
            self.changed.notify_all();
            return;
        }
        let core = Arc::clone(core);
        let run = move || core.draining().run(&core);
        match std::thread::Builder::new().name("worker-drain".to_owned()).spawn(run) {
            Ok(_) => state.thread = true,
            Err(error) => log::error!(
                "no thread for a drain: {error}; nobody is told, and its deadline does not count"
            ),
        }
    }

    fn run(&self, core: &Core) {
        let mut state = self.lock();
        loop {
            if state.untold > 0 {
                let first = state.callbacks.len() - state.untold;
                let (callback, drain) = (state.callbacks.get(first).cloned(), state.now);
                state.untold -= 1;
                drop(state);
                // A drain that is over already is not worth a word.
                if let (Some(callback), Some(drain)) = (callback, drain) {
                    callback(&drain);
                }
                state = self.lock();
                continue;
            }
            let now = Instant::now();
            match state.deadline {
                None => {
                    state.thread = false;
                    return;
                }
                Some(deadline) if deadline <= now => {
                    state.deadline = None;
                    drop(state);
                    core.end_all();
                    state = self.lock();
                }
                Some(deadline) => {
                    let waited = self.changed.wait_timeout(state, deadline - now);
                    state = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
