//! The configuration of the directory: TOML to checked values.
//!
//! It reads a file and looks up users; it opens no sockets.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use dispatch_protocol::relay::{Name, frame};
use serde::Deserialize;

use crate::registry::{Limits, Receives};

/// Default configuration file.
pub const DEFAULT_FILE: &str = "/etc/dispatcher/directory.toml";

/// Default of `socket`.
pub const DEFAULT_SOCKET: &str = "/run/dispatcher/relay.sock";

/// Most bytes of a configuration file.
const MAX_FILE: u64 = 1024 * 1024;

/// Most namespaces.
const MAX_NAMESPACES: usize = 1024;

const MIB: usize = 1024 * 1024;

/// The largest message that can be configured: 64 MiB.
const MAX_MESSAGE: u32 = 64 * 1024 * 1024;

/// A complete, valid configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// The socket to which workers connect.
    pub socket: PathBuf,
    /// Its mode.
    pub socket_mode: u32,
    /// The name of this host among the others.
    pub host: Name,
    /// The file with the key of tickets; without one no ticket is valid.
    pub ticket_key: Option<PathBuf>,
    /// Who may enter which namespace.
    pub namespaces: Vec<Namespace>,
    /// Bounds of the registry.
    pub limits: Limits,
    /// The largest message, in bytes.
    pub max_message: u32,
    /// Bytes that wait for members which do not read: all, and those of one user.
    pub max_queued_bytes: usize,
    /// See `max_queued_bytes`.
    pub max_queued_bytes_per_user: usize,
    /// Bytes of messages to and from other hosts that wait in this process: all, and those of one
    /// user.
    pub max_gateway_bytes: usize,
    /// See `max_gateway_bytes`.
    pub max_gateway_bytes_per_user: usize,
    /// How long a connection may take for its hello.
    pub hello_timeout: Duration,
    /// Where the numbers can be read over HTTP.
    pub metrics_listen: Option<SocketAddr>,
    /// The other hosts, if there are any.
    pub nats: Option<Nats>,
}

/// How this directory reaches the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nats {
    /// Servers, `nats://` or `tls://`.
    pub servers: String,
    /// A file of NATS credentials (JWT and key).
    pub credentials: Option<PathBuf>,
    /// Certificates that TLS trusts.
    pub tls_ca: Option<PathBuf>,
    /// The own certificate and key for TLS.
    pub tls_client: Option<(PathBuf, PathBuf)>,
    /// The first part of all subjects.
    pub subject: String,
}

/// Who may enter a namespace, and what holds there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Its name.
    pub name: Name,
    /// Pools whose workers may enter; empty: a ticket is not needed.
    pub pools: Vec<String>,
    /// Users that may enter; empty: any user with a ticket.
    pub users: Vec<u32>,
    /// Who receives if an id is registered twice.
    pub receives: Receives,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    socket: PathBuf,
    socket_mode: String,
    host: Option<String>,
    ticket_key: Option<PathBuf>,
    metrics_listen: Option<String>,
    grace: String,
    hello_timeout: String,
    max_ids: usize,
    max_ids_per_user: usize,
    max_ids_per_member: u32,
    max_registrations_per_id: usize,
    max_members: usize,
    max_members_per_user: usize,
    max_groups: usize,
    max_groups_per_user: usize,
    max_groups_per_member: usize,
    max_memberships: usize,
    max_memberships_per_user: usize,
    max_watches: usize,
    max_watches_per_user: usize,
    max_watches_per_member: usize,
    max_lookups: usize,
    max_lookups_per_user: usize,
    max_lookups_per_member: usize,
    max_links: usize,
    max_links_per_user: usize,
    max_queued_bytes: usize,
    max_queued_bytes_per_user: usize,
    max_gateway_bytes: usize,
    max_gateway_bytes_per_user: usize,
    max_message: u32,
    nats: Option<String>,
    nats_credentials: Option<PathBuf>,
    nats_tls_ca: Option<PathBuf>,
    nats_tls_certificate: Option<PathBuf>,
    nats_tls_key: Option<PathBuf>,
    nats_subject: String,
    namespaces: BTreeMap<String, NamespaceFile>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct NamespaceFile {
    pools: Vec<String>,
    users: Vec<User>,
    registrations: Registrations,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum User {
    Number(u32),
    Name(String),
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Registrations {
    #[default]
    Newest,
    All,
}

impl Default for File {
    fn default() -> Self {
        let limits = Limits::default();
        File {
            socket: DEFAULT_SOCKET.into(),
            socket_mode: "0666".to_owned(),
            host: None,
            ticket_key: None,
            metrics_listen: None,
            grace: "2s".to_owned(),
            hello_timeout: "5s".to_owned(),
            max_ids: limits.ids,
            max_ids_per_user: limits.ids_per_user,
            max_ids_per_member: limits.ids_per_member,
            max_registrations_per_id: limits.registrations_per_id,
            max_members: limits.members,
            max_members_per_user: limits.members_per_user,
            max_groups: limits.groups,
            max_groups_per_user: limits.groups_per_user,
            max_groups_per_member: limits.groups_per_member,
            max_memberships: limits.memberships,
            max_memberships_per_user: limits.memberships_per_user,
            max_watches: limits.watches,
            max_watches_per_user: limits.watches_per_user,
            max_watches_per_member: limits.watches_per_member,
            max_lookups: limits.lookups,
            max_lookups_per_user: limits.lookups_per_user,
            max_lookups_per_member: limits.lookups_per_member,
            max_links: limits.links,
            max_links_per_user: limits.links_per_user,
            max_queued_bytes: 256 * MIB,
            max_queued_bytes_per_user: 64 * MIB,
            max_gateway_bytes: 256 * MIB,
            max_gateway_bytes_per_user: 128 * MIB,
            max_message: 1024 * 1024,
            nats: None,
            nats_credentials: None,
            nats_tls_ca: None,
            nats_tls_certificate: None,
            nats_tls_key: None,
            nats_subject: "dispatch-relay".to_owned(),
            namespaces: BTreeMap::new(),
        }
    }
}

/// What one of each takes at most, in bytes, with ids of the largest length: a registration and the
/// memory of one that has ended, a membership or watch, a look-up that waits, a link, a member.
const ID_BYTES: usize = 270;
const ENTRY_BYTES: usize = 160;
const LOOKUP_BYTES: usize = 150;
const LINK_BYTES: usize = 128;
const MEMBER_BYTES: usize = 8192;

/// The program, the connection to NATS and its updates.
const BASE_BYTES: usize = 64 * MIB;

impl Config {
    /// About how many bytes the directory takes when every limit is reached. The `MemoryMax` of its
    /// unit must be larger.
    pub fn most_memory(&self) -> usize {
        let limits = &self.limits;
        [
            (limits.ids, ID_BYTES),
            (limits.memberships, ENTRY_BYTES),
            (limits.watches, ENTRY_BYTES),
            (limits.lookups, LOOKUP_BYTES),
            (limits.links, LINK_BYTES),
            (limits.members, MEMBER_BYTES),
            (self.max_queued_bytes, 1),
            (self.max_gateway_bytes, 1),
            (BASE_BYTES, 1),
        ]
        .into_iter()
        .fold(0, |sum: usize, (count, bytes)| sum.saturating_add(count.saturating_mul(bytes)))
    }

    /// Reads and checks a file.
    ///
    /// # Errors
    /// Text for people: the file, the key and what is wrong.
    pub fn load(path: &Path) -> Result<Config, String> {
        let shown = path.display();
        let size = std::fs::metadata(path).map_err(|error| format!("{shown}: {error}"))?.len();
        if size > MAX_FILE {
            return Err(format!("{shown} has {size} bytes, at most {MAX_FILE} are read"));
        }
        let text = std::fs::read_to_string(path).map_err(|error| format!("{shown}: {error}"))?;
        Config::parse(&text).map_err(|error| format!("{shown}: {error}"))
    }

    /// Checks a configuration in memory. The defaults need no file: `Config::parse("")`.
    ///
    /// # Errors
    /// Text for people: the key and what is wrong.
    pub fn parse(text: &str) -> Result<Config, String> {
        let file: File = toml::from_str(text).map_err(|error| located(text, &error))?;
        let milliseconds = |key: &str, value: &str| {
            let time = humantime::parse_duration(value);
            let time = time.map_err(|error| format!("{key} = {value:?}: {error}"))?;
            match u64::try_from(time.as_millis()) {
                Ok(time) if time <= 3_600_000 => Ok(time),
                _ => Err(format!("{key} = {value:?}: at most 1h")),
            }
        };
        let mode = file.socket_mode.trim_start_matches("0o");
        let socket_mode = u32::from_str_radix(mode, 8).ok().filter(|mode| *mode <= 0o777);
        let socket_mode = socket_mode
            .ok_or_else(|| format!("socket_mode = {:?}: octal, like \"0660\"", file.socket_mode))?;
        for (key, value, most) in [
            ("max_ids", file.max_ids, 500_000_000),
            ("max_registrations_per_id", file.max_registrations_per_id, 64),
            ("max_members", file.max_members, 65_536),
            ("max_members_per_user", file.max_members_per_user, 65_536),
            ("max_groups", file.max_groups, 10_000_000),
            ("max_groups_per_user", file.max_groups_per_user, 10_000_000),
            ("max_groups_per_member", file.max_groups_per_member, 10_000_000),
            ("max_memberships", file.max_memberships, 500_000_000),
            ("max_memberships_per_user", file.max_memberships_per_user, 500_000_000),
            ("max_watches", file.max_watches, 500_000_000),
            ("max_watches_per_user", file.max_watches_per_user, 500_000_000),
            ("max_watches_per_member", file.max_watches_per_member, 10_000_000),
            ("max_lookups", file.max_lookups, 100_000_000),
            ("max_lookups_per_user", file.max_lookups_per_user, 100_000_000),
            ("max_lookups_per_member", file.max_lookups_per_member, 1_000_000),
            ("max_links", file.max_links, 100_000_000),
            ("max_links_per_user", file.max_links_per_user, 100_000_000),
            ("max_queued_bytes", file.max_queued_bytes, 1 << 40),
            ("max_queued_bytes_per_user", file.max_queued_bytes_per_user, 1 << 40),
            ("max_gateway_bytes", file.max_gateway_bytes, 1 << 40),
            ("max_gateway_bytes_per_user", file.max_gateway_bytes_per_user, 1 << 40),
            ("max_ids_per_user", file.max_ids_per_user, 500_000_000),
            ("max_ids_per_member", file.max_ids_per_member as usize, 500_000_000),
            ("max_message", file.max_message as usize, MAX_MESSAGE as usize),
        ] {
            if value == 0 || value > most {
                return Err(format!("{key} = {value}: 1 to {most}"));
            }
        }
        // A message is held whole on its way in and on its way out.
        let least = 4 * frame::longest_forward(file.max_message as usize);
        for (key, value) in [
            ("max_gateway_bytes", file.max_gateway_bytes),
            ("max_gateway_bytes_per_user", file.max_gateway_bytes_per_user),
        ] {
            if file.nats.is_some() && value < least {
                return Err(format!(
                    "{key} = {value}: at least {least} for max_message = {}",
                    file.max_message
                ));
            }
        }
        for (key, value) in [
            ("max_queued_bytes", file.max_queued_bytes),
            ("max_queued_bytes_per_user", file.max_queued_bytes_per_user),
        ] {
            if value < MIB {
                return Err(format!("{key} = {value}: at least {MIB}"));
            }
        }
        let host = match file.host {
            Some(host) => host,
            None => rustix::system::uname().nodename().to_string_lossy().into_owned(),
        };
        let limits = Limits {
            ids: file.max_ids,
            ids_per_user: file.max_ids_per_user,
            ids_per_member: file.max_ids_per_member,
            registrations_per_id: file.max_registrations_per_id,
            members: file.max_members,
            members_per_user: file.max_members_per_user,
            groups: file.max_groups,
            groups_per_user: file.max_groups_per_user,
            groups_per_member: file.max_groups_per_member,
            memberships: file.max_memberships,
            memberships_per_user: file.max_memberships_per_user,
            watches: file.max_watches,
            watches_per_user: file.max_watches_per_user,
            watches_per_member: file.max_watches_per_member,
            lookups: file.max_lookups,
            lookups_per_user: file.max_lookups_per_user,
            lookups_per_member: file.max_lookups_per_member,
            links: file.max_links,
            links_per_user: file.max_links_per_user,
            grace: milliseconds("grace", &file.grace)?,
            ..Limits::default()
        };
        let metrics_listen = match &file.metrics_listen {
            None => None,
            Some(text) => Some(text.parse().map_err(|_| {
                format!("metrics_listen = {text:?}: an address and a port, like \"127.0.0.1:9903\"")
            })?),
        };
        let tls_client = match (file.nats_tls_certificate, file.nats_tls_key) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, None) => None,
            _ => return Err("nats_tls_certificate and nats_tls_key need each other".to_owned()),
        };
        let subject = file.nats_subject;
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if subject.is_empty() || subject.len() > 64 || !subject.chars().all(plain) {
            return Err(format!("nats_subject = {subject:?}: letters, digits, - and _"));
        }
        let nats = file.nats.map(|servers| Nats {
            servers,
            credentials: file.nats_credentials,
            tls_ca: file.nats_tls_ca,
            tls_client,
            subject,
        });
        Ok(Config {
            socket: file.socket,
            socket_mode,
            host: Name::new(&host).map_err(|error| format!("host = {host:?}: {error}"))?,
            ticket_key: file.ticket_key,
            namespaces: namespaces(file.namespaces)?,
            limits,
            max_message: file.max_message,
            max_queued_bytes: file.max_queued_bytes,
            max_queued_bytes_per_user: file.max_queued_bytes_per_user,
            max_gateway_bytes: file.max_gateway_bytes,
            max_gateway_bytes_per_user: file.max_gateway_bytes_per_user,
            hello_timeout: Duration::from_millis(milliseconds(
                "hello_timeout",
                &file.hello_timeout,
            )?),
            metrics_listen,
            nats,
        })
    }
}

/// A mistake of the file in one line, with its place.
fn located(text: &str, error: &toml::de::Error) -> String {
    let before = error.span().and_then(|span| text.get(..span.start));
    let line = before.map_or(1, |before| before.matches('\n').count() + 1);
    format!("line {line}: {}", error.message())
}

/// Without one there is the namespace `default`, for the directory's own user.
fn namespaces(file: BTreeMap<String, NamespaceFile>) -> Result<Vec<Namespace>, String> {
    let own = rustix::process::geteuid().as_raw();
    if file.len() > MAX_NAMESPACES {
        return Err(format!("{} namespaces, at most {MAX_NAMESPACES}", file.len()));
    }
    let mut all = Vec::new();
    for (name, entry) in file {
        let key = format!("namespaces.{name}");
        let mut users = Vec::new();
        for user in entry.users {
            users.push(match user {
                User::Number(number) => number,
                User::Name(user) => match nix::unistd::User::from_name(&user) {
                    Ok(Some(found)) => found.uid.as_raw(),
                    Ok(None) => return Err(format!("{key}.users: there is no user {user:?}")),
                    Err(error) => return Err(format!("{key}.users: {user:?}: {error}")),
                },
            });
        }
        if entry.pools.is_empty() && users.is_empty() {
            users.push(own);
        }
        all.push(Namespace {
            name: Name::new(&name).map_err(|error| format!("{key}: {error}"))?,
            pools: entry.pools,
            users,
            receives: match entry.registrations {
                Registrations::Newest => Receives::Newest,
                Registrations::All => Receives::All,
            },
        });
    }
    if all.is_empty() {
        let name = Name::new("default").map_err(|error| error.to_string())?;
        let receives = Receives::Newest;
        all.push(Namespace { name, pools: Vec::new(), users: vec![own], receives });
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

    use super::*;

    #[test]
    fn mistakes_are_named() {
        for (text, named) in [
            ("graze = \"1s\"", "graze"),
            ("grace = \"1\"", "grace"),
            ("grace = \"2h\"", "at most 1h"),
            ("socket_mode = \"9\"", "socket_mode"),
            ("metrics_listen = \"9903\"", "127.0.0.1:9903"),
            ("max_ids = 0", "max_ids"),
            (
                "nats = \"nats://a\"\nmax_gateway_bytes_per_user = 1000000",
                "max_gateway_bytes_per_user",
            ),
            ("nats = \"nats://a\"\nmax_message = 67108864", "max_gateway_bytes = 268435456"),
            ("max_queued_bytes = 1000", "max_queued_bytes"),
            ("[namespaces.chat]\nusers = [\"no-such-user\"]", "no-such-user"),
            ("[namespaces.\"two words\"]", "two words"),
            ("[namespaces.chat]\nregistrations = \"last\"", "last"),
            ("nats = \"nats://a\"\nnats_tls_key = \"k\"", "nats_tls_certificate"),
            ("nats_subject = \"a.b\"", "nats_subject"),
        ] {
            let error = Config::parse(text).unwrap_err();
            assert!(error.contains(named), "{text}: {error}");
        }
    }

    /// The sample is valid as it is, and every key that it shows exists and has the default that it
    /// shows, unless it says that it is an example.
    #[test]
    fn the_sample_has_every_key() {
        let sample = include_str!("../../etc/directory.toml");
        Config::parse(sample).unwrap();
        let shown = |line: &&str| {
            line.strip_prefix('#').is_some_and(|rest| {
                rest.starts_with(|c: char| c.is_ascii_lowercase() || c == '[')
                    && !rest.starts_with("     ")
            })
        };
        let lines: Vec<&str> = sample.lines().filter(shown).map(|line| &line[1..]).collect();
        let all = Config::parse(&lines.join("\n")).unwrap();
        assert_eq!(all.namespaces[0].pools, ["web"]);
        let defaults: Vec<&str> =
            lines.iter().copied().filter(|line| !line.contains("# example")).collect();
        let defaults = defaults.join("\n");
        let defaults = defaults.split("[namespaces").next().unwrap();
        let (set, default) = (Config::parse(defaults).unwrap(), Config::parse("").unwrap());
        assert_eq!(format!("{set:?}"), format!("{default:?}"));
        // An unknown key is refused with the list of those that there are.
        let error = Config::parse("no_such_key = 1").unwrap_err();
        let keys: Vec<&str> =
            error.split('`').skip(3).step_by(2).filter(|key| *key != "namespaces").collect();
        assert!(keys.len() > 30, "{error}");
        for key in keys {
            assert!(sample.contains(&format!("\n#{key} ")), "{key}");
        }
    }

    /// What the limits allow fits into what the unit allows.
    #[test]
    fn the_unit_has_memory_for_what_the_defaults_allow() {
        let unit = include_str!("../../etc/dispatch-directory.service");
        let most = unit.lines().find_map(|line| line.strip_prefix("MemoryMax=")).unwrap();
        let most = most.strip_suffix('G').unwrap().parse::<usize>().unwrap() * 1024 * MIB;
        let needed = Config::parse("").unwrap().most_memory();
        assert!(needed < most, "{needed} of {most} bytes");
        // Not only because the unit allows anything.
        assert!(needed > most / 2, "{needed} of {most} bytes");
        let more = Config::parse("max_gateway_bytes = 1073741824").unwrap().most_memory();
        assert!(more > most, "{more} of {most} bytes");
    }

    #[test]
    fn the_default_admits_the_own_user() {
        let config = Config::parse("").unwrap();
        assert_eq!(config.namespaces[0].name.as_str(), "default");
        assert_eq!(config.namespaces[0].users, [rustix::process::geteuid().as_raw()]);
        let config = Config::parse("[namespaces.a]\npools = [\"web\"]").unwrap();
        assert!(config.namespaces[0].users.is_empty());
        assert_eq!(config.namespaces[0].pools, ["web"]);
    }
}
