//! The chaos test of steered pools for any duration: `cargo run --release -p dispatcher --example
//! steer_chaos -- --minutes 60`. Needs root.
//!
//! The same program is also the dispatcher and the servers of the test, so nothing else must be
//! built.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "mod.rs"]
mod chaos;
mod server;

use std::process::ExitCode;
use std::time::Duration;

use chaos::{Options, Programs};
use clap::Parser;

/// Real clients, unmodified servers and dispatchers in steer mode under random faults; then a
/// comparison with the kernel's list of sockets, and a check that every connection was answered, or
/// lost for a known reason.
#[derive(Parser)]
struct Arguments {
    /// How long the faults last.
    #[arg(long, default_value_t = 1.0)]
    minutes: f64,
    /// Repeats the same faults, though at other moments of the clients' connections.
    #[arg(long)]
    seed: Option<u64>,
    /// Clients that connect at the same time.
    #[arg(long, default_value_t = 48)]
    clients: usize,
}

fn main() -> ExitCode {
    match std::env::var("CHAOS_ROLE").as_deref() {
        Ok("dispatcher") => return dispatcher::cli::main(),
        Ok(_) => {
            server::main();
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
        programs: Programs { dispatcher: this.clone(), server: this },
    };
    if chaos::run(&options) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
