//! `line_socket`, `line_socket_mode` and `line_types`: the socket for workers of the line protocol.

use std::collections::BTreeMap;
use std::path::PathBuf;

use toml::Spanned;

use dispatch_protocol::line::MAX_TYPE;

use super::address::{same_path, unix_source};
use super::error::{Mistake, suggest};
use super::file::PoolKeys;
use super::validate::{Check, Checked};
use super::{Address, Config, UnixEndpoint, UnixSource};
use dispatcher_core::{Policy, PoolSettings};

/// The default of `line_socket_mode`.
const DEFAULT_MODE: u32 = 0o600;

/// Most entries of `line_types`.
const MOST_TYPES: usize = 1024;

/// The socket of a pool for workers of the line protocol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LineSocket {
    /// Its path.
    pub path: PathBuf,
    /// Permission bits; never world-writable.
    pub mode: u32,
    /// The pool of a worker, by the type that it reports. Other workers join the socket's pool.
    pub types: BTreeMap<String, String>,
}

impl LineSocket {
    /// The socket as the dispatcher makes it.
    pub(crate) fn endpoint(&self) -> UnixEndpoint {
        let source = UnixSource::Path(self.path.clone());
        UnixEndpoint { source, mode: self.mode, user: None, group: None }
    }
}

/// Reads the three keys of a pool.
pub(super) fn line_socket(
    check: &mut Check<'_>,
    keys: &PoolKeys,
    defaults: &PoolKeys,
    settings: &PoolSettings,
) -> Option<LineSocket> {
    let Some(path) = &keys.line_socket else {
        for span in [
            keys.line_socket_mode.as_ref().map(Spanned::span),
            keys.line_types.as_ref().map(Spanned::span),
        ] {
            let Some(span) = span else { continue };
            check.warn(Mistake::new(span, "this has no effect without `line_socket`"));
        }
        return None;
    };
    if settings.policy == Policy::LeastScore && !settings.scores.gauges.is_empty() {
        check.warn(
            Mistake::new(
                path.span(),
                "workers of the line protocol have no gauges, so `least-score` never chooses them",
            )
            .help("use another policy, or scores.connections alone"),
        );
    }
    let path = check.keep(socket_path(path))?;
    let mode = match keys.line_socket_mode.as_ref().or(defaults.line_socket_mode.as_ref()) {
        None => DEFAULT_MODE,
        Some(mode) => {
            let bits = check.octal(mode, "\"0660\": owner and group may connect");
            let bits = bits.and_then(|bits| match bits & 0o002 {
                0 => Ok(bits),
                _ => Err(Mistake::new(
                    mode.span(),
                    "every user of this machine could connect and get connections",
                )
                .help("write \"0600\" or \"0660\"; allow_users and allow_groups say who may join")),
            });
            check.keep(bits)?
        }
    };
    let mut types = BTreeMap::new();
    let map = keys.line_types.as_ref().or(defaults.line_types.as_ref());
    for (kind, pool) in map.into_iter().flat_map(Spanned::get_ref) {
        let text = kind.get_ref();
        if text.is_empty() || text.len() > MAX_TYPE {
            let message = format!("a type has 1 to {MAX_TYPE} bytes");
            check.mistake(Mistake::new(kind.span(), message).help("workers report it as `type=`"));
        } else {
            types.insert(text.clone(), pool.get_ref().clone());
        }
    }
    if let Some(map) = map.filter(|_| types.len() > MOST_TYPES) {
        let message = format!("at most {MOST_TYPES} types are possible");
        check.mistake(Mistake::new(map.span(), message));
    }
    Some(LineSocket { path, mode, types })
}

fn socket_path(text: &Spanned<String>) -> Checked<PathBuf> {
    match unix_source(Some(text.clone()), "", "line_socket")? {
        UnixSource::Path(path) => Ok(path),
        UnixSource::Systemd(_) => Err(Mistake::new(
            text.span(),
            "`line_socket` is a path: systemd passes no sockets for it",
        )
        .help("such as \"/run/dispatcher/line.sock\"")),
    }
}

/// `[defaults]` cannot have a `line_socket`: each pool has its own.
pub(super) fn check_defaults(check: &mut Check<'_>, defaults: &PoolKeys) {
    if let Some(socket) = &defaults.line_socket {
        check.mistake(
            Mistake::new(socket.span(), "each pool needs a `line_socket` of its own")
                .help("move it to a [pool.NAME]; line_socket_mode and line_types may stay here"),
        );
    }
}

/// The sockets must differ from all others, and the types name pools that exist.
pub(super) fn check_lines(
    check: &mut Check<'_>,
    config: &Config,
    defaults: &PoolKeys,
    tables: &[(Spanned<String>, PoolKeys)],
) {
    let mut seen: Vec<(&str, PathBuf)> = Vec::new();
    for (pool, (name, keys)) in config.pools.iter().zip(tables) {
        let (Some(line), Some(text)) = (&pool.line, &keys.line_socket) else { continue };
        let endpoint = |endpoint: &UnixEndpoint| matches!(&endpoint.source, UnixSource::Path(path) if same_path(path, &line.path));
        let listener = |address: &Address| matches!(address, Address::Unix(path) if same_path(path, &line.path));
        let other = if endpoint(&config.dispatch_socket) {
            Some("`dispatch_socket`".to_owned())
        } else if endpoint(&config.admin_socket) {
            Some("`admin_socket`".to_owned())
        } else if let Some(it) = config.listeners.iter().find(|it| listener(&it.address)) {
            Some(format!("the address of listener `{}`", it.name))
        } else {
            let other = seen.iter().find(|(_, path)| same_path(path, &line.path));
            other.map(|(pool, _)| format!("the `line_socket` of pool `{pool}`"))
        };
        if let Some(other) = other {
            check.mistake(
                Mistake::new(text.span(), format!("this is {other} already"))
                    .help("use a different path for each"),
            );
        }
        seen.push((name.get_ref(), line.path.clone()));
    }
    let known = |pool: &str| tables.iter().any(|(name, _)| name.get_ref() == pool);
    let all = std::iter::once(defaults).chain(tables.iter().map(|(_, keys)| keys));
    let maps = all.filter_map(|keys| keys.line_types.as_ref());
    for pool in maps.flat_map(|map| map.get_ref().values()) {
        if !known(pool.get_ref()) {
            let names = tables.iter().map(|(name, _)| name.get_ref().as_str());
            let help = suggest(pool.get_ref(), "the pools are", names);
            let message = format!("there is no pool `{}`", pool.get_ref());
            check.mistake(Mistake::new(pool.span(), message).help(help));
        }
    }
}
