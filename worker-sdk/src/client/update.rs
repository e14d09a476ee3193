//! Changes of weight, maximum and pause at run time.
//!
//! The settings outlive the dispatcher: the next hello carries them.

use std::os::fd::AsFd;
use std::sync::Arc;

use super::error::Error;
use super::join::Session;
use super::log_queue::RateLimited;
use super::outbox::Record;
use super::worker_core::{Link, Pending, State, WorkerCore};
use dispatch_protocol::wire::{Features, Update};

impl WorkerCore {
    pub(crate) fn set_weight(&self, weight: u16) -> Result<(), Error> {
        if weight == 0 {
            return Err(Error::config("weight", "is 0; the smallest share is 1"));
        }
        self.change(|settings| settings.weight = weight)
    }

    pub(crate) fn set_max_connections(&self, max: u32) -> Result<(), Error> {
        if max == 0 {
            return Err(Error::config("max_connections", "is 0; a worker holds at least 1"));
        }
        self.change(|settings| settings.max_connections = max)
    }

    pub(crate) fn set_paused(&self, paused: bool) -> Result<(), Error> {
        self.change(|settings| settings.paused = paused)
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.lock().settings.paused
    }

    fn change(&self, change: impl FnOnce(&mut Update)) -> Result<(), Error> {
        if !self.process().is_current() {
            return Err(Error::Forked);
        }
        let mut locked = self.lock();
        let state = &mut *locked;
        let before = state.settings;
        change(&mut state.settings);
        if state.settings == before {
            return Ok(());
        }
        match &state.link {
            // Sent under the lock, so that an update never follows a goodbye and updates arrive in
            // order.
            Link::Joined { session, .. } => self.tell(session, &state.settings),
            Link::Standalone { listener, paused: None } => {
                // Waiting connections stay in the kernel's queue and do not make the worker
                // readable.
                match (before.paused, state.settings.paused) {
                    (false, true) => self.readiness().forget(listener.as_fd()),
                    (true, false) => {
                        let failed = |error| Error::io("wait for connections", error);
                        self.readiness().watch(listener.as_fd()).map_err(failed)?;
                    }
                    _ => {}
                }
            }
            Link::Standalone { .. } | Link::Waiting { .. } | Link::Greeting { .. } => {}
            Link::Closed => state.settings.paused = false,
        }
        if state.settings.paused {
            state.set_aside();
        } else {
            // The dispatcher revoked them when it received the pause.
            state.aside.clear();
        }
        Ok(())
    }

    /// Sends the settings to the dispatcher; never waits.
    pub(super) fn tell(&self, session: &Arc<Session>, settings: &Update) {
        if !session.features.contains(Features::UPDATE) {
            self.log_queue().push_limited(RateLimited::Update, log::Level::Warn, || {
                "the dispatcher is too old for changes of weight, maximum or pause".to_owned()
            });
        } else if let Err(error) = session.post(self, Record::Update(*settings)) {
            // The dispatcher is gone; the next one gets the settings with the hello.
            self.log_queue().push_limited(RateLimited::Update, log::Level::Debug, || {
                format!("could not send a change to the dispatcher: {error}")
            });
        }
    }
}

impl State {
    /// While paused the worker takes nothing. The dispatcher revokes what arrives; if it ends
    /// before that, this worker takes it.
    pub(super) fn set_aside(&mut self) {
        for pending in std::mem::take(&mut self.queue) {
            match pending {
                Pending::Offered(_) => self.aside.push(pending),
                Pending::Taken(_) | Pending::Probe(_) => self.queue.push_back(pending),
            }
        }
        // Revoked connections are kept for the length of a pause, but at most as many as the
        // scoreboard has slots.
        let most = self.link.session().map_or(0, |session| session.board.slots() as usize);
        let surplus = self.aside.len().saturating_sub(most);
        self.aside.drain(..surplus);
    }
}
