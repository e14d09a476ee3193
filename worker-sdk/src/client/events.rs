//! Telling the application that the worker joined, lost its dispatcher, or was resumed after a drain.
//!
//! Owns the callbacks, what they have yet to be told, and the thread that tells it: in order, one after the other, without
//! a lock. The thread lives only while there is something to tell.

use std::collections::VecDeque;
use std::fmt;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::drain::start_thread;
use super::log_queue::log_now;
use super::worker_core::WorkerCore;

/// Most events that wait for a callback which takes its time. Beyond that the oldest are left out.
const MOST: usize = 64;

/// What happened between the worker and its dispatchers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum LinkEvent {
    /// As the worker with this id.
    Joined(u64),
    /// For this reason.
    Lost(String),
    Resumed,
}

/// Each is told of the events of its own kind only.
#[derive(Clone)]
pub(super) enum LinkCallback {
    Joined(Arc<dyn Fn(u64) + Send + Sync>),
    Lost(Arc<dyn Fn(&str) + Send + Sync>),
    Resumed(Arc<dyn Fn() + Send + Sync>),
}

impl LinkCallback {
    fn call(&self, event: &LinkEvent) {
        match (self, event) {
            (LinkCallback::Joined(call), LinkEvent::Joined(id)) => call(*id),
            (LinkCallback::Lost(call), LinkEvent::Lost(why)) => call(why),
            (LinkCallback::Resumed(call), LinkEvent::Resumed) => call(),
            (LinkCallback::Joined(_) | LinkCallback::Lost(_) | LinkCallback::Resumed(_), _) => {}
        }
    }
}

#[derive(Default)]
pub(super) struct LinkEvents(Mutex<EventState>);

#[derive(Default)]
struct EventState {
    callbacks: Vec<LinkCallback>,
    /// For all callbacks, or for one that was added when it had happened already.
    untold: VecDeque<(LinkEvent, Option<LinkCallback>)>,
    left_out: u64,
    /// Whether a thread tells them.
    telling: bool,
    /// Nothing happens any more.
    closed: bool,
}

impl EventState {
    /// The callbacks that nobody will call any more; to be dropped without the lock, as they may own anything.
    fn done(&mut self) -> Vec<LinkCallback> {
        if self.closed && !self.telling { mem::take(&mut self.callbacks) } else { Vec::new() }
    }

    fn add(&mut self, event: LinkEvent, only: Option<LinkCallback>) {
        if self.untold.len() == MOST {
            self.untold.pop_front();
            self.left_out += 1;
        }
        self.untold.push_back((event, only));
    }
}

impl fmt::Debug for LinkEvents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LinkEvents").finish_non_exhaustive()
    }
}

impl LinkEvents {
    /// It has just happened. May be called under the core's lock.
    pub(super) fn happened(&self, core: &Arc<WorkerCore>, event: LinkEvent) {
        let mut state = self.lock();
        if !state.callbacks.is_empty() {
            state.add(event, None);
            self.start(core, &mut state);
        }
    }

    /// `already` is what has happened before, and still is so. Gives what is to be dropped without any lock.
    pub(super) fn on(
        &self,
        core: &Arc<WorkerCore>,
        callback: LinkCallback,
        already: Option<LinkEvent>,
    ) -> Vec<LinkCallback> {
        let mut state = self.lock();
        if let Some(event) = already {
            state.add(event, Some(callback.clone()));
            self.start(core, &mut state);
        }
        state.callbacks.push(callback);
        state.done()
    }

    /// The worker is closed: what has yet to be told still is, and then the callbacks and all they own are let go.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        let done = state.done();
        drop(state);
        drop(done);
    }

    fn start(&self, core: &Arc<WorkerCore>, state: &mut EventState) {
        if !state.telling {
            let for_thread = Arc::clone(core);
            state.telling = start_thread(core, "worker-events", move || for_thread.events().tell());
        }
    }

    fn tell(&self) {
        loop {
            let mut state = self.lock();
            let left_out = mem::take(&mut state.left_out);
            let Some((event, only)) = state.untold.pop_front() else {
                state.telling = false;
                let done = state.done();
                drop(state);
                drop(done);
                return;
            };
            let callbacks = match only {
                Some(callback) => vec![callback],
                None => state.callbacks.clone(),
            };
            drop(state);
            if left_out > 0 {
                let line =
                    format_args!("{left_out} events were left out: the callbacks take too long");
                log_now(log::Level::Warn, line);
            }
            for callback in callbacks {
                // The panic's own message was printed where it happened. The callback is not ours to look at again.
                if catch_unwind(AssertUnwindSafe(|| callback.call(&event))).is_err() {
                    let line =
                        format_args!("a callback panicked; the others are called all the same");
                    log_now(log::Level::Error, line);
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, EventState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
