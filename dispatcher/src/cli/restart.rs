//! `dispatcher restart`: replaces the processes of a pool, or of one worker.

use std::time::Duration;

use clap::Args;
use clap_complete::engine::ArgValueCandidates;

use super::admin::AdminEndpoint;
use super::table::{clean, count};
use super::{AdminArgs, Failure, admin, complete, print, print_json, rollout};
use crate::api::action::{Action, PoolRestarted};

pub(super) const EXAMPLES: &str = "\
Examples:
  dispatcher restart web          replace every process of pool web, max_surge at a time
  dispatcher restart web/web-1    replace the process of this worker
  dispatcher restart web --wait   return when all are replaced; exit code 70 if the roll stopped
  dispatcher restart web --end-oldest   end the connections of the oldest former generation first

A new process starts first. Once it is ready (see ready_check and min_ready), the old worker is drained: it gets no new
connections, and its process ends with the last one (see drain_timeout). At the first new process that does not become
ready the roll stops, and the old ones serve on: see `dispatcher rollout`. A crash loop of the pool ends: its processes
are started at once.";

#[derive(Debug, Args)]
pub(super) struct RestartArgs {
    /// The pool, or a worker: its id, or POOL/NAME.
    #[arg(value_name = "POOL|WORKER", add = ArgValueCandidates::new(complete::pools_and_workers))]
    target: String,
    /// Wait until all of them are replaced: the new processes get connections, and the old ones get
    /// no more.
    #[arg(long)]
    wait: bool,
    /// Stop waiting after this long, with exit code 75 [default: 1h]
    #[arg(long, value_name = "DURATION", requires = "wait", value_parser = humantime::parse_duration)]
    timeout: Option<Duration>,
    /// If max_leaving_generations former generations still have connections, end those of the
    /// oldest.
    #[arg(long)]
    end_oldest: bool,
    /// Print the answer as JSON.
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    admin: AdminArgs,
}

pub(super) fn restart(arguments: &RestartArgs) -> Result<(), Failure> {
    let target = &arguments.target;
    // A pool has no slash in its name.
    let is_worker = target.contains('/') || target.bytes().all(|byte| byte.is_ascii_digit());
    let kind = if is_worker { "workers" } else { "pools" };
    let endpoint = admin::find(&arguments.admin)?;
    let path = format!("/v1/{kind}/{}", admin::segment(target));
    let answer: PoolRestarted =
        admin::post(&endpoint, &path, &Action::restart(arguments.end_oldest))?;
    match arguments.json {
        true => print_json(&answer)?,
        false => print(&summary(&answer))?,
    }
    if arguments.wait {
        let timeout = arguments.timeout.unwrap_or(rollout::TIMEOUT);
        rollout::until_over(&endpoint, &answer.pool, Some(&answer), timeout)?;
    }
    Ok(())
}

/// Replaces the processes of a pool.
pub(super) fn pool(endpoint: &AdminEndpoint, pool: &str) -> Result<PoolRestarted, Failure> {
    admin::post(endpoint, &format!("/v1/pools/{}", admin::segment(pool)), &Action::restart(false))
}

pub(super) fn summary(answer: &PoolRestarted) -> String {
    format!(
        "pool {}: generation {}: {} to replace, {} at a time\n",
        clean(&answer.pool),
        answer.generation,
        count(answer.processes.into(), "process"),
        answer.at_once
    )
}
