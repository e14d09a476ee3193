//! Finding and asking a running dispatcher, for every client command.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{AdminArgs, Exit, Failure};
use crate::admin::client::{self, ClientError};
use crate::api::command::Problem;
use crate::config::{Config, DEFAULT_ADMIN_SOCKET, DEFAULT_FILE, UnixSource};

/// The variable that names the admin socket.
const VARIABLE: &str = "DISPATCHER_ADMIN";

/// How `from` starts when a configuration says it.
const FROM_FILE: &str = "config ";

/// An admin socket, and who says so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub path: PathBuf,
    pub from: String,
    /// Why the configuration could not say where it is, if it should have: the mistake and its place.
    pub unsaid: Option<String>,
}

impl Place {
    fn new(path: impl Into<PathBuf>, from: impl Into<String>) -> Place {
        Place { path: path.into(), from: from.into(), unsaid: None }
    }

    /// Whether a configuration says so, as it is now.
    pub(super) fn is_of_a_file(&self) -> bool {
        self.from.starts_with(FROM_FILE)
    }
}

/// `--admin`, else `DISPATCHER_ADMIN`, else the configuration, else the default.
pub(super) fn find(arguments: &AdminArgs) -> Result<Place, Failure> {
    find_with(arguments, std::env::var_os(VARIABLE), Path::new(DEFAULT_FILE))
}

pub(super) fn find_with(
    arguments: &AdminArgs,
    variable: Option<OsString>,
    default_file: &Path,
) -> Result<Place, Failure> {
    if let Some(path) = &arguments.admin {
        return Ok(Place::new(path, "--admin"));
    }
    // A configuration on the command line is nearer than an environment from somewhere.
    if let Some(file) = &arguments.config {
        let source = Config::admin_source(file)
            .map_err(|error| Failure::new(Exit::Config, error.to_string()))?;
        return from_file(source, file);
    }
    if let Some(path) = variable.filter(|path| !path.is_empty()) {
        return Ok(Place::new(path, VARIABLE));
    }
    match Config::admin_source(default_file) {
        Ok(source) => from_file(source, default_file),
        // Missing, not for us to read, or being edited: the dispatcher may well be where it usually is. If it is not, the
        // mistake that keeps us from reading where it is comes first.
        Err(error) => {
            let unsaid = error.diagnostic().is_some().then(|| error.to_string());
            Ok(Place { unsaid, ..Place::new(DEFAULT_ADMIN_SOCKET, "default") })
        }
    }
}

/// Where a dispatcher that is to read its changed configuration may be, most likely first. The file that says so may be the
/// very one that was changed: of the installed one, the dispatcher may still be where it is by default.
pub(super) fn places(arguments: &AdminArgs) -> Result<Vec<Place>, Failure> {
    places_with(arguments, std::env::var_os(VARIABLE), Path::new(DEFAULT_FILE))
}

pub(super) fn places_with(
    arguments: &AdminArgs,
    variable: Option<OsString>,
    default_file: &Path,
) -> Result<Vec<Place>, Failure> {
    let mut places = vec![find_with(arguments, variable, default_file)?];
    if places[0].is_of_a_file()
        && arguments.config.is_none()
        && places[0].path != Path::new(DEFAULT_ADMIN_SOCKET)
    {
        places.push(Place::new(DEFAULT_ADMIN_SOCKET, "default"));
    }
    Ok(places)
}

fn from_file(source: UnixSource, file: &Path) -> Result<Place, Failure> {
    match source {
        UnixSource::Path(path) => Ok(Place::new(path, format!("{FROM_FILE}{}", file.display()))),
        UnixSource::Systemd(name) => Err(Failure::new(
            Exit::Usage,
            format!(
                "{}: the admin socket is made by systemd as {name}, so only systemd knows its path: \
                 give it with --admin PATH",
                file.display()
            ),
        )),
    }
}

/// `GET target`.
pub(super) fn get(place: &Place, target: &str) -> Result<Vec<u8>, Failure> {
    client::get(&place.path, target, client::TIMEOUT).map_err(|error| failure(&error, place))
}

/// `POST target`.
pub(super) fn post<T: DeserializeOwned>(
    place: &Place,
    target: &str,
    body: &impl Serialize,
) -> Result<T, Failure> {
    post_within(place, target, body, client::TIMEOUT)
}

/// The same, for what may take longer.
pub(super) fn post_within<T: DeserializeOwned>(
    place: &Place,
    target: &str,
    body: &impl Serialize,
    timeout: Duration,
) -> Result<T, Failure> {
    let answer =
        client::post(&place.path, target, body, timeout).map_err(|error| failure(&error, place))?;
    parse(&answer, place)
}

pub(super) fn parse<T: DeserializeOwned>(body: &[u8], place: &Place) -> Result<T, Failure> {
    serde_json::from_slice(body).map_err(|error| {
        let path = place.path.display();
        let message = format!("{path} does not answer like a dispatcher of this version: {error}");
        Failure::new(Exit::Protocol, message)
    })
}

/// Part of a path: a name as it must be written there.
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

fn failure(error: &ClientError, place: &Place) -> Failure {
    let tried = format!("tried {} (from {})", place.path.display(), place.from);
    match error {
        ClientError::NotRunning(..) if place.unsaid.is_some() => {
            let mistake = place.unsaid.as_deref().unwrap_or_default();
            let hint = "it may say where the admin socket is: mend it, or name the socket with --admin PATH";
            Failure::new(Exit::Config, format!("{mistake}\nnobody listens; {tried}\nhelp: {hint}"))
        }
        ClientError::NotRunning(..) => {
            Failure::new(Exit::Unavailable, format!("is the dispatcher running? {tried}: {error}"))
        }
        ClientError::Permission(_) => Failure::new(
            Exit::NoPermission,
            format!("{error} ({tried}): become its user, or see admin_socket_mode"),
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
