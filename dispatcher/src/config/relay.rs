//! The keys about the relay's directory: `relay_directory` and `relay_socket`.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::de::{Deserialize, Deserializer, Error, Visitor};

use super::error::Mistake;
use super::file::File;
use super::spawn::literal;
use super::validate::Check;
use super::{Config, Pool, UnixEndpoint, UnixSource};

/// The variable with the path of the directory's socket, for the processes of pools.
const VARIABLE: &str = "DISPATCH_RELAY_SOCKET";

/// The directory of the relay, as seen by the dispatcher.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RelaySettings {
    /// The directory to start; `None`: another program starts it, or there is none.
    pub directory: Option<RelayDirectory>,
    /// Where the directory listens; `None`: not known to the dispatcher.
    pub socket: Option<PathBuf>,
}

/// The configuration of a directory that the dispatcher starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RelayDirectory {
    /// `true`: the defaults.
    Defaults,
    /// A file, as for `dispatch-directory --config`.
    File(PathBuf),
}

/// The value of `relay_directory`.
#[derive(Clone, Debug)]
pub(super) enum DirectoryKey {
    On(bool),
    File(String),
}

impl<'de> Deserialize<'de> for DirectoryKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct V;

        impl Visitor<'_> for V {
            type Value = DirectoryKey;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("true, false, or the configuration file of the directory")
            }

            fn visit_bool<E: Error>(self, on: bool) -> Result<Self::Value, E> {
                Ok(DirectoryKey::On(on))
            }

            fn visit_str<E: Error>(self, path: &str) -> Result<Self::Value, E> {
                Ok(DirectoryKey::File(path.to_owned()))
            }
        }

        deserializer.deserialize_any(V)
    }
}

pub(super) fn relay(check: &mut Check<'_>, file: &File, dispatch: &UnixEndpoint) -> RelaySettings {
    let told = file.relay_socket.as_ref();
    let socket = told.map(|path| PathBuf::from(path.get_ref()));
    let Some(key) = &file.relay_directory else {
        return RelaySettings { directory: None, socket };
    };
    match key.get_ref() {
        DirectoryKey::On(false) => RelaySettings { directory: None, socket },
        DirectoryKey::On(true) => RelaySettings {
            directory: Some(RelayDirectory::Defaults),
            socket: Some(socket.unwrap_or_else(|| default_socket(dispatch))),
        },
        DirectoryKey::File(path) => {
            if let Some(told) = told {
                check.mistake(
                    Mistake::new(told.span(), "the file of the directory decides this")
                        .help(format!("set `socket` in {path}, and remove `relay_socket`")),
                );
            }
            let path = PathBuf::from(path);
            let socket = check.keep(
                socket_in(&path)
                    .map_err(|(error, help)| Mistake::new(key.span(), error).help(help)),
            );
            RelaySettings { directory: Some(RelayDirectory::File(path)), socket }
        }
    }
}

/// `relay.sock` beside the socket of the workers.
fn default_socket(dispatch: &UnixEndpoint) -> PathBuf {
    match &dispatch.source {
        UnixSource::Path(path) => path.with_file_name("relay.sock"),
        UnixSource::Systemd(_) => dispatch_directory::config::DEFAULT_SOCKET.into(),
    }
}

/// The socket in a configuration of the directory, or what is wrong and what to do.
fn socket_in(path: &Path) -> Result<PathBuf, (String, &'static str)> {
    let config = dispatch_directory::config::Config::load(path)
        .map_err(|error| (error, "`dispatch-directory --check --config FILE` checks it, too"))?;
    if config.nats.is_some() {
        return Err((
            format!("{}: `nats` is set, but this directory serves one host", path.display()),
            "run dispatch-directory as a program of its own (etc/dispatch-directory.service) and \
             write its socket here: relay_socket = \"…\"",
        ));
    }
    Ok(config.socket)
}

/// Tells the processes of the pools where the directory is, unless their configuration does.
pub(super) fn tell_processes(relay: &RelaySettings, pools: &mut [Pool]) {
    let Some(socket) = relay.socket.as_ref().and_then(|path| path.to_str()) else { return };
    for spawn in pools.iter_mut().filter_map(|pool| pool.spawn.as_mut()) {
        if !spawn.environment.iter().any(|(name, _)| name == VARIABLE) {
            spawn.environment.push((VARIABLE.to_owned(), literal(socket)));
        }
    }
}

impl Config {
    /// Starts a directory with the defaults, whose socket is `socket`.
    pub(super) fn with_directory(mut self, socket: PathBuf) -> Config {
        self.relay =
            RelaySettings { directory: Some(RelayDirectory::Defaults), socket: Some(socket) };
        tell_processes(&self.relay, &mut self.pools);
        self
    }
}
