//! `mode = "steer"`: the kernel chooses the worker of each connection.

mod listeners;
mod members;
mod refused;
mod shared;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use serde::Deserialize;
use serde::de::{Deserializer, Error, Visitor};
use toml::Spanned;

pub(super) use self::listeners::check_steered;
use self::members::{members, missing_cgroups};
use self::refused::{refuse_affinity, refuse_keys};
use super::Spawn;
use super::error::Mistake;
use super::file::{PoolKeys, SpawnKeys};
use super::spawn::{has_address, has_placeholder};
use super::validate::Check;
use super::value::Count;
use dispatcher_core::{Policy, PoolSettings};

/// Most steered pools: the programs of one network namespace.
pub const MAX_STEERED_POOLS: usize = 64;

/// Most workers of a steered pool, those that replace others included.
pub const MAX_STEERED_WORKERS: u32 = 1024;

/// How a pool is steered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Steer {
    /// Workers that others start: `[[pool.NAME.member]]`. Empty if the pool starts processes.
    pub members: Vec<Member>,
    /// Where the processes listen.
    pub ports: Ports,
    /// The address of the processes, `{addr}`.
    pub address: IpAddr,
    /// What becomes of the pool where the kernel's programs cannot be loaded. `None`: the
    /// dispatcher does not start.
    pub fallback: Option<Fallback>,
}

impl Steer {
    /// Whether connections are passed where the kernel cannot choose.
    pub fn passes(&self) -> bool {
        self.fallback == Some(Fallback::Pass)
    }
}

/// Another way where the kernel's programs cannot be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fallback {
    /// Connections are passed to workers with the SDK.
    Pass,
    /// The kernel's own hash chooses among inherited listeners.
    Hash,
}

/// Where the processes of a steered pool listen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ports {
    /// Each at an address of its own: `{addr}` and `{port}`.
    Own,
    /// All at the public address, with inherited listeners: `{fd}`, `LISTEN_FDS`.
    Shared,
}

/// A worker of a steered pool that others start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its name.
    pub name: String,
    /// Where it listens.
    pub address: SocketAddr,
    /// Its cgroup v2 directory.
    pub cgroup: PathBuf,
    /// Its share relative to others.
    pub weight: u16,
    /// For `failover`.
    pub priority: u16,
}

/// The values of `mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum ModeName {
    Pass,
    Steer,
}

/// The values of `ports`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum PortsName {
    Own,
    Shared,
}

/// `[[pool.NAME.member]]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MemberKeys {
    pub address: Spanned<String>,
    pub cgroup: Spanned<PathBuf>,
    pub name: Option<Spanned<String>>,
    pub weight: Option<Count<1, 65_535>>,
    pub priority: Option<Count<0, 65_535>>,
}

/// The value of `steer_pins`.
#[derive(Clone, Debug)]
pub(super) enum PinsKey {
    Off,
    At(PathBuf),
}

impl<'de> Deserialize<'de> for PinsKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct V;

        impl Visitor<'_> for V {
            type Value = PinsKey;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a directory on bpffs, or false")
            }

            fn visit_bool<E: Error>(self, on: bool) -> Result<PinsKey, E> {
                match on {
                    false => Ok(PinsKey::Off),
                    true => Ok(PinsKey::At(DEFAULT_PINS.into())),
                }
            }

            fn visit_str<E: Error>(self, path: &str) -> Result<PinsKey, E> {
                Ok(PinsKey::At(path.into()))
            }
        }

        deserializer.deserialize_any(V)
    }
}

/// Default of `steer_pins`.
const DEFAULT_PINS: &str = "/sys/fs/bpf/dispatcher";

/// `steer_pins`.
pub(super) fn pins(check: &mut Check<'_>, key: Option<&Spanned<PinsKey>>) -> Option<PathBuf> {
    let Some(key) = key else { return Some(DEFAULT_PINS.into()) };
    match key.get_ref() {
        PinsKey::Off => None,
        PinsKey::At(path) if path.is_absolute() => Some(path.clone()),
        PinsKey::At(_) => {
            check.mistake(
                Mistake::new(key.span(), "`steer_pins` is an absolute path of a directory")
                    .help("on bpffs, such as \"/sys/fs/bpf/dispatcher\"; false for no pins"),
            );
            None
        }
    }
}

/// `[defaults]` cannot have members: each belongs to one pool.
pub(super) fn check_defaults(check: &mut Check<'_>, defaults: &PoolKeys) {
    if let Some(member) = defaults.member.first() {
        check.mistake(
            Mistake::new(member.span(), "a member belongs to one pool")
                .help("move it to a [[pool.NAME.member]]"),
        );
    }
}

/// Reads the keys of one pool. `None` if it is passed.
pub(super) fn steer(
    check: &mut Check<'_>,
    (name, keys, defaults): (&str, &PoolKeys, &PoolKeys),
    settings: &PoolSettings,
    spawn: Option<&Spawn>,
) -> Option<Steer> {
    let mode = keys.mode.as_ref().or(defaults.mode.as_ref());
    let Some(mode) = mode.filter(|mode| *mode.get_ref() == ModeName::Steer) else {
        only_steered(check, (keys, defaults), spawn);
        return None;
    };
    if !cfg!(feature = "steer") {
        check.mistake(
            Mistake::new(
                mode.span(),
                "this program cannot steer: it was built without the feature",
            )
            .help("build it with `--features steer`, or write mode = \"pass\""),
        );
    }
    refuse_keys(check, keys);
    refuse_affinity(check, keys.affinity.as_ref().or(defaults.affinity.as_ref()), settings);
    if settings.policy == Policy::LeastScore {
        let policy = keys.policy.as_ref().or(defaults.policy.as_ref());
        let span = policy.map_or(mode.span(), Spanned::span);
        check.mistake(
            Mistake::new(span, "the kernel knows no gauges, so it cannot choose by `least-score`")
                .help("another policy, or mode = \"pass\""),
        );
    }
    let own = keys.spawn.as_ref();
    let members = members(check, name, keys);
    missing_cgroups(check, keys);
    let ports = match (own, members.is_empty()) {
        (None, true) if keys.member.is_empty() => {
            check.mistake(Mistake::absence(mode.span(), "a steered pool without workers").help(
                "add [pool.NAME.spawn], or a [[pool.NAME.member]] for each worker that \
                     something else starts",
            ));
            Ports::Own
        }
        (Some(_), _) if !keys.member.is_empty() => {
            check.mistake(
                Mistake::new(keys.member[0].span(), "the pool starts its workers itself")
                    .help("remove [pool.NAME.spawn], or the members: another pool can have them"),
            );
            Ports::Own
        }
        (Some(spawned), _) => {
            let known = (spawned, defaults.spawn.as_ref().map(Spanned::get_ref));
            ports(check, known, (keys.ports.as_ref().or(defaults.ports.as_ref()), spawn))
        }
        (None, _) => {
            if let Some(key) = keys.ports.as_ref().filter(|key| *key.get_ref() != PortsName::Own) {
                check.mistake(
                    Mistake::new(key.span(), "a member listens at an address of its own")
                        .help("remove `ports`: only processes of the dispatcher inherit listeners"),
                );
            }
            Ports::Own
        }
    };
    if let (Some(spawned), Some(spawn)) = (own, spawn) {
        let most = MAX_STEERED_WORKERS / 2;
        if spawn.processes > most {
            check.mistake(
                Mistake::new(spawned.span(), format!("more than {most} processes"))
                    .help("each may have a second one that replaces it, and 1024 fit"),
            );
        }
    }
    let fallback = keys.fallback.as_ref().or(defaults.fallback.as_ref());
    if let Some(fallback) = fallback {
        shared::check_fallback(check, fallback, ports);
    }
    let fallback = fallback.map(|key| *key.get_ref());
    if ports == Ports::Shared && fallback == Some(Fallback::Hash) {
        shared::refuse(check, (keys, defaults), spawn);
    }
    // Its listeners decide on the address; see `check_steered`.
    Some(Steer { members, ports, address: Ipv4Addr::LOCALHOST.into(), fallback })
}

/// Keys that only steered pools have.
fn only_steered(
    check: &mut Check<'_>,
    (keys, defaults): (&PoolKeys, &PoolKeys),
    spawn: Option<&Spawn>,
) {
    const HELP: &str = "write mode = \"steer\", or remove it";
    if let Some(fallback) = &keys.fallback {
        let message = "only a pool with mode = \"steer\" has a `fallback`";
        check.mistake(Mistake::new(fallback.span(), message).help(HELP));
    }
    if let Some(ports) = &keys.ports {
        let message = "only a pool with mode = \"steer\" has `ports`";
        check.mistake(Mistake::new(ports.span(), message).help(HELP));
    }
    if let Some(member) = keys.member.first() {
        let message = "only a pool with mode = \"steer\" has members";
        check.mistake(
            Mistake::new(member.span(), message)
                .help("workers of other pools join by themselves; write mode = \"steer\""),
        );
    }
    let Some(own) = keys.spawn.as_ref().filter(|_| spawn.is_some()) else { return };
    let defaults = defaults.spawn.as_ref().map(Spanned::get_ref);
    if let Some(text) = texts(own.get_ref(), defaults).find(|text| has_address(text.get_ref())) {
        let message = "`{addr}`, `{port}` and `{fd}` have a value only with mode = \"steer\"";
        check.mistake(Mistake::new(text.span(), message).help(
            "write mode = \"steer\" in the pool: the kernel then chooses among servers that \
             listen by themselves",
        ));
    }
}

/// The command of a pool's processes.
fn command<'a>(
    own: &'a SpawnKeys,
    defaults: Option<&'a SpawnKeys>,
) -> impl Iterator<Item = &'a Spanned<String>> {
    let command = own.command.as_ref().or(defaults.and_then(|it| it.command.as_ref()));
    command.into_iter().flat_map(Spanned::get_ref)
}

/// The texts in which placeholders have values.
fn texts<'a>(
    own: &'a SpawnKeys,
    defaults: Option<&'a SpawnKeys>,
) -> impl Iterator<Item = &'a Spanned<String>> {
    let variables = own.environment.as_ref().or(defaults.and_then(|it| it.environment.as_ref()));
    let directory = own.directory.as_ref().or(defaults.and_then(|it| it.directory.as_ref()));
    let variables = variables.into_iter().flat_map(|table| table.values());
    command(own, defaults).chain(variables).chain(directory)
}

/// Where the processes listen: as `ports` says, or as their placeholders do.
fn ports(
    check: &mut Check<'_>,
    (own, defaults): (&Spanned<SpawnKeys>, Option<&SpawnKeys>),
    (key, spawn): (Option<&Spanned<PortsName>>, Option<&Spawn>),
) -> Ports {
    let keys = own.get_ref();
    let with =
        |name: &str| texts(keys, defaults).find(|text| has_placeholder(text.get_ref(), name));
    let fork = keys.fork.as_ref().or(defaults.and_then(|it| it.fork.as_ref()));
    if let Some(fork) = fork.filter(|fork| *fork.get_ref()) {
        check.mistake(
            Mistake::new(fork.span(), "forked processes would listen at one address")
                .help("fork = false: each process of a steered pool is started by itself"),
        );
    }
    let wanted = key.map(|key| *key.get_ref());
    match (wanted, with("port"), with("fd")) {
        (Some(PortsName::Shared), ..) | (None, None, Some(_)) => Ports::Shared,
        (_, Some(_), None) => Ports::Own,
        (_, Some(_), Some(fd)) => {
            let message = "a process listens at `{port}` or inherits `{fd}`, not both";
            check.mistake(Mistake::new(fd.span(), message).help("remove one of the two"));
            Ports::Own
        }
        (_, None, Some(fd)) => {
            let message = "`{fd}` has a value only with ports = \"shared\"";
            check.mistake(Mistake::new(fd.span(), message).help("remove `ports`"));
            Ports::Own
        }
        // A mistake in the command is reported by itself.
        (_, None, None) if spawn.is_none() => Ports::Own,
        (_, None, None) => {
            let span = keys.command.as_ref().map_or(own.span(), Spanned::span);
            check.mistake(Mistake::new(span, "the processes would not know where to listen").help(
                "use {addr} and {port}, such as [\"uvicorn\", \"app:app\", \"--host\", \"{addr}\", \
                 \"--port\", \"{port}\"]; or {fd} for a server that inherits its listener; or \
                 ports = \"shared\" for one that reads LISTEN_FDS",
            ));
            Ports::Own
        }
    }
}
