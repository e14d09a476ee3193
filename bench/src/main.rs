//! Measures the dispatcher and its alternatives: each gets the same load in turn; ratios are taken
//! within one run only.
//!
//! The same binary is the harness, every worker, the load generator and the smallest possible
//! dispatcher: these are hidden commands, so all contenders share one server and one client.

mod bare;
mod calls;
mod cgroup;
mod cli;
mod contender;
mod load;
mod machine;
mod namespace;
mod report;
mod socket;
mod stats;
mod svg;
mod work;
mod worker;

use std::process::ExitCode;

fn main() -> ExitCode {
    match cli::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}
