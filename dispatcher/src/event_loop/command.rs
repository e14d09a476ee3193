//! Carries out the commands of operators: one exhaustive match from commands to the core, and the
//! answers.

use std::time::SystemTime;

use dispatch_protocol::ClientAddr;

use super::{EventLoop, clock};
use crate::api::action::{Outcome, PoolRestarted, PoolScaled, WorkerSummary, WorkersChanged};
use crate::api::command::{
    Answer, Command, CommandError, Problem, ProcessCount, Target, WorkerRef, unknown_pool,
};
use crate::api::decisions::{RawExplanation, RawHistory};
use crate::background::logger::quoted;
use crate::config::MAX_PROCESSES;
use dispatcher_core::{CannotResume, ListenerId, PoolId, RollBegun, WorkerId};

impl EventLoop {
    /// Carries out a command.
    pub(super) fn command(&mut self, command: Command) -> Answer {
        match command {
            Command::Drain { target: Target::All, deadline, announce } => {
                self.core.drain_host(self.now, announce, deadline);
                Ok(self.workers_changed(&self.targets(&Target::All)?))
            }
            Command::Drain { target, deadline, announce: _ } => {
                let deadline = deadline.map(|wait| self.now + wait);
                let workers = self.steerable(&target, "drain")?;
                for &worker in &workers {
                    self.core.drain_worker(self.now, worker, deadline);
                }
                Ok(self.workers_changed(&workers))
            }
            Command::Weight { target, weight } => {
                let workers = self.steerable(&target, "weight")?;
                for &worker in &workers {
                    self.core.set_weight(self.now, worker, weight);
                }
                Ok(self.workers_changed(&workers))
            }
            Command::Scale { pool, wanted } => self.scale(&pool, wanted),
            Command::Restart { target, end_oldest } => self.restart(&target, end_oldest),
            Command::Undo { pool } => self.undo(&pool),
            Command::Resume { target: Target::All } => {
                self.core.resume_host(self.now);
                Ok(self.workers_changed(&self.targets(&Target::All)?))
            }
            Command::Resume { target } => {
                let drains = self.core.host_drain().is_some();
                if drains && let Target::Pool(name) = &target {
                    self.pool_called(name)?;
                    let message = format!("pool {name} cannot be resumed: the whole host drains");
                    return Err(CommandError::new(Problem::Conflict, message)
                        .hint("dispatcher resume --all"));
                }
                let workers = self.steerable(&target, "resume")?;
                for &worker in &workers {
                    let resumed = self.core.resume_worker(self.now, worker);
                    // With several workers, those that can resume do; with one worker, the operator
                    // gets the error.
                    if let (Target::Worker(name), Err(why)) = (&target, resumed) {
                        return Err(self.not_resumed(name, worker, why));
                    }
                }
                Ok(self.workers_changed(&workers))
            }
        }
    }

    /// Sets the number of processes of a pool.
    fn scale(&mut self, name: &str, wanted: ProcessCount) -> Answer {
        let id = self.spawning_pool(name)?;
        let before = self.core.pool_settings(id).map_or(0, |settings| settings.processes);
        let processes = match wanted {
            ProcessCount::Exactly(processes) => i64::from(processes),
            ProcessCount::ChangeBy(by) => i64::from(before) + i64::from(by),
        };
        let valid = u32::try_from(processes).ok().filter(|n| (1..=MAX_PROCESSES).contains(n));
        let Some(processes) = valid else {
            let message = format!("a pool has 1 to {MAX_PROCESSES} processes, not {processes}");
            return Err(CommandError::new(Problem::Invalid, message)
                .hint("to stop new connections, drain the pool"));
        };
        self.core.scale(self.now, id, processes);
        log::info!("event=pool_scaled pool={name} processes={processes} before={before}");
        let counts = self.core.processes(id);
        Ok(Outcome::Pool(PoolScaled {
            active: counts.active,
            before,
            leaving: counts.leaving,
            instance: self.run.instance.clone(),
            pool: name.to_owned(),
            processes,
            starting: counts.starting,
        }))
    }

    /// Replaces the processes of a pool, or of one worker.
    fn restart(&mut self, target: &Target, end_oldest: bool) -> Answer {
        let (pool, process) = match target {
            Target::Pool(name) => (self.spawning_pool(name)?, None),
            Target::Worker(name) => {
                let Some(worker) = self.to_restart(name, target)? else {
                    return Err(CommandError::new(Problem::NotFound, "there is no such worker"));
                };
                let process = self.core.process_of(worker);
                let process = process.ok_or_else(|| {
                    let message = format!("the dispatcher has not started worker {name}");
                    CommandError::new(Problem::Conflict, message)
                        .hint("it is a service of its own: systemctl restart its unit")
                })?;
                (process.pool, Some(process))
            }
            Target::All => {
                let message = "only a pool or a worker can be restarted";
                return Err(CommandError::new(Problem::Invalid, message));
            }
        };
        let begun = self.begin_roll(target, pool, process, end_oldest)?;
        Ok(self.restarted(pool, begun))
    }

    /// The worker of this name whose process fills its place: workers that leave may have the same
    /// name.
    fn to_restart(
        &self,
        name: &WorkerRef,
        target: &Target,
    ) -> Result<Option<WorkerId>, CommandError> {
        let fills = |&worker: &WorkerId| {
            self.core.process_of(worker).is_some_and(|process| self.core.wants_process(process))
        };
        let workers = self.core.workers().filter(fills);
        let workers = workers.map(|it| (it.serial, self.pool_of(it), self.core.worker_name(it)));
        match name.resolve(&self.run.instance, workers) {
            Ok(serial) => Ok(self.core.workers().find(|worker| worker.serial == serial)),
            Err(_) => Ok(self.targets(target)?.first().copied()),
        }
    }

    /// Returns to the command before the last restart of a pool.
    fn undo(&mut self, name: &str) -> Answer {
        let pool = self.spawning_pool(name)?;
        let begun = self.undo_roll(&Target::Pool(name.to_owned()), pool)?;
        Ok(self.restarted(pool, begun))
    }

    fn restarted(&self, pool: PoolId, begun: RollBegun) -> Outcome {
        let name = self.core.pool_name(pool).to_owned();
        let RollBegun { generation, processes } = begun;
        let settings = self.core.pool_settings(pool);
        let at_once = settings
            .map_or(1, |settings| settings.supervision.max_surge.of(settings.processes))
            .min(processes);
        log::info!(
            "event=pool_restarting pool={name} generation={} processes={processes} at_once={at_once}",
            generation.0
        );
        Outcome::Restarted(PoolRestarted {
            at_once,
            generation: generation.0,
            instance: self.run.instance.clone(),
            pool: name,
            processes,
        })
    }

    /// Replaces the processes of every pool.
    pub(super) fn restart_all(&mut self) {
        let pools: Vec<String> = self.core.pool_names().map(str::to_owned).collect();
        for pool in pools {
            // A pool that starts no processes refuses; the log has any other reason.
            let starts = self.spawning_pool(&pool).is_ok();
            if let Err(error) = self.restart(&Target::Pool(pool.clone()), false)
                && starts
            {
                log::error!("event=pool_not_restarted pool={pool} error={}", quoted(&error));
            }
        }
    }

    /// The pool of this name, if it starts processes.
    fn spawning_pool(&self, name: &str) -> Result<PoolId, CommandError> {
        let id = self.pool_called(name)?;
        if self.pools.get(usize::from(id.0)).is_some_and(|pool| pool.spawn.is_some()) {
            return Ok(id);
        }
        let message = format!("pool {name} starts no processes");
        Err(CommandError::new(Problem::Conflict, message)
            .hint("its workers are services of their own; see [pool.NAME.spawn]"))
    }

    /// The recorded decisions of a pool.
    pub(super) fn history(&self, pool: &str, after: u64) -> Result<RawHistory, CommandError> {
        let id = self.pool_called(pool)?;
        let settings = self.core.pool_settings(id);
        let listeners = (0u16..)
            .take(self.listeners.resources.len())
            .map(|n| self.core.listener_name(ListenerId(n)).to_owned());
        Ok(RawHistory {
            policy: settings.map_or("", |settings| settings.policy.name()),
            steered: self.is_steered(id),
            size: settings.map_or(0, |settings| settings.history),
            clock: (clock(), SystemTime::now()),
            listeners: listeners.collect(),
            decisions: self.core.history(id, after),
        })
    }

    /// The worker that a pool's next connection would go to.
    pub(super) fn explain(
        &self,
        pool: &str,
        peer: ClientAddr,
    ) -> Result<RawExplanation, CommandError> {
        let id = self.pool_called(pool)?;
        self.is_obeyed(id, "explain")?;
        let unknown = || unknown_pool(pool, self.core.pool_names());
        Ok(RawExplanation {
            policy: self.core.pool_settings(id).map_or("", |settings| settings.policy.name()),
            steered: self.is_steered(id),
            clock: (clock(), SystemTime::now()),
            explanation: self.core.explain(self.now, id, peer).ok_or_else(unknown)?,
        })
    }

    fn pool_called(&self, name: &str) -> Result<PoolId, CommandError> {
        let unknown = || unknown_pool(name, self.core.pool_names());
        self.core.pool_named(name).ok_or_else(unknown)
    }

    /// The workers a command is about.
    pub(super) fn targets(&self, target: &Target) -> Result<Vec<WorkerId>, CommandError> {
        match target {
            Target::All => Ok(self.core.workers().collect()),
            Target::Pool(name) => {
                if !self.core.pool_names().any(|pool| pool == name) {
                    return Err(unknown_pool(name, self.core.pool_names()));
                }
                Ok(self.core.workers().filter(|&worker| self.pool_of(worker) == name).collect())
            }
            Target::Worker(name) => {
                let workers = self.core.workers();
                let workers = workers.map(|worker| {
                    (worker.serial, self.pool_of(worker), self.core.worker_name(worker))
                });
                let serial = name.resolve(&self.run.instance, workers)?;
                Ok(self.core.workers().filter(|worker| worker.serial == serial).collect())
            }
        }
    }

    /// The workers of a command about new connections.
    fn steerable(&self, target: &Target, what: &str) -> Result<Vec<WorkerId>, CommandError> {
        let workers = self.targets(target)?;
        if let Target::Pool(name) = target {
            self.is_obeyed(self.pool_called(name)?, what)?;
        }
        let mut pools = workers.iter().filter_map(|&worker| self.core.pool_of_worker(worker));
        pools.try_for_each(|pool| self.is_obeyed(pool, what))?;
        Ok(workers)
    }

    /// Refuses a command where the kernel's own hash chooses.
    fn is_obeyed(&self, pool: PoolId, what: &str) -> Result<(), CommandError> {
        let Some(error) = self.steers.hashed(pool) else { return Ok(()) };
        let name = self.core.pool_name(pool);
        let message = format!(
            "{what} is not possible in pool {name}: the kernel's own hash chooses its workers, \
             because the programs cannot be loaded: {error}"
        );
        Err(CommandError::new(Problem::Conflict, message)
            .hint("dispatcher doctor; restart and scale work"))
    }

    fn not_resumed(&self, name: &WorkerRef, worker: WorkerId, why: CannotResume) -> CommandError {
        let pool = self.pool_of(worker);
        let (reason, hint) = match why {
            CannotResume::Leaving => (
                "is leaving and takes no more connections".to_owned(),
                "start another worker in its place".to_owned(),
            ),
            CannotResume::PoolRemoved => (
                format!("cannot be resumed: pool {pool} was removed from the configuration"),
                format!("add [pool.{pool}] again and reload first"),
            ),
            CannotResume::HostDrains => (
                "cannot be resumed: the whole host drains".to_owned(),
                "dispatcher resume --all".to_owned(),
            ),
            CannotResume::Surplus => (
                format!(
                    "cannot be resumed: its process is surplus: pool {pool} has fewer processes now"
                ),
                format!("dispatcher scale {pool} +1"),
            ),
        };
        CommandError::new(Problem::Conflict, format!("worker {name} {reason}")).hint(hint)
    }

    fn pool_of(&self, worker: WorkerId) -> &str {
        self.core.pool_of_worker(worker).map_or("", |pool| self.core.pool_name(pool))
    }

    /// The state of these workers.
    fn workers_changed(&self, workers: &[WorkerId]) -> Outcome {
        let summary = |&worker: &WorkerId| WorkerSummary {
            id: worker.serial,
            load: self.core.load(worker).unwrap_or_default(),
            name: self.core.worker_name(worker).to_owned(),
            pool: self.pool_of(worker).to_owned(),
            state: self.core.worker_state(worker).map_or("gone", |state| state.name()).to_owned(),
            weight: self.core.weight(worker).unwrap_or_default(),
        };
        Outcome::Workers(WorkersChanged {
            host: self.host_drain_status(),
            instance: self.run.instance.clone(),
            workers: workers.iter().map(summary).collect(),
        })
    }
}
