//! The lock on the state. Its release flushes the log queue, and completes a close by the loss of a
//! dispatcher.

use super::*;

/// The locked state. Log lines queued under the lock reach the application's logger after the
/// release.
pub(in crate::client) struct Locked<'a> {
    // Declared first, so dropped first.
    state: MutexGuard<'a, State>,
    flush: Flush<'a>,
}

struct Flush<'a>(&'a WorkerCore);

impl Drop for Flush<'_> {
    fn drop(&mut self) {
        self.0.log_queue.flush();
        if self.0.closed_by_loss.load(Ordering::Relaxed)
            && self.0.closed_by_loss.swap(false, Ordering::SeqCst)
        {
            self.0.close_callbacks();
        }
    }
}

impl<'a> Locked<'a> {
    /// Waits for `condition`; may return early.
    pub(super) fn wait(
        self,
        condition: &Condvar,
        core: &'a WorkerCore,
        until: Option<Instant>,
    ) -> Locked<'a> {
        let Locked { state, flush } = self;
        if !flush.0.log_queue.is_empty() {
            // Flushes the log first. That may take time, so the caller checks its condition again.
            drop(state);
            drop(flush);
            return core.lock();
        }
        let state = match until {
            None => condition.wait(state).unwrap_or_else(PoisonError::into_inner),
            Some(until) => {
                let left = until.saturating_duration_since(Instant::now());
                condition.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
            }
        };
        Locked { state, flush }
    }
}

impl std::ops::Deref for Locked<'_> {
    type Target = State;

    fn deref(&self) -> &State {
        &self.state
    }
}

impl std::ops::DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut State {
        &mut self.state
    }
}

impl WorkerCore {
    pub(in crate::client) fn lock(&self) -> Locked<'_> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        Locked { state, flush: Flush(self) }
    }
}
