//! Results that come later, for threads and for tasks.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use crate::client::process::Process;

/// A result that comes later: `.await` it in a task of any runtime, or [`wait`](Pending::wait) in a
/// thread. Dropping it gives up the result, not the operation.
#[must_use = "the operation runs, but its result is lost; use `wait` or `.await`"]
pub struct Pending<T: Orphan>(Arc<Slot<T>>);

/// What a result is in a fork of the process that waits for it: no thread there sets it.
pub trait Orphan {
    /// The result.
    fn forked() -> Self;
}

/// The place of the result.
pub(super) struct Slot<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
    process: Process,
}

struct State<T> {
    value: Option<T>,
    waker: Option<Waker>,
    /// Whether a thread waits.
    waits: bool,
}

impl<T: Orphan> Slot<T> {
    pub(super) fn new() -> (Arc<Slot<T>>, Pending<T>) {
        let state = State { value: None, waker: None, waits: false };
        let (state, process) = (Mutex::new(state), Process::current());
        let slot = Arc::new(Slot { state, changed: Condvar::new(), process });
        (Arc::clone(&slot), Pending(slot))
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the result and wakes what waits for it.
    pub(super) fn set(&self, value: T) {
        let mut state = self.lock();
        state.value = Some(value);
        let (waker, waits) = (state.waker.take(), state.waits);
        drop(state);
        if waits {
            self.changed.notify_one();
        }
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<T: Orphan> Pending<T> {
    pub(super) fn ready(value: T) -> Pending<T> {
        let (slot, pending) = Slot::new();
        slot.set(value);
        pending
    }

    /// Blocks until the result is there.
    pub fn wait(self) -> T {
        if !self.0.process.is_current() {
            return T::forked();
        }
        let mut state = self.0.lock();
        loop {
            if let Some(value) = state.value.take() {
                return value;
            }
            state.waits = true;
            state = self.0.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The result, if it is there.
    pub fn try_take(&mut self) -> Option<T> {
        if !self.0.process.is_current() {
            return Some(T::forked());
        }
        self.0.lock().value.take()
    }
}

impl<T: Orphan> Future for Pending<T> {
    type Output = T;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        if !self.0.process.is_current() {
            return Poll::Ready(T::forked());
        }
        let mut state = self.0.lock();
        match state.value.take() {
            Some(value) => Poll::Ready(value),
            None => {
                state.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl<T: Orphan> fmt::Debug for Pending<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pending(..)")
    }
}
