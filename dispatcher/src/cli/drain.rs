//! `dispatcher drain` and `dispatcher resume`: stop and restart new connections to workers.

use std::fmt::Write as _;
use std::time::Duration;

use clap::Args;
use clap_complete::engine::ArgValueCandidates;

use super::table::{clean, count};
use super::{AdminArgs, Exit, Failure, admin, complete, print, print_json, wait};
use crate::api::action::{Action, WorkerSummary, WorkersChanged};
use crate::api::command::{CommandError, Problem, WorkerRef};
use crate::api::status::HostDrainStatus;

pub(super) const DRAIN_EXAMPLES: &str = "\
Examples:
  dispatcher drain 3                             worker 3 gets no new connections
  dispatcher drain web/web-1 --deadline 30s      connections that remain after 30 s are ended
  dispatcher drain --pool web --wait             wait until its workers have no connections
  dispatcher drain --all --announce 5s --wait    empty this host: tell HAProxy first
  dispatcher resume web/web-1                    new connections again";

pub(super) const RESUME_EXAMPLES: &str = "\
Examples:
  dispatcher resume web/web-1
  dispatcher resume --pool web
  dispatcher resume --all --json";

/// Default timeouts of `--wait`: without a deadline, and after a deadline (workers need time to
/// close the ended connections).
const LONGEST_WAIT: Duration = Duration::from_secs(3600);
const AFTER_DEADLINE: Duration = Duration::from_secs(10);

// Selects workers. No doc comment: clap would use it as the description of the command.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(super) struct TargetArgs {
    /// The worker: its id, or POOL/NAME. ID@INSTANCE is refused after a restart of the dispatcher.
    #[arg(value_name = "WORKER", add = ArgValueCandidates::new(complete::workers))]
    worker: Option<String>,
    /// All workers of this pool.
    #[arg(long, value_name = "POOL", add = ArgValueCandidates::new(complete::pools))]
    pool: Option<String>,
    /// The whole host: all workers of all pools, and those that join later.
    #[arg(long)]
    all: bool,
}

impl TargetArgs {
    /// The path to which commands for these workers are posted. `command` is the command's name,
    /// for hints.
    fn path(&self, command: &str) -> Result<String, Failure> {
        if let Some(pool) = &self.pool {
            return Ok(format!("/v1/pools/{}", admin::segment(pool)));
        }
        match &self.worker {
            Some(worker) => {
                let name: WorkerRef = worker.parse().map_err(|error: CommandError| {
                    // A single word is probably the name of a pool.
                    let hint = format!(
                        "for every worker of a pool: dispatcher {command} --pool {worker}; for one of them: \
                         its id, or POOL/NAME (see: dispatcher workers)"
                    );
                    let is_word = !worker.is_empty() && !worker.contains('/');
                    usage(if is_word { error.hint(clean(&hint)) } else { error })
                })?;
                Ok(format!("/v1/workers/{}", admin::segment(&name.to_string())))
            }
            // The parser guarantees that `--all` is set.
            None => Ok("/v1/workers".to_owned()),
        }
    }
}

/// The failure for a wrong argument.
pub(super) fn usage(error: CommandError) -> Failure {
    Failure { refused: Some(error.clone()), ..Failure::new(Exit::Usage, error.to_string()) }
}

#[derive(Debug, Args)]
pub(super) struct DrainArgs {
    #[command(flatten)]
    target: TargetArgs,
    /// End the remaining connections after this long, such as 30s [default: never]
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    deadline: Option<Duration>,
    /// With --all: workers get connections for this long, while HAProxy's agent check and advice
    /// tell that the host drains [default: 0s]
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    announce: Option<Duration>,
    /// Wait until the workers have no connections left; progress goes to stderr.
    #[arg(long)]
    wait: bool,
    /// Stop waiting after this long, with exit code 75 [default: 10s after the deadline, or 1h]
    #[arg(long, value_name = "DURATION", requires = "wait", value_parser = humantime::parse_duration)]
    timeout: Option<Duration>,
    /// Print the answer as JSON.
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    admin: AdminArgs,
}

#[derive(Debug, Args)]
pub(super) struct ResumeArgs {
    #[command(flatten)]
    target: TargetArgs,
    /// Print the answer as JSON.
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    admin: AdminArgs,
}

pub(super) fn drain(arguments: &DrainArgs) -> Result<(), Failure> {
    if arguments.announce.is_some() && !arguments.target.all {
        let message = "only a drain of the whole host can be announced";
        let hint = "dispatcher drain --all --announce 5s";
        return Err(usage(CommandError::new(Problem::Invalid, message).hint(hint)));
    }
    let path = arguments.target.path("drain")?;
    let endpoint = admin::find(&arguments.admin)?;
    let action = match arguments.target.all {
        true => Action::drain_host(arguments.deadline, arguments.announce),
        false => Action::drain(arguments.deadline),
    };
    let answer: WorkersChanged = admin::post(&endpoint, &path, &action)?;
    show(&answer, arguments.json)?;
    if !arguments.wait {
        return Ok(());
    }
    let workers = answer.workers.iter().map(|worker| (worker.id, name_of(worker)));
    let default =
        arguments.deadline.map_or(LONGEST_WAIT, |deadline| deadline.saturating_add(AFTER_DEADLINE));
    let default = default.saturating_add(arguments.announce.unwrap_or_default());
    let timeout = arguments.timeout.unwrap_or(default);
    if arguments.target.all {
        return wait::host_drained(&endpoint, &answer.instance, timeout);
    }
    let drained = wait::Drained { workers: workers.collect(), instance: answer.instance };
    drained.wait(&endpoint, timeout)
}

pub(super) fn resume(arguments: &ResumeArgs) -> Result<(), Failure> {
    let path = arguments.target.path("resume")?;
    let endpoint = admin::find(&arguments.admin)?;
    show(&admin::post(&endpoint, &path, &Action::Resume {})?, arguments.json)
}

/// Prints the answer: as JSON, or a line for each worker.
fn show(answer: &WorkersChanged, json: bool) -> Result<(), Failure> {
    if json {
        return print_json(answer);
    }
    let host = answer.host.as_ref().map_or_else(String::new, |host| host_line(host) + "\n");
    print(&(host + &lines(&answer.workers, |_| String::new())))
}

/// A drain of the host in one line.
pub(super) fn host_line(host: &HostDrainStatus) -> String {
    let time = |ms: u64| humantime::format_duration(Duration::from_secs(ms.div_ceil(1_000)));
    let begins = match host.begins_in_ms {
        0 => String::new(),
        ms => format!(", begins in {}", time(ms)),
    };
    let deadline = host
        .deadline_in_ms
        .map_or_else(String::new, |ms| format!(", ends the remaining ones in {}", time(ms)));
    format!(
        "host: {}, {}{begins}{deadline}",
        clean(&host.state),
        count(host.connections, "connection")
    )
}

/// A line for each worker; `first` is the text before its state.
pub(super) fn lines(workers: &[WorkerSummary], first: impl Fn(&WorkerSummary) -> String) -> String {
    if workers.is_empty() {
        return "no workers\n".to_owned();
    }
    let mut text = String::new();
    for worker in workers {
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "worker {} ({}): {}{}, {}",
            worker.id,
            name_of(worker),
            first(worker),
            clean(&worker.state),
            count(worker.load, "connection")
        );
    }
    text
}

fn name_of(worker: &WorkerSummary) -> String {
    format!("{}/{}", clean(&worker.pool), clean(&worker.name))
}
