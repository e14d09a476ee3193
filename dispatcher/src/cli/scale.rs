//! `dispatcher scale`: changes the number of processes that the dispatcher runs for a pool.

use clap::Args;
use clap_complete::engine::ArgValueCandidates;

use super::table::{clean, count};
use super::{AdminArgs, Failure, admin, complete, print, print_json};
use crate::api::action::{Action, PoolScaled};
use crate::api::command::ProcessCount;

pub(super) const EXAMPLES: &str = "\
Examples:
  dispatcher scale jobs 8       8 processes
  dispatcher scale jobs +1      one more
  dispatcher scale jobs -1      one fewer: the last process is drained and ends after its last connection

The number applies until the next reload or restart, which restores `processes` of the configuration.";

#[derive(Debug, Args)]
pub(super) struct ScaleArgs {
    /// The pool.
    #[arg(add = ArgValueCandidates::new(complete::pools))]
    pool: String,
    /// The number of processes, 1 to 1024; or a change, +N or -N.
    #[arg(value_name = "N", allow_hyphen_values = true, value_parser = parse)]
    processes: ProcessCount,
    /// Print the answer as JSON.
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    admin: AdminArgs,
}

fn parse(text: &str) -> Result<ProcessCount, String> {
    let wrong = |_| "a whole number such as 8, +1 or -1".to_owned();
    if text.starts_with(['+', '-']) {
        text.parse().map(ProcessCount::ChangeBy).map_err(wrong)
    } else {
        text.parse().map(ProcessCount::Exactly).map_err(wrong)
    }
}

pub(super) fn scale(arguments: &ScaleArgs) -> Result<(), Failure> {
    let endpoint = admin::find(&arguments.admin)?;
    let path = format!("/v1/pools/{}", admin::segment(&arguments.pool));
    let answer: PoolScaled = admin::post(&endpoint, &path, &Action::scale(arguments.processes))?;
    if arguments.json {
        return print_json(&answer);
    }
    print(&format!(
        "pool {}: {} wanted, {} before: {} active, {} starting, {} leaving\n",
        clean(&arguments.pool),
        count(answer.processes.into(), "process"),
        answer.before,
        answer.active,
        answer.starting,
        answer.leaving
    ))
}
