//! The JSON of commands: the bodies that `POST /v1/workers`, `/v1/workers/ID` and `/v1/pools/NAME`
//! accept, and their answers.
//!
//! The routes and the client commands use the same types, so neither side builds or reads JSON by
//! hand. Fields are in alphabetical order, which is their order in the answers.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::command::{Command, CommandError, Problem, ProcessCount, Target};
use super::status::{HostDrainStatus, Status, WorkerStatus};

/// The body of a request that changes workers: `{"action": "drain", "deadline": "30s"}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "action", rename_all = "snake_case", deny_unknown_fields)]
pub enum Action {
    /// The workers get no new connections.
    Drain {
        /// After this duration the worker ends its remaining connections.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        deadline: Option<String>,
        /// All workers only: they get connections for this long, while advice and agents tell
        /// others that the host drains.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        announce: Option<String>,
    },
    /// The workers get connections again.
    Resume {},
    /// The worker gets another share of new connections.
    Weight {
        /// From 1 to 65535.
        weight: u32,
    },
    /// The processes are replaced: the next process starts first, then the old one is drained.
    Restart {
        /// If too many former generations have connections, those of the oldest are ended.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        end_oldest: bool,
    },
    /// The pool returns to the command before its last restart.
    Undo {},
    /// The pool gets more or fewer processes. Exactly one of the two fields is set.
    Scale {
        /// The new number of processes.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        processes: Option<u32>,
        /// The change of the number of processes.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        by: Option<i32>,
    },
}

impl Action {
    /// A drain, with or without a deadline.
    pub fn drain(deadline: Option<Duration>) -> Action {
        let deadline = deadline.map(|wait| humantime::format_duration(wait).to_string());
        Action::Drain { deadline, announce: None }
    }

    /// A drain of the whole host, announced for this long.
    pub fn drain_host(deadline: Option<Duration>, announce: Option<Duration>) -> Action {
        let text = |wait: Duration| humantime::format_duration(wait).to_string();
        Action::Drain { deadline: deadline.map(text), announce: announce.map(text) }
    }

    /// A restart.
    pub fn restart(end_oldest: bool) -> Action {
        Action::Restart { end_oldest }
    }

    /// A change of a pool's processes.
    pub fn scale(wanted: ProcessCount) -> Action {
        match wanted {
            ProcessCount::Exactly(processes) => {
                Action::Scale { processes: Some(processes), by: None }
            }
            ProcessCount::ChangeBy(by) => Action::Scale { processes: None, by: Some(by) },
        }
    }

    /// The command for `target`.
    ///
    /// # Errors
    /// [`Problem::Invalid`] when a value is out of range or the action does not apply to such a
    /// target.
    pub fn command(self, target: Target) -> Result<Command, CommandError> {
        Ok(match self {
            Action::Drain { announce: Some(_), .. } if target != Target::All => {
                let message = "only a drain of the whole host can be announced";
                return Err(
                    CommandError::new(Problem::Invalid, message).hint("post it to /v1/workers")
                );
            }
            Action::Drain { deadline, announce } => {
                let deadline = deadline.map(|text| wait("deadline", &text)).transpose()?;
                let announce = announce.map(|text| wait("announce", &text)).transpose()?;
                Command::Drain { target, deadline, announce: announce.unwrap_or_default() }
            }
            Action::Resume {} => Command::Resume { target },
            Action::Weight { weight } => {
                let valid = u16::try_from(weight).ok().filter(|&weight| weight > 0);
                let weight = valid.ok_or_else(|| {
                    let message = format!("a weight is from 1 to 65535, not {weight}");
                    CommandError::new(Problem::Invalid, message)
                        .hint("to stop new connections, drain the worker")
                })?;
                Command::Weight { target, weight }
            }
            Action::Undo {} => {
                let Target::Pool(pool) = target else {
                    let message = "only a pool can return to its former command";
                    return Err(CommandError::new(Problem::Invalid, message)
                        .hint("post it to /v1/pools/NAME"));
                };
                Command::Undo { pool }
            }
            Action::Restart { end_oldest } => match target {
                Target::Pool(_) | Target::Worker(_) => Command::Restart { target, end_oldest },
                Target::All => {
                    let message = "only a pool or a worker can be restarted";
                    return Err(CommandError::new(Problem::Invalid, message)
                        .hint("post it to /v1/pools/NAME or /v1/workers/ID"));
                }
            },
            Action::Scale { processes, by } => {
                let wanted = match (processes, by) {
                    (Some(processes), None) => ProcessCount::Exactly(processes),
                    (None, Some(by)) => ProcessCount::ChangeBy(by),
                    (Some(_), Some(_)) | (None, None) => {
                        let message = "set either `processes` or `by`";
                        return Err(CommandError::new(Problem::Invalid, message)
                            .hint("such as {\"action\": \"scale\", \"processes\": 8}"));
                    }
                };
                let Target::Pool(pool) = target else {
                    let message = "only a pool can be scaled";
                    return Err(CommandError::new(Problem::Invalid, message)
                        .hint("post it to /v1/pools/NAME"));
                };
                Command::Scale { pool, wanted }
            }
        })
    }
}

fn wait(field: &str, text: &str) -> Result<Duration, CommandError> {
    humantime::parse_duration(text).map_err(|error| {
        CommandError::new(Problem::Invalid, format!("{field}: {error}"))
            .hint("write a duration, such as \"30s\" or \"5min\"")
    })
}

/// The answer to an action that succeeded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Outcome {
    /// After a drain, a resume or a new weight.
    Workers(WorkersChanged),
    /// After a change of the number of processes.
    Pool(PoolScaled),
    /// After a restart.
    Restarted(PoolRestarted),
}

/// The workers that an action applied to, with their state after it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkersChanged {
    /// The drain of the whole host, after `drain --all`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<HostDrainStatus>,
    /// The instance of the dispatcher: worker ids are unique within it.
    #[serde(default)]
    pub instance: String,
    /// Possibly none.
    pub workers: Vec<WorkerSummary>,
}

/// A worker in the answer to an action.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerSummary {
    /// The id at this dispatcher.
    pub id: u64,
    /// Live connections, untaken ones included.
    pub load: u64,
    /// The name that the worker gave itself.
    pub name: String,
    /// The pool of the worker.
    pub pool: String,
    /// `active`, `suspect` or `draining`; `gone` if the worker has left.
    pub state: String,
    /// The share of new connections, relative to other workers.
    #[serde(default)]
    pub weight: u32,
}

/// A pool whose processes, or some of them, are being replaced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolRestarted {
    /// Most processes that are replaced at the same time.
    pub at_once: u32,
    /// The generation of the new processes.
    pub generation: u32,
    /// The instance of the dispatcher.
    #[serde(default)]
    pub instance: String,
    /// The pool.
    pub pool: String,
    /// The number of processes that are replaced.
    pub processes: u32,
}

/// A pool after a change of its number of processes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolScaled {
    /// Processes that have joined and get connections.
    pub active: u32,
    /// Wanted processes before the change.
    pub before: u32,
    /// The instance of the dispatcher.
    #[serde(default)]
    pub instance: String,
    /// Processes that have not ended and get no more connections.
    pub leaving: u32,
    /// The pool.
    pub pool: String,
    /// Wanted processes.
    pub processes: u32,
    /// Wanted processes that have not joined yet.
    pub starting: u32,
}

/// A worker with all that the status has about it, and its pool.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkerEntry {
    /// The pool of the worker.
    pub pool: String,
    /// The rest.
    #[serde(flatten)]
    pub status: WorkerStatus,
}

impl WorkerEntry {
    /// All workers of a status, in the order of the pools.
    pub fn all(status: &Status) -> impl Iterator<Item = WorkerEntry> + '_ {
        status.pools.iter().flat_map(|pool| {
            let entry = |worker: &WorkerStatus| WorkerEntry {
                pool: pool.name.clone(),
                status: worker.clone(),
            };
            pool.workers.iter().map(entry)
        })
    }

    /// The part that the answer to an action has as well.
    pub fn summary(&self) -> WorkerSummary {
        WorkerSummary {
            id: self.status.id,
            load: self.status.load,
            name: self.status.name.clone(),
            pool: self.pool.clone(),
            state: self.status.state.clone(),
            weight: self.status.weight,
        }
    }
}

/// The answer of `GET /v1/workers`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkerList {
    /// The instance of the dispatcher, where the dispatcher has sent it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<String>,
    /// In the order of the pools.
    pub workers: Vec<WorkerEntry>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(value: &impl Serialize) -> String {
        serde_json::to_string(value).expect("JSON")
    }

    #[test]
    fn requests_have_exactly_the_documented_bytes() {
        let half_a_minute = Some(Duration::from_secs(30));
        for (action, expected) in [
            (Action::drain(None), r#"{"action":"drain"}"#),
            (Action::drain(half_a_minute), r#"{"action":"drain","deadline":"30s"}"#),
            (Action::Resume {}, r#"{"action":"resume"}"#),
            (Action::Weight { weight: 3 }, r#"{"action":"weight","weight":3}"#),
            (Action::scale(ProcessCount::Exactly(8)), r#"{"action":"scale","processes":8}"#),
            (Action::scale(ProcessCount::ChangeBy(-1)), r#"{"action":"scale","by":-1}"#),
        ] {
            assert_eq!(json(&action), expected);
            assert_eq!(serde_json::from_str::<Action>(expected).expect("an action"), action);
        }
        assert!(serde_json::from_str::<Action>(r#"{"action":"resume","x":1}"#).is_err());
    }

    #[test]
    fn answers_have_exactly_the_documented_bytes() {
        let worker = WorkerEntry {
            pool: "web".to_owned(),
            status: WorkerStatus { id: 3, name: "a".to_owned(), ..WorkerStatus::default() },
        };
        let changed = WorkersChanged {
            host: None,
            instance: "0a1b".to_owned(),
            workers: vec![worker.summary()],
        };
        assert_eq!(
            json(&Outcome::Workers(changed)),
            r#"{"instance":"0a1b","workers":[{"id":3,"load":0,"name":"a","pool":"web","state":"","weight":0}]}"#
        );
        let scaled = PoolScaled {
            active: 1,
            before: 2,
            leaving: 3,
            instance: "0a1b".to_owned(),
            pool: "web".to_owned(),
            processes: 4,
            starting: 5,
        };
        assert_eq!(
            json(&Outcome::Pool(scaled)),
            r#"{"active":1,"before":2,"instance":"0a1b","leaving":3,"pool":"web","processes":4,"starting":5}"#
        );
        let list = WorkerList { instance: None, workers: vec![worker] };
        assert_eq!(serde_json::from_str::<WorkerList>(&json(&list)).expect("a list"), list);
    }
}
