//! Measures the dispatcher beside its alternatives: the same load at each in turn, ratios within one run only.
//!
//! The same binary is the harness, every worker, the load generator and the smallest possible dispatcher: those
//! are hidden commands, so that all contenders share one serving code and one client code.

mod bare;
mod cli;
mod contender;
mod load;
mod machine;
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
