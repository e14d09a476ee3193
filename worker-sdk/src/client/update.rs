//! Changing what hello said of the worker, and pausing, at run time.
//!
//! What is set here outlives the dispatcher: the next hello says it, too.

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
            // Under the lock: so it never follows a goodbye, and two changes arrive in their order.
            Link::Joined { session, .. } => self.tell(session, &state.settings),
            Link::Standalone { listener, paused: None } => {
                // What waits there goes on waiting, and keeps nobody busy.
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
            // The dispatcher has taken them back when it heard of the pause.
            state.aside.clear();
        }
        Ok(())
    }

    /// Has the dispatcher know; never waits for it.
    pub(super) fn tell(&self, session: &Arc<Session>, settings: &Update) {
        if !session.features.contains(Features::UPDATE) {
            self.log_queue().push_limited(RateLimited::Update, log::Level::Warn, || {
                "this dispatcher is too old to be told of another weight, maximum or pause"
                    .to_owned()
            });
        } else if let Err(error) = session.post(self, Record::Update(*settings)) {
            // It has gone: the next one is told by hello.
            self.log_queue().push_limited(RateLimited::Update, log::Level::Debug, || {
                format!("could not tell the dispatcher of a change: {error}")
            });
        }
    }
}

impl State {
    /// While paused nothing is claimed. What has come all the same the dispatcher takes back; should it die before, nobody
    /// else can serve it.
    pub(super) fn set_aside(&mut self) {
        for pending in std::mem::take(&mut self.queue) {
            match pending {
                Pending::Offered { .. } => self.aside.push(pending),
                Pending::Taken(_) | Pending::Probe(_) => self.queue.push_back(pending),
            }
        }
        // What was taken back is not held for the length of a pause: no more than a ring can have out.
        let most = self.link.session().map_or(0, |session| session.board.slots() as usize);
        let surplus = self.aside.len().saturating_sub(most);
        self.aside.drain(..surplus);
    }
}
