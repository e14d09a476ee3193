//! `dispatcher weight`: a worker's share of new connections: which it is, or another from now on.

use clap::Args;
use clap_complete::engine::ArgValueCandidates;
use serde_json::{Value, json};

use super::{AdminArgs, Failure, admin, complete, drain};
use crate::api::command::WorkerRef;

pub(super) const EXAMPLES: &str = "\
Examples:
  dispatcher weight web/web-1        which weight it has
  dispatcher weight 3 10             worker 3 gets ten times what one with weight 1 gets
  dispatcher weight web/web-1 1      back to what it was

The weight is the worker's until it leaves. To give it nothing at all: dispatcher drain";

#[derive(Debug, Args)]
pub(super) struct WeightArgs {
    /// The worker: its id, or POOL/NAME.
    #[arg(add = ArgValueCandidates::new(complete::workers))]
    worker: String,
    /// Its weight from now on: 1 to 65535. Without it the weight is shown.
    #[arg(value_name = "N", value_parser = parse)]
    weight: Option<u16>,
    /// The answer as JSON.
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    admin: AdminArgs,
}

fn parse(text: &str) -> Result<u16, String> {
    match text.parse() {
        Ok(0) => Err("a weight is at least 1; to give a worker nothing, drain it".to_owned()),
        Ok(weight) => Ok(weight),
        Err(_) => Err("a weight is a whole number from 1 to 65535".to_owned()),
    }
}

pub(super) fn weight(arguments: &WeightArgs) -> Result<(), Failure> {
    let worker: WorkerRef = arguments.worker.parse().map_err(drain::usage)?;
    let place = admin::find(&arguments.admin)?;
    let path = format!("/v1/workers/{}", admin::segment(&worker.to_string()));
    let answer = match arguments.weight {
        Some(weight) => {
            admin::post(&place, &path, &json!({ "action": "weight", "weight": weight }))?
        }
        None => {
            let worker: Value = admin::parse(&admin::get(&place, &path)?, &place)?;
            json!({ "workers": [worker] })
        }
    };
    drain::show_with(&answer, arguments.json, |worker| format!("weight {}, ", worker["weight"]))
}
