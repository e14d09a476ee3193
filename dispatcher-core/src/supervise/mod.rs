//! Supervision of the processes that the dispatcher starts: connects the places of a pool
//! ([`processes`]) with its workers.
//!
//! Guarantees: every change of a worker or a process reaches [`Processes`], and its actions become
//! effects, drains and resumes. Needs [`Core::spawned`] or [`Core::exited`] after each
//! [`Effect::Spawn`].

mod decide;
mod place;
mod processes;
mod settings;

pub(crate) use processes::Processes;
pub use processes::{EndReason, ProcessTotals, RESTART_MIN, RESTART_RESET, Replacement};
pub use settings::{Supervision, Surge};

use std::collections::HashMap;
use std::time::Duration;

use self::place::View;
use self::processes::Action;
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
    /// first [`Core::tick`]. `leaving`: it gets no connections.
    pub fn adopt(
        &mut self,
        now: Time,
        pool: PoolId,
        place: u32,
        start: u32,
        leaving: bool,
    ) -> Option<ProcessId> {
        let entry = self.pools.get_mut(usize::from(pool.0))?;
        Some(entry.processes.adopt(now, place, start, leaving))
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

    /// A process uses more than `max_memory`: it is replaced.
    pub fn exceeds_memory(&mut self, now: Time, process: ProcessId) {
        let p = usize::from(process.pool.0);
        if let Some(pool) = self.pools.get_mut(p) {
            pool.processes.replace(process, Replacement::Memory);
            self.settle_processes(now, p);
        }
    }

    /// What the processes of a pool start from has changed: starts that wait for a delay wait no
    /// longer, and a crash loop ends.
    pub fn retry_processes(&mut self, now: Time, pool: PoolId) {
        let p = usize::from(pool.0);
        if let Some(entry) = self.pools.get_mut(p).filter(|pool| !pool.retired) {
            entry.processes.retry();
            self.settle_processes(now, p);
        }
    }

    /// Replaces every process of a pool, as many at once as `max_surge` permits. Ends a crash loop.
    /// Returns the number of processes that are replaced.
    pub fn restart_processes(&mut self, now: Time, pool: PoolId) -> u32 {
        let p = usize::from(pool.0);
        let Some(entry) = self.pools.get_mut(p).filter(|pool| !pool.retired) else { return 0 };
        entry.processes.retry();
        let replaced = entry.processes.replace_all(Replacement::Restart);
        self.settle_processes(now, p);
        replaced
    }

    /// Replaces one process. False if it is none that fills a place.
    pub fn restart_process(&mut self, now: Time, process: ProcessId) -> bool {
        let p = usize::from(process.pool.0);
        let Some(entry) = self.pools.get_mut(p) else { return false };
        if !entry.processes.wants(process) {
            return false;
        }
        entry.processes.retry();
        entry.processes.replace(process, Replacement::Restart);
        self.settle_processes(now, p);
        true
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
            self.pools[p].processes.joined(now, process);
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

    /// What is due.
    pub(crate) fn tick_processes(&mut self, now: Time, p: usize) {
        if self.pools[p].processes.is_due(now) {
            self.settle_processes(now, p);
        }
    }

    /// Decides what is to be done with the processes of a pool, and does it.
    fn settle_processes(&mut self, now: Time, p: usize) {
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
            };
            processes.see(process, view);
        }
        let mut actions = Vec::new();
        processes.settle(now, &mut actions);
        self.act(now, p, actions);
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
