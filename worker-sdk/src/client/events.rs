//! Callbacks for joins, losses of the dispatcher, and resumed drains.
//!
//! This module owns the callbacks, the events they have not received yet, and the thread that calls
//! them in order and without a lock. The thread exists only while events wait.

use std::collections::VecDeque;
use std::fmt;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::drain::start_thread;
use super::log_queue::log_now;
use super::worker_core::WorkerCore;

/// The largest number of waiting events. Beyond it the oldest are dropped.
const MOST: usize = 64;

/// An event between the worker and its dispatchers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum LinkEvent {
    /// The worker joined and has this id.
    Joined(u64),
    /// The worker lost its dispatcher for this reason.
    Lost(String),
    Resumed,
}

/// A callback receives only the events of its own kind.
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
    /// Events for all callbacks, or for one callback that was added after the event.
    undelivered: VecDeque<(LinkEvent, Option<LinkCallback>)>,
    dropped: u64,
    /// Whether a thread delivers them.
    delivering: bool,
    /// No further events come.
    closed: bool,
}

impl EventState {
    /// The callbacks that will not be called any more. Drop them without the lock, because they may
    /// own anything.
    fn done(&mut self) -> Vec<LinkCallback> {
        if self.closed && !self.delivering { mem::take(&mut self.callbacks) } else { Vec::new() }
    }

    fn add(&mut self, event: LinkEvent, only: Option<LinkCallback>) {
        if self.undelivered.len() == MOST {
            self.undelivered.pop_front();
            self.dropped += 1;
        }
        self.undelivered.push_back((event, only));
    }
}

impl fmt::Debug for LinkEvents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LinkEvents").finish_non_exhaustive()
    }
}

impl LinkEvents {
    /// Reports an event. May be called under the core's lock.
    pub(super) fn happened(&self, core: &Arc<WorkerCore>, event: LinkEvent) {
        let mut state = self.lock();
        if !state.callbacks.is_empty() {
            state.add(event, None);
            self.start(core, &mut state);
        }
    }

    /// `already` is an event that still holds. The caller drops the result without any lock.
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

    /// The worker is closed: waiting events are still delivered, then the callbacks are dropped.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        let done = state.done();
        drop(state);
        drop(done);
    }

    fn start(&self, core: &Arc<WorkerCore>, state: &mut EventState) {
        if !state.delivering {
            let for_thread = Arc::clone(core);
            state.delivering =
                start_thread(core, "worker-events", move || for_thread.events().deliver());
        }
    }

    fn deliver(&self) {
        loop {
            let mut state = self.lock();
            let dropped = mem::take(&mut state.dropped);
            let Some((event, only)) = state.undelivered.pop_front() else {
                state.delivering = false;
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
            if dropped > 0 {
                let line =
                    format_args!("{dropped} events were dropped: the callbacks take too long");
                log_now(log::Level::Warn, line);
            }
            for callback in callbacks {
                // The panic hook has printed the message. The callback is not used again.
                if catch_unwind(AssertUnwindSafe(|| callback.call(&event))).is_err() {
                    let line = format_args!("a callback panicked; the other callbacks still run");
                    log_now(log::Level::Error, line);
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, EventState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
