//! `dispatcher demo`: runs without a configuration file, in a temporary directory.

use std::fmt::Write as _;
use std::path::Path;

use super::private::{Directory, quoted};
use super::{DemoArgs, Exit, Failure, print, run};
use crate::config::Config;

pub(super) fn demo(arguments: &DemoArgs) -> Result<(), Failure> {
    let directory = Directory::new("demo").map_err(|error| {
        Failure::new(Exit::CantCreate, format!("the temporary directory: {error}"))
    })?;
    let admin = match &arguments.admin {
        Some(path) => path.clone(),
        None => directory.path.join("admin.sock"),
    };
    let program = std::env::current_exe()
        .map_err(|error| Failure::new(Exit::OsErr, format!("the path of this program: {error}")))?;
    let program = program.to_str().map(str::to_owned).ok_or_else(|| {
        Failure::new(
            Exit::OsErr,
            format!("the path of this program is not UTF-8: {}", program.display()),
        )
    })?;
    let relay = directory.path.join("relay.sock");
    let config = Config::demo(
        arguments.listen,
        arguments.workers,
        admin.clone(),
        directory.path.join("dispatch.sock"),
        relay.clone(),
        vec![program.clone(), "demo-worker".to_owned(), std::process::id().to_string()],
    );
    let workers = arguments.workers;
    run::serve(config, |addresses| {
        // The demo serves even if stdout is closed.
        let _ = print(&what_to_try(&program, addresses, workers, &admin, &relay));
    })
}

fn what_to_try(
    program: &str,
    addresses: &[String],
    workers: u32,
    admin: &Path,
    relay: &Path,
) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    for address in addresses {
        let _ = writeln!(
            text,
            "{} http://{address}/   (Ctrl-C stops everything)\n\n\
             Try, in another terminal:\n  \
             curl http://{address}/",
            if workers == 1 {
                "1 worker serves".to_owned()
            } else {
                format!("{workers} workers serve")
            }
        );
    }
    let admin = admin.display().to_string();
    let relay = relay.display().to_string();
    let (program, admin) = (quoted(program), quoted(&admin));
    for command in ["status", "top", "drain web/web-1"] {
        let _ = writeln!(text, "  {program} {command} --admin {admin}");
    }
    let _ = writeln!(text, "  {program} relay stats --socket {}", quoted(&relay));
    text
}
