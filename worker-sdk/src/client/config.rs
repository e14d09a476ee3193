//! The settings of a worker: defaults, sources (file, environment) and checks.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::clock;
use super::dispatchers;
use super::error::Error;
use super::sample::Sampling;
use dispatch_protocol::wire::{MAX_NAME, Token, is_hidden, is_name};

/// File descriptors that the default of `max_connections` leaves for the rest of the program.
const FD_RESERVE: u64 = 64;

/// A shorter interval would mostly measure the sampler.
const MIN_SAMPLE: Duration = Duration::from_millis(10);

/// What a worker does when its dispatcher ends without an order to it: after a crash, and at a
/// restart that leaves the workers alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnDispatcherLoss {
    /// It continues with its connections, and joins the next dispatcher. A process that the
    /// dispatcher has started and drained, as before an orderly stop, finishes its connections and
    /// ends instead.
    #[default]
    Serve,
    /// It takes no more connections, as after a [close](crate::Worker::close) at the end of a
    /// drain: the callbacks of [`on_drain`](crate::Worker::on_drain) run,
    /// [`accept`](crate::Worker::accept) returns `None`, and the application finishes its
    /// connections and ends. The worker does not join again.
    Drain,
    /// As `Drain`, and all connections are shut down at once, so that reads and writes on them end:
    /// a thread of the SDK waits for the loss. If the dispatcher had begun to drain
    /// this worker, as before an orderly stop, they continue until the deadline of the drain.
    Stop,
}

/// Settings of a worker that joins a dispatcher, or listens itself.
///
/// Every field has a default, and a method of the same name that sets it. Creating a worker checks
/// the settings.
///
/// ```
/// use std::time::Duration;
/// use worker_sdk::WorkerConfig;
///
/// let config = WorkerConfig::new()
///     .dispatch_socket("/run/dispatcher/dispatch.sock")
///     .pool("web")
///     .name("web-1")
///     .weight(2) // Twice the share of weight 1.
///     .priority(0)
///     .max_connections(1000)
///     .join_timeout(Duration::from_secs(30))
///     .reconnect(Duration::from_millis(50), Duration::from_secs(5))
///     .sample(worker_sdk::Sampling::Auto, Duration::from_secs(1))
///     .on_dispatcher_loss(worker_sdk::OnDispatcherLoss::Serve);
/// assert_eq!(config.pool, "web");
/// ```
///
/// The settings can be part of the application's own configuration. Unknown keys are errors;
/// durations are strings as in the dispatcher's configuration: `"250ms"`, `"10s"`, `"1m 30s"`. The
/// settings can also be written, for example to show the values in force; the secret token is left
/// out.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// #[derive(serde::Deserialize)]
/// struct MyConfig {
///     greeting: String,
///     worker: worker_sdk::WorkerConfig,
/// }
///
/// let config: MyConfig = toml::from_str(r#"
///     greeting = "hello"
///
///     [worker]
///     dispatch_socket = "/run/dispatcher/dispatch.sock"
///     pool = "web"
///     join_timeout = "30s"
/// "#)?;
/// assert_eq!(config.worker.weight, 1);
/// # assert_eq!(config.greeting, "hello");
///
/// // The environment has priority, so that a dispatcher can start this program.
/// let config = config.worker.with_env()?;
/// # let _ = config;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct WorkerConfig {
    /// The path of the dispatch socket. Several paths, at most 16, are separated by `:`: they are
    /// tried in order, and a worker stays with the dispatcher that it has joined until it loses it.
    /// `DISPATCH_SOCKET`. Default: none, which needs `listen`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dispatch_socket: Option<PathBuf>,
    /// The pool to join: 1 to 64 bytes without spaces. `DISPATCH_POOL`. Default: `default`.
    pub pool: String,
    /// A name for people, in status and logs. `DISPATCH_NAME`. Default: `<program>-<pid>`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Share of the load relative to the pool's other workers, 1 to 65,535. `DISPATCH_WEIGHT`.
    /// Default: 1.
    pub weight: u16,
    /// For pools that prefer some workers; higher first. `DISPATCH_PRIORITY`. Default: 0.
    pub priority: u16,
    /// The largest number of connections at once, at least 1. `DISPATCH_MAX_CONNECTIONS`. Default:
    /// the soft limit of open files less 64, read when the worker is created; the SDK does not
    /// change the limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_connections: Option<u32>,
    /// An address at which clients reach this worker itself, beside the listeners of the
    /// dispatcher, for advice to clients: `203.0.113.5:443`, `[2001:db8::5]:443` or
    /// `host.example.org:443`; no wildcard. `DISPATCH_ADVERTISE`. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advertise: Option<String>,
    /// The address to listen on without a dispatch socket: `127.0.0.1:8080`, `[::]:8080` or
    /// `unix:/path`. Ignored with a dispatch socket. `DISPATCH_LISTEN`. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen: Option<String>,
    /// The longest time for the first join. `DISPATCH_JOIN_TIMEOUT`. Default: none; the worker
    /// waits for the dispatcher without limit.
    #[serde(deserialize_with = "optional_duration", serialize_with = "write_optional_duration")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub join_timeout: Option<Duration>,
    /// The wait after a dispatcher has refused this worker. It doubles with every further refusal.
    /// While no dispatcher listens, the worker tries again every 100 ms at most, however long that
    /// lasts. Each wait is shortened by up to half at random, so that workers do not return at the
    /// same time. Default: 50 ms; less than 1 ms counts as 1 ms.
    #[serde(deserialize_with = "duration", serialize_with = "write_duration")]
    pub reconnect_min: Duration,
    /// The longest wait between two attempts. Default: 5 s.
    #[serde(deserialize_with = "duration", serialize_with = "write_duration")]
    pub reconnect_max: Duration,
    /// Whether to measure the machine and this process for pools that score by it (gauges
    /// [`system_cpu`, `free_memory`, `process_cpu`,
    /// `process_rss`](dispatch_protocol::scoreboard::gauge::names)): `auto` (the gauges that the
    /// pool uses), `always` (all four) or `never`. A thread takes the samples. In a container the
    /// two system values are those of the host. `DISPATCH_SAMPLE`. Default: `auto`.
    pub sample: Sampling,
    /// The interval of these samples, at least 10 ms. `DISPATCH_SAMPLE_INTERVAL`. Default: 1 s.
    #[serde(deserialize_with = "duration", serialize_with = "write_duration")]
    pub sample_interval: Duration,
    /// What to do when the dispatcher is lost, that is, when it ends without an order to this
    /// worker: `serve`, `drain` or `stop`. `DISPATCH_ON_LOSS`. Default: `serve`; a dispatcher that
    /// starts this process sets the variable to the `on_dispatcher_loss` of its pool.
    pub on_dispatcher_loss: OnDispatcherLoss,
    /// Proof that the dispatcher started this process: 32 hexadecimal digits. `DISPATCH_TOKEN`.
    /// Default: none.
    #[serde(deserialize_with = "optional_token", skip_serializing)]
    pub token: Option<Token>,
}

impl Default for WorkerConfig {
    fn default() -> Self {
        WorkerConfig {
            dispatch_socket: None,
            pool: "default".to_owned(),
            name: None,
            weight: 1,
            priority: 0,
            advertise: None,
            max_connections: None,
            listen: None,
            join_timeout: None,
            reconnect_min: Duration::from_millis(50),
            reconnect_max: Duration::from_secs(5),
            sample: Sampling::Auto,
            sample_interval: Duration::from_secs(1),
            on_dispatcher_loss: OnDispatcherLoss::Serve,
            token: None,
        }
    }
}

impl WorkerConfig {
    /// The defaults. They have neither a dispatch socket nor an address to listen on.
    pub fn new() -> WorkerConfig {
        WorkerConfig::default()
    }

    /// Defaults, overridden by the environment; see [`with_env`](WorkerConfig::with_env).
    ///
    /// # Errors
    /// [`Error::Config`] has the variable and the problem.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), worker_sdk::Error> {
    /// // DISPATCH_SOCKET=/run/dispatcher/dispatch.sock DISPATCH_POOL=web ./my-server
    /// let worker = worker_sdk::Worker::connect(worker_sdk::WorkerConfig::from_env()?)?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn from_env() -> Result<WorkerConfig, Error> {
        WorkerConfig::default().with_env()
    }

    /// Overrides settings with the environment: `DISPATCH_SOCKET`, `DISPATCH_POOL`,
    /// `DISPATCH_NAME`, `DISPATCH_WEIGHT`, `DISPATCH_PRIORITY`, `DISPATCH_MAX_CONNECTIONS`,
    /// `DISPATCH_LISTEN`, `DISPATCH_JOIN_TIMEOUT`, `DISPATCH_SAMPLE`, `DISPATCH_SAMPLE_INTERVAL`,
    /// `DISPATCH_ON_LOSS`, `DISPATCH_TOKEN`. An empty variable counts as not set. Later calls
    /// override the environment.
    ///
    /// # Errors
    /// [`Error::Config`] has the variable and the problem.
    ///
    /// ```
    /// # fn main() -> Result<(), worker_sdk::Error> {
    /// // Without these variables, as on a developer's machine, the worker listens itself.
    /// let config = worker_sdk::WorkerConfig::new().listen("127.0.0.1:8080").with_env()?;
    /// assert!(config.listen.is_some());
    /// # Ok(())
    /// # }
    /// ```
    pub fn with_env(self) -> Result<WorkerConfig, Error> {
        self.with_variables(|name| std::env::var_os(name))
    }

    fn with_variables(
        mut self,
        variable: impl Fn(&str) -> Option<OsString>,
    ) -> Result<WorkerConfig, Error> {
        let raw = |name: &str| variable(name).filter(|value| !value.is_empty());
        let text = |name: &'static str| match raw(name).map(OsString::into_string) {
            None => Ok(None),
            Some(Ok(value)) => Ok(Some(value)),
            Some(Err(_)) => Err(Error::config(name, "is not valid UTF-8")),
        };
        if let Some(path) = raw("DISPATCH_SOCKET") {
            self.dispatch_socket = Some(path.into());
        }
        if let Some(pool) = text("DISPATCH_POOL")? {
            self.pool = checked_name("DISPATCH_POOL", pool)?;
        }
        if let Some(name) = text("DISPATCH_NAME")? {
            self.name = Some(checked_name("DISPATCH_NAME", name)?);
        }
        if let Some(weight) = text("DISPATCH_WEIGHT")? {
            self.weight = number("DISPATCH_WEIGHT", &weight, 1, u16::MAX)?;
        }
        if let Some(priority) = text("DISPATCH_PRIORITY")? {
            self.priority = number("DISPATCH_PRIORITY", &priority, 0, u16::MAX)?;
        }
        if let Some(max) = text("DISPATCH_MAX_CONNECTIONS")? {
            self.max_connections = Some(number("DISPATCH_MAX_CONNECTIONS", &max, 1, u32::MAX)?);
        }
        if let Some(advertise) = text("DISPATCH_ADVERTISE")? {
            self.advertise = Some(checked_address("DISPATCH_ADVERTISE", advertise)?);
        }
        if let Some(listen) = text("DISPATCH_LISTEN")? {
            self.listen = Some(listen);
        }
        if let Some(sample) = text("DISPATCH_SAMPLE")? {
            self.sample = match sample.as_str() {
                "auto" => Sampling::Auto,
                "always" => Sampling::Always,
                "never" => Sampling::Never,
                _ => {
                    let problem = format!("{sample:?} is not auto, always or never");
                    return Err(Error::config("DISPATCH_SAMPLE", problem));
                }
            };
        }
        if let Some(interval) = text("DISPATCH_SAMPLE_INTERVAL")? {
            let parsed = parse_duration(&interval).and_then(|parsed| match parsed {
                short if short < MIN_SAMPLE => Err(format!("`{interval}` is less than 10ms")),
                parsed => Ok(parsed),
            });
            self.sample_interval =
                parsed.map_err(|problem| Error::config("DISPATCH_SAMPLE_INTERVAL", problem))?;
        }
        if let Some(timeout) = text("DISPATCH_JOIN_TIMEOUT")? {
            let parsed = parse_duration(&timeout)
                .map_err(|problem| Error::config("DISPATCH_JOIN_TIMEOUT", problem))?;
            self.join_timeout = Some(parsed);
        }
        if let Some(loss) = text("DISPATCH_ON_LOSS")? {
            self.on_dispatcher_loss = match loss.as_str() {
                "serve" => OnDispatcherLoss::Serve,
                "drain" => OnDispatcherLoss::Drain,
                "stop" => OnDispatcherLoss::Stop,
                _ => {
                    let problem = format!("{loss:?} is not serve, drain or stop");
                    return Err(Error::config("DISPATCH_ON_LOSS", problem));
                }
            };
        }
        if let Some(token) = text("DISPATCH_TOKEN")? {
            let parsed = token.parse::<Token>();
            self.token = Some(parsed.map_err(|_| {
                // The value is a secret, so the message does not contain it.
                Error::config("DISPATCH_TOKEN", "is not 32 hexadecimal digits")
            })?);
        }
        Ok(self)
    }

    /// Sets [`dispatch_socket`](WorkerConfig::dispatch_socket).
    #[must_use]
    pub fn dispatch_socket(mut self, path: impl Into<PathBuf>) -> Self {
        self.dispatch_socket = Some(path.into());
        self
    }

    /// Sets [`pool`](WorkerConfig::pool).
    #[must_use]
    pub fn pool(mut self, pool: impl Into<String>) -> Self {
        self.pool = pool.into();
        self
    }

    /// Sets [`name`](WorkerConfig::name).
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Sets [`weight`](WorkerConfig::weight).
    #[must_use]
    pub fn weight(mut self, weight: u16) -> Self {
        self.weight = weight;
        self
    }

    /// Sets [`priority`](WorkerConfig::priority).
    #[must_use]
    pub fn priority(mut self, priority: u16) -> Self {
        self.priority = priority;
        self
    }

    /// Sets [`max_connections`](WorkerConfig::max_connections).
    #[must_use]
    pub fn max_connections(mut self, max: u32) -> Self {
        self.max_connections = Some(max);
        self
    }

    /// Sets [`advertise`](WorkerConfig::advertise).
    #[must_use]
    pub fn advertise(mut self, address: impl Into<String>) -> Self {
        self.advertise = Some(address.into());
        self
    }

    /// Sets [`listen`](WorkerConfig::listen).
    ///
    /// ```
    /// # fn main() -> Result<(), worker_sdk::Error> {
    /// let config = worker_sdk::WorkerConfig::new().listen("127.0.0.1:0"); // Any free port.
    /// let worker = worker_sdk::Worker::connect(config)?;
    /// println!("serving {:?}", worker.local_addr());
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn listen(mut self, address: impl Into<String>) -> Self {
        self.listen = Some(address.into());
        self
    }

    /// Sets [`join_timeout`](WorkerConfig::join_timeout).
    #[must_use]
    pub fn join_timeout(mut self, timeout: Duration) -> Self {
        self.join_timeout = Some(timeout);
        self
    }

    /// Sets [`reconnect_min`](WorkerConfig::reconnect_min) and
    /// [`reconnect_max`](WorkerConfig::reconnect_max).
    #[must_use]
    pub fn reconnect(mut self, min: Duration, max: Duration) -> Self {
        (self.reconnect_min, self.reconnect_max) = (min, max);
        self
    }

    /// Sets [`sample`](WorkerConfig::sample) and
    /// [`sample_interval`](WorkerConfig::sample_interval).
    #[must_use]
    pub fn sample(mut self, sampling: Sampling, interval: Duration) -> Self {
        (self.sample, self.sample_interval) = (sampling, interval);
        self
    }

    /// Sets [`on_dispatcher_loss`](WorkerConfig::on_dispatcher_loss).
    #[must_use]
    pub fn on_dispatcher_loss(mut self, action: OnDispatcherLoss) -> Self {
        self.on_dispatcher_loss = action;
        self
    }

    /// Sets [`token`](WorkerConfig::token). Rarely necessary: [`with_env`](WorkerConfig::with_env)
    /// sets it.
    ///
    /// ```
    /// # fn main() -> Result<(), dispatch_protocol::wire::WireError> {
    /// let token = "00112233445566778899aabbccddeeff".parse()?;
    /// let config = worker_sdk::WorkerConfig::new().token(token);
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn token(mut self, token: Token) -> Self {
        self.token = Some(token);
        self
    }

    /// Checks every field, so that the dispatcher does not have to refuse it.
    pub(crate) fn check(&self) -> Result<(), Error> {
        checked_name("pool", self.pool.clone())?;
        if let Some(name) = &self.name {
            checked_name("name", name.clone())?;
        }
        if let Some(advertise) = &self.advertise {
            checked_address("advertise", advertise.clone())?;
        }
        if self.weight == 0 {
            return Err(Error::config("weight", "is 0; the smallest share is 1"));
        }
        if self.max_connections == Some(0) {
            return Err(Error::config("max_connections", "is 0; a worker holds at least 1"));
        }
        if self.reconnect_min.is_zero() || self.reconnect_min > self.reconnect_max {
            return Err(Error::config(
                "reconnect_min",
                "must be more than 0 and at most reconnect_max",
            ));
        }
        if self.sample_interval < MIN_SAMPLE {
            return Err(Error::config("sample_interval", "must be at least 10 ms"));
        }
        self.dispatch_socket.as_deref().map_or(Ok(()), dispatchers::check)?;
        if self.dispatch_socket.is_none() && self.listen.is_none() {
            return Err(Error::config(
                "dispatch_socket",
                "not set: set DISPATCH_SOCKET (or dispatch_socket) to the dispatcher's socket, \
                 or DISPATCH_LISTEN (or listen) to an address to serve without a dispatcher",
            ));
        }
        Ok(())
    }

    /// The name for the hello: the configured one, or program name and pid.
    pub(crate) fn effective_name(&self) -> String {
        match &self.name {
            Some(name) => name.clone(),
            None => default_name(std::env::current_exe().ok().as_deref(), std::process::id()),
        }
    }

    pub(crate) fn effective_max_connections(&self) -> u32 {
        self.max_connections.unwrap_or_else(|| {
            let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
            let room = limit.unwrap_or(u64::MAX).saturating_sub(FD_RESERVE).max(1);
            u32::try_from(room).unwrap_or(u32::MAX)
        })
    }
}

fn default_name(program: Option<&Path>, pid: u32) -> String {
    let suffix = format!("-{pid}");
    let program = program.and_then(Path::file_name).unwrap_or_default();
    let mut name = String::new();
    for c in program.to_string_lossy().chars() {
        let c = if c.is_whitespace() || is_hidden(c) { '_' } else { c };
        if name.len() + c.len_utf8() + suffix.len() > MAX_NAME {
            break;
        }
        name.push(c);
    }
    if name.is_empty() {
        name.push_str("worker");
    }
    name + &suffix
}

fn checked_name(setting: &'static str, name: String) -> Result<String, Error> {
    if is_name(&name) {
        Ok(name)
    } else {
        let problem =
            format!("{name:?} is not 1 to {MAX_NAME} bytes of visible characters without spaces");
        Err(Error::config(setting, problem))
    }
}

/// An address that others can connect to: with a port, and no wildcard.
fn checked_address(setting: &'static str, address: String) -> Result<String, Error> {
    let specific =
        |ip: std::net::IpAddr, port: u16| !ip.to_canonical().is_unspecified() && port > 0;
    let good = match address.parse::<std::net::SocketAddr>() {
        Ok(parsed) => specific(parsed.ip(), parsed.port()),
        Err(_) => address.rsplit_once(':').is_some_and(|(host, port)| {
            let letters = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
            let named = host.bytes().any(|b| b.is_ascii_alphabetic()) && host.bytes().all(letters);
            named && host.len() <= 253 && port.parse::<u16>().is_ok_and(|port| port > 0)
        }),
    };
    match good {
        true => Ok(address),
        false => {
            let problem = format!("{address:?} is not an address that clients can connect to");
            Err(Error::config(setting, problem))
        }
    }
}

fn number<T>(setting: &'static str, text: &str, min: T, max: T) -> Result<T, Error>
where
    T: std::str::FromStr + PartialOrd + fmt::Display,
{
    match text.parse::<T>() {
        Ok(value) if value >= min => Ok(value),
        _ => Err(Error::config(
            setting,
            format!("{text:?} is not a whole number from {min} to {max}"),
        )),
    }
}

/// The durations of the dispatcher's configuration: `250ms`, `10s`, `1m 30s`, `2h`.
fn parse_duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|error| {
        format!(
            "`{text}` is not a duration: {error}; write a number and its unit, such as \"200ms\", \"10s\" or \"1m 30s\""
        )
    })
}

fn duration<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    struct Visitor;
    impl serde::de::Visitor<'_> for Visitor {
        type Value = Duration;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a duration with its unit, such as \"200ms\" or \"10s\"")
        }
        fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Duration, E> {
            parse_duration(text).map_err(E::custom)
        }
    }
    deserializer.deserialize_any(Visitor)
}

fn write_duration<S: serde::Serializer>(
    duration: &Duration,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    // The output must be readable again, and years are the largest unit.
    let duration = clock::bounded(*duration);
    serializer.collect_str(&humantime::format_duration(duration))
}

fn write_optional_duration<S: serde::Serializer>(
    duration: &Option<Duration>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match duration {
        Some(duration) => write_duration(duration, serializer),
        None => serializer.serialize_none(),
    }
}

fn optional_duration<'de, D>(deserializer: D) -> Result<Option<Duration>, D::Error>
where
    D: serde::Deserializer<'de>,
{
    #[derive(Deserialize)]
    struct Wrapped(#[serde(deserialize_with = "duration")] Duration);
    Ok(Option::<Wrapped>::deserialize(deserializer)?.map(|wrapped| wrapped.0))
}

fn optional_token<'de, D>(deserializer: D) -> Result<Option<Token>, D::Error>
where
    D: serde::Deserializer<'de>,
{
    let Some(text) = Option::<String>::deserialize(deserializer)? else {
        return Ok(None);
    };
    // The value is a secret, so the message does not contain it.
    text.parse()
        .map(Some)
        .map_err(|_| serde::de::Error::custom("token is not 32 hexadecimal digits"))
}

#[cfg(test)]
mod tests;
