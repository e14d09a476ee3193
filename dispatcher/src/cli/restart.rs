//! `dispatcher restart`: replaces the processes of a pool, or of one worker.

use clap::Args;
use clap_complete::engine::ArgValueCandidates;

use super::admin::AdminEndpoint;
use super::table::{clean, count};
use super::{AdminArgs, Failure, admin, complete, print, print_json};
use crate::api::action::{Action, PoolRestarted};

pub(super) const EXAMPLES: &str = "\
Examples:
  dispatcher restart web          replace every process of pool web, max_surge at a time
  dispatcher restart web/web-1    replace the process of this worker

A new process starts first. Once its worker has joined, the old worker is drained: it gets no new
connections, and its process ends with the last one (see drain_timeout). A crash loop of the pool
ends: its processes are started at once.";

#[derive(Debug, Args)]
pub(super) struct RestartArgs {
    /// The pool, or a worker: its id, or POOL/NAME.
    #[arg(value_name = "POOL|WORKER", add = ArgValueCandidates::new(complete::pools_and_workers))]
    target: String,
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
    let answer: PoolRestarted = admin::post(&endpoint, &path, &Action::Restart {})?;
    if arguments.json {
        return print_json(&answer);
    }
    print(&summary(&answer))
}

/// Replaces the processes of a pool.
pub(super) fn pool(endpoint: &AdminEndpoint, pool: &str) -> Result<PoolRestarted, Failure> {
    admin::post(endpoint, &format!("/v1/pools/{}", admin::segment(pool)), &Action::Restart {})
}

pub(super) fn summary(answer: &PoolRestarted) -> String {
    format!(
        "pool {}: {} replaced, {} at a time\n",
        clean(&answer.pool),
        count(answer.processes.into(), "process"),
        answer.at_once
    )
}
