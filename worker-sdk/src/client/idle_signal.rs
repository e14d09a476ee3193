//! Waiting for the last connection to end.
//!
//! Owns who waits, and nothing else. Whoever ends a connection asks here only whether anybody does: one load.

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

/// Counts as one who waits.
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

    /// A connection has ended, and is counted.
    ///
    /// Here the count comes first and then the look at who waits; whoever waits says so first and then looks at the
    /// count. All sequentially consistent: so one of the two sees the other.
    pub(super) fn ended(&self, live: impl Fn() -> u64) {
        if self.waiting.load(Ordering::SeqCst) > 0 && live() == 0 {
            // With the lock, so that nobody is between looking and sleeping.
            let _lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
            self.ended.notify_all();
            #[cfg(feature = "tokio")]
            self.told.notify_waiters();
        }
    }

    /// False if that moment has come before.
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
            // Before the look, as above.
            told.as_mut().enable();
            if live() == 0 {
                return;
            }
            told.await;
        }
    }
}
