//! The processes of a pool in the status: their states, the last roll, and former generations.

use std::time::Duration;

use dispatcher_core::{LeavingGeneration, ProcessSnapshot};
use serde::{Deserialize, Serialize};

/// The processes that the dispatcher starts for a pool. Totals are since the start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessesStatus {
    /// The number of processes that should get connections.
    pub wanted: u32,
    /// Processes that get connections.
    pub active: u32,
    /// Wanted processes whose worker has not joined yet.
    pub starting: u32,
    /// Processes that get no more connections, and have not ended.
    pub leaving: u32,
    /// Processes that get connections until another one has replaced them.
    #[serde(default)]
    pub outdated: u32,
    /// Restarts of processes that ended or failed to start.
    pub restarts: u64,
    /// Processes replaced because of their age, connections or memory, or by `restart`.
    pub replaced: u64,
    /// Processes ended because their worker did not join within `start_timeout`.
    pub ended_late: u64,
    /// Processes ended because their worker was suspect for `kill_hung_after`.
    pub ended_hung: u64,
    /// Whether `crash_loop_after` starts in succession have failed.
    pub crash_loop: bool,
    /// Milliseconds until the next start that waits for a delay; absent if none waits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_start_in_ms: Option<u64>,
    /// The number of the deploy that the pool has: that of new places, and after a roll that of
    /// every process.
    #[serde(default)]
    pub generation: u32,
    /// Whether the configuration has other settings than this generation: a restart applies them.
    #[serde(default)]
    pub restart_needed: bool,
    /// The last roll.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub roll: Option<RollStatus>,
    /// The generations that leave because of a roll and have connections, oldest first.
    #[serde(default)]
    pub leaving_generations: Vec<LeavingStatus>,
    /// Ready checks that passed.
    #[serde(default)]
    pub ready_checks_passed: u64,
    /// Ready checks that failed.
    #[serde(default)]
    pub ready_checks_failed: u64,
}

/// A roll: the processes of a pool are replaced by processes of another generation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RollStatus {
    /// The generation of the new processes.
    pub generation: u32,
    /// The generation to which `rollout undo` returns.
    pub former: u32,
    /// The only process that is replaced, counted from 1; absent if all are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<u32>,
    /// `progressing`, `stopped` or `done`.
    pub state: String,
    /// Whether it returns to a generation that was there before.
    pub undo: bool,
    /// New processes that became ready.
    pub replaced: u32,
    /// Processes that are still to be replaced, or would have been.
    pub remaining: u32,
    /// Seconds since it began.
    pub seconds: u64,
    /// Program and arguments of the new processes.
    pub command: Vec<String>,
    /// Program and arguments to which `rollout undo` returns.
    pub former_command: Vec<String>,
    /// Why it stopped; with `undo`, why the roll before it stopped, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The last lines that the process wrote that was not ready.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub output: Vec<String>,
}

/// Processes of a former generation that have connections.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeavingStatus {
    /// The generation.
    pub generation: u32,
    /// Its processes that have connections.
    pub processes: u32,
    /// Their connections.
    pub connections: u64,
}

impl ProcessesStatus {
    /// What is not as usual, in short; empty if every wanted process is active.
    pub fn changes(&self) -> String {
        let mut parts = Vec::new();
        if self.crash_loop {
            parts.push("crash loop".to_owned());
        }
        if self.starting > 0 {
            parts.push(format!("{} starting", self.starting));
        }
        match &self.roll {
            Some(roll) if roll.state == "progressing" => {
                let all = roll.replaced + roll.remaining;
                let generation = roll.generation;
                parts.push(format!("generation {generation}: {} of {all} replaced", roll.replaced));
            }
            Some(roll) if roll.state == "stopped" => {
                parts.push(format!("roll to generation {} stopped", roll.generation));
            }
            _ if self.restart_needed => parts.push("changed settings need a restart".to_owned()),
            _ if self.outdated > 0 => parts.push(format!("{} to be replaced", self.outdated)),
            _ => {}
        }
        if self.leaving > 0 {
            parts.push(format!("{} leaving", self.leaving));
        }
        if let Some(wait) = self.next_start_in_ms {
            parts.push(format!("next start in {} s", wait.div_ceil(1000)));
        }
        parts.join(", ")
    }
}

impl From<&ProcessSnapshot> for ProcessesStatus {
    fn from(core: &ProcessSnapshot) -> ProcessesStatus {
        let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        ProcessesStatus {
            wanted: core.counts.wanted,
            active: core.counts.active,
            starting: core.counts.starting,
            leaving: core.counts.leaving,
            outdated: core.outdated,
            restarts: core.totals.restarts,
            replaced: core.totals.replaced,
            ended_late: core.totals.ended_late,
            ended_hung: core.totals.ended_hung,
            crash_loop: core.crash_loop,
            next_start_in_ms: core.next_start_in.map(milliseconds),
            generation: core.generation.0,
            restart_needed: false,
            roll: core.roll.as_ref().map(|(roll, age)| RollStatus {
                generation: roll.generation.0,
                former: roll.former.0,
                process: roll.place.map(|place| place + 1),
                state: roll.state.name().to_owned(),
                undo: roll.undo,
                replaced: roll.replaced,
                remaining: core.remaining,
                seconds: age.as_secs(),
                ..RollStatus::default()
            }),
            leaving_generations: core.leaving_generations.iter().map(LeavingStatus::from).collect(),
            // The event loop adds the rest.
            ready_checks_passed: 0,
            ready_checks_failed: 0,
        }
    }
}

impl From<&LeavingGeneration> for LeavingStatus {
    fn from(core: &LeavingGeneration) -> LeavingStatus {
        LeavingStatus {
            generation: core.generation.0,
            processes: core.processes,
            connections: core.connections,
        }
    }
}
