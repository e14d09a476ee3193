//! `dispatcher check`: validates a configuration file.

use std::fmt::Write as _;
use std::path::Path;

use dispatcher_core::ProxyRules;
use serde::Serialize;

use super::{CheckArgs, Exit, Failure, print, print_error, print_json};
use crate::background::service_manager::unit::{self, Ending, Unit};
use crate::config::{Config, ConfigError, DEFAULT_FILE, Diagnostic, Pool, UnixSource};

pub(super) fn check(arguments: &CheckArgs) -> Result<(), Failure> {
    let given = arguments.file.as_deref().or(arguments.config.as_deref());
    let path = given.unwrap_or(Path::new(DEFAULT_FILE));
    let unit = arguments.unit.as_deref().map(Unit::named);
    if arguments.json {
        return check_for_programs(path, unit.as_ref());
    }
    let config = load(path)?;
    let mut text = format!("{}: ok\n{}", path.display(), summary(&config));
    if let Some(unit) = unit {
        let unknown = |error| Failure::new(Exit::Unavailable, error);
        let ending = ask(unit.ending()).map_err(unknown)?;
        if let Some(mistake) = mistake_in(&unit, &ending, &config) {
            return Err(mistake.in_file(path));
        }
        let then = if ending.spares_processes() { "can serve on" } else { "end" };
        // Writing to a string cannot fail.
        let _ =
            writeln!(text, "unit {unit}: {ending}; without the dispatcher its processes {then}");
    }
    print(&text)
}

/// A configuration that does not work in its unit.
pub(super) struct UnitMistake {
    message: String,
    hint: String,
}

impl UnitMistake {
    pub(super) fn in_file(self, path: &Path) -> Failure {
        let UnitMistake { message, hint } = self;
        Failure::new(Exit::Config, format!("{}: {message}\nhelp: {hint}", path.display()))
    }
}

/// Asks systemd whether the configuration works in this unit. Asks only if the answer matters.
///
/// # Errors
///
/// If systemd does not answer, or has no such unit.
pub(super) fn unit_mistake(unit: &Unit, config: &Config) -> Result<Option<UnitMistake>, String> {
    if !config.pools.iter().any(Pool::serves_without_dispatcher) {
        return Ok(None);
    }
    Ok(mistake_in(unit, &ask(unit.ending())?, config))
}

fn mistake_in(unit: &Unit, ending: &Ending, config: &Config) -> Option<UnitMistake> {
    let serving = config.pools.iter().filter(|pool| pool.serves_without_dispatcher());
    let serving: Vec<String> =
        serving.map(|pool| format!("[pool.{}.spawn]", pool.settings.name)).collect();
    (!serving.is_empty() && !ending.spares_processes()).then(|| UnitMistake {
        message: unit::serve_refused(unit, ending, &serving),
        hint: unit::serve_hint(unit),
    })
}

/// Waits for an answer of systemd.
fn ask<T>(question: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|error| error.to_string())?.block_on(question)
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
    /// The file cannot be read, or does not fit the unit.
    Whole { message: String, help: Option<String> },
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
fn check_for_programs(path: &Path, unit: Option<&Unit>) -> Result<(), Failure> {
    let result = Config::load(path);
    let mut failure = None;
    let (mistakes, warnings) = match &result {
        Ok(config) => {
            let mut found = Vec::new();
            if let Some(unit) = unit {
                let unknown = |error| Failure::new(Exit::Unavailable, error);
                let ending = ask(unit.ending()).map_err(unknown)?;
                if let Some(mistake) = mistake_in(unit, &ending, config) {
                    let UnitMistake { message, hint } = &mistake;
                    let (message, help) = (message.clone(), Some(hint.clone()));
                    found.push(Finding::Whole { message, help });
                    failure = Some(mistake.in_file(path));
                }
            }
            (found, &config.warnings[..])
        }
        Err(error) => {
            let found: Vec<Finding> = error.diagnostics().iter().map(Finding::at).collect();
            let message = error.to_string();
            failure = Some(Failure::new(Exit::Config, message.clone()));
            let whole = || vec![Finding::Whole { message, help: None }];
            (if found.is_empty() { whole() } else { found }, error.warnings())
        }
    };
    print_json(&Report {
        file: path.display().to_string(),
        ok: failure.is_none(),
        mistake: mistakes.first(),
        mistakes: &mistakes,
        warnings: warnings.iter().map(|warning| Finding::at(&warning.0)).collect(),
    })?;
    failure.map_or(Ok(()), Err)
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

/// Which networks send headers of the PROXY protocol.
fn trusted(rules: &ProxyRules) -> String {
    let from: Vec<String> = rules.from.iter().map(ToString::to_string).collect();
    match from.is_empty() {
        true => ", PROXY protocol".to_owned(),
        false => format!(", PROXY protocol from {}", from.join(", ")),
    }
}

fn summary(config: &Config) -> String {
    let mut text = String::new();
    for listener in &config.listeners {
        let pool = config.pools.get(usize::from(listener.pool));
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "listener {}: {} -> pool {}{}",
            listener.name,
            listener.address_text,
            pool.map_or("?", |pool| &pool.settings.name),
            listener.proxy.as_ref().map_or_else(String::new, trusted),
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
            None => match &pool.steer {
                Some(steer) => crate::plural::count(steer.members.len() as u64, "member"),
                None => "workers join by themselves".to_owned(),
            },
        };
        let steered = if pool.steer.is_some() { "the kernel chooses by " } else { "" };
        let _ = writeln!(
            text,
            "pool {}: {steered}{}, {workers}",
            pool.settings.name,
            pool.settings.policy.name(),
        );
        if let Some(address) = &pool.agent_listen {
            let whole = match (pool.settings.agent_workers, &pool.spawn) {
                (Some(workers), _) => crate::plural::count(u64::from(workers), "worker"),
                (None, Some(spawn)) => crate::plural::count(u64::from(spawn.processes), "process"),
                (None, None) => "the workers that have joined".to_owned(),
            };
            let _ = writeln!(text, "agent of {}: {address}, 100% is {whole}", pool.settings.name);
        }
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
    if let Some(address) = config.advice.listen {
        let peers = crate::plural::count(config.advice.peers.len() as u64, "peer");
        let _ = writeln!(text, "advice_listen: {address}, {peers}");
    }
    text
}
