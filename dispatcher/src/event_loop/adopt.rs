//! Processes that an earlier dispatcher started and left: puts them back in their places when this
//! dispatcher starts, and leaves them to the next one when it restarts.

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dispatch_protocol::wire::Token;

use super::rolls::Rolls;
use super::{EventLoop, PoolResources};
use crate::background::logger::quoted;
use crate::background::service_manager::unit::StopKind;
use crate::background::spawner::{Deploys, Report, Spawner, Survivor};
use crate::config::{Config, MAX_PROCESSES, OnDispatcherLoss, Pool};
use dispatcher_core::{Core, Generation, PoolId, PoolSettings, ProcessId, Time};

/// How long the service manager may take to say once more why it stops the dispatcher.
const CONFIRM: Duration = Duration::from_millis(2_500);

/// The time from SIGTERM to SIGKILL for a process that had `stop_timeout` for its connections, and
/// for each process after a second signal.
pub(super) const AFTER_DRAIN: Duration = Duration::from_secs(2);

/// The journal of the processes of the dispatcher with this socket: beside the socket. `None` for a
/// socket without a path.
pub(super) fn journal_path(dispatch_address: &str) -> Option<PathBuf> {
    let path = Path::new(dispatch_address.strip_prefix("unix:")?);
    let mut name = path.file_name()?.to_owned();
    name.push(".processes");
    let path = path.with_file_name(name);
    Some(std::path::absolute(&path).unwrap_or(path))
}

/// Recorded processes, and the pools that only exist because of them.
#[derive(Default)]
pub(super) struct Survivors {
    list: Vec<(PoolId, Survivor)>,
    /// What is known of the deploys of their pools.
    deploys: Vec<Deploys>,
    /// Pools that are not configured any more.
    removed: Vec<PoolId>,
}

/// Finds the processes of an earlier dispatcher. A pool that is not configured any more is added,
/// so that its workers can join and are drained.
pub(super) fn find(spawner: &Spawner, config: &mut Config, path: Option<PathBuf>) -> Survivors {
    let mut survivors = Survivors::default();
    let Some(path) = path else { return survivors };
    let (recovered, deploys) = spawner.recover(path);
    survivors.deploys = deploys;
    for survivor in recovered {
        let name = &survivor.record.pool;
        let known = config.pools.iter().position(|pool| pool.settings.name == *name);
        let position = known.unwrap_or_else(|| {
            // It is retired before a process could be started. A pool with processes is not said to
            // lack workers.
            let processes = 1;
            let settings =
                PoolSettings { name: name.clone(), processes, ..PoolSettings::default() };
            config.pools.push(Pool {
                settings,
                unavailable_response: None,
                spawn: None,
                agent_listen: None,
                steer: None,
                line: None,
            });
            config.pools.len() - 1
        });
        let Ok(id) = u16::try_from(position) else { continue };
        if known.is_none() {
            survivors.removed.push(PoolId(id));
        }
        survivors.list.push((PoolId(id), survivor));
    }
    survivors
}

/// Processes of an earlier dispatcher, in their places.
#[derive(Default)]
pub(super) struct Adopted {
    /// The tokens with which their workers join.
    pub(super) tokens: HashMap<Token, ProcessId>,
    /// Those of steered pools, with their process ids, and where they listen.
    pub(super) listening: Vec<(ProcessId, i32, SocketAddr)>,
}

impl Survivors {
    /// Puts the processes into their places, and has their ends watched.
    pub(super) fn adopt(
        self,
        now: Time,
        core: &mut Core,
        spawner: &Spawner,
        pools: &[PoolResources],
        rolls: &mut Rolls,
    ) -> Adopted {
        let mut adopted_processes = Adopted::default();
        let adopted: BTreeSet<PoolId> = self.list.iter().map(|(pool, _)| *pool).collect();
        for (pool, mut survivor) in self.list {
            let record = &survivor.record;
            let place = record.place.min(MAX_PROCESSES - 1);
            let at = (place, record.start);
            let generation = Generation(record.generation);
            let adopted = core.adopt(now, pool, at, record.leaving, generation);
            let Some(process) = adopted else { continue };
            log::info!(
                "event=process_adopted pool={} process={} pid={} leaving={}",
                record.pool,
                place + 1,
                survivor.pid,
                record.leaving
            );
            adopted_processes.tokens.insert(survivor.token, process);
            if let Some(address) = survivor.record.address {
                adopted_processes.listening.push((process, survivor.pid, address));
            }
            let settings = core.pool_settings(pool);
            let patience = settings.map_or(AFTER_DRAIN, |pool| pool.supervision.stop_timeout);
            let spawn = pools.get(usize::from(pool.0)).and_then(|pool| pool.spawn.as_ref());
            let max_memory = spawn.and_then(|spawn| spawn.max_memory);
            if let Some(spawn) = spawn {
                survivor.output_rate = spawn.setup.output_rate;
            }
            spawner.watch(process, survivor, patience, max_memory);
        }
        for (id, pool) in (0u16..).map(PoolId).zip(pools) {
            let own = |deploys: &&Deploys| deploys.pool == core.pool_name(id);
            let known = self.deploys.iter().find(own).filter(|_| adopted.contains(&id));
            if let Some(known) = known.cloned() {
                rolls.add(id, core.generation(id), pool.spawn.as_ref());
                rolls.recover(now, core, id, (known, pool.spawn.as_ref()));
                continue;
            }
            // Without a record of the deploys, the youngest processes probably have the settings of
            // the configuration.
            let processes = core.process_ids(id).filter_map(|(it, _)| core.generation_of(it));
            let current = processes.max().unwrap_or(core.generation(id));
            rolls.add(id, current, pool.spawn.as_ref());
            if adopted.contains(&id) {
                core.resume_roll(now, id, None, current);
            }
        }
        for pool in self.removed {
            core.retire_pool(now, pool);
        }
        adopted_processes
    }
}

impl EventLoop {
    /// Whether the processes of a pool outlive the dispatcher, or the kernel goes on choosing among
    /// its members.
    fn survives(&self, pool: PoolId) -> bool {
        let Some(resources) = self.pools.get(usize::from(pool.0)) else { return false };
        let members = resources.steer.as_ref().is_some_and(|steer| !steer.members.is_empty());
        let spawn = resources.spawn.as_ref();
        spawn.is_some_and(|spawn| spawn.on_dispatcher_loss == OnDispatcherLoss::Serve)
            || (members && self.steers.is_pinned(pool))
    }

    /// Whether the processes of any pool outlive the dispatcher.
    pub(super) fn any_survives(&self) -> bool {
        (0..self.pools.len() as u16).any(|pool| self.survives(PoolId(pool)))
    }

    /// Whether this stop leaves the processes of a pool to the next dispatcher.
    pub(super) fn leaves(&self, pool: PoolId) -> bool {
        self.run.leaves && self.survives(pool)
    }

    /// Ends a process, unless this stop leaves it. A process with connections first has
    /// `stop_timeout` to finish them: its worker was drained.
    pub(super) fn end_process(&mut self, process: ProcessId, has_connections: bool) {
        if self.leaves(process.pool) {
            return;
        }
        let settings = self.core.pool_settings(process.pool);
        let timeout = settings
            .map_or(self.config.limits.stop_timeout, |settings| settings.supervision.stop_timeout);
        // An unmodified server ends with SIGTERM only, and finishes its connections then.
        match has_connections && !self.is_steered(process.pool) {
            true => {
                let patience = timeout.min(AFTER_DRAIN);
                self.side.spawner.stop_process(process, timeout, patience);
            }
            false => self.side.spawner.stop_process(process, Duration::ZERO, timeout),
        }
    }

    /// The longest time that the end of a process may take.
    pub(super) fn longest_end(&self) -> Duration {
        let spawning = (0u16..).map(PoolId).zip(&self.pools).filter(|(_, it)| it.spawn.is_some());
        let settings = spawning.filter_map(|(pool, _)| self.core.pool_settings(pool));
        let timeouts = settings.map(|settings| settings.supervision.stop_timeout);
        timeouts.max().unwrap_or(self.config.limits.stop_timeout) + AFTER_DRAIN
    }

    /// The end of the dispatcher: asks once more whether it is restarted, if it would leave
    /// processes. An operator may have stopped the unit since.
    pub(super) fn confirm_leaving(&mut self) {
        let Some(unit) = self.run.unit.clone().filter(|_| self.run.leaves) else { return };
        self.side.spawner.ask_stop_kind(unit);
        let end = Instant::now() + CONFIRM;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.side.reports.recv_timeout(left) {
                Ok(Report::StopKind(kind)) => {
                    self.run.leaves = kind != StopKind::Stop;
                    self.run.recalled = !self.run.leaves;
                    return;
                }
                // The ends of processes do not matter any more.
                Ok(_) => {}
                Err(_) => return,
            }
        }
    }

    /// The end of the dispatcher: ends every process that is not ending yet, or leaves it.
    pub(super) fn end_processes(&mut self) {
        for pool in (0..self.pools.len() as u16).map(PoolId) {
            if self.leaves(pool) {
                self.side.spawner.leave_pool(pool);
                log::info!(
                    "event=processes_left pool={} count={}",
                    quoted(self.core.pool_name(pool)),
                    self.core.process_ids(pool).count()
                );
                continue;
            }
            let processes: Vec<ProcessId> =
                self.core.process_ids(pool).map(|(process, _)| process).collect();
            for process in processes {
                // Its worker was released: whether it had connections is known no more, and the
                // process has its time for them.
                if self.side.spawner.is_ending(process) {
                    continue;
                }
                // A worker that was released to join the next dispatcher may have connections.
                let has_connections = self.core.has_connections(process) || self.run.recalled;
                self.end_process(process, has_connections);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_journal_is_beside_the_socket() {
        let path = journal_path("unix:/run/dispatcher/dispatch.sock").expect("a path");
        assert_eq!(path, Path::new("/run/dispatcher/dispatch.sock.processes"));
        assert!(journal_path("unix:a.sock").expect("a path").is_absolute());
        assert_eq!(journal_path("unix:@abstract").map(|path| path.is_absolute()), Some(true));
        assert_eq!(journal_path("127.0.0.1:80"), None);
    }
}
