//! `dispatcher run`.

use std::path::Path;

use super::{Exit, Failure, check};
use crate::config::Config;

pub(super) fn run(path: &Path) -> Result<(), Failure> {
    let config = check::load(path)?;
    serve(config, |_| {})
}

/// Serves until told to stop. `ready` is called once, with the addresses the listeners are bound to, when clients and workers can
/// connect.
pub(super) fn serve(config: Config, ready: impl FnOnce(&[String])) -> Result<(), Failure> {
    crate::logger::init()
        .map_err(|error| Failure::new(Exit::OsErr, format!("the log thread: {error}")))?;
    // PLACEHOLDER: call the shell here, with `config` and `ready`, and map its errors to exit codes.
    drop((config, ready));
    let result = Err(Failure::new(
        Exit::Software,
        "serving is not part of this build yet",
    ));
    crate::logger::flush(std::time::Duration::from_secs(1));
    result
}
