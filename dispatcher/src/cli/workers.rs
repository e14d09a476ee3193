//! `dispatcher workers`: who is there, one line each.

use clap::Args;
use clap_complete::engine::ArgValueCandidates;
use serde_json::Value;

use super::table::{Table, clean, width};
use super::{AdminArgs, Failure, admin, complete, print};

pub(super) const EXAMPLES: &str = "\
Examples:
  dispatcher workers
  dispatcher workers --pool web
  dispatcher workers --json | jq -r '.workers[] | select(.state == \"draining\") | .id'";

#[derive(Debug, Args)]
pub(super) struct WorkersArgs {
    /// Only those of this pool.
    #[arg(long, value_name = "POOL", add = ArgValueCandidates::new(complete::pools))]
    pool: Option<String>,
    /// As JSON.
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    admin: AdminArgs,
}

pub(super) fn workers(arguments: &WorkersArgs) -> Result<(), Failure> {
    let place = admin::find(&arguments.admin)?;
    let mut answer: Value = admin::parse(&admin::get(&place, "/v1/workers")?, &place)?;
    if let Some(pool) = &arguments.pool {
        // Asked for by name, so that a wrong one is answered with the nearest.
        admin::get(&place, &format!("/v1/pools/{}", admin::segment(pool)))?;
        if let Some(workers) = answer["workers"].as_array_mut() {
            workers.retain(|worker| worker["pool"] == pool.as_str());
        }
    }
    if arguments.json {
        return print(&format!("{answer}\n"));
    }
    let rows = answer["workers"].as_array().map_or(&[][..], Vec::as_slice);
    if rows.is_empty() {
        return print("no workers\n");
    }
    let head = ["WORKER", "STATE", "ID", "PID", "WEIGHT", "LOAD", "MAX", "CUSTODY"];
    let mut table = Table::new(&head, 2);
    for row in rows {
        let word = |key: &str| clean(row[key].as_str().unwrap_or("?"));
        table.row([
            format!("{}/{}", word("pool"), word("name")),
            word("state"),
            row["id"].to_string(),
            row["pid"].to_string(),
            row["weight"].to_string(),
            row["load"].to_string(),
            row["max_connections"].to_string(),
            row["custody"].to_string(),
        ]);
    }
    let mut text = String::new();
    table.show(&mut text, width());
    print(&text)
}
