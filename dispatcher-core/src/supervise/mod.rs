//! Supervision of the processes that the dispatcher starts: connects the places of a pool
//! ([`processes`]) with its workers.
//!
//! Guarantees: every change of a worker or a process reaches [`Processes`], and its actions become
//! effects, drains and resumes. Needs [`Core::spawned`] or [`Core::exited`] after each
//! [`Effect::Spawn`].

mod decide;
mod place;
mod processes;
mod roll;
mod settings;

pub(crate) use processes::Processes;
pub use processes::{EndReason, ProcessTotals, RESTART_MIN, RESTART_RESET, Replacement};
pub use roll::{
    Generation, LeavingGeneration, PREFERRED_LOAD, Roll, RollBegun, RollRefusal, RollState,
    StepFailure,
};
pub use settings::{Supervision, Surge};

use std::collections::HashMap;
use std::time::Duration;

use self::place::View;
use self::processes::{Act, Action, Checked};
use super::Core;
use super::effect::{Effect, Event};
use super::types::{PoolId, ProcessId, State, Time, WorkerId};
use super::worker::Worker;

/// The number of processes of a pool in each state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProcessCounts {
    /// Processes that should get connections.
    pub wanted: u32,
    /// Processes that get connections.
    pub active: u32,
    /// Wanted processes whose worker has not joined, because they start, or wait for a restart.
    pub starting: u32,
    /// Processes that get no more connections.
    pub leaving: u32,
}

impl Core {
    // --- inputs ----------------------------------------------------------------------------

    /// Enters a process that an earlier dispatcher started, in its place. To be called before the
    /// first [`Core::tick`]. `leaving`: it gets no connections. [`Core::resume_roll`] follows.
    pub fn adopt(
        &mut self,
        now: Time,
        pool: PoolId,
        (place, start): (u32, u32),
        leaving: bool,
        generation: Generation,
    ) -> Option<ProcessId> {
        let entry = self.pools.get_mut(usize::from(pool.0))?;
        Some(entry.processes.adopt(now, place, start, leaving, generation))
    }

    /// What an earlier dispatcher knew of the deploys of a pool, after its last process was
    /// entered: a roll in progress goes on. `current`: the generation of the pool.
    pub fn resume_roll(
        &mut self,
        now: Time,
        pool: PoolId,
        roll: Option<Roll>,
        current: Generation,
    ) {
        if let Some(entry) = self.pools.get_mut(usize::from(pool.0)) {
            entry.processes.resume_roll(now, roll, current);
        }
    }

    /// A process was started (`true`) or could not be.
    pub fn spawned(&mut self, now: Time, process: ProcessId, started: bool) {
        if !started {
            return self.exited(now, process);
        }
        let p = usize::from(process.pool.0);
        if let Some(pool) = self.pools.get_mut(p) {
            pool.processes.started(now, process);
            self.settle_processes(now, p);
        }
    }

    /// A process ended.
    pub fn exited(&mut self, now: Time, process: ProcessId) {
        let p = usize::from(process.pool.0);
        if p >= self.pools.len() {
            return;
        }
        // A stopping dispatcher starts a process again only for clients that wait for it.
        if self.stop.is_some() {
            let stopped = !self.has_clients(p);
            self.pools[p].processes.set_stopped(stopped);
        }
        let mut actions = Vec::new();
        self.pools[p].processes.ended(now, process, &mut actions);
        self.act(now, p, actions);
        self.settle_processes(now, p);
    }

    /// A process of an earlier dispatcher lets no clients in any more, so that its worker does not
    /// join: it leaves, and another one takes its place.
    pub fn process_has_closed(&mut self, now: Time, process: ProcessId) {
        let p = usize::from(process.pool.0);
        if let Some(pool) = self.pools.get_mut(p) {
            let mut actions = Vec::new();
            pool.processes.leaves(now, process, &mut actions);
            self.act(now, p, actions);
            self.settle_processes(now, p);
        }
    }

    /// A process uses more than `max_memory`: it is replaced.
    pub fn exceeds_memory(&mut self, now: Time, process: ProcessId) {
        let p = usize::from(process.pool.0);
        if let Some(pool) = self.pools.get_mut(p) {
            pool.processes.replace(process, Replacement::Memory);
            self.settle_processes(now, p);
        }
    }

    /// The command of a pool has changed: places whose starts fail, and empty ones, start from it;
    /// starts that wait for a delay wait no longer, and a crash loop ends. The other processes keep
    /// their generation until the next roll. A retired pool has only empty places. Returns the
    /// generation of the new command.
    pub fn renew_processes(&mut self, now: Time, pool: PoolId) -> Generation {
        let p = usize::from(pool.0);
        let Some(entry) = self.pools.get_mut(p) else {
            return Generation::FIRST;
        };
        let generation = entry.processes.unused_generation();
        entry.processes.renew(generation);
        entry.processes.retry();
        self.settle_processes(now, p);
        generation
    }

    /// Begins to replace every process of a pool, as many at once as `max_surge` permits. Ends a
    /// crash loop, and an earlier roll. `end_oldest`: if too many generations leave, the
    /// connections of the oldest are ended.
    ///
    /// # Errors
    /// [`RollRefusal::TooManyGenerations`], [`RollRefusal::HostDrains`].
    pub fn roll(
        &mut self,
        now: Time,
        pool: PoolId,
        end_oldest: bool,
    ) -> Result<RollBegun, RollRefusal> {
        let p = usize::from(pool.0);
        if self.pools.get(p).is_none_or(|pool| pool.retired) {
            return Err(RollRefusal::NotServing);
        }
        self.make_room(now, p, None, end_oldest)?;
        let processes = &mut self.pools[p].processes;
        processes.retry();
        let generation = processes.unused_generation();
        Ok(self.begin_roll(now, p, |processes, actions| {
            processes.roll(now, None, generation, actions)
        }))
    }

    /// Begins to replace one process. `generation`: that of its command, or `None` for one that no
    /// process has had.
    ///
    /// # Errors
    /// [`RollRefusal::NotServing`] if the process does not fill a place, and as [`Core::roll`].
    pub fn roll_one(
        &mut self,
        now: Time,
        process: ProcessId,
        generation: Option<Generation>,
        end_oldest: bool,
    ) -> Result<RollBegun, RollRefusal> {
        let p = usize::from(process.pool.0);
        if !self.pools.get(p).is_some_and(|pool| pool.processes.wants(process)) {
            return Err(RollRefusal::NotServing);
        }
        self.make_room(now, p, Some(process.place), end_oldest)?;
        let processes = &mut self.pools[p].processes;
        processes.retry();
        let generation = generation.unwrap_or_else(|| processes.unused_generation());
        Ok(self.begin_roll(now, p, |processes, actions| {
            processes.roll(now, Some(process.place), generation, actions)
        }))
    }

    /// Returns to the generation before the last roll. The number of leaving generations does not
    /// matter here.
    ///
    /// # Errors
    /// [`RollRefusal::NothingToUndo`], [`RollRefusal::HostDrains`].
    pub fn undo_roll(&mut self, now: Time, pool: PoolId) -> Result<RollBegun, RollRefusal> {
        let p = usize::from(pool.0);
        let some = self.pools.get(p).is_some_and(|pool| pool.processes.last_roll().is_some());
        if !some {
            return Err(RollRefusal::NothingToUndo);
        }
        if self.host_drains() {
            return Err(RollRefusal::HostDrains);
        }
        self.pools[p].processes.retry();
        let mut begun = None;
        self.begin_roll(now, p, |processes, actions| {
            let none = RollBegun { generation: Generation::FIRST, processes: 0 };
            *begun.insert(processes.undo(now, actions).unwrap_or(none))
        });
        begun.ok_or(RollRefusal::NothingToUndo)
    }

    /// A roll in progress stops, because the command of its generation is not known.
    pub fn interrupt_roll(&mut self, now: Time, pool: PoolId) {
        let p = usize::from(pool.0);
        if let Some(entry) = self.pools.get_mut(p) {
            let mut actions = Vec::new();
            entry.processes.interrupt_roll(now, &mut actions);
            self.act(now, p, actions);
            self.settle_processes(now, p);
        }
    }

    /// The outcome of an [`Effect::CheckReady`].
    pub fn checked(&mut self, now: Time, process: ProcessId, passed: bool) {
        let p = usize::from(process.pool.0);
        if p >= self.pools.len() {
            return;
        }
        let step = self.pools[p].processes.checked(now, process, passed);
        // A worker that did not pass gets no connection: its process is ended.
        if passed || !step {
            for worker in self.workers_of(process) {
                if let Some(w) = self.find(worker) {
                    self.workers[w].checking = false;
                    self.refresh(w);
                }
            }
        }
        self.settle_processes(now, p);
        self.after(now, p);
    }

    /// Refuses a roll while the host drains, and one that would make too many generations leave, or
    /// ends the oldest.
    fn make_room(
        &mut self,
        now: Time,
        p: usize,
        place: Option<u32>,
        end_oldest: bool,
    ) -> Result<(), RollRefusal> {
        // The new workers would get no connections, so no step could become ready.
        if self.host_drains() {
            return Err(RollRefusal::HostDrains);
        }
        self.see_workers(p);
        while let Some((oldest, processes)) = self.pools[p].processes.too_many_leaving(place) {
            if !end_oldest {
                return Err(RollRefusal::TooManyGenerations(oldest));
            }
            self.pools[p].processes.end_connections(now, &processes);
            for process in processes {
                for worker in self.workers_of(process) {
                    self.begin_drain(now, worker, Some(now));
                }
            }
        }
        Ok(())
    }

    fn begin_roll(
        &mut self,
        now: Time,
        p: usize,
        begin: impl FnOnce(&mut Processes, &mut Vec<Act>) -> RollBegun,
    ) -> RollBegun {
        let mut actions = Vec::new();
        let begun = begin(&mut self.pools[p].processes, &mut actions);
        self.act(now, p, actions);
        self.settle_processes(now, p);
        begun
    }

    // --- questions -------------------------------------------------------------------------

    /// The number of processes of a pool in each state.
    pub fn processes(&self, pool: PoolId) -> ProcessCounts {
        let p = usize::from(pool.0);
        let Some(entry) = self.pools.get(p) else { return ProcessCounts::default() };
        let mut usable = HashMap::new();
        for worker in &self.workers {
            if let Some(process) = worker.process
                && worker.pool == p
                && worker.state != State::Gone
            {
                *usable.entry(process).or_insert(false) |= worker.is_usable();
            }
        }
        let mut counts = ProcessCounts { wanted: entry.processes.wanted(), ..Default::default() };
        for (process, leaves) in entry.processes.ids() {
            match usable.get(&process) {
                Some(true) if !leaves => counts.active += 1,
                Some(false) => counts.leaving += 1,
                _ if leaves => counts.leaving += 1,
                // It starts.
                _ => {}
            }
        }
        counts.starting = counts.wanted.saturating_sub(entry.processes.filled());
        counts
    }

    /// Whether this process is to run: it is started again when it ends.
    pub fn wants_process(&self, process: ProcessId) -> bool {
        let pool = self.pools.get(usize::from(process.pool.0));
        pool.is_some_and(|pool| !pool.retired && pool.processes.wants(process))
    }

    /// The processes of a pool that have not ended, and whether each is leaving.
    pub fn process_ids(&self, pool: PoolId) -> impl Iterator<Item = (ProcessId, bool)> + '_ {
        let pool = self.pools.get(usize::from(pool.0));
        pool.into_iter().flat_map(|pool| pool.processes.ids())
    }

    /// The last roll of a pool.
    pub fn last_roll(&self, pool: PoolId) -> Option<Roll> {
        self.pools.get(usize::from(pool.0))?.processes.last_roll()
    }

    /// The generation of a pool: that of new places, and after a roll that of every process.
    pub fn generation(&self, pool: PoolId) -> Generation {
        let pool = self.pools.get(usize::from(pool.0));
        pool.map_or(Generation::FIRST, |pool| pool.processes.current())
    }

    /// The generation of a process.
    pub fn generation_of(&self, process: ProcessId) -> Option<Generation> {
        self.pools.get(usize::from(process.pool.0))?.processes.generation_of(process)
    }

    /// Every generation that a process of the pool has or may get, in no order, with repetitions.
    pub fn generations(&self, pool: PoolId) -> impl Iterator<Item = Generation> + '_ {
        let pool = self.pools.get(usize::from(pool.0));
        pool.into_iter().flat_map(|pool| pool.processes.generations())
    }

    /// The process that we started and that a worker is, if it is one.
    pub fn process_of(&self, worker: WorkerId) -> Option<ProcessId> {
        self.find(worker).and_then(|w| self.workers[w].process)
    }

    /// Whether the workers of a process have connections.
    pub fn has_connections(&self, process: ProcessId) -> bool {
        let of = |worker: &&Worker| {
            worker.process == Some(process) && worker.state != State::Gone && !worker.forgotten
        };
        self.workers.iter().filter(of).any(|worker| worker.load() > 0)
    }

    /// Whether a worker's process does not fill a place: it gets no connections.
    pub(crate) fn is_surplus(&self, w: usize) -> bool {
        let Worker { pool, process, .. } = self.workers[w];
        process.is_some_and(|process| {
            usize::from(process.pool.0) == pool && !self.pools[pool].processes.wants(process)
        })
    }

    /// When the connections of a worker are ended whose process another one has replaced. `None`
    /// for a surplus process, which may be wanted again.
    pub(crate) fn drain_deadline(&self, now: Time, w: usize) -> Option<Time> {
        let (p, process) = self.supervised(w)?;
        let settings = &self.pools[p].settings;
        let most = settings.supervision.drain_timeout?;
        (process.place < settings.processes).then(|| now + most)
    }

    // --- changes of workers ----------------------------------------------------------------

    /// A worker has joined.
    pub(crate) fn process_joined(&mut self, now: Time, w: usize) {
        if let Some((p, process)) = self.supervised(w) {
            let checked = self.pools[p].processes.joined(now, process);
            if checked != Checked::No {
                let worker = &mut self.workers[w];
                worker.checking = true;
                let worker = worker.id;
                self.refresh(w);
                // A check that is under way goes on with the new worker.
                if checked == Checked::Now {
                    self.effects.push_back(Effect::CheckReady { process, worker });
                }
            }
            self.settle_processes(now, p);
        }
    }

    /// A worker announced that it leaves.
    pub(crate) fn process_leaves(&mut self, now: Time, w: usize) {
        let Some((p, process)) = self.supervised(w) else { return };
        let other = |worker: &Worker| worker.process == Some(process) && worker.is_usable();
        if self.workers.iter().any(other) {
            return;
        }
        let mut actions = Vec::new();
        self.pools[p].processes.leaves(now, process, &mut actions);
        self.act(now, p, actions);
        self.settle_processes(now, p);
    }

    /// A worker is gone.
    pub(crate) fn process_lost(&mut self, now: Time, w: usize) {
        let Some((p, process)) = self.supervised(w) else { return };
        let other =
            |worker: &Worker| worker.process == Some(process) && worker.state != State::Gone;
        if !self.workers.iter().any(other) {
            self.pools[p].processes.lost_worker(now, process);
            self.settle_processes(now, p);
        }
    }

    /// The process of a worker, and its pool, if the pool has started it.
    fn supervised(&self, w: usize) -> Option<(usize, ProcessId)> {
        let Worker { pool, process, .. } = self.workers[w];
        let process = process.filter(|process| usize::from(process.pool.0) == pool)?;
        Some((pool, process))
    }

    /// Passes the settings of a pool on.
    pub(crate) fn change_processes(&mut self, now: Time, p: usize) {
        let Some(pool) = self.pools.get_mut(p) else { return };
        pool.processes.change(pool.settings.processes, &pool.settings.supervision);
        self.settle_processes(now, p);
    }

    /// Whether no process of a pool is started, because the host drains.
    pub(crate) fn hold_processes(&mut self, now: Time, p: usize, held: bool) {
        self.pools[p].processes.set_held(held);
        self.settle_processes(now, p);
    }

    /// What is due.
    pub(crate) fn tick_processes(&mut self, now: Time, p: usize) {
        if self.pools[p].processes.is_due(now) {
            self.settle_processes(now, p);
        }
    }

    /// Decides what is to be done with the processes of a pool, and does it.
    fn settle_processes(&mut self, now: Time, p: usize) {
        self.see_workers(p);
        let mut actions = Vec::new();
        self.pools[p].processes.settle(now, &mut actions);
        self.act(now, p, actions);
    }

    /// Tells the processes of a pool of their workers.
    fn see_workers(&mut self, p: usize) {
        let processes = &mut self.pools[p].processes;
        processes.look_again();
        for worker in self.workers.iter().filter(|worker| worker.pool == p) {
            let Some(process) = worker.process.filter(|_| worker.state != State::Gone) else {
                continue;
            };
            let suspect = match worker.state {
                State::Suspect => true,
                State::Draining => worker.unproven,
                State::Active | State::Gone => false,
            };
            let view = View {
                joined: true,
                load: worker.load(),
                served: worker.base.saturating_add(worker.taken),
                suspect_since: suspect.then_some(worker.suspect_since),
                stays: !worker.said_goodbye && !worker.closed,
                unaware: worker.steered.is_some(),
            };
            processes.see(process, view);
        }
    }

    fn act(&mut self, now: Time, p: usize, actions: Vec<(ProcessId, Action)>) {
        for (process, action) in actions {
            let pool = process.pool;
            match action {
                Action::Start => self.effects.push_back(Effect::Spawn { process }),
                Action::Drain { bounded } => {
                    let most = self.pools[p].settings.supervision.drain_timeout;
                    let deadline = most.filter(|_| bounded).map(|most| now + most);
                    for worker in self.workers_of(process) {
                        self.drain_unwanted(now, worker, deadline);
                    }
                }
                Action::Resume => {
                    for worker in self.workers_of(process) {
                        if let Some(w) = self.find(worker) {
                            // Its check may have been given up.
                            self.workers[w].checking = false;
                            self.refresh(w);
                        }
                        if self.find(worker).is_some_and(|w| self.workers[w].unwanted) {
                            // A worker that is leaving cannot be resumed: it has said so.
                            let _ = self.resume_worker(now, worker);
                        }
                    }
                }
                Action::End(reason) => {
                    let timeout = self.pools[p].settings.supervision.stop_timeout;
                    self.effects.push_back(Effect::StopProcess { process, timeout });
                    self.event(Event::ProcessStopped { process, reason });
                }
                Action::TellRestart(delay) => self.event(Event::Restarting { process, delay }),
                Action::TellReplace(why) => self.event(Event::Replacing { process, why }),
                Action::TellCrashLoop(failures) => {
                    self.event(Event::CrashLoop { process, failures });
                }
                Action::TellRecovered => self.event(Event::CrashLoopOver { pool }),
                Action::TellRollStopped(cause) => {
                    self.event(Event::RollStopped { process, cause });
                }
                Action::TellRolled(generation) => self.event(Event::Rolled { pool, generation }),
            }
        }
    }

    fn workers_of(&self, process: ProcessId) -> Vec<WorkerId> {
        let of = |worker: &&Worker| {
            worker.process == Some(process) && worker.state != State::Gone && !worker.forgotten
        };
        self.workers.iter().filter(of).map(|worker| worker.id).collect()
    }
}

/// The longest default delay before a process is started again.
pub const RESTART_MAX: Duration = Supervision::MAX_RESTART_DELAY;
