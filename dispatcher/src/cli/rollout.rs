//! `dispatcher rollout`: the deploys of a pool: how far the last one is, and back to the former
//! command.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use clap_complete::engine::ArgValueCandidates;
use serde::Serialize;

use super::admin::AdminEndpoint;
use super::table::{clean, count};
use super::wait::Progress;
use super::{AdminArgs, Exit, Failure, admin, complete, print, print_json};
use crate::api::action::{Action, PoolRestarted};
use crate::api::status::{ProcessesStatus, RollStatus, Status};

pub(super) const EXAMPLES: &str = "\
Examples:
  dispatcher rollout status web           the generation of pool web, and how its last restart went
  dispatcher rollout status web --wait    wait for its end; exit code 70 if it stopped
  dispatcher rollout undo web             return to the command before the last restart

Exit codes: 0 the roll is done, or goes on; 65 another roll has begun meanwhile; 70 it stopped, because a new process did
not become ready, also if it was undone then; 75 it was not over within --timeout, the pool is in a crash loop, or the
dispatcher was started again and does not know it.";

/// The default of `--timeout`.
pub(super) const TIMEOUT: Duration = Duration::from_secs(3600);

/// Interval between two requests.
const PACE: Duration = Duration::from_millis(200);

#[derive(Debug, Args)]
pub(super) struct RolloutArgs {
    #[command(subcommand)]
    command: RolloutCommand,
}

#[derive(Debug, Subcommand)]
enum RolloutCommand {
    /// Show the generation of a pool, and how its last restart went.
    Status(PoolArgs),
    /// Return to the command before the last restart: processes that have another one are replaced.
    Undo(PoolArgs),
}

#[derive(Debug, Args)]
struct PoolArgs {
    /// The pool.
    #[arg(value_name = "POOL", add = ArgValueCandidates::new(complete::pools))]
    pool: String,
    /// Wait until the roll is done or has stopped.
    #[arg(long)]
    wait: bool,
    /// Stop waiting after this long, with exit code 75 [default: 1h]
    #[arg(long, value_name = "DURATION", requires = "wait", value_parser = humantime::parse_duration)]
    timeout: Option<Duration>,
    /// Print the answer as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    admin: AdminArgs,
}

impl RolloutArgs {
    /// Whether the output is JSON.
    pub(super) fn json(&self) -> bool {
        match &self.command {
            RolloutCommand::Status(arguments) | RolloutCommand::Undo(arguments) => arguments.json,
        }
    }
}

pub(super) fn rollout(arguments: &RolloutArgs) -> Result<(), Failure> {
    match &arguments.command {
        RolloutCommand::Status(arguments) => status(arguments),
        RolloutCommand::Undo(arguments) => undo(arguments),
    }
}

fn status(arguments: &PoolArgs) -> Result<(), Failure> {
    let endpoint = admin::find(&arguments.admin)?;
    let failed = match arguments.wait {
        true => {
            let timeout = arguments.timeout.unwrap_or(TIMEOUT);
            until_over(&endpoint, &arguments.pool, None, timeout).err()
        }
        false => None,
    };
    let (name, processes) = fetch(&endpoint, &arguments.pool)?;
    match arguments.json {
        true => print_json(&PoolRollout { pool: &name, processes: &processes })?,
        false => print(&report(&name, &processes))?,
    }
    if let Some(failed) = failed.filter(|failed| failed.exit != Exit::Software) {
        return Err(failed);
    }
    match &processes.roll {
        // A roll that was undone by itself keeps the reason; an operator's `undo` has none.
        Some(roll) if roll.state == "stopped" || (roll.undo && roll.reason.is_some()) => {
            Err(Failure::new(Exit::Software, headline(&name, roll)))
        }
        _ => Ok(()),
    }
}

fn undo(arguments: &PoolArgs) -> Result<(), Failure> {
    let endpoint = admin::find(&arguments.admin)?;
    let path = format!("/v1/pools/{}", admin::segment(&arguments.pool));
    let answer: PoolRestarted = admin::post(&endpoint, &path, &Action::Undo {})?;
    match arguments.json {
        true => print_json(&answer)?,
        false => print(&format!(
            "pool {}: back to generation {}: {} to replace, {} at a time\n",
            clean(&answer.pool),
            answer.generation,
            count(answer.processes.into(), "process"),
            answer.at_once
        ))?,
    }
    if arguments.wait {
        let timeout = arguments.timeout.unwrap_or(TIMEOUT);
        until_over(&endpoint, &answer.pool, Some(&answer), timeout)?;
    }
    Ok(())
}

/// `--json`.
#[derive(Serialize)]
struct PoolRollout<'a> {
    pool: &'a str,
    #[serde(flatten)]
    processes: &'a ProcessesStatus,
}

/// The processes of a pool.
fn fetch(endpoint: &AdminEndpoint, pool: &str) -> Result<(String, ProcessesStatus), Failure> {
    let status: Status = admin::parse(&admin::get(endpoint, "/v1/status")?, endpoint)?;
    find(status, pool)
}

fn find(status: Status, pool: &str) -> Result<(String, ProcessesStatus), Failure> {
    let names = status.pools.iter().map(|pool| pool.name.as_str());
    let unknown = crate::api::command::unknown_pool(pool, names);
    let Some(found) = status.pools.into_iter().find(|known| known.name == pool) else {
        return Err(Failure::new(Exit::NoInput, unknown.to_string()));
    };
    let Some(processes) = found.processes else {
        let message = format!(
            "pool {} starts no processes\n\
             help: its workers are services of their own; see [pool.NAME.spawn]",
            clean(pool)
        );
        return Err(Failure::new(Exit::DataErr, message));
    };
    Ok((found.name, processes))
}

/// Waits until the last roll of a pool, or the one that `begun` names, is over.
///
/// # Errors
///
/// Exit code 70 when it stopped, 75 after `timeout` or when the dispatcher was started again and
/// has forgotten it.
pub(super) fn until_over(
    endpoint: &AdminEndpoint,
    pool: &str,
    begun: Option<&PoolRestarted>,
    timeout: Duration,
) -> Result<(), Failure> {
    let mut progress = Progress::default();
    let outcome = watch(endpoint, pool, begun, timeout, &mut progress);
    progress.end();
    outcome
}

fn watch(
    endpoint: &AdminEndpoint,
    pool: &str,
    begun: Option<&PoolRestarted>,
    timeout: Duration,
    progress: &mut Progress,
) -> Result<(), Failure> {
    let deadline = Instant::now().checked_add(timeout);
    let name = clean(pool);
    // The roll may return to the generation before it, by itself.
    let mut failed: Option<String> = None;
    loop {
        let late = deadline.is_some_and(|deadline| Instant::now() >= deadline);
        let processes = match fetch(endpoint, pool) {
            Ok((_, processes)) => processes,
            // The dispatcher is busy, or is being started again: a roll goes on then.
            Err(failure)
                if matches!(failure.exit, Exit::TempFail | Exit::Unavailable | Exit::Protocol)
                    && !late =>
            {
                std::thread::sleep(PACE);
                continue;
            }
            Err(failure) => return Err(failure),
        };
        let Some(roll) = &processes.roll else {
            return match begun {
                None => Ok(()),
                Some(begun) => {
                    let message = format!(
                        "the dispatcher was started again and does not know the roll to generation \
                         {} of pool {name}: its processes were started from the configuration\n\
                         help: see `dispatcher status`",
                        begun.generation
                    );
                    Err(Failure::new(Exit::TempFail, message))
                }
            };
        };
        if let Some(begun) = begun
            && roll.generation != begun.generation
            && !(roll.undo && roll.former == begun.generation)
        {
            let message = format!(
                "another roll of pool {name} has begun meanwhile, to generation {}",
                roll.generation
            );
            return Err(Failure::new(Exit::DataErr, message));
        }
        if roll.state == "stopped" {
            return Err(Failure::new(Exit::Software, explanation(&name, roll)));
        }
        if let Some(begun) = begun
            && roll.undo
            && roll.generation != begun.generation
        {
            failed = Some(explanation(&name, roll));
        }
        if roll.state == "done" {
            return match failed {
                Some(message) => Err(Failure::new(Exit::Software, message)),
                None => Ok(()),
            };
        }
        let all = roll.replaced + roll.remaining;
        let what = match roll.undo {
            true => format!("back to generation {}", roll.generation),
            false => format!("generation {}", roll.generation),
        };
        let state = format!("{what}: {} of {all} replaced", roll.replaced);
        let starting = match processes.starting {
            0 => String::new(),
            starting => format!(", {starting} starting"),
        };
        progress.say(&format!("pool {name}: {state}{starting}"));
        if processes.crash_loop {
            let message = format!(
                "pool {name}: its processes do not start; {state}\n\
                 help: the log has their output and exit status (event=process_ended)"
            );
            return Err(Failure::new(Exit::TempFail, message));
        }
        if late {
            let waited = humantime::format_duration(timeout);
            let message = format!("pool {name}: {state} after {waited}; the roll goes on");
            return Err(Failure::new(Exit::TempFail, message));
        }
        std::thread::sleep(PACE);
    }
}

/// What has happened, in one line.
fn headline(pool: &str, roll: &RollStatus) -> String {
    let reason = roll.reason.as_deref().unwrap_or("the reason is not known");
    let (what, generation) = match (roll.undo, roll.state.as_str()) {
        (true, "stopped") => ("the return", roll.generation),
        (true, _) => ("the roll", roll.former),
        (false, _) => ("the roll", roll.generation),
    };
    format!("pool {}: {what} to generation {generation} stopped: {}", clean(pool), clean(reason))
}

/// Why a roll stopped, with the last output of the process.
fn explanation(pool: &str, roll: &RollStatus) -> String {
    let mut text = headline(pool, roll);
    let all = roll.replaced + roll.remaining;
    let undone = match (roll.undo, roll.state.as_str()) {
        (true, "stopped") => "",
        (true, "done") => "; it was undone",
        (true, _) => "; it is being undone",
        (false, _) => "; the other processes serve on",
    };
    let _ = match roll.undo {
        false => write!(text, "\n{} replaced{undone}", count(roll.replaced.into(), "process")),
        true => write!(text, "\n{} of {all} returned{undone}", roll.replaced),
    };
    if roll.output.is_empty() {
        text.push_str(
            "\nno output of the process is known: it wrote nothing, or output is not \"log\"",
        );
    } else {
        text.push_str("\nthe last lines of its output:");
        for line in &roll.output {
            let _ = write!(text, "\n  {}", clean(line));
        }
    }
    if !roll.undo {
        let pool = clean(pool);
        let _ = write!(
            text,
            "\nhelp: correct it and restart again, or: dispatcher rollout undo {pool}"
        );
    }
    text
}

/// `rollout status`.
fn report(pool: &str, processes: &ProcessesStatus) -> String {
    let mut text = String::new();
    let pool = clean(pool);
    let _ = writeln!(text, "pool {pool}: generation {}", processes.generation);
    match &processes.roll {
        None => text.push_str("not restarted since the dispatcher was started\n"),
        Some(roll) => {
            let what = match (roll.undo, roll.process) {
                (true, _) => format!("return from {} to {}", roll.former, roll.generation),
                (false, Some(process)) => format!(
                    "roll of process {process} from generation {} to {}",
                    roll.former, roll.generation
                ),
                (false, None) => format!("roll from {} to {}", roll.former, roll.generation),
            };
            let ago = humantime::format_duration(Duration::from_secs(roll.seconds));
            let _ = writeln!(text, "last {what}: {}, begun {ago} ago", roll.state);
            let _ =
                writeln!(text, "replaced: {} of {}", roll.replaced, roll.replaced + roll.remaining);
            let _ = writeln!(text, "command: {}", shown(&roll.command));
            if roll.former_command != roll.command {
                let _ = writeln!(text, "former command: {}", shown(&roll.former_command));
            }
            if let Some(reason) = &roll.reason {
                let _ = writeln!(text, "stopped: {}", clean(reason));
                for line in &roll.output {
                    let _ = writeln!(text, "  {}", clean(line));
                }
            }
        }
    }
    if processes.restart_needed {
        let _ = writeln!(
            text,
            "the configuration has other settings: dispatcher restart {pool} applies them"
        );
    }
    for leaving in &processes.leaving_generations {
        let _ = writeln!(
            text,
            "leaving: generation {}, {} with {}",
            leaving.generation,
            count(leaving.processes.into(), "worker"),
            count(leaving.connections, "connection")
        );
    }
    text
}

fn shown(command: &[String]) -> String {
    match command {
        [] => "not known".to_owned(),
        words => clean(&words.join(" ")),
    }
}
