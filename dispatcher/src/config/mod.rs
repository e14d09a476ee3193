//! The configuration: parses TOML into valid typed settings, or returns errors with file, line,
//! column and the nearest valid key.
//!
//! Owns parsing, defaults and validation; later modules see only checked values. It opens no
//! sockets and starts no processes. It does resolve users and groups, so that an unknown name is
//! reported early.

mod access_rules;
mod accounts;
mod address;
mod advice;
mod affinity;
mod agent;
mod demo;
mod error;
mod file;
mod hints;
mod line;
mod listener;
mod process_setup;
mod proxy;
mod read;
mod relay;
mod scores;
mod spawn;
mod steer;
mod validate;
mod value;

#[cfg(test)]
mod tests;

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

pub use advice::{AdviceSettings, MAX_ADVICE_PEERS, is_advisable};
pub use error::{ConfigError, Diagnostic, Warning};
pub(crate) use hints::SAMPLE;
pub use line::LineSocket;
pub use process_setup::{Account, Limit, Output, ProcessLimits, ProcessSetup, UNLIMITED};
pub use relay::{RelayDirectory, RelaySettings};
pub use spawn::{NOT_INHERITED, Place, depends_on_process, expand, has_placeholder, literal};
pub use steer::{Fallback, MAX_STEERED_WORKERS, Member, Ports, Steer};

use serde::{Deserialize, Serialize};

use dispatcher_core::{AccessRules, PoolSettings, ProxyRules};

/// Default configuration file.
pub const DEFAULT_FILE: &str = "/etc/dispatcher/dispatcher.toml";

/// Default of `dispatch_socket`.
pub const DEFAULT_DISPATCH_SOCKET: &str = "/run/dispatcher/dispatch.sock";

/// Default of `admin_socket`.
pub const DEFAULT_ADMIN_SOCKET: &str = "/run/dispatcher/admin.sock";

/// Environment variables that the dispatcher sets for its processes; `environment` must not contain
/// them.
pub const RESERVED_VARIABLES: [&str; 6] = [
    "DISPATCH_SOCKET",
    "DISPATCH_POOL",
    "DISPATCH_NAME",
    "DISPATCH_TOKEN",
    "DISPATCH_ON_LOSS",
    "DISPATCH_PREFORK_FD",
];

/// Most processes of a pool.
pub const MAX_PROCESSES: u32 = 1024;

/// Most bytes of an `unavailable_response` file.
pub const MAX_UNAVAILABLE_RESPONSE: usize = 64 * 1024;

/// Most bytes of a configuration file. Real ones are far smaller; a wrong path (a device, a log)
/// fails at once.
const MAX_FILE: u64 = 4 * 1024 * 1024;

/// A complete, valid configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// The file that it was read from, if any.
    pub file: Option<PathBuf>,
    /// The socket to which workers connect.
    pub dispatch_socket: UnixEndpoint,
    /// The socket to which commands and monitoring connect.
    pub admin_socket: UnixEndpoint,
    /// The address for read-only HTTP over TCP.
    pub admin_http: Option<SocketAddr>,
    /// Host names accepted over TCP, in addition to `localhost` and the name of the machine.
    pub admin_http_hosts: Vec<String>,
    /// Advice to clients.
    pub advice: AdviceSettings,
    /// The directory of the relay.
    pub relay: RelaySettings,
    /// In file order; `pool` of each is an index into `pools`.
    pub listeners: Vec<Listener>,
    /// In file order (a listener's `ListenerSettings::pool` refers to this order).
    pub pools: Vec<Pool>,
    /// Bounds and timeouts of the dispatcher itself.
    pub limits: Limits,
    /// The directory on bpffs with which the kernel's choice outlives the dispatcher.
    pub steer_pins: Option<PathBuf>,
    /// Values that are valid but probably wrong, such as a user that does not exist.
    pub warnings: Vec<Warning>,
}

impl Config {
    /// Reads and checks a configuration file.
    ///
    /// Relative paths are kept; they are relative to the working directory of the dispatcher.
    ///
    /// # Errors
    /// [`ConfigError`] if the file cannot be read or has mistakes; all of them are reported.
    pub fn load(path: &Path) -> Result<Config, ConfigError> {
        let text = text_of(path)?;
        let config = Config::parse(&text, &path.display().to_string())?;
        Ok(Config { file: Some(path.to_owned()), ..config })
    }

    /// Checks a configuration in memory; `file_name` is its name in errors.
    ///
    /// # Errors
    /// [`ConfigError`] with every mistake.
    pub fn parse(text: &str, file_name: &str) -> Result<Config, ConfigError> {
        let source = error::Source { file: file_name, text };
        let (file, mistakes) = read::read(&source);
        match file {
            Some(file) => validate::validate(file, mistakes, &source),
            None => Err(source.errors(mistakes, Vec::new())),
        }
    }

    /// Reads only `admin_socket`, for the client commands, and checks nothing else. It works while
    /// the rest of the file has mistakes.
    ///
    /// # Errors
    /// [`ConfigError`] if the file cannot be read, is not TOML, or has an invalid `admin_socket`.
    pub fn admin_source(path: &Path) -> Result<UnixSource, ConfigError> {
        let text = text_of(path)?;
        let source = error::Source { file: &path.display().to_string(), text: &text };
        let socket = read::admin_socket(&source)?;
        address::unix_source(socket, DEFAULT_ADMIN_SOCKET, "admin_socket")
            .map_err(|mistake| source.error(mistake))
    }
}

fn text_of(path: &Path) -> Result<String, ConfigError> {
    use std::io::{self, Read};

    let unreadable =
        |error: io::Error| ConfigError::Unreadable { file: path.display().to_string(), error };
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(unreadable)?;
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(unreadable(io::Error::new(
            io::ErrorKind::InvalidData,
            "longer than 4 MiB: this is not a configuration file",
        )));
    }
    String::from_utf8(bytes).map_err(|_| {
        unreadable(io::Error::new(
            io::ErrorKind::InvalidData,
            "not UTF-8 text: this is not a configuration file",
        ))
    })
}

/// A Unix socket, and its permissions if the dispatcher creates it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnixEndpoint {
    /// A path, or an inherited socket.
    pub source: UnixSource,
    /// Permission bits.
    pub mode: u32,
    /// Owner, if not the user of the dispatcher.
    pub user: Option<u32>,
    /// Group, if not the group of the dispatcher.
    pub group: Option<u32>,
}

/// The origin of a Unix socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UnixSource {
    /// Created by the dispatcher at this path.
    Path(PathBuf),
    /// Inherited from systemd under this `FileDescriptorName=`.
    Systemd(String),
}

/// A listener.
#[derive(Clone, Debug)]
pub struct Listener {
    /// Unique name.
    pub name: String,
    /// The address as written in the file.
    pub address_text: String,
    /// The address to which clients connect.
    pub address: Address,
    /// Index of its pool in [`Config::pools`].
    pub pool: u16,
    /// The address that advice gives to clients, if not the bound one.
    pub advertise: Option<String>,
    /// Socket options.
    pub options: ListenerOptions,
    /// Access rules for clients.
    pub access_rules: AccessRules,
    /// Rules about headers of the PROXY protocol, with `proxy_protocol`.
    pub proxy: Option<ProxyRules>,
}

/// The address of a listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// TCP, IPv4 or IPv6.
    Tcp(SocketAddr),
    /// A Unix socket that the dispatcher creates: `unix:/run/app.sock`.
    Unix(PathBuf),
    /// Inherited from systemd: `systemd:NAME`.
    Systemd(String),
}

impl std::fmt::Display for Address {
    /// As it is written in the configuration.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Address::Tcp(address) => address.fmt(f),
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Systemd(name) => write!(f, "systemd:{name}"),
        }
    }
}

/// Options set on the listening socket; accepted connections inherit the TCP ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenerOptions {
    /// Length of the kernel's accept queue; the kernel caps it at `net.core.somaxconn`. Default
    /// 4096.
    pub backlog: u32,
    /// Accept only IPv6 on an IPv6 address. Default false: `[::]` accepts IPv4 too.
    pub ipv6_only: bool,
    /// TCP_NODELAY. Default true.
    pub nodelay: bool,
    /// SO_KEEPALIVE with this TCP_KEEPIDLE. Default none.
    pub keepalive: Option<Duration>,
    /// TCP_KEEPINTVL.
    pub keepalive_interval: Option<Duration>,
    /// TCP_KEEPCNT.
    pub keepalive_count: Option<u32>,
    /// TCP_USER_TIMEOUT.
    pub user_timeout: Option<Duration>,
    /// TCP_DEFER_ACCEPT.
    pub defer_accept: Option<Duration>,
    /// TCP_FASTOPEN queue length.
    pub fast_open: Option<u32>,
    /// SO_RCVBUF, bytes.
    pub receive_buffer: Option<u32>,
    /// SO_SNDBUF, bytes.
    pub send_buffer: Option<u32>,
    /// SO_REUSEPORT. Default false.
    pub reuse_port: bool,
    /// Only bind the address: the processes of the pool inherit listeners of their own there. Not a
    /// key; it follows from the pool.
    pub bind_only: bool,
    /// IP_FREEBIND: bind an address that the machine does not have yet. Default false.
    pub free_bind: bool,
    /// Permission bits of a Unix listener. Default 0o666.
    pub mode: u32,
}

impl Default for ListenerOptions {
    fn default() -> ListenerOptions {
        ListenerOptions {
            backlog: 4096,
            ipv6_only: false,
            nodelay: true,
            keepalive: None,
            keepalive_interval: None,
            keepalive_count: None,
            user_timeout: None,
            defer_accept: None,
            fast_open: None,
            receive_buffer: None,
            send_buffer: None,
            reuse_port: false,
            bind_only: false,
            free_bind: false,
            mode: 0o666,
        }
    }
}

/// A pool: the settings of the core, and those that only the event loop needs.
#[derive(Clone, Debug, PartialEq)]
pub struct Pool {
    /// The settings of the core.
    pub settings: PoolSettings,
    /// Contents of the file `unavailable_response`, read at load; at most 64 KiB.
    pub unavailable_response: Option<Arc<[u8]>>,
    /// The processes that the dispatcher starts.
    pub spawn: Option<Spawn>,
    /// Where HAProxy's agent check is answered: TCP, or inherited from systemd.
    pub agent_listen: Option<Address>,
    /// The socket for workers of the line protocol.
    pub line: Option<LineSocket>,
    /// With `mode = "steer"`.
    pub steer: Option<Steer>,
}

impl Pool {
    /// Whether the pool's processes serve on when the dispatcher ends.
    pub fn serves_without_dispatcher(&self) -> bool {
        let action = self.spawn.as_ref().map(|spawn| spawn.on_dispatcher_loss);
        action == Some(OnDispatcherLoss::Serve)
    }
}

/// Processes that the dispatcher keeps running for a pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spawn {
    /// Program and arguments; at least the program. With placeholders (see [`expand`]), like the
    /// values of `environment`, and `directory`.
    pub command: Vec<String>,
    /// The number of processes.
    #[serde(skip)]
    pub processes: u32,
    /// `fork`: one process loads the application and forks the others. Default false.
    pub fork: bool,
    /// Environment variables in addition to those of the dispatcher.
    pub environment: Vec<(String, String)>,
    /// Working directory, if not that of the dispatcher.
    pub directory: Option<String>,
    /// Account, permissions, limits and output.
    pub setup: ProcessSetup,
    /// `max_memory` in bytes: a process that uses more is replaced.
    pub max_memory: Option<u64>,
    /// `on_dispatcher_loss`. Default [`OnDispatcherLoss::Drain`].
    pub on_dispatcher_loss: OnDispatcherLoss,
    /// Where the processes listen, in a steered pool: `{addr}`.
    #[serde(default)]
    pub address: Option<IpAddr>,
    /// `ready_check`. Default [`ReadyCheck::Tcp`].
    #[serde(default)]
    pub ready_check: ReadyCheck,
}

impl Spawn {
    /// Whether processes started from these settings are as those started from `other`. Their
    /// number and their check do not matter.
    pub fn starts_like(&self, other: &Spawn) -> bool {
        let Spawn { processes, ready_check, .. } = other;
        *other == Spawn { processes: *processes, ready_check: ready_check.clone(), ..self.clone() }
    }
}

/// When the worker of a process that replaces another one is ready.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ReadyCheck {
    /// As soon as it has joined.
    None,
    /// When its application has taken a connection.
    #[default]
    Tcp,
    /// When its application has answered a `GET` for this path with a status from 200 to 399.
    Http(String),
}

/// What a spawned worker does when the dispatcher ends without an order to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnDispatcherLoss {
    /// It serves on and joins the next dispatcher.
    Serve,
    /// It takes no more connections and ends with its last one. The default: it needs nothing from
    /// the service manager, and old and new workers never take connections at the same time.
    #[default]
    Drain,
    /// It shuts its connections down and ends.
    Stop,
}

impl OnDispatcherLoss {
    /// The name in the configuration and in `DISPATCH_ON_LOSS`.
    pub fn name(self) -> &'static str {
        match self {
            OnDispatcherLoss::Serve => "serve",
            OnDispatcherLoss::Drain => "drain",
            OnDispatcherLoss::Stop => "stop",
        }
    }
}

/// Bounds and timeouts of the dispatcher itself; top-level keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// `accept_batch`: most connections accepted from one listener in one turn. Default 64.
    pub accept_batch: u32,
    /// `hello_timeout`: longest wait for the hello of a new control connection. Default 2 s.
    pub hello_timeout: Duration,
    /// `max_pending_hellos`: most control connections of one user without a hello. Default 64.
    pub max_pending_hellos: u32,
    /// `stop_timeout`: longest wait of a stop for connections in flight, and then for spawned
    /// processes to end. Default 10 s.
    pub stop_timeout: Duration,
    /// `resource_pause`: pause of accepting after EMFILE and similar errors. Default 100 ms.
    pub resource_pause: Duration,
    /// `busy_poll`: time after an event in which the event loop polls without sleeping. Default
    /// zero.
    pub busy_poll: Duration,
    /// `fault_history`: number of faults in the status. Default 50.
    pub fault_history: u32,
    /// `log_level`: the log level, unless `DISPATCHER_LOG` is set. Default info.
    pub log_level: log::LevelFilter,
    /// `max_handshakes`: most control connections without an answer, over all users. Default 256.
    pub max_handshakes: u32,
    /// `connect_rate`: most control connections accepted per second. Default 2,000.
    pub connect_rate: u32,
    /// `join_rate`: most control connections of one user per second, on average. Default 50.
    pub join_rate: u32,
    /// `join_burst`: most control connections of one user at once. Default 1,000.
    pub join_burst: u32,
    /// `admin_rate`: most HTTP requests of one user per second, on average; more are delayed.
    /// Default 200.
    pub admin_rate: u32,
    /// `closing_threads`: most threads for closes that linger and other calls that may block.
    /// Default 16.
    pub closing_threads: u32,
    /// `max_closing`: most descriptors that wait to be closed before their linger is cleared; at
    /// twice as many, accepting pauses. Default 1,024.
    pub max_closing: u32,
    /// `metrics_max_workers`: most workers with metrics of their own. Default 256.
    pub metrics_max_workers: u32,
    /// `relay_ticket_key`: the file with the key that signs tickets for the relay's directory.
    /// Default: no tickets.
    pub relay_ticket_key: Option<PathBuf>,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            accept_batch: 64,
            hello_timeout: Duration::from_secs(2),
            max_pending_hellos: 64,
            stop_timeout: Duration::from_secs(10),
            resource_pause: Duration::from_millis(100),
            busy_poll: Duration::ZERO,
            fault_history: 50,
            log_level: log::LevelFilter::Info,
            max_handshakes: 256,
            connect_rate: 2_000,
            join_rate: 50,
            join_burst: 1_000,
            admin_rate: 200,
            closing_threads: 16,
            max_closing: 1_024,
            metrics_max_workers: 256,
            relay_ticket_key: None,
        }
    }
}
