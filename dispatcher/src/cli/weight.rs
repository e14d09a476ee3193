//! `dispatcher weight`: shows or sets the weight of a worker, its share of new connections.

use clap::Args;
use clap_complete::engine::ArgValueCandidates;

use super::{AdminArgs, Failure, admin, complete, drain, print, print_json};
use crate::api::action::{Action, WorkerEntry, WorkerList, WorkerSummary, WorkersChanged};
use crate::api::command::WorkerRef;

pub(super) const EXAMPLES: &str = "\
Examples:
  dispatcher weight web/web-1        show the weight
  dispatcher weight 3 10             worker 3 gets ten times the connections of a worker with weight 1
  dispatcher weight web/web-1 1      back to the default

The weight applies until the worker leaves. To stop new connections: dispatcher drain";

#[derive(Debug, Args)]
pub(super) struct WeightArgs {
    /// The worker: its id, or POOL/NAME.
    #[arg(add = ArgValueCandidates::new(complete::workers))]
    worker: String,
    /// The new weight: 1 to 65535 [default: only show the weight]
    #[arg(value_name = "N", value_parser = parse)]
    weight: Option<u16>,
    /// Print the answer as JSON.
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    admin: AdminArgs,
}

fn parse(text: &str) -> Result<u16, String> {
    match text.parse() {
        Ok(0) => {
            Err("a weight is at least 1; to stop new connections, drain the worker".to_owned())
        }
        Ok(weight) => Ok(weight),
        Err(_) => Err("a weight is a whole number from 1 to 65535".to_owned()),
    }
}

pub(super) fn weight(arguments: &WeightArgs) -> Result<(), Failure> {
    let worker: WorkerRef = arguments.worker.parse().map_err(drain::usage)?;
    let endpoint = admin::find(&arguments.admin)?;
    let path = format!("/v1/workers/{}", admin::segment(&worker.to_string()));
    let workers = match arguments.weight {
        Some(weight) => {
            let action = Action::Weight { weight: weight.into() };
            let answer: WorkersChanged = admin::post(&endpoint, &path, &action)?;
            if arguments.json {
                return print_json(&answer);
            }
            answer.workers
        }
        None => {
            let worker: WorkerEntry = admin::parse(&admin::get(&endpoint, &path)?, &endpoint)?;
            if arguments.json {
                return print_json(&WorkerList { instance: None, workers: vec![worker] });
            }
            vec![worker.summary()]
        }
    };
    let weight = |worker: &WorkerSummary| format!("weight {}, ", worker.weight);
    print(&drain::lines(&workers, weight))
}
