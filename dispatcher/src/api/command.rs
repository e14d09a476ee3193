//! The commands of an operator, their errors, and the names of workers.
//!
//! These types are shared by HTTP, the client commands and the event loop. `event_loop/command.rs`
//! carries the commands out.

use dispatch_protocol::wire::is_hidden;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use strsim::damerau_levenshtein;

use super::action::Outcome;

/// A command for the event loop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Stop new connections to workers.
    Drain {
        /// The workers.
        target: Target,
        /// After this time the workers end their remaining connections.
        deadline: Option<Duration>,
        /// All workers only: they get connections for this long, while others are told.
        announce: Duration,
    },
    /// Send new connections to workers again.
    Resume {
        /// The workers.
        target: Target,
    },
    /// Change the share of new connections.
    Weight {
        /// The workers.
        target: Target,
        /// Relative to other workers, at least 1.
        weight: u16,
    },
    /// Replace the processes of a pool, or of one worker.
    Restart {
        /// The pool, or the worker.
        target: Target,
        /// If too many former generations have connections, those of the oldest are ended.
        end_oldest: bool,
    },
    /// Return to the command before the last restart.
    Undo {
        /// The pool.
        pool: String,
    },
    /// Change the number of processes of a pool.
    Scale {
        /// The pool.
        pool: String,
        /// The number.
        wanted: ProcessCount,
    },
}

/// A number of processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProcessCount {
    /// Exactly this many.
    Exactly(u32),
    /// This many more, or fewer if negative.
    ChangeBy(i32),
}

/// The answer to a command.
pub type Answer = Result<Outcome, CommandError>;

/// The workers that a command applies to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// One worker.
    Worker(WorkerRef),
    /// All current workers of a pool.
    Pool(String),
    /// All current workers.
    All,
}

/// The reason why a command failed, by what the caller can do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Problem {
    /// No worker, pool or path has this name.
    NotFound,
    /// Several workers have this name.
    Ambiguous,
    /// The command is malformed.
    Invalid,
    /// The command does not apply to this worker or pool, or not now.
    Conflict,
    /// The configuration has a mistake.
    Config,
    /// The client may not do this, or not over this socket.
    Forbidden,
    /// The path does not support the method.
    Method,
    /// The request is too long.
    TooLarge,
    /// The dispatcher is busy or stopping.
    Unavailable,
    /// Clients cannot be served now.
    NotReady,
    /// A defect of the dispatcher.
    Internal,
}

/// A failed command. Over HTTP: `{"problem": …, "error": …, "hint": …}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandError {
    /// The kind, for programs.
    pub problem: Problem,
    /// The error message.
    #[serde(rename = "error")]
    pub message: String,
    /// A hint how to correct it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl CommandError {
    /// An error without a hint.
    pub fn new(problem: Problem, message: impl Into<String>) -> CommandError {
        CommandError { problem, message: message.into(), hint: None }
    }

    /// Adds a hint.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> CommandError {
        self.hint = Some(hint.into());
        self
    }
}

impl fmt::Display for CommandError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        match &self.hint {
            Some(hint) => write!(f, "\nhelp: {hint}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for CommandError {}

/// A reference to a worker in a command: its id, or `POOL/NAME`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WorkerRef {
    /// The id in the status.
    Id(u64),
    /// The id together with the instance of the dispatcher: `ID@INSTANCE`. Another instance assigns
    /// the same ids to other workers.
    IdOf {
        /// The id.
        id: u64,
        /// `instance` of the status.
        instance: String,
    },
    /// The name. Names need not be unique; if they are not, only the id works.
    Named {
        /// The pool.
        pool: String,
        /// The name that the worker gave itself.
        name: String,
    },
}

impl FromStr for WorkerRef {
    type Err = CommandError;

    fn from_str(text: &str) -> Result<WorkerRef, CommandError> {
        if let Ok(id) = text.parse() {
            return Ok(WorkerRef::Id(id));
        }
        if let Some((id, instance)) = text.split_once('@')
            && let Ok(id) = id.parse()
            && !instance.is_empty()
        {
            return Ok(WorkerRef::IdOf { id, instance: instance.to_owned() });
        }
        match text.split_once('/') {
            Some((pool, name)) if !pool.is_empty() && !name.is_empty() => {
                Ok(WorkerRef::Named { pool: pool.to_owned(), name: name.to_owned() })
            }
            _ => Err(CommandError::new(
                Problem::Invalid,
                format!("`{}` does not name a worker", shown(text)),
            )
            .hint(
                "write its id, such as 3, or POOL/NAME, such as web/web-1; see: dispatcher workers",
            )),
        }
    }
}

impl fmt::Display for WorkerRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WorkerRef::Id(id) => id.fmt(f),
            WorkerRef::IdOf { id, instance } => write!(f, "{id}@{instance}"),
            WorkerRef::Named { pool, name } => write!(f, "{pool}/{name}"),
        }
    }
}

impl WorkerRef {
    /// Finds the worker among `workers` (id, pool, name) of the dispatcher instance `current`.
    ///
    /// # Errors
    /// [`Problem::NotFound`] with the nearest name, [`Problem::Ambiguous`] with the ids, or
    /// [`Problem::Conflict`] for an id of another instance.
    pub fn resolve<'a>(
        &self,
        current: &str,
        workers: impl Iterator<Item = (u64, &'a str, &'a str)> + Clone,
    ) -> Result<u64, CommandError> {
        match self {
            WorkerRef::IdOf { id, instance } if instance != current => {
                let message = format!(
                    "worker {id} is of instance {}: the dispatcher has been restarted as instance {current}",
                    shown(instance)
                );
                Err(CommandError::new(Problem::Conflict, message)
                    .hint("list the current workers with: dispatcher workers"))
            }
            WorkerRef::Id(id) | WorkerRef::IdOf { id, .. } => {
                if workers.clone().any(|(other, _, _)| other == *id) {
                    return Ok(*id);
                }
                let error = CommandError::new(
                    Problem::NotFound,
                    format!("there is no worker with id {id}"),
                );
                Err(error.hint(
                    "ids are reused only after a restart; list the workers with: dispatcher workers",
                ))
            }
            WorkerRef::Named { pool, name } => {
                let found: Vec<u64> = workers
                    .clone()
                    .filter(|(_, p, n)| p == pool && n == name)
                    .map(|(id, _, _)| id)
                    .collect();
                match found[..] {
                    [id] => Ok(id),
                    [] => {
                        let wanted = self.to_string();
                        let known = workers.map(|(_, pool, name)| format!("{pool}/{name}"));
                        Err(not_found(
                            "worker",
                            &wanted,
                            known,
                            "list the workers with: dispatcher workers",
                        ))
                    }
                    _ => {
                        let ids: Vec<String> = found.iter().map(u64::to_string).collect();
                        let many = format!("{} workers have the name {self}", found.len());
                        let hint = format!("use an id: {}", ids.join(", "));
                        Err(CommandError::new(Problem::Ambiguous, many).hint(hint))
                    }
                }
            }
        }
    }
}

/// The error for an unknown pool, with the nearest existing name.
pub fn unknown_pool<'a>(wanted: &str, pools: impl Iterator<Item = &'a str>) -> CommandError {
    let known: Vec<String> = pools.map(str::to_owned).collect();
    let all = match known.len() {
        0 => "there are no pools".to_owned(),
        _ => format!("the pools are {}", known.join(", ")),
    };
    not_found("pool", wanted, known.into_iter(), &all)
}

fn not_found(
    what: &str,
    wanted: &str,
    known: impl Iterator<Item = String>,
    otherwise: &str,
) -> CommandError {
    let nearest = known
        .map(|name| (damerau_levenshtein(wanted, &name), name))
        .min()
        .filter(|(distance, _)| *distance <= 2.max(wanted.chars().count() / 3));
    let message = format!("there is no {what} `{}`", shown(wanted));
    CommandError::new(Problem::NotFound, message).hint(match nearest {
        Some((_, name)) => format!("did you mean `{}`?", shown(&name)),
        None => otherwise.to_owned(),
    })
}

/// Shortens an untrusted name and replaces its control characters, for a message.
fn shown(text: &str) -> String {
    text.chars().take(128).map(|c| if is_hidden(c) { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORKERS: [(u64, &str, &str); 4] = [
        (1, "web", "web-1"),
        (2, "web", "web-2"),
        (5, "chat", "same-name"),
        (6, "chat", "same-name"),
    ];

    fn resolve(text: &str) -> Result<u64, CommandError> {
        text.parse::<WorkerRef>()?.resolve("0a1b", WORKERS.into_iter())
    }

    #[test]
    fn a_worker_has_an_id_and_a_name() {
        assert_eq!(resolve("2"), Ok(2));
        assert_eq!(resolve("web/web-1"), Ok(1));
        assert_eq!(resolve("2@0a1b"), Ok(2));
        assert_eq!(resolve("5"), Ok(5));
    }

    #[test]
    fn invalid_worker_names_explain_why() {
        let error = resolve("web/web-3").unwrap_err();
        assert_eq!(error.problem, Problem::NotFound);
        assert_eq!(error.message, "there is no worker `web/web-3`");
        assert_eq!(error.hint.as_deref(), Some("did you mean `web/web-1`?"));
        let error = resolve("nothing/like-it-at-all").unwrap_err();
        assert_eq!(error.hint.as_deref(), Some("list the workers with: dispatcher workers"));
        let error = resolve("9").unwrap_err();
        assert_eq!(
            (error.problem, error.message.as_str()),
            (Problem::NotFound, "there is no worker with id 9")
        );
        let error = resolve("2@ffff").unwrap_err();
        assert_eq!(error.problem, Problem::Conflict);
        assert!(error.message.contains("as instance 0a1b"), "{error}");
        let error = resolve("chat/same-name").unwrap_err();
        assert_eq!(error.problem, Problem::Ambiguous);
        assert_eq!(
            error.to_string(),
            "2 workers have the name chat/same-name\nhelp: use an id: 5, 6"
        );
        for text in ["web", "", "/", "web/", "/web-1", "-1", "2@", "@0a1b", "x@0a1b"] {
            assert_eq!(resolve(text).unwrap_err().problem, Problem::Invalid, "{text}");
        }
        assert!(!resolve("a\x1b[2J").unwrap_err().message.contains('\x1b'));
    }

    #[test]
    fn an_unknown_pool_gets_the_nearest_name() {
        let error = unknown_pool("wep", ["web", "chat"].into_iter());
        assert_eq!(error.to_string(), "there is no pool `wep`\nhelp: did you mean `web`?");
        let error = unknown_pool("elsewhere", ["web", "chat"].into_iter());
        assert_eq!(error.hint.as_deref(), Some("the pools are web, chat"));
    }
}
