//! Records that must reach the dispatcher without blocking a thread of the application: update and
//! goodbye.
//!
//! A record is sent immediately if the control connection has room. Otherwise it is kept here, and
//! a thread sends it later. Only the last record is kept: an update has all settings, and a goodbye
//! replaces an update. So a session has at most one waiting record and one thread, and both end
//! with it.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SendFlags, send};

use super::drain::start_thread;
use super::join::{Session, end};
use super::worker_core::WorkerCore;
use dispatch_protocol::wire::{Goodbye, Update};

/// How long the end of a session waits for an unsent goodbye.
pub(super) const GOODBYE_TIMEOUT: Duration = Duration::from_secs(1);

/// How often the thread checks whether the session has to end.
const POLL_INTERVAL: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// The pause of the thread between two attempts.
const RETRY_PAUSE: Duration = Duration::from_millis(5);

#[derive(Clone, Copy, Debug)]
pub(super) enum Record {
    Update(Update),
    Goodbye,
}

impl Record {
    fn encode(self) -> Vec<u8> {
        let mut bytes = Vec::new();
        match self {
            Record::Update(update) => update.encode(&mut bytes),
            Record::Goodbye => Goodbye.encode(&mut bytes),
        }
        bytes
    }
}

#[derive(Debug, Default)]
pub(super) struct Outbox {
    state: Mutex<OutboxState>,
    /// Wakes threads that wait until the last record is sent.
    sent: Condvar,
}

#[derive(Debug, Default)]
struct OutboxState {
    unsent: Option<Record>,
    /// Whether a thread sends the record.
    sending: bool,
    /// The session ends after the record, at this time at the latest.
    ends: Option<Instant>,
}

impl Outbox {
    fn lock(&self) -> MutexGuard<'_, OutboxState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until no record is left, but not beyond `until`.
    pub(super) fn wait_empty(&self, until: Instant) {
        let left = until.saturating_duration_since(Instant::now());
        let unsent = |state: &mut OutboxState| state.unsent.is_some() && state.sending;
        drop(self.sent.wait_timeout_while(self.lock(), left, unsent));
    }
}

impl Session {
    /// Sends a record now or later, in order. Never waits. An error means that the dispatcher is
    /// gone.
    pub(super) fn post(self: &Arc<Self>, core: &WorkerCore, record: Record) -> Result<(), Errno> {
        let mut state = self.outbox.lock();
        if state.unsent.is_none() {
            match self.try_send(record) {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(error) => return Err(error),
            }
        }
        state.unsent = Some(record);
        if !state.sending {
            let session = Arc::clone(self);
            state.sending = start_thread(core, "worker-outbox", move || session.deliver());
        }
        Ok(())
    }

    /// Ends the session immediately, or (true) after the waiting record.
    pub(super) fn end_after_outbox(&self) -> bool {
        let mut state = self.outbox.lock();
        let waits = state.unsent.is_some() && state.sending;
        if waits {
            state.ends = Some(Instant::now() + GOODBYE_TIMEOUT);
        } else {
            self.end();
        }
        waits
    }

    fn deliver(&self) {
        loop {
            // The result does not matter; the next attempt reports errors.
            let _ = poll(&mut [PollFd::new(&self.control, PollFlags::OUT)], Some(&POLL_INTERVAL));
            let mut state = self.outbox.lock();
            let late = state.ends.is_some_and(|ends| ends <= Instant::now());
            let again = match state.unsent {
                Some(record) if !late => matches!(self.try_send(record), Ok(false)),
                _ => false,
            };
            if !again {
                state.unsent = None;
                state.sending = false;
                if state.ends.is_some() {
                    end(&self.control);
                }
                drop(state);
                self.outbox.sent.notify_all();
                return;
            }
            drop(state);
            // `poll` may report the socket as writable although the system lacks memory for the
            // record.
            std::thread::sleep(RETRY_PAUSE);
        }
    }

    /// Whether the record was sent. After an error it never will be.
    fn try_send(&self, record: Record) -> Result<bool, Errno> {
        loop {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match send(&self.control, &record.encode(), flags) {
                Ok(_) => return Ok(true),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
    }
}
