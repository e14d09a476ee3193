//! The program `dispatch-directory`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use dispatch_directory::config::{Config, DEFAULT_FILE};

/// Knows which worker holds which client id, and gives workers direct links for messages.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The configuration file. Without it and without the default file, the defaults apply.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Only checks the configuration.
    #[arg(long)]
    check: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    env_logger::Builder::new()
        .filter_level(log::LevelFilter::Info)
        .parse_env("DISPATCHER_LOG")
        .init();
    let default = PathBuf::from(DEFAULT_FILE);
    let config = match arguments.config.or_else(|| default.exists().then_some(default)) {
        Some(path) => Config::load(&path),
        None => Config::parse(""),
    };
    let config = match config {
        Ok(config) => config,
        Err(error) => {
            log::error!("event=bad_configuration error={error}");
            return ExitCode::from(2);
        }
    };
    if arguments.check {
        return ExitCode::SUCCESS;
    }
    match dispatch_directory::run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!("event=directory_failed error={error}");
            ExitCode::FAILURE
        }
    }
}
