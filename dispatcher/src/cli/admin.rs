//! Finds a running dispatcher and sends requests to it, for every client command.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{AdminArgs, Exit, Failure, private};
use crate::admin::client::{self, ClientError};
use crate::api::command::Problem;
use crate::config::{Config, DEFAULT_ADMIN_SOCKET, DEFAULT_FILE, UnixSource};

/// Environment variable with the path of the admin socket.
const VARIABLE: &str = "DISPATCHER_ADMIN";

/// `from` of the usual path.
const DEFAULT: &str = "default";

/// Prefix of `from` when a configuration file gave the path.
const FROM_FILE: &str = "config ";

/// The path of an admin socket and the source of that path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct AdminEndpoint {
    pub path: PathBuf,
    pub from: String,
    /// The mistake in the configuration file, with its position, if the file should have given the
    /// path but could not be parsed.
    pub mistake: Option<String>,
}

impl AdminEndpoint {
    fn new(path: impl Into<PathBuf>, from: impl Into<String>) -> AdminEndpoint {
        AdminEndpoint { path: path.into(), from: from.into(), mistake: None }
    }

    /// Whether a configuration file gave the path.
    pub(super) fn is_from_file(&self) -> bool {
        self.from.starts_with(FROM_FILE)
    }
}

/// Sources in order of precedence: `--admin`, `DISPATCHER_ADMIN`, the configuration, the default,
/// and, where nothing is there, the only `dispatcher serve` of this user.
pub(super) fn find(arguments: &AdminArgs) -> Result<AdminEndpoint, Failure> {
    let found = find_with(arguments, std::env::var_os(VARIABLE), Path::new(DEFAULT_FILE))?;
    if found.from != DEFAULT || found.mistake.is_some() || found.path.exists() {
        return Ok(found);
    }
    of_serve(found, private::running("serve"))
}

fn of_serve(default: AdminEndpoint, running: Vec<PathBuf>) -> Result<AdminEndpoint, Failure> {
    match &running[..] {
        [] => Ok(default),
        [one] => Ok(AdminEndpoint::new(one, "dispatcher serve")),
        several => {
            let mut text = "several `dispatcher serve` run: say which one is meant".to_owned();
            for path in several {
                let path = path.display().to_string();
                text.push_str(&format!("\n  --admin {}", private::quoted(&path)));
            }
            Err(Failure::new(Exit::Usage, text))
        }
    }
}

pub(super) fn find_with(
    arguments: &AdminArgs,
    variable: Option<OsString>,
    default_file: &Path,
) -> Result<AdminEndpoint, Failure> {
    if let Some(path) = &arguments.admin {
        return Ok(AdminEndpoint::new(path, "--admin"));
    }
    // A command-line argument takes precedence over the environment.
    if let Some(file) = &arguments.config {
        let source = Config::admin_source(file)
            .map_err(|error| Failure::new(Exit::Config, error.to_string()))?;
        return from_file(source, file);
    }
    if let Some(path) = variable.filter(|path| !path.is_empty()) {
        return Ok(AdminEndpoint::new(path, VARIABLE));
    }
    match Config::admin_source(default_file) {
        Ok(source) => from_file(source, default_file),
        // The file is missing, not readable, or being edited. The dispatcher may still listen at
        // the default path. If it does not, the error shows the mistake in the file first.
        Err(error) => {
            let mistake = error.diagnostic().is_some().then(|| error.to_string());
            Ok(AdminEndpoint { mistake, ..AdminEndpoint::new(DEFAULT_ADMIN_SOCKET, DEFAULT) })
        }
    }
}

/// The paths where a dispatcher with a changed configuration may listen, most likely first. The
/// change may have moved the admin socket itself, so a dispatcher with the installed file may still
/// listen at the default path.
pub(super) fn endpoints(arguments: &AdminArgs) -> Result<Vec<AdminEndpoint>, Failure> {
    endpoints_with(arguments, std::env::var_os(VARIABLE), Path::new(DEFAULT_FILE))
}

pub(super) fn endpoints_with(
    arguments: &AdminArgs,
    variable: Option<OsString>,
    default_file: &Path,
) -> Result<Vec<AdminEndpoint>, Failure> {
    let mut endpoints = vec![find_with(arguments, variable, default_file)?];
    if endpoints[0].is_from_file()
        && arguments.config.is_none()
        && endpoints[0].path != Path::new(DEFAULT_ADMIN_SOCKET)
    {
        endpoints.push(AdminEndpoint::new(DEFAULT_ADMIN_SOCKET, DEFAULT));
    }
    Ok(endpoints)
}

fn from_file(source: UnixSource, file: &Path) -> Result<AdminEndpoint, Failure> {
    match source {
        UnixSource::Path(path) => {
            Ok(AdminEndpoint::new(path, format!("{FROM_FILE}{}", file.display())))
        }
        UnixSource::Systemd(name) => Err(Failure::new(
            Exit::Usage,
            format!(
                "{}: systemd creates the admin socket as {name}, and only systemd knows its path: \
                 set it with --admin PATH",
                file.display()
            ),
        )),
    }
}

/// Wait for an answer that other hosts contribute to: the longest `request_timeout`, and more.
pub(super) const LONG: Duration = Duration::from_secs(15);

/// Sends `GET target`.
pub(super) fn get(endpoint: &AdminEndpoint, target: &str) -> Result<Vec<u8>, Failure> {
    get_within(endpoint, target, client::TIMEOUT)
}

/// Like [`get`], for requests that may take longer.
pub(super) fn get_within(
    endpoint: &AdminEndpoint,
    target: &str,
    timeout: Duration,
) -> Result<Vec<u8>, Failure> {
    client::get(&endpoint.path, target, timeout).map_err(|error| failure(&error, endpoint))
}

/// Sends `POST target` and parses the answer.
pub(super) fn post<T: DeserializeOwned>(
    endpoint: &AdminEndpoint,
    target: &str,
    body: &impl Serialize,
) -> Result<T, Failure> {
    post_within(endpoint, target, body, client::TIMEOUT)
}

/// Like [`post`], for requests that may take longer.
pub(super) fn post_within<T: DeserializeOwned>(
    endpoint: &AdminEndpoint,
    target: &str,
    body: &impl Serialize,
    timeout: Duration,
) -> Result<T, Failure> {
    let answer = client::post(&endpoint.path, target, body, timeout)
        .map_err(|error| failure(&error, endpoint))?;
    parse(&answer, endpoint)
}

pub(super) fn parse<T: DeserializeOwned>(
    body: &[u8],
    endpoint: &AdminEndpoint,
) -> Result<T, Failure> {
    serde_json::from_slice(body).map_err(|error| {
        let path = endpoint.path.display();
        let message = format!("{path} does not answer like a dispatcher of this version: {error}");
        Failure::new(Exit::Protocol, message)
    })
}

/// Percent-encodes a name for use as a path segment.
pub(super) fn segment(name: &str) -> String {
    let mut text = String::new();
    for byte in name.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                text.push(char::from(byte));
            }
            // Writing to a string cannot fail.
            _ => drop(write!(text, "%{byte:02X}")),
        }
    }
    text
}

fn failure(error: &ClientError, endpoint: &AdminEndpoint) -> Failure {
    let tried = format!("tried {} (from {})", endpoint.path.display(), endpoint.from);
    match error {
        ClientError::NotRunning(..) if endpoint.mistake.is_some() => {
            let mistake = endpoint.mistake.as_deref().unwrap_or_default();
            let hint =
                "the file may contain admin_socket: correct it, or set the path with --admin PATH";
            Failure::new(
                Exit::Config,
                format!("{mistake}\nno process listens there; {tried}\nhelp: {hint}"),
            )
        }
        ClientError::NotRunning(..) => {
            Failure::new(Exit::Unavailable, format!("is the dispatcher running? {tried}: {error}"))
        }
        ClientError::Permission(_) => Failure::new(
            Exit::NoPermission,
            format!(
                "{error} ({tried}): run the command as the dispatcher's user, or see admin_socket_mode"
            ),
        ),
        ClientError::Timeout(_) | ClientError::Busy(_) => {
            Failure::new(Exit::TempFail, format!("{error} ({tried})"))
        }
        ClientError::Rejected(error) => {
            let exit = match error.problem {
                Problem::NotFound => Exit::NoInput,
                Problem::Ambiguous | Problem::Invalid => Exit::Usage,
                Problem::Conflict => Exit::DataErr,
                Problem::Config => Exit::Config,
                Problem::Forbidden => Exit::NoPermission,
                Problem::Unavailable | Problem::NotReady => Exit::TempFail,
                Problem::Method | Problem::TooLarge | Problem::Internal => Exit::Protocol,
            };
            Failure { refused: Some(error.clone()), ..Failure::new(exit, error.to_string()) }
        }
        ClientError::Unexpected(_) => Failure::new(Exit::Protocol, format!("{error} ({tried})")),
        ClientError::System(_) => Failure::new(Exit::OsErr, format!("{error} ({tried})")),
    }
}
