//! Draining by an operator: a worker gets nothing more, keeps what it has, and may be made active again.
//!
//! What it was sent and has not taken stays with it, as everything before it was its own choice to take; if it leaves
//! that untaken for `handoff_timeout`, it goes elsewhere like any suspect's. While all of a pool's workers drain the
//! pool has no usable worker: its clients wait for `wait_for_worker`, and are then refused.

use super::types::*;
use super::{Core, Event};

impl Core {
    /// An operator wants the worker to get nothing more. False if that was so already, or the worker is gone.
    pub fn drain_worker(&mut self, now: Time, worker: WorkerId) -> bool {
        let Some(w) = self.find(worker) else { return false };
        let usable = self.workers[w].is_usable();
        if usable {
            let live = self.workers[w].load();
            // Whether it is alive is as open as before, should it be made active again.
            self.workers[w].unproven = self.workers[w].state == State::Suspect;
            self.drain(now, w);
            self.event(Event::Draining { worker, live });
        }
        self.after(now, self.workers[w].pool);
        usable
    }

    /// An operator wants the worker to get connections again. False if it does already.
    ///
    /// # Errors
    /// [`CannotResume`] for a worker that leaves by its own wish.
    pub fn resume_worker(&mut self, now: Time, worker: WorkerId) -> Result<bool, CannotResume> {
        let w = self.find(worker).ok_or(CannotResume::Leaving)?;
        let state = &mut self.workers[w];
        match state.state {
            State::Gone => return Err(CannotResume::Leaving),
            State::Draining if state.said_goodbye || state.closed => {
                return Err(CannotResume::Leaving);
            }
            State::Active | State::Suspect => return Ok(false),
            State::Draining => {}
        }
        let pool = state.pool;
        if std::mem::take(&mut state.unproven) {
            state.state = State::Suspect;
            state.suspect_since = now;
        } else {
            state.state = State::Active;
            // What it has finished meanwhile must not draw every new client to it at once.
            state.start_slowly(now, self.pools[pool].settings.slow_start);
        }
        self.add_usable(pool);
        self.event(Event::Resumed { worker });
        // In a round of revocations its end does this.
        if self.workers[w].ring.revoking() == 0 {
            self.probe(now, w);
        }
        self.refresh(w);
        self.after(now, pool);
        Ok(true)
    }

    /// Every worker that is there, in no particular order.
    pub fn workers(&self) -> impl Iterator<Item = WorkerId> + Clone + '_ {
        let there =
            |worker: &&super::worker::Worker| worker.state != State::Gone && !worker.forgotten;
        self.workers.iter().filter(there).map(|worker| worker.id)
    }

    /// The names of all pools.
    pub fn pool_names(&self) -> impl Iterator<Item = &str> + Clone {
        self.pools.iter().map(|pool| pool.settings.name.as_str())
    }
}

/// Why a worker cannot be made active again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CannotResume {
    /// It said goodbye, closed its channel or is gone: it takes nothing more.
    Leaving,
}
