//! Waits for the end of the last connection.
//!
//! This module owns the waiters only. The end of a connection costs one load if nothing waits.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Instant;

#[derive(Debug, Default)]
pub(super) struct IdleSignal {
    waiting: AtomicUsize,
    lock: Mutex<()>,
    ended: Condvar,
    #[cfg(feature = "tokio")]
    told: tokio::sync::Notify,
}

/// Counts as a waiter while it exists.
struct Waiter<'a>(&'a IdleSignal);

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

impl IdleSignal {
    fn enter(&self) -> Waiter<'_> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        Waiter(self)
    }

    /// Called when a connection has ended and is counted.
    ///
    /// This function counts first and then reads the number of waiters; a waiter registers first
    /// and then reads the count. All accesses are sequentially consistent, so at least one of the
    /// two sees the other.
    pub(super) fn ended(&self, live: impl Fn() -> u64) {
        if self.waiting.load(Ordering::SeqCst) > 0 && live() == 0 {
            // With the lock, so that no thread is between its check and its sleep.
            let _lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
            self.ended.notify_all();
            #[cfg(feature = "tokio")]
            self.told.notify_waiters();
        }
    }

    /// Waits until no connection is live; false if `until` comes first.
    pub(super) fn wait(&self, until: Option<Instant>, live: impl Fn() -> u64) -> bool {
        let _waiting = self.enter();
        let mut lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        while live() > 0 {
            let Some(until) = until else {
                lock = self.ended.wait(lock).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.ended.wait_timeout(lock, left);
            lock = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    #[cfg(feature = "tokio")]
    pub(super) async fn waited(&self, live: impl Fn() -> u64) {
        let _waiting = self.enter();
        loop {
            let mut told = std::pin::pin!(self.told.notified());
            // Registers before the check, as above.
            told.as_mut().enable();
            if live() == 0 {
                return;
            }
            told.await;
        }
    }
}
