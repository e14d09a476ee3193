//! The settings of a relay.

use std::path::PathBuf;
use std::time::Duration;

use dispatch_protocol::relay::Name;
use dispatch_protocol::relay::ticket::MAX_TICKET;

use super::engine::Settings;
use super::queue::Capacity;
use super::{Error, milliseconds};

/// Settings of a [`Relay`](super::Relay). Every field has a default, and a method of the same name.
///
/// ```
/// use std::time::Duration;
/// use worker_sdk::relay::RelayConfig;
///
/// let config = RelayConfig::new()
///     .socket("/run/dispatcher/relay.sock")
///     .namespace("chat")
///     .name("web-1")
///     .timeout(Duration::from_secs(5))
///     .queue(256);
/// ```
#[derive(Clone, Debug)]
#[must_use]
pub struct RelayConfig {
    socket: PathBuf,
    namespace: String,
    name: Option<String>,
    ticket: Vec<u8>,
    timeout: Duration,
    join_timeout: Duration,
    queue: usize,
    queue_bytes: usize,
    queues_bytes: usize,
    window: usize,
    link_bytes: usize,
    waiting: usize,
    recipient_bytes: usize,
    waiting_bytes: usize,
    routes: usize,
    requests: usize,
    group_ttl: Duration,
}

/// Checked settings.
#[derive(Clone, Debug)]
pub(crate) struct Checked {
    pub(super) socket: PathBuf,
    pub(super) namespace: Name,
    pub(super) name: Name,
    pub(super) ticket: Vec<u8>,
    pub(super) join_timeout: Duration,
    pub(super) queue: Capacity,
    pub(super) queues_bytes: usize,
    pub(super) settings: Settings,
}

impl Default for RelayConfig {
    fn default() -> Self {
        RelayConfig {
            socket: "/run/dispatcher/relay.sock".into(),
            namespace: "default".to_owned(),
            name: None,
            ticket: Vec::new(),
            timeout: Duration::from_secs(5),
            join_timeout: Duration::from_secs(10),
            queue: 1024,
            queue_bytes: 8 * 1024 * 1024,
            queues_bytes: 256 * 1024 * 1024,
            window: 8192,
            link_bytes: 8 * 1024 * 1024,
            waiting: 1024,
            recipient_bytes: 4 * 1024 * 1024,
            waiting_bytes: 16 * 1024 * 1024,
            routes: 65_536,
            requests: 65_536,
            group_ttl: Duration::from_secs(60),
        }
    }
}

impl RelayConfig {
    /// The defaults.
    pub fn new() -> RelayConfig {
        RelayConfig::default()
    }

    /// Takes `socket` from `DISPATCH_RELAY_SOCKET`, `namespace` from `DISPATCH_RELAY_NAMESPACE` and
    /// `name` from `DISPATCH_NAME`, where they are set.
    pub fn with_env(mut self) -> RelayConfig {
        let text = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        if let Some(path) = std::env::var_os("DISPATCH_RELAY_SOCKET").filter(|p| !p.is_empty()) {
            self.socket = path.into();
        }
        if let Some(namespace) = text("DISPATCH_RELAY_NAMESPACE") {
            self.namespace = namespace;
        }
        self.name = text("DISPATCH_NAME").or(self.name);
        self
    }

    /// The directory's socket. Default: `/run/dispatcher/relay.sock`.
    pub fn socket(mut self, path: impl Into<PathBuf>) -> RelayConfig {
        self.socket = path.into();
        self
    }

    /// The namespace. Default: `default`.
    pub fn namespace(mut self, namespace: impl Into<String>) -> RelayConfig {
        self.namespace = namespace.into();
        self
    }

    /// The name of this worker in presence. Default: `pid-` and the process id.
    pub fn name(mut self, name: impl Into<String>) -> RelayConfig {
        self.name = Some(name.into());
        self
    }

    /// The ticket of the pool, from `relay_ticket` of the worker. A namespace that is open to users
    /// needs none.
    pub fn ticket(mut self, ticket: Option<Vec<u8>>) -> RelayConfig {
        self.ticket = ticket.unwrap_or_default();
        self
    }

    /// How long the outcome of a message may take before it is `Lost`. It should be longer than the
    /// directory's `grace`. Default: 5 s.
    pub fn timeout(mut self, timeout: Duration) -> RelayConfig {
        self.timeout = timeout;
        self
    }

    /// How long `connect` waits for a directory. Default: 10 s.
    pub fn join_timeout(mut self, timeout: Duration) -> RelayConfig {
        self.join_timeout = timeout;
        self
    }

    /// Messages in the queue of one registration, membership or watch. Default: 1,024.
    pub fn queue(mut self, messages: usize) -> RelayConfig {
        self.queue = messages;
        self
    }

    /// Bytes in the queue of one registration, membership or watch. One message may exceed it.
    /// Default: 8 MiB.
    pub fn queue_bytes(mut self, bytes: usize) -> RelayConfig {
        self.queue_bytes = bytes;
        self
    }

    /// Bytes in the queues of all registrations, memberships and watches together. Default: 256
    /// MiB.
    pub fn queues_bytes(mut self, bytes: usize) -> RelayConfig {
        self.queues_bytes = bytes;
        self
    }

    /// Messages that wait for an outcome at one other worker. Default: 8,192.
    pub fn window(mut self, messages: usize) -> RelayConfig {
        self.window = messages;
        self
    }

    /// Bytes that wait to be sent to one other worker, and bytes that wait for an outcome there.
    /// One message may exceed it. Default: 8 MiB.
    pub fn link_bytes(mut self, bytes: usize) -> RelayConfig {
        self.link_bytes = bytes;
        self
    }

    /// Messages that wait for the place of one recipient, as during the grace. Default: 1,024.
    pub fn waiting(mut self, messages: usize) -> RelayConfig {
        self.waiting = messages;
        self
    }

    /// Bytes of these. One message may exceed it. Default: 4 MiB.
    pub fn recipient_bytes(mut self, bytes: usize) -> RelayConfig {
        self.recipient_bytes = bytes;
        self
    }

    /// Bytes of these for all recipients. Default: 16 MiB.
    pub fn waiting_bytes(mut self, bytes: usize) -> RelayConfig {
        self.waiting_bytes = bytes;
        self
    }

    /// Recipients and groups whose place is remembered. Default: 65,536 of each.
    pub fn routes(mut self, recipients: usize) -> RelayConfig {
        self.routes = recipients;
        self
    }

    /// Requests that wait for a reply. Default: 65,536.
    pub fn requests(mut self, requests: usize) -> RelayConfig {
        self.requests = requests;
        self
    }

    /// How long the members of a group are remembered to which nothing is sent; at least `timeout`.
    /// Default: 60 s.
    pub fn group_ttl(mut self, time: Duration) -> RelayConfig {
        self.group_ttl = time;
        self
    }

    pub(super) fn check(self) -> Result<Checked, Error> {
        let wrong = |field: &str, problem: &str| Error::Config(format!("{field} {problem}"));
        let name = self.name.unwrap_or_else(|| format!("pid-{}", std::process::id()));
        let named = |field: &str, text: &str| {
            Name::new(text).map_err(|error| wrong(field, &format!("{text:?}: {error}")))
        };
        if self.ticket.len() > MAX_TICKET {
            return Err(wrong("ticket", "is too long; use what relay_ticket returns"));
        }
        for (field, value) in [
            ("queue", self.queue),
            ("queue_bytes", self.queue_bytes),
            ("queues_bytes", self.queues_bytes),
            ("requests", self.requests),
            ("window", self.window),
            ("link_bytes", self.link_bytes),
            ("waiting", self.waiting),
            ("routes", self.routes),
        ] {
            if value == 0 {
                return Err(wrong(field, "must not be 0"));
            }
        }
        let timeout = milliseconds(self.timeout);
        if timeout == 0 {
            return Err(wrong("timeout", "must be at least 1 ms"));
        }
        Ok(Checked {
            namespace: named("namespace", &self.namespace)?,
            name: named("name", &name)?,
            socket: self.socket,
            ticket: self.ticket,
            join_timeout: self.join_timeout,
            queue: Capacity { items: self.queue, bytes: self.queue_bytes },
            queues_bytes: self.queues_bytes,
            settings: Settings {
                window: self.window,
                link_bytes: self.link_bytes,
                waiting: self.waiting,
                recipient_bytes: self.recipient_bytes,
                waiting_bytes: self.waiting_bytes,
                routes: self.routes,
                requests: self.requests,
                // A message in flight may still need the members.
                group_ttl: milliseconds(self.group_ttl).max(timeout),
                timeout,
            },
        })
    }
}
