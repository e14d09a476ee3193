//! The chaos test for any duration: `cargo run --release -p dispatcher --example chaos -- --minutes
//! 30`.
//!
//! The same program is also the dispatcher and the workers of the test, so nothing else must be
//! built.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "mod.rs"]
mod chaos;
mod hostile;
mod worker;

use std::process::ExitCode;
use std::time::Duration;

use chaos::{Options, Programs};
use clap::Parser;

/// Real clients, workers and dispatchers under random faults; then a check that every connection
/// was answered once, or lost for a known reason.
#[derive(Parser)]
struct Arguments {
    /// How long the faults last.
    #[arg(long, default_value_t = 1.0)]
    minutes: f64,
    /// Repeats the same faults, though at other moments of the clients' connections.
    #[arg(long)]
    seed: Option<u64>,
    /// Clients that connect at the same time.
    #[arg(long, default_value_t = 64)]
    clients: usize,
    /// Only SIGKILL for the dispatcher, as often as it can be started, and no other fault.
    #[arg(long)]
    only_dispatcher: bool,
}

fn main() -> ExitCode {
    match std::env::var("CHAOS_ROLE").as_deref() {
        Ok("dispatcher") => return dispatcher::cli::main(),
        Ok(role) => {
            worker::main(role);
            return ExitCode::SUCCESS;
        }
        Err(_) => {}
    }
    let arguments = Arguments::parse();
    let this = std::env::current_exe().unwrap();
    let options = Options {
        faults_for: Duration::from_secs_f64(arguments.minutes * 60.0),
        seed: arguments.seed.unwrap_or_else(test_support::chaos::any_seed),
        clients: arguments.clients,
        only_dispatcher: arguments.only_dispatcher,
        programs: Programs { dispatcher: this.clone(), worker: this },
    };
    if chaos::run(&options) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
