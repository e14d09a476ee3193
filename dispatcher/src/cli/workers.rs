//! `dispatcher workers`: lists workers, one per line.

use clap::Args;
use clap_complete::engine::ArgValueCandidates;

use super::table::{Table, clean, width};
use super::{AdminArgs, Failure, admin, complete, print, print_json};
use crate::api::action::WorkerList;

pub(super) const EXAMPLES: &str = "\
Examples:
  dispatcher workers
  dispatcher workers --pool web
  dispatcher workers --json | jq -r '.workers[] | select(.state == \"draining\") | .id'";

#[derive(Debug, Args)]
pub(super) struct WorkersArgs {
    /// List only the workers of this pool.
    #[arg(long, value_name = "POOL", add = ArgValueCandidates::new(complete::pools))]
    pool: Option<String>,
    /// Print JSON.
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    admin: AdminArgs,
}

pub(super) fn workers(arguments: &WorkersArgs) -> Result<(), Failure> {
    let endpoint = admin::find(&arguments.admin)?;
    let mut answer: WorkerList = admin::parse(&admin::get(&endpoint, "/v1/workers")?, &endpoint)?;
    if let Some(pool) = &arguments.pool {
        // This request fails for an unknown pool, with the nearest name as a hint.
        admin::get(&endpoint, &format!("/v1/pools/{}", admin::segment(pool)))?;
        answer.workers.retain(|worker| worker.pool == *pool);
    }
    if arguments.json {
        return print_json(&answer);
    }
    if answer.workers.is_empty() {
        return print("no workers\n");
    }
    let head = ["WORKER", "STATE", "ID", "PID", "WEIGHT", "LOAD", "MAX", "INFLIGHT"];
    let mut table = Table::new(&head, 2);
    for worker in &answer.workers {
        let status = &worker.status;
        table.row([
            format!("{}/{}", clean(&worker.pool), clean(&status.name)),
            clean(&status.shown_kind()),
            status.id.to_string(),
            status.shown_pid(),
            status.weight.to_string(),
            status.load.to_string(),
            status.max_connections.to_string(),
            status.in_flight.to_string(),
        ]);
    }
    let mut text = String::new();
    table.show(&mut text, width());
    print(&text)
}
