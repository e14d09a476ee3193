//! Waiting for the last connection to end.
//!
//! Owns who waits, and nothing else. Whoever ends a connection asks here only whether anybody does: one load.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

#[derive(Debug, Default)]
pub(super) struct Idle {
    waiting: AtomicUsize,
    lock: Mutex<()>,
    ended: Condvar,
    #[cfg(feature = "tokio")]
    told: tokio::sync::Notify,
}

/// Counts as one who waits.
struct Waiting<'a>(&'a Idle);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Idle {
    fn enter(&self) -> Waiting<'_> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        Waiting(self)
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

    pub(super) fn wait(&self, live: impl Fn() -> u64) {
        let _waiting = self.enter();
        let mut lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        while live() > 0 {
            lock = self.ended.wait(lock).unwrap_or_else(PoisonError::into_inner);
        }
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
