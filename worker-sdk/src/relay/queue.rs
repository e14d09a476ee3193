//! The application's queue of one registration, membership or watch: bounded in items and in bytes,
//! for any number of receivers.
//!
//! Each item that is pushed wakes one receiver of each kind, thread and task. A task that was woken
//! and is dropped before it has received wakes the next one.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use crate::client::process::Process;

/// Why nothing more comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Ended {
    /// This program has ended it, or the relay was closed.
    Closed,
    /// A later registration of the same id has replaced it.
    Superseded,
    /// The directory does not accept it, because a limit is reached.
    NotAccepted,
    /// This process is a fork of the one that has the relay.
    Forked,
}

/// What an item takes of the limits in bytes. Only items of this crate have it.
pub trait Weigh {
    /// Bytes.
    fn weight(&self) -> usize;
}

/// The bytes in all queues of one relay.
#[derive(Debug)]
pub(super) struct Budget {
    used: AtomicUsize,
    most: usize,
}

impl Budget {
    pub(super) fn new(most: usize) -> Budget {
        Budget { used: AtomicUsize::new(0), most }
    }

    fn take(&self, bytes: usize) -> bool {
        let fits = |used: usize| used.checked_add(bytes).filter(|sum| *sum <= self.most);
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_ok()
    }

    fn give_back(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// The bounds of one queue.
#[derive(Clone, Copy, Debug)]
pub(super) struct Capacity {
    pub(super) items: usize,
    /// One item may exceed it.
    pub(super) bytes: usize,
}

pub(super) struct Queue<T: Weigh> {
    state: Mutex<State<T>>,
    changed: Condvar,
    capacity: Capacity,
    budget: Arc<Budget>,
    /// A fork may find the lock taken by a thread that it does not have.
    process: Process,
}

struct State<T> {
    items: VecDeque<T>,
    bytes: usize,
    ended: Option<Ended>,
    /// Tasks that wait and have not been woken, the longest waiting first.
    tasks: VecDeque<(u64, Waker)>,
    next_task: u64,
    /// Threads that wait.
    threads: usize,
}

impl<T: Weigh> Queue<T> {
    pub(super) fn new(capacity: Capacity, budget: Arc<Budget>) -> Queue<T> {
        let state = State {
            items: VecDeque::new(),
            bytes: 0,
            ended: None,
            tasks: VecDeque::new(),
            next_task: 0,
            threads: 0,
        };
        let process = Process::current();
        Queue { state: Mutex::new(state), changed: Condvar::new(), capacity, budget, process }
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the item back if the queue is full or has ended. Call [`wake`](Queue::wake) after.
    pub(super) fn push(&self, item: T) -> Result<(), T> {
        let weight = item.weight();
        let mut state = self.lock();
        let full = state.items.len() >= self.capacity.items
            || (state.bytes > 0 && state.bytes.saturating_add(weight) > self.capacity.bytes);
        if full || state.ended.is_some() || !self.budget.take(weight) {
            return Err(item);
        }
        state.bytes += weight;
        state.items.push_back(item);
        Ok(())
    }

    fn pop(&self, state: &mut State<T>) -> Option<T> {
        let item = state.items.pop_front()?;
        let weight = item.weight();
        state.bytes -= weight;
        self.budget.give_back(weight);
        Some(item)
    }

    /// Wakes a receiver of each kind, for one item.
    pub(super) fn wake(&self) {
        let mut state = self.lock();
        let (task, threads) = (state.tasks.pop_front(), state.threads);
        drop(state);
        if threads > 0 {
            self.changed.notify_one();
        }
        if let Some((_, waker)) = task {
            waker.wake();
        }
    }

    /// Nothing more comes; what is there can still be received.
    pub(super) fn end(&self, why: Ended) {
        let mut state = self.lock();
        state.ended.get_or_insert(why);
        let tasks = std::mem::take(&mut state.tasks);
        drop(state);
        self.changed.notify_all();
        tasks.into_iter().for_each(|(_, waker)| waker.wake());
    }

    pub(super) fn ended(&self) -> Option<Ended> {
        if !self.process.is_current() {
            return Some(Ended::Forked);
        }
        self.lock().ended
    }

    pub(super) fn try_take(&self) -> Option<T> {
        if !self.process.is_current() {
            return None;
        }
        self.pop(&mut self.lock())
    }

    pub(super) fn receive(&self) -> Receive<'_, T> {
        Receive { queue: self, task: None }
    }

    /// The next item, or the end; `None` to wait.
    fn next(&self, state: &mut State<T>) -> Option<Option<T>> {
        match self.pop(state) {
            Some(item) => Some(Some(item)),
            None if state.ended.is_some() => Some(None),
            None => None,
        }
    }
}

impl<T: Weigh> Drop for Queue<T> {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        self.budget.give_back(state.bytes);
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
/// thread. Several may wait; each item goes to one of them.
#[must_use = "nothing is received without `wait` or `.await`"]
pub struct Receive<'a, T: Weigh> {
    queue: &'a Queue<T>,
    /// The number under which the task was entered among those that wait.
    task: Option<u64>,
}

impl<T: Weigh> Receive<'_, T> {
    /// Blocks until there is an item, or the end.
    pub fn wait(self) -> Option<T> {
        self.wait_until(None)
    }

    /// Blocks no longer than this; `None` then, too.
    pub fn wait_for(self, time: Duration) -> Option<T> {
        self.wait_until(Instant::now().checked_add(time))
    }

    fn wait_until(self, deadline: Option<Instant>) -> Option<T> {
        if !self.queue.process.is_current() {
            return None;
        }
        let changed = &self.queue.changed;
        let mut state = self.queue.lock();
        loop {
            // Before the time is looked at, so that a wake is never wasted on a thread that gives
            // up.
            if let Some(next) = self.queue.next(&mut state) {
                return next;
            }
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return None;
            }
            state.threads += 1;
            state = match left {
                None => changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(left) => {
                    changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
            state.threads -= 1;
        }
    }
}

impl<T: Weigh> Future for Receive<'_, T> {
    type Output = Option<T>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<T>> {
        let queue = self.queue;
        if !queue.process.is_current() {
            return Poll::Ready(None);
        }
        let mut state = queue.lock();
        let place = self.task.and_then(|task| state.tasks.iter().position(|one| one.0 == task));
        if let Some(next) = queue.next(&mut state) {
            // Whether it was woken or not, it takes no wake with it.
            place.and_then(|place| state.tasks.remove(place));
            self.task = None;
            return Poll::Ready(next);
        }
        let waker = context.waker();
        match place {
            Some(place) => {
                if let Some((_, entered)) = state.tasks.get_mut(place) {
                    entered.clone_from(waker);
                }
            }
            None => {
                state.next_task += 1;
                let task = state.next_task;
                state.tasks.push_back((task, waker.clone()));
                self.task = Some(task);
            }
        }
        Poll::Pending
    }
}

impl<T: Weigh> Drop for Receive<'_, T> {
    fn drop(&mut self) {
        let Some(task) = self.task else { return };
        if !self.queue.process.is_current() {
            return;
        }
        let mut state = self.queue.lock();
        if let Some(place) = state.tasks.iter().position(|one| one.0 == task) {
            state.tasks.remove(place);
        } else if !state.items.is_empty() {
            // It was woken for an item that it has not received.
            drop(state);
            self.queue.wake();
        }
    }
}

impl<T: Weigh> fmt::Debug for Receive<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Receive(..)")
    }
}

impl<T: Weigh> fmt::Debug for Queue<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue").field("capacity", &self.capacity).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
