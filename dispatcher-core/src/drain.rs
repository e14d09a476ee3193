//! Draining by an operator: a worker gets nothing more, keeps what it has, and may be made active again.
//!
//! What it was sent and has not taken stays with it, as everything before it was its own choice to take; if it leaves
//! that untaken for `handoff_timeout`, it goes elsewhere like any suspect's. While all of a pool's workers drain the
//! pool has no usable worker: its clients wait for `wait_for_worker`, and are then refused.
//!
//! The worker is told, on its channel, so after everything it was sent before. Only it can end a connection it has
//! taken; at the deadline its SDK shuts them down. What it has not taken by then goes elsewhere.

use std::time::Duration;

use super::types::*;
use super::worker::Round;
use super::{Core, Effect, Event};

/// How much later than ours the worker's deadline is: what it ends then must have been counted.
pub const COUNT_FIRST: Duration = Duration::from_millis(100);

impl Core {
    /// An operator wants the worker to get nothing more; at `deadline` what it still has is ended. Said again, the last
    /// deadline counts, and without one the earlier goes on counting. False if the worker is gone.
    pub fn drain_worker(&mut self, now: Time, worker: WorkerId, deadline: Option<Time>) -> bool {
        if let Some(w) = self.find(worker) {
            self.workers[w].unwanted = false;
        }
        self.begin_drain(now, worker, deadline)
    }

    /// The worker's process, or its pool, is not wanted any more. One that drains already goes on as it is.
    pub(super) fn drain_unwanted(&mut self, now: Time, worker: WorkerId) {
        if let Some(w) = self.find(worker).filter(|&w| self.workers[w].is_usable()) {
            self.workers[w].unwanted = true;
            self.begin_drain(now, worker, None);
        }
    }

    /// Workers of a pool that drain only because they were not wanted, and are wanted again, get connections again. Those
    /// that are leaving by now end, and their processes are started again.
    pub(super) fn resume_wanted(&mut self, now: Time, p: usize) {
        for w in 0..self.workers.len() {
            let worker = &self.workers[w];
            if worker.pool == p && worker.unwanted && !self.is_surplus(w) {
                let id = worker.id;
                // One that is leaving cannot be: it has said so.
                let _ = self.resume_worker(now, id);
            }
        }
    }

    fn begin_drain(&mut self, now: Time, worker: WorkerId, deadline: Option<Time>) -> bool {
        let Some(w) = self.find(worker) else { return false };
        if self.workers[w].state == State::Gone {
            return false;
        }
        let live = self.workers[w].load();
        let begins = self.workers[w].is_usable();
        let state = &self.workers[w];
        // One that leaves by its own wish listens no more.
        let listens = !state.said_goodbye && !state.closed;
        let later = listens && deadline.is_some() && state.drain_deadline != deadline;
        if begins {
            // Whether it is alive is as open as before, should it be made active again.
            self.workers[w].unproven = self.workers[w].state == State::Suspect;
            self.drain(now, w);
        }
        if begins || later {
            let state = &mut self.workers[w];
            state.drain_deadline = deadline.or(state.drain_deadline);
            let deadline = state.drain_deadline.map(|deadline| deadline - now);
            self.event(Event::Draining { worker, live, deadline });
            self.give_notice(
                w,
                Notice::Drain {
                    deadline: self.workers[w].drain_deadline.map(|deadline| deadline + COUNT_FIRST),
                },
            );
            self.refresh(w);
        }
        self.after(now, self.workers[w].pool);
        true
    }

    /// An operator wants the worker to get connections again. False if it does already.
    ///
    /// # Errors
    /// [`CannotResume`] for a worker that leaves by its own wish, and for one that is not wanted any more.
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
        if self.pools[pool].retired {
            return Err(CannotResume::PoolRemoved);
        }
        if self.is_surplus(w) {
            return Err(CannotResume::Surplus);
        }
        self.rebind(w);
        let state = &mut self.workers[w];
        state.drain_deadline = None;
        state.unwanted = false;
        if std::mem::take(&mut state.unproven) {
            state.state = State::Suspect;
            state.trust.suspect(now);
            state.suspect_since = now;
        } else {
            state.state = State::Active;
            // What it has finished meanwhile must not draw every new client to it at once.
            state.start_slowly(now, self.pools[pool].settings.slow_start);
        }
        self.add_usable(pool);
        self.event(Event::Resumed { worker });
        self.give_notice(w, Notice::Resume);
        // In a round of revocations its end does this.
        if self.workers[w].ring.revoking() == 0 && self.workers[w].state == State::Suspect {
            self.sort_out(now, w);
        }
        self.refresh(w);
        self.after(now, pool);
        Ok(true)
    }

    /// While the worker drained, its clients went to a new worker of its name, if there was one, and stay there.
    fn rebind(&mut self, w: usize) {
        let state = &self.workers[w];
        let Some(memory) = &mut self.pools[state.pool].memory else { return };
        if memory.is_bound_to(state.binding, w as u32) {
            return;
        }
        let workers = &self.workers;
        let binding = memory.bind(&state.name, w as u32, |w| workers[w as usize].is_usable());
        self.workers[w].binding = binding;
    }

    /// An [`super::Effect::Tell`] could not be carried out; it is tried again after `handoff_timeout`.
    pub fn notice_failed(&mut self, now: Time, worker: WorkerId, why: SendFailure) {
        let Some(w) = self.find(worker) else { return };
        match why {
            SendFailure::Closed => self.closed(now, w),
            SendFailure::Full | SendFailure::Resources | SendFailure::Client => {
                let state = &mut self.workers[w];
                let pause = self.pools[state.pool].settings.handoff_timeout;
                state.notice_again = Some(now + pause);
            }
        }
        self.refresh(w);
        self.after(now, self.workers[w].pool);
    }

    fn give_notice(&mut self, w: usize, notice: Notice) {
        if self.workers[w].hears {
            self.workers[w].notice = Some(notice);
            self.repeat_notice(w);
        }
    }

    /// Says the last notice once more, because its record may have been lost.
    pub(super) fn repeat_notice(&mut self, w: usize) {
        let state = &mut self.workers[w];
        state.notice_again = None;
        if state.said_goodbye || state.closed || state.state == State::Gone {
            return;
        }
        if let Some(notice) = state.notice {
            let worker = state.id;
            self.effects.push_back(Effect::Tell { worker, notice });
        }
    }

    /// The time it was given to drain is over: what it has not taken goes elsewhere, what it has it shall end.
    pub(super) fn end_drain(&mut self, now: Time, w: usize) {
        let state = &mut self.workers[w];
        state.drain_deadline = None;
        if state.state != State::Draining {
            return;
        }
        let live = state.load().saturating_sub(u64::from(state.untaken()));
        if state.hears {
            state.ended += live;
            self.ended += live;
        }
        self.begin_round(now, w, Round::Drained);
    }

    /// Every worker that is there, in no particular order.
    pub fn workers(&self) -> impl Iterator<Item = WorkerId> + Clone + '_ {
        let there =
            |worker: &&super::worker::Worker| worker.state != State::Gone && !worker.forgotten;
        self.workers.iter().filter(there).map(|worker| worker.id)
    }

    /// The names of all pools that workers can join.
    pub fn pool_names(&self) -> impl Iterator<Item = &str> + Clone {
        self.pools.iter().filter(|pool| !pool.retired).map(|pool| pool.settings.name.as_str())
    }
}

/// What a worker is told, if it listens ([`dispatch_protocol::wire::Features::DRAIN`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// No more connections.
    Drain {
        /// When it shall end what it still has.
        deadline: Option<Time>,
    },
    /// Connections may come again.
    Resume,
}

/// Why a worker cannot be made active again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CannotResume {
    /// It said goodbye, closed its channel or is gone: it takes nothing more.
    Leaving,
    /// Its pool was taken out of the configuration.
    PoolRemoved,
    /// Its process is one more than its pool is to have.
    Surplus,
}
