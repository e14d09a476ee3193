//! `dispatcher run`: serves with a configuration file.

use std::io::ErrorKind;

use super::{Exit, Failure, RunArgs, check, print_error};
use crate::admin;
use crate::background::service_manager::unit::Unit;
use crate::config::Config;
use crate::event_loop::{self, RunError};
use crate::mailbox::StartSideThread;

pub(super) fn run(arguments: &RunArgs) -> Result<(), Failure> {
    let path = arguments.config.as_path();
    let config = check::load(path)?;
    if let Some(unit) = Unit::own() {
        match check::unit_mistake(&unit, &config) {
            Ok(None) => {}
            Ok(Some(mistake)) => return Err(mistake.in_file(path)),
            // systemd started this process, so it is only busy. The configuration may be right.
            Err(error) => print_error(&format!("warning: the unit {unit}: {error}")),
        }
    }
    match arguments.take_over {
        true => serve_with(config, event_loop::run_taking_over, |_| {}),
        false => serve(config, |_| {}),
    }
}

/// Serves until a stop is requested. `ready` is called once with the bound addresses of the
/// listeners, when clients and workers can connect.
pub(super) fn serve<F: FnOnce(&[String])>(config: Config, ready: F) -> Result<(), Failure> {
    serve_with(config, event_loop::run, ready)
}

fn serve_with<F: FnOnce(&[String])>(
    config: Config,
    run: fn(Config, StartSideThread, F) -> Result<(), RunError>,
    ready: F,
) -> Result<(), Failure> {
    crate::background::logger::init(config.limits.log_level)
        .map_err(|error| Failure::new(Exit::OsErr, format!("the log thread: {error}")))?;
    let result = run(config, admin::start, ready)
        .map_err(|error| Failure::new(exit_for(&error), error.to_string()));
    crate::background::logger::flush(std::time::Duration::from_secs(1));
    result
}

fn exit_for(error: &RunError) -> Exit {
    match error {
        RunError::InUse { .. } | RunError::TakeOver(_) | RunError::Steer { .. } => {
            Exit::Unavailable
        }
        RunError::Bind { error, .. } | RunError::Lock { error, .. }
            if error.kind() == ErrorKind::PermissionDenied =>
        {
            Exit::NoPermission
        }
        RunError::NotASocket(_) | RunError::Bind { .. } | RunError::Lock { .. } => Exit::CantCreate,
        RunError::Inherited(_) => Exit::Config,
        RunError::System { .. } => Exit::OsErr,
    }
}
