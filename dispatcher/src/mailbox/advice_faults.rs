//! Peers that advice leaves out, for the faults of the status: the side thread reports them, the
//! event loop keeps the list of faults.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

/// Most changes that wait for the event loop. Beyond that the oldest are dropped.
const MAX_EVENTS: usize = 128;

/// A change of one peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerEvent {
    /// When.
    pub at: SystemTime,
    /// The peer.
    pub peer: String,
    /// The state in words.
    pub text: String,
    /// Whether the peer is left out from now on; otherwise it answers again, or is no peer any
    /// more.
    pub left_out: bool,
}

/// The changes that the event loop has not seen yet.
#[derive(Clone, Debug, Default)]
pub struct AdviceFaults {
    events: Arc<Mutex<VecDeque<PeerEvent>>>,
    /// Whether there are any, so that the event loop rarely takes the lock.
    any: Arc<AtomicBool>,
}

impl AdviceFaults {
    pub(crate) fn report(&self, event: PeerEvent) {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        if events.len() == MAX_EVENTS {
            events.pop_front();
        }
        events.push_back(event);
        drop(events);
        self.any.store(true, Ordering::Release);
    }

    /// The changes since the last call, in order. Never blocks: if the lock is taken, the next call
    /// returns them.
    pub(crate) fn take(&self) -> VecDeque<PeerEvent> {
        if !self.any.load(Ordering::Acquire) {
            return VecDeque::new();
        }
        let Ok(mut events) = self.events.try_lock() else { return VecDeque::new() };
        self.any.store(false, Ordering::Release);
        std::mem::take(&mut events)
    }
}
