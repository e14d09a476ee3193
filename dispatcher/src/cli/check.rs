//! `dispatcher check`: validates a configuration file.

use std::fmt::Write as _;
use std::path::Path;

use serde::Serialize;

use super::{CheckArgs, Exit, Failure, print, print_error, print_json};
use crate::config::{Config, ConfigError, DEFAULT_FILE, Diagnostic, UnixSource};

pub(super) fn check(arguments: &CheckArgs) -> Result<(), Failure> {
    let given = arguments.file.as_deref().or(arguments.config.as_deref());
    let path = given.unwrap_or(Path::new(DEFAULT_FILE));
    if arguments.json {
        return check_for_programs(path);
    }
    let config = load(path)?;
    print(&format!("{}: ok\n{}", path.display(), summary(&config)))
}

/// What `check --json` prints.
#[derive(Serialize)]
struct Report<'a> {
    file: String,
    ok: bool,
    /// The first mistake.
    mistake: Option<&'a Finding<'a>>,
    mistakes: &'a [Finding<'a>],
    warnings: Vec<Finding<'a>>,
}

/// A mistake or a warning.
#[derive(Serialize)]
#[serde(untagged)]
enum Finding<'a> {
    /// At a position in the file.
    Placed { line: usize, column: usize, width: usize, message: &'a str, help: Option<&'a str> },
    /// The file cannot be read.
    Unreadable { message: String },
}

impl<'a> Finding<'a> {
    fn at(found: &'a Diagnostic) -> Finding<'a> {
        Finding::Placed {
            line: found.line,
            column: found.column,
            width: found.width,
            message: &found.message,
            help: found.help.as_deref(),
        }
    }
}

/// Prints a [`Report`]. The exit code is the same as without `--json`.
fn check_for_programs(path: &Path) -> Result<(), Failure> {
    let result = Config::load(path);
    let (mistakes, warnings) = match &result {
        Ok(config) => (Vec::new(), &config.warnings[..]),
        Err(error) => {
            let found: Vec<Finding> = error.diagnostics().iter().map(Finding::at).collect();
            let unreadable = || vec![Finding::Unreadable { message: error.to_string() }];
            (if found.is_empty() { unreadable() } else { found }, error.warnings())
        }
    };
    print_json(&Report {
        file: path.display().to_string(),
        ok: result.is_ok(),
        mistake: mistakes.first(),
        mistakes: &mistakes,
        warnings: warnings.iter().map(|warning| Finding::at(&warning.0)).collect(),
    })?;
    result.map(drop).map_err(|error| Failure::new(Exit::Config, error.to_string()))
}

/// Loads a configuration and prints its warnings.
pub(super) fn load(path: &Path) -> Result<Config, Failure> {
    let config = Config::load(path).map_err(|error| {
        let hint = match &error {
            ConfigError::Unreadable { .. } => "\nhelp: name another file with --config FILE",
            ConfigError::Invalid { .. } => "",
        };
        for warning in error.warnings() {
            print_error(&warning.to_string());
        }
        Failure::new(Exit::Config, format!("{error}{hint}"))
    })?;
    for warning in &config.warnings {
        print_error(&warning.to_string());
    }
    Ok(config)
}

fn summary(config: &Config) -> String {
    let mut text = String::new();
    for listener in &config.listeners {
        let pool = config.pools.get(usize::from(listener.pool));
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "listener {}: {} -> pool {}",
            listener.name,
            listener.address_text,
            pool.map_or("?", |pool| &pool.settings.name),
        );
    }
    for pool in &config.pools {
        let workers = match &pool.spawn {
            Some(spawn) => {
                let account = spawn.setup.account.as_ref();
                let user = account.map(|account| format!(" as user {}", account.user_text));
                let command = spawn.command.join(" ");
                format!("{} x {command}{}", spawn.processes, user.unwrap_or_default())
            }
            None => "workers join by themselves".to_owned(),
        };
        let _ = writeln!(
            text,
            "pool {}: {}, {workers}",
            pool.settings.name,
            pool.settings.policy.name(),
        );
    }
    for (name, socket) in [
        ("dispatch_socket", &config.dispatch_socket.source),
        ("admin_socket", &config.admin_socket.source),
    ] {
        let _ = match socket {
            UnixSource::Path(path) => writeln!(text, "{name}: {}", path.display()),
            UnixSource::Systemd(name_there) => writeln!(text, "{name}: systemd:{name_there}"),
        };
    }
    if let Some(address) = config.admin_http {
        let _ = writeln!(text, "admin_http: {address}, read-only");
    }
    text
}
