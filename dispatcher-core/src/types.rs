//! Identifiers, units and settings of the decision core: plain values.

use core::net::IpAddr;
use std::fmt;
use std::hash::Hasher;
use std::ops::{Add, Sub};
use std::time::Duration;

use super::supervise::Supervision;

use dispatch_protocol::ClientAddr;
use dispatch_protocol::wire::Token;
use siphasher::sip::SipHasher13;

use crate::affinity::key::KeySource;

mod scores;
mod why;

pub use scores::*;
pub use why::Why;

/// A moment: nanoseconds of a clock that never goes back (`CLOCK_MONOTONIC` in the event loop,
/// anything in a simulation).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(pub u64);

impl Add<Duration> for Time {
    type Output = Time;

    /// Saturates, so that an absurd configured duration means "never".
    fn add(self, duration: Duration) -> Time {
        Time(self.0.saturating_add(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)))
    }
}

impl Sub for Time {
    type Output = Duration;

    /// Zero when `earlier` is later.
    fn sub(self, earlier: Time) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

/// A pool, by its position in the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PoolId(pub u16);

/// A listener, by its position in the configuration. Handoffs carry it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ListenerId(pub u16);

/// A worker. `index` is dense and reused; `serial` counts joins from 1, is never reused, and is the
/// id shown to people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerId {
    /// Index in the core's tables and parallel ones.
    pub index: u32,
    /// The id shown to people.
    pub serial: u64,
}

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serial.fmt(f)
    }
}

/// A connection of which the dispatcher has a copy. `serial` counts accepts from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnId {
    /// Index in the core's tables and parallel ones; dense and reused.
    pub index: u32,
    /// The number shown in logs.
    pub serial: u64,
}

impl fmt::Display for ConnId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serial.fmt(f)
    }
}

/// One handoff or probe at a worker: slot and sequence number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket {
    /// Slot of the worker's scoreboard.
    pub slot: u32,
    /// Sequence number written there.
    pub seq: u64,
}

/// A hash that identifies a client: of its address, a cookie, or another configured source. The
/// same bytes give the same key in every dispatcher and after every restart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AffinityKey(pub u64);

impl AffinityKey {
    /// The key of these bytes.
    pub fn of(bytes: &[u8]) -> AffinityKey {
        // Fixed keys, so that a restarted or second dispatcher sends a client to the same worker.
        let mut hasher = SipHasher13::new_with_keys(0x6469_7370_6174_6368, 0x6166_6669_6e69_7479);
        hasher.write(bytes);
        AffinityKey(hasher.finish())
    }

    /// The key of a client's IP address; clients of a Unix listener have none.
    pub fn of_peer(peer: &ClientAddr) -> Option<AffinityKey> {
        Some(match peer.ip()? {
            IpAddr::V4(ip) => AffinityKey::of(&ip.octets()),
            IpAddr::V6(ip) => AffinityKey::of(&ip.octets()),
        })
    }
}

/// How the worker for a connection is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// Fewest live connections for its weight.
    #[default]
    LeastConnections,
    /// Each in turn, in proportion to its weight.
    RoundRobin,
    /// At random, in proportion to its weight.
    Random,
    /// The less loaded of two drawn at random.
    TwoChoices,
    /// The worker that the client's key belongs to.
    Hash,
    /// The least loaded worker of the highest priority that is up; the others stand by.
    Failover,
    /// Lowest score.
    LeastScore,
}

impl Policy {
    /// Every policy.
    pub const ALL: [Policy; 7] = [
        Policy::LeastConnections,
        Policy::RoundRobin,
        Policy::Random,
        Policy::TwoChoices,
        Policy::Hash,
        Policy::Failover,
        Policy::LeastScore,
    ];

    /// The name in the configuration and the status.
    pub fn name(self) -> &'static str {
        match self {
            Policy::LeastConnections => "least-connections",
            Policy::RoundRobin => "round-robin",
            Policy::Random => "random",
            Policy::TwoChoices => "two-choices",
            Policy::Hash => "hash",
            Policy::Failover => "failover",
            Policy::LeastScore => "least-score",
        }
    }

    /// A client's key if no affinity key is configured: its address for `hash`, else none.
    pub fn key_of(self, peer: &ClientAddr) -> Option<AffinityKey> {
        match self {
            Policy::Hash => AffinityKey::of_peer(peer),
            Policy::LeastConnections
            | Policy::RoundRobin
            | Policy::Random
            | Policy::TwoChoices
            | Policy::Failover
            | Policy::LeastScore => None,
        }
    }
}

/// Settings of a pool that the core needs. `config` makes them.
#[derive(Clone, Debug, PartialEq)]
pub struct PoolSettings {
    /// Unique name.
    pub name: String,
    /// Base policy.
    pub policy: Policy,
    /// Most live connections at one worker, at least 1.
    pub max_connections_per_worker: u32,
    /// Slots per worker: most connections sent and not yet taken, at least 1.
    pub max_untaken: u32,
    /// Most workers at once.
    pub max_workers: u32,
    /// How long a connection may stay untaken at a worker that usually takes quickly.
    pub handoff_timeout: Duration,
    /// The longest time a connection may stay untaken, however slow its worker usually is.
    pub max_handoff_timeout: Duration,
    /// How long clients wait while there is no usable worker.
    pub wait_for_worker: Duration,
    /// Terms of the score, for `least-score`.
    pub scores: Scores,
    /// Length of a slow start; zero for none.
    pub slow_start: Duration,
    /// Number of decisions that are recorded; 0 for none.
    pub history: u32,
    /// Number of workers that each recorded decision lists, at least 1.
    pub history_candidates: u32,
    /// Users and groups whose workers may join.
    pub access: AllowedAccounts,
    /// Affinity of clients, if configured.
    pub affinity: Option<Affinity>,
    /// Limits of awaiting first bytes, where `affinity` needs them.
    pub peek: Peek,
    /// Processes to keep running; 0 for none.
    pub processes: u32,
    /// The number of workers that are the whole capacity, for [`crate::advice::AgentAnswer`].
    /// `None`: `processes`, or without processes the workers that have joined.
    pub agent_workers: Option<u32>,
    /// How these processes are supervised.
    pub supervision: Supervision,
    /// The kernel chooses the workers of its connections: nothing is accepted from its listeners,
    /// and no worker can join by itself.
    pub steered: bool,
    /// The accept queues of steered workers can be moved: see [`super::Effect::MoveQueue`].
    pub queues_move: bool,
}

impl Default for PoolSettings {
    /// A pool without a name, with the defaults of the configuration, that no worker may join.
    fn default() -> PoolSettings {
        PoolSettings {
            name: String::new(),
            policy: Policy::default(),
            max_connections_per_worker: 10_000,
            max_untaken: 256,
            max_workers: 4096,
            handoff_timeout: Duration::from_millis(200),
            max_handoff_timeout: Duration::from_secs(30),
            wait_for_worker: Duration::from_secs(10),
            scores: Scores::default(),
            slow_start: Duration::ZERO,
            history: 0,
            history_candidates: 16,
            access: AllowedAccounts::default(),
            affinity: None,
            peek: Peek::default(),
            processes: 0,
            agent_workers: None,
            supervision: Supervision::default(),
            steered: false,
            queues_move: false,
        }
    }
}

/// Settings of a pool's affinity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Affinity {
    /// The source of the keys.
    pub key: KeySource,
    /// A key expires this long after its last use.
    pub ttl: Duration,
    /// Most keys, at least 1.
    pub max_entries: u32,
}

impl Affinity {
    /// Default of `affinity.ttl`.
    pub const DEFAULT_TTL: Duration = Duration::from_secs(30 * 60);

    /// Default of `affinity.max_entries`.
    pub const DEFAULT_MAX_ENTRIES: u32 = 100_000;
}

/// Limits of awaiting first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peek {
    /// How long they are awaited.
    pub timeout: Duration,
    /// How many bytes are examined.
    pub max_bytes: u32,
    /// Most awaited connections at once.
    pub max_awaiting: u32,
}

impl Default for Peek {
    /// The defaults of the configuration.
    fn default() -> Peek {
        Peek { timeout: Duration::from_secs(5), max_bytes: 16_384, max_awaiting: 4096 }
    }
}

/// Users and groups whose workers may join a pool. Users and groups are numeric here; `config`
/// resolves names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AllowedAccounts {
    /// User ids that may join.
    pub users: Vec<u32>,
    /// Group ids, primary or supplementary, whose members may join.
    pub groups: Vec<u32>,
}

/// Settings of a listener that the core needs.
#[derive(Clone, Debug)]
pub struct ListenerSettings {
    /// Unique name.
    pub name: String,
    /// The address as configured, for the status.
    pub address: String,
    /// The pool that serves it.
    pub pool: PoolId,
}

/// A worker's request to join: the peer credentials from the kernel, and its hello.
#[derive(Clone, Debug)]
pub struct Join {
    /// From `SO_PEERCRED`.
    pub pid: i32,
    /// From `SO_PEERCRED`.
    pub uid: u32,
    /// Primary group from `SO_PEERCRED` and supplementary ones from `SO_PEERGROUPS`.
    pub gids: Vec<u32>,
    /// The worker's hello.
    pub hello: dispatch_protocol::wire::Hello,
    /// The process that the hello's token was issued for, if the token is valid.
    pub spawned: Option<ProcessId>,
}

/// A process that the dispatcher starts and supervises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ProcessId {
    /// The pool.
    pub pool: PoolId,
    /// The place that it fills in its pool: 0 to `processes - 1`.
    pub place: u32,
    /// Distinguishes the processes of one place: the number of the start in its pool, from 1 on.
    pub start: u32,
}

/// A client to be placed.
#[derive(Clone, Copy, Debug)]
pub struct Client {
    /// The listener that accepted it.
    pub listener: ListenerId,
    /// Its address.
    pub peer: ClientAddr,
    /// Its key, if known.
    pub key: Option<AffinityKey>,
    /// Whether its PROXY header has been read, by this dispatcher or by the one before it.
    pub header: HeaderRead,
}

/// Whether the PROXY header of a connection has been read. Matters only for listeners with
/// `proxy_protocol`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HeaderRead {
    /// Not yet, if there is one: the peer is the other end of the socket.
    #[default]
    No,
    /// Yes: the peer is the client that it names.
    Client,
    /// Yes, and it names no client: the peer is the proxy.
    Local,
    /// There is none: the peer is the client.
    Absent,
}

impl Client {
    /// A client of which only the address is known.
    pub fn new(listener: ListenerId, peer: ClientAddr) -> Client {
        Client { listener, peer, key: None, header: HeaderRead::No }
    }
}

/// Why a worker may not join, with the deciding configuration key if there is one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// For the worker's program.
    pub code: dispatch_protocol::wire::RefusedCode,
    /// One sentence for people: the problem and its remedy.
    pub reason: String,
    /// The deciding key, such as `pool.web.allow_users`.
    pub key: Option<String>,
}

/// Why a worker has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Departure {
    /// Its control connection ended.
    Disconnected,
    /// Its process ended.
    Died,
    /// The dispatcher disconnected it for this violation.
    Expelled(&'static str),
    /// The dispatcher is stopping, and the worker's pool has nothing left to do.
    Released,
}

/// Why a connection was closed by the dispatcher. Each has its own counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CloseReason {
    /// No usable worker for `wait_for_worker`.
    NoWorker,
    /// The client reset the connection while it was queued.
    ClientGone,
    /// The dispatcher stopped before a worker could get it.
    Shutdown,
    /// The listener's `allow` and `deny` exclude this client.
    Denied,
    /// The client exceeded the listener's `rate_limit`.
    RateLimited,
    /// `max_queued_per_client` of this client's connections were waiting.
    TooManyQueued,
    /// It cannot be passed to any worker, because of descriptors in the queue of the client's
    /// socket.
    Unsendable,
    /// Another dispatcher has taken it over, and serves it.
    HandedOver,
    /// A trusted proxy sent something else than a PROXY header.
    ProxyMissing,
    /// A source that is not in `proxy_protocol_from` sent a PROXY header.
    ProxyUntrusted,
    /// The PROXY header is not valid.
    ProxyMalformed,
    /// The PROXY header is longer than `proxy_max_header`.
    ProxyTooLong,
    /// The PROXY header of a trusted proxy did not come within `proxy_timeout`.
    ProxyTimeout,
    /// It was in the socket of a worker of the line protocol that has left, and could not be given
    /// to another worker.
    Unread,
}

impl CloseReason {
    /// Every reason, in the order of the status.
    pub const ALL: [CloseReason; 14] = [
        CloseReason::NoWorker,
        CloseReason::ClientGone,
        CloseReason::Shutdown,
        CloseReason::Denied,
        CloseReason::RateLimited,
        CloseReason::TooManyQueued,
        CloseReason::Unsendable,
        CloseReason::HandedOver,
        CloseReason::ProxyMissing,
        CloseReason::ProxyUntrusted,
        CloseReason::ProxyMalformed,
        CloseReason::ProxyTooLong,
        CloseReason::ProxyTimeout,
        CloseReason::Unread,
    ];

    /// Whether only listeners with `proxy_protocol` have it.
    pub fn is_of_proxy_protocol(self) -> bool {
        matches!(
            self,
            CloseReason::ProxyMissing
                | CloseReason::ProxyUntrusted
                | CloseReason::ProxyMalformed
                | CloseReason::ProxyTooLong
                | CloseReason::ProxyTimeout
        )
    }

    /// Whether only pools with `line_socket` have it.
    pub fn is_of_line_protocol(self) -> bool {
        self == CloseReason::Unread
    }

    /// The name in the status and in logs.
    pub fn name(self) -> &'static str {
        match self {
            CloseReason::NoWorker => "no_worker",
            CloseReason::ClientGone => "client_gone",
            CloseReason::Shutdown => "shutdown",
            CloseReason::Denied => "denied",
            CloseReason::RateLimited => "rate_limited",
            CloseReason::TooManyQueued => "too_many_queued",
            CloseReason::Unsendable => "unsendable",
            CloseReason::HandedOver => "handed_over",
            CloseReason::ProxyMissing => "proxy_missing",
            CloseReason::ProxyUntrusted => "proxy_untrusted",
            CloseReason::ProxyMalformed => "proxy_malformed",
            CloseReason::ProxyTooLong => "proxy_too_long",
            CloseReason::ProxyTimeout => "proxy_timeout",
            CloseReason::Unread => "unread",
        }
    }
}

/// Why a record could not be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendFailure {
    /// The channel is full (EAGAIN): another worker may have room.
    Full,
    /// The worker closed its end (EPIPE, ECONNRESET): it is leaving or gone.
    Closed,
    /// This machine or user is short of descriptors or memory (ETOOMANYREFS, ENOMEM, ENOBUFS …): a
    /// send to any worker would fail.
    Resources,
    /// This connection cannot be passed to any worker, although others can: a Unix socket with Unix
    /// sockets in its queue (ETOOMANYREFS, before Linux 6.10).
    Client,
}

/// What the event loop does with a listener's queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accepting {
    /// Accept, and report each connection.
    Yes,
    /// Leave clients in the kernel's queue.
    Pause,
    /// Accept: the core closes each connection at once, so that clients do not wait in vain.
    Refuse,
    /// Stopping, or retired: accept what is in the queue, then close the listener.
    Finish,
}

/// A worker's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Gets connections.
    Active,
    /// Left a connection untaken for too long; it only gets trials until it takes one.
    Suspect,
    /// Said goodbye, or an operator drains it: gets no connections and keeps those it has.
    Draining,
    /// Left, with revocations still pending. Not shown.
    Gone,
}

impl State {
    /// The name in the status and in logs.
    pub fn name(self) -> &'static str {
        match self {
            State::Active => "active",
            State::Suspect => "suspect",
            State::Draining => "draining",
            State::Gone => "gone",
        }
    }
}

/// A report of a worker with blocking threads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Threads {
    /// How many wait in `accept`.
    pub idle: u32,
    /// How long a thread usually is away from `accept`, if known.
    pub turnaround: Option<Duration>,
}

/// A token for a spawned process. The event loop makes it when the core starts the process.
pub type SpawnToken = Token;
