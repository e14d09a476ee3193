//! Draining by an operator: a worker gets no more connections, keeps those that it has, and may be
//! resumed.
//!
//! Connections in flight stay with the worker; those that it leaves untaken for `handoff_timeout`
//! go to other workers, as with a suspect worker. While all of a pool's workers drain, the pool has
//! no usable worker: its clients wait for `wait_for_worker`, and are then refused.
//!
//! The worker gets a notice on its channel, behind all connections that were sent before. Only the
//! worker can end a connection that it has taken; at the deadline its SDK shuts them down.
//! Connections that it has not taken by then go to other workers.

use std::time::Duration;

use super::types::*;
use super::worker::Round;
use super::{Core, Effect, Event};

/// How much later than the core's the worker's deadline is: the core counts the live connections
/// before the worker ends them.
pub const COUNT_FIRST: Duration = Duration::from_millis(100);

impl Core {
    /// Drains a worker; at `deadline` its remaining connections are ended. A second call replaces
    /// the deadline; without one it keeps the earlier. False if the worker is gone.
    pub fn drain_worker(&mut self, now: Time, worker: WorkerId, deadline: Option<Time>) -> bool {
        if let Some(w) = self.find(worker) {
            self.workers[w].unwanted = false;
        }
        self.begin_drain(now, worker, deadline)
    }

    /// Drains a worker whose process is surplus or whose pool was removed. No effect if it drains
    /// already.
    pub(super) fn drain_unwanted(&mut self, now: Time, worker: WorkerId, deadline: Option<Time>) {
        if let Some(w) = self.find(worker).filter(|&w| self.workers[w].is_usable()) {
            self.workers[w].unwanted = true;
            self.begin_drain(now, worker, deadline);
        }
    }

    /// Resumes the workers of a pool that drain only because they were surplus or removed, and are
    /// not any more. The processes of workers that are already leaving are restarted after their
    /// end.
    pub(super) fn resume_wanted(&mut self, now: Time, p: usize) {
        for w in 0..self.workers.len() {
            let worker = &self.workers[w];
            if worker.pool == p && worker.unwanted && !self.is_surplus(w) {
                let id = worker.id;
                // Fails for a worker that is leaving, which is intended.
                let _ = self.resume_worker(now, id);
            }
        }
    }

    pub(super) fn begin_drain(
        &mut self,
        now: Time,
        worker: WorkerId,
        deadline: Option<Time>,
    ) -> bool {
        let Some(w) = self.find(worker) else { return false };
        if self.workers[w].state == State::Gone {
            return false;
        }
        let live = self.workers[w].load();
        let begins = self.workers[w].is_usable();
        let state = &self.workers[w];
        // A worker that leaves by itself reads no notices.
        let listens = !state.said_goodbye && !state.closed;
        let later = listens && deadline.is_some() && state.drain_deadline != deadline;
        if begins {
            // If it is resumed, it is as suspect as before.
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

    /// Resumes a draining worker. False if it is not draining.
    ///
    /// # Errors
    /// [`CannotResume`] for a worker that leaves by itself, is surplus, whose pool was removed, or
    /// whose host drains.
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
        if self.host_drains() {
            return Err(CannotResume::HostDrains);
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
            // With its full weight its low load would attract every new client at once.
            state.start_slowly(now, self.pools[pool].settings.slow_start);
        }
        self.add_usable(pool);
        self.event(Event::Resumed { worker });
        self.give_notice(w, Notice::Resume);
        // During a round of revocations, the end of the round does this.
        if self.workers[w].ring.revoking() == 0 && self.workers[w].state == State::Suspect {
            self.sort_out(now, w);
        }
        self.refresh(w);
        self.after(now, pool);
        Ok(true)
    }

    /// Gives a resumed worker a binding. If a new worker of its name has taken the old one over,
    /// the clients stay with that worker.
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

    /// An [`super::Effect::Notify`] failed; the notice is repeated after `handoff_timeout`.
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
        if self.workers[w].supports_notices {
            self.workers[w].notice = Some(notice);
            self.repeat_notice(w);
        }
    }

    /// Sends the last notice again, because its record may have been lost.
    pub(super) fn repeat_notice(&mut self, w: usize) {
        let state = &mut self.workers[w];
        state.notice_again = None;
        if state.said_goodbye || state.closed || state.state == State::Gone {
            return;
        }
        if let Some(notice) = state.notice {
            let worker = state.id;
            self.effects.push_back(Effect::Notify { worker, notice });
        }
    }

    /// The deadline of a drain: untaken connections go to other workers, the worker ends its live
    /// ones.
    pub(super) fn end_drain(&mut self, now: Time, w: usize) {
        let state = &mut self.workers[w];
        state.drain_deadline = None;
        if state.state != State::Draining {
            return;
        }
        let live = state.load().saturating_sub(u64::from(state.untaken()));
        if state.supports_notices {
            state.ended += live;
            self.ended += live;
        }
        self.begin_round(now, w, Round::Drained);
    }

    /// Every worker that is not gone, in no particular order.
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

/// A notice to a worker that supports it ([`dispatch_protocol::wire::Features::DRAIN`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The worker gets no more connections.
    Drain {
        /// When it ends its remaining connections.
        deadline: Option<Time>,
    },
    /// The worker may get connections again.
    Resume,
}

/// Why a worker cannot be resumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CannotResume {
    /// It said goodbye, closed its channel or is gone.
    Leaving,
    /// Its pool was removed from the configuration.
    PoolRemoved,
    /// Its process is surplus: its pool has fewer processes now.
    Surplus,
    /// The whole host drains.
    HostDrains,
}
