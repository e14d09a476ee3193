//! Deploys of pools: which settings each generation starts from, why the last roll stopped, and the
//! connections of ready checks.
//!
//! Decides nothing: the core decides what is replaced. Guarantees: the settings of a generation are
//! kept as long as the core can start a process of it; a later dispatcher finds the deploys of
//! pools whose processes outlive this one in the journal.

mod checks;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::oneshot;

use super::EventLoop;
use crate::api::command::{CommandError, Problem, Target};
use crate::api::status::RollStatus;
use crate::background::spawner::{CheckConnection, CheckFate, Deploys, RollRecord};
use crate::config::{OnDispatcherLoss, Spawn};
use dispatcher_core::{
    Core, Event, Generation, PoolId, ProcessId, Roll, RollBegun, RollRefusal, RollState,
    StepFailure, Ticket, Time, WorkerId,
};

/// Most lines of output that a stopped roll shows.
const MAX_LINES: usize = 20;

/// Processes of a pool of which it is kept how they ended: as many as may end in one turn.
const LAST_NOTES: usize = 256;

/// The deploys of all pools.
#[derive(Debug, Default)]
pub(super) struct Rolls {
    pools: HashMap<PoolId, PoolRolls>,
    /// A connection that the core is asked to send, and then those in flight.
    offered: Option<CheckConnection>,
    in_flight: HashMap<(WorkerId, Ticket), (OwnedFd, oneshot::Sender<CheckFate>)>,
}

/// The deploys of one pool.
#[derive(Debug, Default)]
struct PoolRolls {
    versions: BTreeMap<Generation, Spawn>,
    /// How the last processes ended, or why they were not ready.
    last: VecDeque<(ProcessId, String)>,
    /// Why the last roll stopped.
    stop: Option<Stopped>,
    /// When the last roll began: seconds since 1970.
    began: u64,
    passed: u64,
    failed: u64,
}

#[derive(Clone, Debug, Default)]
struct Stopped {
    reason: String,
    /// The process whose output is shown, or the output itself if an earlier dispatcher knew it.
    process: Option<ProcessId>,
    output: Vec<String>,
}

impl Rolls {
    /// The settings of a pool at the start of the dispatcher, and what an earlier one recorded.
    pub(super) fn add(&mut self, pool: PoolId, first: Generation, spawn: Option<&Spawn>) {
        let entry = self.pools.entry(pool).or_default();
        *entry = PoolRolls::default();
        if let Some(spawn) = spawn {
            entry.versions.insert(first, spawn.clone());
        }
    }

    /// What the processes of a generation are started from.
    pub(super) fn version(&self, pool: PoolId, generation: Generation) -> Option<&Spawn> {
        self.pools.get(&pool)?.versions.get(&generation)
    }

    /// What was last learned of a process: how it ended, or why it is not ready.
    pub(super) fn note(&mut self, process: ProcessId, what: &str) {
        let last = &mut self.pools.entry(process.pool).or_default().last;
        // Several may end before the core's events about them are read.
        last.retain(|(known, _)| *known != process);
        if last.len() == LAST_NOTES {
            last.pop_front();
        }
        last.push_back((process, what.to_owned()));
    }

    /// Ready checks of a pool that passed and that failed.
    pub(super) fn checks(&self, pool: PoolId) -> (u64, u64) {
        self.pools.get(&pool).map_or((0, 0), |pool| (pool.passed, pool.failed))
    }

    /// Takes the deploys of an earlier dispatcher over. Its processes were adopted before.
    pub(super) fn recover(
        &mut self,
        now: Time,
        core: &mut Core,
        pool: PoolId,
        (deploys, configured): (Deploys, Option<&Spawn>),
    ) {
        let entry = self.pools.entry(pool).or_default();
        entry.versions =
            deploys.versions.into_iter().map(|(number, it)| (Generation(number), it)).collect();
        let current = Generation(deploys.current);
        let roll = deploys.roll.map(|roll| {
            entry.began = roll.began;
            if let Some(reason) = roll.reason.clone() {
                entry.stop = Some(Stopped { reason, process: None, output: roll.output.clone() });
            }
            restored(now, &roll)
        });
        core.resume_roll(now, pool, roll, current);
        let goes_on = roll.filter(|roll| roll.state == RollState::Progressing);
        if let Some(roll) = goes_on
            && !entry.versions.contains_key(&roll.generation)
        {
            let reason = "it was interrupted: the dispatcher was started again, and its journal has \
                          no command for this generation";
            entry.stop = Some(Stopped { reason: reason.to_owned(), ..Stopped::default() });
            core.interrupt_roll(now, pool);
        }
        let name = core.pool_name(pool);
        if let Some(roll) = goes_on {
            log::info!("event=roll_resumed pool={name} generation={}", roll.generation.0);
        }
        let mut used: Vec<Generation> = core.generations(pool).collect();
        used.sort_unstable();
        used.dedup();
        for unknown in used.iter().filter(|&it| !entry.versions.contains_key(it)) {
            log::warn!(
                "event=pool_version_unknown pool={name} generation={} \
                 hint=\"the journal has no command for it: a process that ends is started from the \
                 configuration\"",
                unknown.0
            );
        }
        let Some(configured) = configured else { return };
        let newest = goes_on.map_or(current, |roll| roll.generation);
        if entry.versions.get(&newest).is_some_and(|version| !version.starts_like(configured)) {
            log::warn!(
                "event=pool_outdated pool={name} generation={} \
                 hint=\"the configuration has other settings than its processes: dispatcher restart {name}\"",
                newest.0
            );
        }
    }
}

/// A roll of an earlier dispatcher.
fn restored(now: Time, record: &RollRecord) -> Roll {
    let age = Duration::from_secs(unix_now().saturating_sub(record.began));
    let began = Time(now.0.saturating_sub(u64::try_from(age.as_nanos()).unwrap_or(u64::MAX)));
    let state = match record.state.as_str() {
        "progressing" => RollState::Progressing,
        "stopped" => RollState::Stopped,
        _ => RollState::Done,
    };
    Roll {
        generation: Generation(record.generation),
        former: Generation(record.former),
        place: record.place,
        state,
        undo: record.undo,
        failure: None,
        replaced: record.replaced,
        began,
        ended: (state != RollState::Progressing).then_some(began),
    }
}

fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

impl EventLoop {
    // --- deploys ---------------------------------------------------------------------------

    /// What a process is started from: the settings of its generation.
    pub(super) fn spawn_of(&self, process: ProcessId) -> Option<&Spawn> {
        let version = self.core.generation_of(process);
        let version = version.and_then(|version| self.rolls.version(process.pool, version));
        let configured = self.pools.get(usize::from(process.pool.0))?.spawn.as_ref();
        version.or(configured)
    }

    /// Begins to replace the processes of a pool, or of one worker.
    pub(super) fn begin_roll(
        &mut self,
        target: &Target,
        pool: PoolId,
        process: Option<ProcessId>,
        end_oldest: bool,
    ) -> Result<RollBegun, CommandError> {
        let configured = self.pools.get(usize::from(pool.0)).and_then(|pool| pool.spawn.clone());
        let Some(configured) = configured else {
            return Err(self.starts_none(pool));
        };
        let begun = match process {
            None => self.core.roll(self.now, pool, end_oldest),
            Some(process) => {
                // A generation that starts from the same settings.
                let versions = self.rolls.pools.get(&pool).map(|pool| &pool.versions);
                let same = versions.into_iter().flatten().rev();
                let same = same.filter(|(_, it)| it.starts_like(&configured)).map(|(it, _)| *it);
                let same = same.collect::<Vec<_>>();
                let own = self.core.generation_of(process);
                let same = own.filter(|own| same.contains(own)).or(same.first().copied());
                self.core.roll_one(self.now, process, same, end_oldest)
            }
        };
        let begun = begun.map_err(|refusal| self.roll_refused(target, pool, refusal))?;
        self.roll_begun(pool, Some((begun.generation, configured)));
        Ok(begun)
    }

    /// Returns to the generation before the last roll.
    pub(super) fn undo_roll(
        &mut self,
        target: &Target,
        pool: PoolId,
    ) -> Result<RollBegun, CommandError> {
        let last = self.core.last_roll(pool);
        let stopped = self.rolls.pools.get(&pool).is_some_and(|pool| pool.stop.is_some());
        if let Some(last) = last.filter(|it| it.undo && it.state != RollState::Stopped && stopped) {
            let name = self.core.pool_name(pool);
            let generation = last.generation.0;
            let message = match last.state {
                RollState::Progressing => {
                    format!("pool {name} is returning to generation {generation} already")
                }
                RollState::Stopped | RollState::Done => {
                    format!("pool {name} has returned to generation {generation} already")
                }
            };
            return Err(CommandError::new(Problem::Conflict, message)
                .hint("its last restart failed and was undone (on_failure)"));
        }
        let former = last.map(|roll| roll.former);
        if let Some(former) = former
            && self.rolls.version(pool, former).is_none()
        {
            let name = self.core.pool_name(pool);
            let message = format!("the command of generation {} is not known", former.0);
            return Err(CommandError::new(Problem::Conflict, message).hint(format!(
                "put it into the configuration again, then: dispatcher reload && dispatcher restart {name}"
            )));
        }
        let begun = self.core.undo_roll(self.now, pool);
        let begun = begun.map_err(|refusal| self.roll_refused(target, pool, refusal))?;
        self.roll_begun(pool, None);
        Ok(begun)
    }

    fn roll_begun(&mut self, pool: PoolId, version: Option<(Generation, Spawn)>) {
        let used: Vec<Generation> = self.core.generations(pool).collect();
        let entry = self.rolls.pools.entry(pool).or_default();
        entry.versions.extend(version);
        entry.versions.retain(|generation, _| used.contains(generation));
        entry.stop = None;
        entry.began = unix_now();
        // Forked processes are to be of the program, and of the data, that are there now.
        self.side.spawner.renew(pool);
        self.record_deploys(pool);
    }

    fn starts_none(&self, pool: PoolId) -> CommandError {
        let message = format!("pool {} starts no processes", self.core.pool_name(pool));
        CommandError::new(Problem::Conflict, message)
            .hint("its workers are services of their own; see [pool.NAME.spawn]")
    }

    fn roll_refused(&self, target: &Target, pool: PoolId, refusal: RollRefusal) -> CommandError {
        let name = self.core.pool_name(pool);
        match refusal {
            RollRefusal::TooManyGenerations(oldest) if let Target::Worker(worker) = target => {
                let message = format!(
                    "too many former processes of worker {worker} have connections \
                     (max_leaving_generations of pool {name}): the oldest has {}",
                    oldest.connections
                );
                CommandError::new(Problem::Conflict, message).hint(format!(
                    "wait for them, or end them: dispatcher restart {worker} --end-oldest"
                ))
            }
            RollRefusal::TooManyGenerations(oldest) => {
                let settings = self.core.pool_settings(pool);
                let most = settings.map_or(0, |it| it.supervision.max_leaving_generations);
                let message = format!(
                    "pool {name} has {most} former generation{s} with connections \
                     (max_leaving_generations): the oldest, {}, has {} at {} worker{t}",
                    oldest.generation.0,
                    oldest.connections,
                    oldest.processes,
                    s = if most == 1 { "" } else { "s" },
                    t = if oldest.processes == 1 { "" } else { "s" },
                );
                CommandError::new(Problem::Conflict, message).hint(format!(
                    "wait for them, or end them: dispatcher restart {name} --end-oldest"
                ))
            }
            RollRefusal::NothingToUndo => CommandError::new(
                Problem::Conflict,
                format!("no restart of pool {name} is known"),
            )
            .hint(format!(
                "to return to an earlier command, put it into the configuration again, then: \
                         dispatcher reload && dispatcher restart {name}"
            )),
            RollRefusal::HostDrains => CommandError::new(
                Problem::Conflict,
                format!("no process of pool {name} is started: the whole host drains"),
            )
            .hint("dispatcher resume --all"),
            RollRefusal::NotServing => match target {
                Target::Worker(worker) => {
                    let message = format!("worker {worker} is leaving already");
                    CommandError::new(Problem::Conflict, message)
                }
                Target::Pool(_) | Target::All => self.starts_none(pool),
            },
        }
    }

    /// The command of a pool was changed by a reload. Returns whether its processes have to be
    /// restarted for that.
    pub(super) fn renew_version(&mut self, pool: PoolId) -> bool {
        let configured = self.pools.get(usize::from(pool.0)).and_then(|pool| pool.spawn.clone());
        let Some(configured) = configured else { return false };
        let generation = self.core.renew_processes(self.now, pool);
        self.roll_renewed(pool, generation, configured.clone());
        // An earlier generation may have the same settings: those before a roll that was undone.
        let mut processes = self.core.process_ids(pool).filter(|(_, leaves)| !leaves);
        processes.any(|(process, _)| {
            self.spawn_of(process).is_none_or(|version| !version.starts_like(&configured))
        })
    }

    /// A pool that was removed comes back, before it wants processes. Returns the generation of its
    /// settings if they are not those that it had: processes that still leave and are wanted again
    /// are replaced.
    pub(super) fn renew_restored(
        &mut self,
        pool: PoolId,
        configured: &Spawn,
    ) -> Option<Generation> {
        let version = self.rolls.version(pool, self.core.generation(pool));
        let same = version.is_some_and(|version| version.starts_like(configured));
        (!same).then(|| self.core.renew_processes(self.now, pool))
    }

    pub(super) fn roll_renewed(&mut self, pool: PoolId, generation: Generation, configured: Spawn) {
        let used: Vec<Generation> = self.core.generations(pool).collect();
        let entry = self.rolls.pools.entry(pool).or_default();
        entry.versions.insert(generation, configured);
        entry.versions.retain(|generation, _| used.contains(generation));
        self.record_deploys(pool);
    }

    /// Keeps why a roll stopped, and the end of a roll.
    pub(super) fn note_roll(&mut self, event: &Event) {
        match *event {
            Event::RollStopped { process, cause } => self.roll_stopped(process, cause),
            Event::Rolled { pool, .. } => self.record_deploys(pool),
            _ => {}
        }
    }

    /// Whether the configuration has other settings than the processes of a pool.
    pub(super) fn needs_restart(&self, pool: PoolId) -> bool {
        let configured = self.pools.get(usize::from(pool.0)).and_then(|it| it.spawn.as_ref());
        let roll = self.core.last_roll(pool).filter(|roll| roll.state == RollState::Progressing);
        let generation = roll.map_or(self.core.generation(pool), |roll| roll.generation);
        let version = self.rolls.version(pool, generation);
        configured.zip(version).is_some_and(|(configured, it)| !it.starts_like(configured))
    }

    /// Why the last roll of a pool stopped.
    pub(super) fn roll_reason(&self, pool: PoolId) -> String {
        let stopped = self.rolls.pools.get(&pool).and_then(|pool| pool.stop.as_ref());
        stopped.map(|stopped| stopped.reason.clone()).unwrap_or_default()
    }

    /// A roll stopped at this process.
    fn roll_stopped(&mut self, process: ProcessId, cause: StepFailure) {
        let entry = self.rolls.pools.entry(process.pool).or_default();
        let known = entry.last.iter().find(|(last, _)| *last == process);
        let known = known.map(|(_, what)| what.as_str());
        let what = match (cause, known) {
            (StepFailure::NotStarted, Some(what)) => format!("could not be started: {what}"),
            (StepFailure::NotStarted, None) => "could not be started".to_owned(),
            (StepFailure::Ended, Some(what)) => format!("ended before it was ready: {what}"),
            (StepFailure::Ended, None) => "ended before it was ready".to_owned(),
            (StepFailure::Late, _) => "did not join within start_timeout".to_owned(),
            (StepFailure::NotReady, Some(what)) => format!("is not ready: {what}"),
            (StepFailure::NotReady, None) => "was not ready within ready_timeout".to_owned(),
            (StepFailure::Suspect, _) => {
                "left connections untaken before it had been ready for min_ready".to_owned()
            }
            (StepFailure::Left, _) => "left before it was ready".to_owned(),
        };
        let name = self.core.pool_name(process.pool);
        let reason = format!("process {} ({name}-{}) {what}", process.place + 1, process.place + 1);
        entry.stop = Some(Stopped { reason, process: Some(process), output: Vec::new() });
        self.record_deploys(process.pool);
    }

    /// The last roll of a pool, for the status.
    pub(super) fn roll_status(&self, pool: PoolId, status: &mut RollStatus) {
        let stopped = self.rolls.pools.get(&pool).and_then(|pool| pool.stop.as_ref());
        if let Some(stopped) = stopped {
            status.reason = Some(stopped.reason.clone());
            status.output = self.output_of(stopped);
        }
        let command = |generation: u32| {
            let version = self.rolls.version(pool, Generation(generation));
            version.map(|version| version.command.clone()).unwrap_or_default()
        };
        status.command = command(status.generation);
        status.former_command = command(status.former);
    }

    fn output_of(&self, stopped: &Stopped) -> Vec<String> {
        let Some(process) = stopped.process else { return stopped.output.clone() };
        let mut lines = self.side.spawner.last_output(process);
        if lines.is_empty() && self.spawn_of(process).is_some_and(|spawn| spawn.fork) {
            // It was never forked, or has written nothing yet.
            lines = self.side.spawner.last_output_of_parents(process.pool);
        }
        let skip = lines.len().saturating_sub(MAX_LINES);
        lines.into_iter().skip(skip).map(|line| line.text).collect()
    }

    /// Tells the journal of the deploys of a pool.
    pub(super) fn record_deploys(&self, pool: PoolId) {
        let spawn = self.pools.get(usize::from(pool.0)).and_then(|pool| pool.spawn.as_ref());
        if spawn.is_none_or(|spawn| spawn.on_dispatcher_loss != OnDispatcherLoss::Serve) {
            return;
        }
        let Some(entry) = self.rolls.pools.get(&pool) else { return };
        let stop = entry.stop.as_ref();
        let roll = self.core.last_roll(pool).map(|roll| RollRecord {
            generation: roll.generation.0,
            former: roll.former.0,
            place: roll.place,
            state: roll.state.name().to_owned(),
            undo: roll.undo,
            replaced: roll.replaced,
            began: entry.began,
            reason: stop.map(|stop| stop.reason.clone()),
            output: stop.map(|stop| self.output_of(stop)).unwrap_or_default(),
        });
        self.side.spawner.record_deploys(Deploys {
            pool: self.core.pool_name(pool).to_owned(),
            current: self.core.generation(pool).0,
            roll,
            versions: entry.versions.iter().map(|(number, it)| (number.0, it.clone())).collect(),
        });
    }
}
