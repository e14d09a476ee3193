//! `mode = "steer"`: the kernel chooses the worker of each connection.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::{Deserializer, Error, Visitor};
use toml::Spanned;

use super::error::Mistake;
use super::file::{ListenerKeys, PoolKeys, SpawnKeys};
use super::spawn::uses;
use super::validate::{Check, Checked, check_name};
use super::value::Count;
use super::{Address, Config, Spawn};
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
    /// `fallback = "pass"`: where the kernel cannot choose, connections are passed to workers with
    /// the SDK.
    pub fallback: bool,
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

/// The value of `fallback`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum FallbackName {
    Pass,
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
        only_steered(check, keys, spawn);
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
    if settings.policy == Policy::LeastScore {
        let span = keys.policy.as_ref().map_or(mode.span(), Spanned::span);
        check.mistake(
            Mistake::new(span, "the kernel knows no gauges, so it cannot choose by `least-score`")
                .help("another policy, or mode = \"pass\""),
        );
    }
    let own = keys.spawn.as_ref();
    let members = members(check, name, keys);
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
        (Some(spawned), _) => ports(check, spawned, defaults.spawn.as_ref(), spawn),
        (None, _) => Ports::Own,
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
    let fallback = keys.fallback.is_some() || defaults.fallback.is_some();
    // Its listeners decide on the address; see `check_steered`.
    Some(Steer { members, ports, address: Ipv4Addr::LOCALHOST.into(), fallback })
}

/// Keys that only steered pools have.
fn only_steered(check: &mut Check<'_>, keys: &PoolKeys, spawn: Option<&Spawn>) {
    const HELP: &str = "write mode = \"steer\", or remove it";
    if let Some(fallback) = &keys.fallback {
        let message = "only a pool with mode = \"steer\" has a `fallback`";
        check.mistake(Mistake::new(fallback.span(), message).help(HELP));
    }
    if let Some(member) = keys.member.first() {
        let message = "only a pool with mode = \"steer\" has members";
        check.mistake(
            Mistake::new(member.span(), message)
                .help("workers of other pools join by themselves; write mode = \"steer\""),
        );
    }
    let Some(own) = keys.spawn.as_ref().filter(|_| spawn.is_some()) else { return };
    let placeholder = texts(own.get_ref())
        .find(|text| ["addr", "port", "fd"].into_iter().any(|name| uses(text.get_ref(), name)));
    if let Some(text) = placeholder {
        let message = "`{addr}`, `{port}` and `{fd}` have a value only with mode = \"steer\"";
        check.mistake(Mistake::new(text.span(), message).help(
            "write mode = \"steer\" in the pool: the kernel then chooses among servers that \
             listen by themselves",
        ));
    }
}

/// The texts of a spawn table in which placeholders have values.
fn texts(keys: &SpawnKeys) -> impl Iterator<Item = &Spanned<String>> {
    let words = keys.command.iter().flat_map(Spanned::get_ref);
    let variables = keys.environment.iter().flat_map(|table| table.values());
    words.chain(variables).chain(&keys.directory)
}

fn ports(
    check: &mut Check<'_>,
    own: &Spanned<SpawnKeys>,
    defaults: Option<&Spanned<SpawnKeys>>,
    spawn: Option<&Spawn>,
) -> Ports {
    let keys = own.get_ref();
    let all = || texts(keys).chain(defaults.into_iter().flat_map(|it| texts(it.get_ref())));
    let with = |name: &str| all().find(|text| uses(text.get_ref(), name));
    if let Some(fork) = keys.fork.as_ref().filter(|fork| *fork.get_ref()) {
        check.mistake(
            Mistake::new(fork.span(), "forked processes would listen at one address")
                .help("fork = false: each process of a steered pool is started by itself"),
        );
    }
    match (with("port"), with("fd")) {
        (Some(_), None) => {}
        (Some(_), Some(fd)) => check.mistake(
            Mistake::new(fd.span(), "a process listens at `{port}` or inherits `{fd}`, not both")
                .help("remove one of the two"),
        ),
        // A mistake in the command is reported by itself.
        (None, _) if spawn.is_none() => {}
        (None, _) => {
            let span = keys.command.as_ref().map_or(own.span(), Spanned::span);
            check.mistake(Mistake::new(span, "the processes would not know where to listen").help(
                "use {addr} and {port}, such as [\"uvicorn\", \"app:app\", \"--host\", \
                     \"{addr}\", \"--port\", \"{port}\"]",
            ));
        }
    }
    Ports::Own
}

fn members(check: &mut Check<'_>, pool: &str, keys: &PoolKeys) -> Vec<Member> {
    let mut members: Vec<Member> = Vec::with_capacity(keys.member.len());
    if keys.member.len() > MAX_STEERED_WORKERS as usize {
        let message = format!("a steered pool has at most {MAX_STEERED_WORKERS} members");
        check.mistake(Mistake::new(keys.member[0].span(), message));
    }
    for (number, entry) in (1..).zip(&keys.member) {
        let entry = entry.get_ref();
        let Some(address) = check.keep(member_address(&entry.address)) else { continue };
        let Some(cgroup) = check.keep(member_cgroup(&entry.cgroup)) else { continue };
        let name = match &entry.name {
            Some(name) => {
                check.keep(check_name(name, "worker"));
                name.get_ref().clone()
            }
            None => format!("{pool}-{number}"),
        };
        if members.iter().any(|other| other.address == address) {
            let message = format!("{address} is the address of another member");
            check.mistake(Mistake::new(entry.address.span(), message));
        }
        if members.iter().any(|other| other.name == name) {
            let span = entry.name.as_ref().map_or(entry.address.span(), Spanned::span);
            check.mistake(Mistake::new(span, format!("another member has the name `{name}`")));
        }
        members.push(Member {
            name,
            address,
            cgroup,
            weight: entry.weight.map_or(1, |it| u16::try_from(it.0).unwrap_or(u16::MAX)),
            priority: entry.priority.map_or(0, |it| u16::try_from(it.0).unwrap_or(u16::MAX)),
        });
    }
    members
}

fn member_address(text: &Spanned<String>) -> Checked<SocketAddr> {
    let address: SocketAddr = text.get_ref().parse().map_err(|_| {
        Mistake::new(text.span(), "not an address and a port")
            .help("where the worker listens, such as \"127.0.0.1:8001\" or \"[::1]:8001\"")
    })?;
    if address.port() == 0 {
        return Err(Mistake::new(text.span(), "a worker has a port of its own")
            .help("the one at which it listens"));
    }
    Ok(address)
}

fn member_cgroup(path: &Spanned<PathBuf>) -> Checked<PathBuf> {
    if path.get_ref().is_absolute() {
        return Ok(path.get_ref().clone());
    }
    Err(Mistake::new(path.span(), "the cgroup is an absolute path").help(
        "the cgroup v2 directory of its unit, such as \
         \"/sys/fs/cgroup/system.slice/web@1.service\"",
    ))
}

/// Keys of a pool that mean nothing where the kernel chooses.
fn refuse_keys(check: &mut Check<'_>, keys: &PoolKeys) {
    const BYTES: &str = "the kernel chooses before the first byte comes";
    const JOIN: &str = "no worker connects to the dispatcher";
    fn span<T>(key: &Option<Spanned<T>>) -> Option<Range<usize>> {
        key.as_ref().map(Spanned::span)
    }
    fn list<T>(key: &Option<Vec<Spanned<T>>>) -> Option<Range<usize>> {
        key.as_ref().map(|all| all.first().map_or(0..0, Spanned::span))
    }
    let refused = [
        ("affinity", span(&keys.affinity), BYTES),
        ("peek_timeout", span(&keys.peek_timeout), BYTES),
        ("peek_max_bytes", span(&keys.peek_max_bytes), BYTES),
        ("max_awaiting", span(&keys.max_awaiting), BYTES),
        ("scores", span(&keys.scores), "the kernel knows no gauges"),
        ("history", span(&keys.history), "the kernel records no decisions"),
        ("max_untaken", span(&keys.max_untaken), "workers have accept queues of their own"),
        ("unavailable_response", span(&keys.unavailable_response), "no process accepts clients"),
        ("line_socket", span(&keys.line_socket), JOIN),
        ("line_socket_mode", span(&keys.line_socket_mode), JOIN),
        ("line_types", span(&keys.line_types), JOIN),
        ("allow_users", list(&keys.allow_users), JOIN),
        ("allow_groups", list(&keys.allow_groups), JOIN),
    ];
    for (key, at, reason) in refused {
        let Some(at) = at else { continue };
        let message = format!("`{key}` is not possible with mode = \"steer\": {reason}");
        let mut mistake = Mistake::new(at, message).help("remove it, or write mode = \"pass\"");
        if key == "affinity" {
            mistake = mistake.help(
                "policy = \"hash\" gives a client address the same worker; or mode = \"pass\"",
            );
        }
        check.mistake(mistake);
    }
}

/// Keys of a listener that mean nothing there.
fn refuse_listener_keys(check: &mut Check<'_>, keys: &ListenerKeys) {
    const CLIENTS: &str = "the kernel's program does not look at clients: use a firewall";
    const PROXY: &str = "no process reads the header before the worker does";
    const SOCKET: &str = "each worker opens its own listener";
    fn span<T>(key: &Option<Spanned<T>>) -> Option<Range<usize>> {
        key.as_ref().map(Spanned::span)
    }
    fn list<T>(key: &Option<Vec<Spanned<T>>>) -> Option<Range<usize>> {
        key.as_ref().map(|all| all.first().map_or(0..0, Spanned::span))
    }
    let refused = [
        ("allow", list(&keys.allow), CLIENTS),
        ("deny", list(&keys.deny), CLIENTS),
        ("rate_limit", span(&keys.rate_limit), CLIENTS),
        ("rate_burst", span(&keys.rate_burst), CLIENTS),
        ("max_queued_per_client", span(&keys.max_queued_per_client), CLIENTS),
        ("client_prefix_ipv4", span(&keys.client_prefix_ipv4), CLIENTS),
        ("client_prefix_ipv6", span(&keys.client_prefix_ipv6), CLIENTS),
        ("max_tracked_clients", span(&keys.max_tracked_clients), CLIENTS),
        ("proxy_protocol", span(&keys.proxy_protocol), PROXY),
        ("proxy_protocol_from", span(&keys.proxy_protocol_from), PROXY),
        ("proxy_timeout", span(&keys.proxy_timeout), PROXY),
        ("proxy_max_header", span(&keys.proxy_max_header), PROXY),
        ("backlog", span(&keys.backlog), SOCKET),
        ("nodelay", span(&keys.nodelay), SOCKET),
        ("keepalive", span(&keys.keepalive), SOCKET),
        ("keepalive_interval", span(&keys.keepalive_interval), SOCKET),
        ("keepalive_count", span(&keys.keepalive_count), SOCKET),
        ("user_timeout", span(&keys.user_timeout), SOCKET),
        ("defer_accept", span(&keys.defer_accept), SOCKET),
        ("fast_open", span(&keys.fast_open), SOCKET),
        ("receive_buffer", span(&keys.receive_buffer), SOCKET),
        ("send_buffer", span(&keys.send_buffer), SOCKET),
        ("reuse_port", span(&keys.reuse_port), SOCKET),
    ];
    for (key, at, reason) in refused {
        let Some(at) = at else { continue };
        let message = format!("`{key}` is not possible at a listener of a steered pool: {reason}");
        let help = "remove it, or write mode = \"pass\" in the pool";
        check.mistake(Mistake::new(at, message).help(help));
    }
}

/// What listeners and pools have to do with each other. Sets the addresses of processes.
pub(super) fn check_steered(
    check: &mut Check<'_>,
    config: &mut Config,
    tables: &[(Spanned<String>, PoolKeys)],
    listeners: &[Spanned<ListenerKeys>],
) {
    let steered = config.pools.iter().filter(|pool| pool.steer.is_some()).count();
    if steered > MAX_STEERED_POOLS {
        let message = format!("more than {MAX_STEERED_POOLS} steered pools");
        let help = "the kernel runs so many programs in a network namespace";
        check.mistake(Mistake::new(0..0, message).help(help));
    }
    for (pool, (name, keys)) in config.pools.iter_mut().zip(tables) {
        let Some(steer) = &mut pool.steer else { continue };
        let mut families = Families::default();
        for listener in listeners.iter().map(Spanned::get_ref) {
            if listener.pool.get_ref() != name.get_ref() {
                continue;
            }
            refuse_listener_keys(check, listener);
            let known = config.listeners.iter().find(|it| it.name == *listener.name.get_ref());
            let Some(known) = known else { continue };
            let ipv6_only = known.options.ipv6_only;
            match check.keep(public_address(&listener.address, &known.address)) {
                Some(address) => families.add(address, ipv6_only),
                None => continue,
            }
            let Address::Tcp(address) = known.address else { continue };
            for (member, entry) in steer.members.iter().zip(&keys.member) {
                let at = entry.get_ref().address.span();
                if member.address == address {
                    let message = "clients connect to this address: a worker needs another one";
                    check.mistake(Mistake::new(at, message));
                } else if member.address.is_ipv4() && address.is_ipv6() {
                    let message = format!(
                        "an IPv4 listener cannot serve the IPv6 clients of listener `{}`",
                        known.name
                    );
                    let help = "let the worker listen at [::1], or at [::] for both families";
                    check.mistake(Mistake::new(at, message).help(help));
                }
            }
        }
        steer.address = families.address();
        if let Some(spawned) = &keys.spawn {
            wrong_family(check, spawned.get_ref(), steer.address);
        }
    }
}

fn public_address(text: &Spanned<String>, address: &Address) -> Checked<SocketAddr> {
    match address {
        Address::Tcp(address) if address.port() != 0 => Ok(*address),
        Address::Tcp(_) => {
            Err(Mistake::new(text.span(), "a steered pool has a port that is known")
                .help("write the port to which clients connect"))
        }
        Address::Unix(_) => {
            Err(Mistake::new(text.span(), "the kernel chooses among TCP listeners only")
                .help("write an address and a port, or mode = \"pass\" in the pool"))
        }
        Address::Systemd(_) => Err(Mistake::new(
            text.span(),
            "clients of a steered pool do not come to a socket of systemd",
        )
        .help("write the address and the port, and remove the .socket unit")),
    }
}

/// The families of clients.
#[derive(Default)]
struct Families {
    v4: bool,
    v6: bool,
}

impl Families {
    fn add(&mut self, address: SocketAddr, ipv6_only: bool) {
        let any = address.ip() == IpAddr::from(Ipv6Addr::UNSPECIFIED);
        self.v4 |= address.is_ipv4() || (any && !ipv6_only);
        self.v6 |= address.is_ipv6();
    }

    /// Where a process listens: a listener at `::` serves both families.
    fn address(&self) -> IpAddr {
        match (self.v4, self.v6) {
            (_, false) => Ipv4Addr::LOCALHOST.into(),
            (false, true) => Ipv6Addr::LOCALHOST.into(),
            (true, true) => Ipv6Addr::UNSPECIFIED.into(),
        }
    }
}

/// A command with an IPv4 address instead of `{addr}` in a pool with IPv6 clients.
fn wrong_family(check: &mut Check<'_>, keys: &SpawnKeys, address: IpAddr) {
    let own = |text: &&Spanned<String>| uses(text.get_ref(), "addr");
    if address.is_ipv4() || texts(keys).any(|text| own(&text)) {
        return;
    }
    let words: Vec<_> = keys.command.iter().flat_map(Spanned::get_ref).collect();
    let is_v4 = |text: &str| {
        let host = text.rsplit(['=', '/']).next().unwrap_or(text);
        let host = host.split(':').next().unwrap_or(host);
        host.parse::<Ipv4Addr>().is_ok()
    };
    if let Some(text) = words.into_iter().find(|text| is_v4(text.get_ref())) {
        check.mistake(
            Mistake::new(
                text.span(),
                "an IPv4 listener cannot serve the IPv6 clients of this pool",
            )
            .help("write {addr}"),
        );
    }
}

/// Whether a cgroup exists now, for a warning.
pub(super) fn missing_cgroups(check: &mut Check<'_>, keys: &PoolKeys) {
    for entry in &keys.member {
        let path = &entry.get_ref().cgroup;
        let above = path.get_ref().parent().unwrap_or(Path::new("/"));
        if !above.is_dir() {
            let message = format!("there is no directory `{}`", above.display());
            check.warn(
                Mistake::new(path.span(), message)
                    .help("until it exists, the kernel cannot choose the workers of this pool"),
            );
        }
    }
}
