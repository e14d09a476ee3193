//! The application's queue of one registration, membership or watch: bounded, one receiver.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

/// Why nothing more comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Ended {
    /// This program has ended it, or the relay was closed.
    Closed,
    /// A later registration of the same id has replaced it.
    Superseded,
    /// The directory accepts it no more, for example after a limit was lowered.
    NotAccepted,
}

pub(super) struct Queue<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
    capacity: usize,
}

struct State<T> {
    items: VecDeque<T>,
    ended: Option<Ended>,
    waker: Option<Waker>,
    waits: bool,
}

impl<T> Queue<T> {
    pub(super) fn new(capacity: usize) -> Queue<T> {
        let state = State { items: VecDeque::new(), ended: None, waker: None, waits: false };
        Queue { state: Mutex::new(state), changed: Condvar::new(), capacity }
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the item back if the queue is full or has ended. Call [`wake`](Queue::wake) after.
    pub(super) fn push(&self, item: T) -> Result<(), T> {
        let mut state = self.lock();
        if state.items.len() >= self.capacity || state.ended.is_some() {
            return Err(item);
        }
        state.items.push_back(item);
        Ok(())
    }

    pub(super) fn wake(&self) {
        let mut state = self.lock();
        let (waker, waits) = (state.waker.take(), state.waits);
        drop(state);
        if waits {
            self.changed.notify_one();
        }
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Nothing more comes; what is there can still be received.
    pub(super) fn end(&self, why: Ended) {
        self.lock().ended.get_or_insert(why);
        self.wake();
    }

    pub(super) fn ended(&self) -> Option<Ended> {
        self.lock().ended
    }

    pub(super) fn try_take(&self) -> Option<T> {
        self.lock().items.pop_front()
    }

    pub(super) fn receive(&self) -> Receive<'_, T> {
        Receive(self)
    }
}

impl Queue<super::PresenceEvent> {
    /// The queue was full: its last event says that some were missed.
    pub(super) fn set_missed(&self) {
        if let Some(last) = self.lock().items.back_mut() {
            last.change = dispatch_protocol::relay::Change::Missed;
        }
    }
}

/// The next item, or `None` after the end: `.await` it in a task, or [`wait`](Receive::wait) in a
/// thread.
#[must_use = "nothing is received without `wait` or `.await`"]
pub struct Receive<'a, T>(&'a Queue<T>);

impl<T> Receive<'_, T> {
    /// Blocks until there is an item, or the end.
    pub fn wait(self) -> Option<T> {
        self.wait_until(None)
    }

    /// Blocks no longer than this; `None` then, too.
    pub fn wait_for(self, time: Duration) -> Option<T> {
        self.wait_until(Instant::now().checked_add(time))
    }

    fn wait_until(self, deadline: Option<Instant>) -> Option<T> {
        let mut state = self.0.lock();
        loop {
            if let Some(item) = state.items.pop_front() {
                return Some(item);
            }
            if state.ended.is_some() {
                return None;
            }
            state.waits = true;
            let changed = &self.0.changed;
            state = match deadline {
                None => changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return None;
                    }
                    let waited = changed.wait_timeout(state, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
            state.waits = false;
        }
    }
}

impl<T> Future for Receive<'_, T> {
    type Output = Option<T>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<T>> {
        let mut state = self.0.lock();
        if let Some(item) = state.items.pop_front() {
            return Poll::Ready(Some(item));
        }
        if state.ended.is_some() {
            return Poll::Ready(None);
        }
        state.waker = Some(context.waker().clone());
        Poll::Pending
    }
}

impl<T> fmt::Debug for Receive<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Receive(..)")
    }
}

impl<T> fmt::Debug for Queue<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue").field("items", &self.lock().items.len()).finish_non_exhaustive()
    }
}
