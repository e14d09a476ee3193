//! `dispatcher log-level`: shows or changes the log level of a running dispatcher.

use clap::Args;
use clap_complete::engine::ArgValueCandidates;

use super::status::clean;
use super::{AdminArgs, Failure, admin, complete, print, print_json};
use crate::api::log_level::{LogLevel, SetLogLevel};

pub(super) const EXAMPLES: &str = "\
Examples:
  dispatcher log-level                            show the level
  dispatcher log-level debug                      log more
  dispatcher log-level --json | jq -r .level

The level applies until it is changed, until the next reload, which restores log_level of the configuration (unless
DISPATCHER_LOG is set for the dispatcher), or until the dispatcher ends.";

#[derive(Debug, Args)]
pub(super) struct LogLevelArgs {
    /// The new level: off, error, warn, info, debug or trace [default: only show the level]
    #[arg(add = ArgValueCandidates::new(complete::levels))]
    level: Option<String>,
    /// Print the answer as JSON.
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    admin: AdminArgs,
}

pub(super) fn log_level(arguments: &LogLevelArgs) -> Result<(), Failure> {
    let endpoint = admin::find(&arguments.admin)?;
    let answer: LogLevel = match &arguments.level {
        Some(level) => {
            let body = SetLogLevel { level: level.clone() };
            admin::post(&endpoint, "/v1/log_level", &body)?
        }
        None => admin::parse(&admin::get(&endpoint, "/v1/log_level")?, &endpoint)?,
    };
    if arguments.json {
        return print_json(&answer);
    }
    let before = answer.previous.map(|level| format!(", {} before", clean(&level)));
    print(&format!("{}{}\n", clean(&answer.level), before.unwrap_or_default()))
}
