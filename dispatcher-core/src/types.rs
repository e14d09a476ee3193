//! Identifiers, units and settings of the decision core. Plain values, no behaviour worth a test of its own.

use core::net::IpAddr;
use std::fmt;
use std::hash::Hasher;
use std::ops::{Add, Sub};
use std::time::Duration;

use dispatch_protocol::ClientAddr;
use dispatch_protocol::wire::Token;
use siphasher::sip::SipHasher13;

use crate::affinity::key::KeySource;

mod scores;
mod why;

pub use scores::*;
pub use why::Why;

/// A moment: nanoseconds of a clock that never goes back (`CLOCK_MONOTONIC` in the event loop, anything in a simulation).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(pub u64);

impl Add<Duration> for Time {
    type Output = Time;

    /// Saturates at the end of time, so that an absurd configured duration means "never".
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

/// A worker. `index` is dense and used again; `serial` counts joins from 1, is never used again, and is what people see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerId {
    /// Position in tables that run parallel to the core's.
    pub index: u32,
    /// The id shown to people.
    pub serial: u64,
}

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serial.fmt(f)
    }
}

/// A connection the dispatcher still has a copy of. `serial` counts accepts from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnId {
    /// Position in tables that run parallel to the core's; dense and used again.
    pub index: u32,
    /// The number shown in logs.
    pub serial: u64,
}

impl fmt::Display for ConnId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serial.fmt(f)
    }
}

/// Where a connection or probe is: slot and sequence number at one worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket {
    /// Slot of the worker's scoreboard.
    pub slot: u32,
    /// Sequence number written there.
    pub seq: u64,
}

/// What a client is known by: a hash of its address, cookie or whatever else a pool goes by. The same bytes give the
/// same key in every dispatcher and after every restart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AffinityKey(pub u64);

impl AffinityKey {
    /// The key of these bytes.
    pub fn of(bytes: &[u8]) -> AffinityKey {
        // Fixed, so that a restart or a second dispatcher sends a client where it was before.
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
    /// Each in turn, as often as its weight says.
    RoundRobin,
    /// At random, as likely as its weight says.
    Random,
    /// The less loaded of two drawn at random.
    TwoChoices,
    /// The one its key belongs to.
    Hash,
    /// The least loaded of the highest priority that is up; the others stand by.
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

    /// What a client is known by as long as nothing better is configured: where it comes from, if that matters at all.
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
    /// Name, unique.
    pub name: String,
    /// Base policy.
    pub policy: Policy,
    /// Most live connections at one worker, at least 1.
    pub max_connections_per_worker: u32,
    /// Slots per worker: most connections sent and not yet released, at least 1.
    pub max_untaken: u32,
    /// Most workers at once.
    pub max_workers: u32,
    /// How long a connection may stay untaken at a worker that usually takes at once.
    pub handoff_timeout: Duration,
    /// The longest time a connection may stay untaken, however slow its worker usually is.
    pub max_handoff_timeout: Duration,
    /// How long clients wait while there is no usable worker.
    pub wait_for_worker: Duration,
    /// What `least-score` goes by; nothing else does.
    pub scores: Scores,
    /// How long a worker's weight grows after it has come; zero for not at all.
    pub slow_start: Duration,
    /// How many decisions are kept; 0 for none.
    pub history: u32,
    /// How many workers each of them names, at least 1.
    pub history_candidates: u32,
    /// Users and groups whose workers may join.
    pub access: AllowedAccounts,
    /// By what clients are known and for how long they are remembered, if they are.
    pub affinity: Option<Affinity>,
    /// How first bytes are awaited, where `affinity` needs them.
    pub peek: Peek,
    /// Processes to keep running; 0 for none.
    pub processes: u32,
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
        }
    }
}

/// How a pool remembers its clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Affinity {
    /// What they are known by.
    pub key: KeySource,
    /// How long after its last use a key is forgotten.
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

/// How a pool awaits first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peek {
    /// How long they are awaited.
    pub timeout: Duration,
    /// How many of them are looked at.
    pub max_bytes: u32,
    /// Most connections that await them at once.
    pub max_awaiting: u32,
}

impl Default for Peek {
    /// The defaults of the configuration.
    fn default() -> Peek {
        Peek { timeout: Duration::from_secs(5), max_bytes: 16_384, max_awaiting: 4096 }
    }
}

/// Users and groups whose workers may join a pool. Users and groups are numeric here; `config` resolves names.
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
    /// Name, unique.
    pub name: String,
    /// The address as configured, for the status.
    pub address: String,
    /// The pool that serves it.
    pub pool: PoolId,
}

/// A worker that wants to join: the peer credentials from the kernel, and its hello.
#[derive(Clone, Debug)]
pub struct Join {
    /// From `SO_PEERCRED`.
    pub pid: i32,
    /// From `SO_PEERCRED`.
    pub uid: u32,
    /// Primary group from `SO_PEERCRED` and supplementary ones from `SO_PEERGROUPS`.
    pub gids: Vec<u32>,
    /// What the worker said.
    pub hello: dispatch_protocol::wire::Hello,
    /// The process the hello's token was made for, when the token is a real one.
    pub spawned: Option<ProcessId>,
}

/// A process the dispatcher keeps running: which pool, and which of its processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ProcessId {
    /// The pool.
    pub pool: PoolId,
    /// 0 to `processes - 1`.
    pub number: u32,
}

/// Where a client connected, for placing it.
#[derive(Clone, Copy, Debug)]
pub struct Client {
    /// The listener it came through.
    pub listener: ListenerId,
    /// Its address.
    pub peer: ClientAddr,
    /// What it is known by, if the pool asks for that and the client has told.
    pub key: Option<AffinityKey>,
}

impl Client {
    /// A client of which no more is known than where it came from.
    pub fn new(listener: ListenerId, peer: ClientAddr) -> Client {
        Client { listener, peer, key: None }
    }
}

/// Why a worker may not join. The core names the deciding configuration key where there is one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// For the worker's program.
    pub code: dispatch_protocol::wire::RefusedCode,
    /// One sentence for people: what was wrong and what to do.
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
    /// The dispatcher cut it off because of what it did.
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
    /// The dispatcher stopped before a worker could be given it.
    Shutdown,
    /// The listener's `allow` and `deny` keep this client out.
    Denied,
    /// More connections of this client than the listener's `rate_limit`.
    RateLimited,
    /// `max_queued_per_client` of this client's connections wait already.
    TooManyQueued,
    /// It cannot be passed to any worker, because of what the client has in the queue of its own socket.
    Unsendable,
}

impl CloseReason {
    /// Every reason, in the order of the status.
    pub const ALL: [CloseReason; 7] = [
        CloseReason::NoWorker,
        CloseReason::ClientGone,
        CloseReason::Shutdown,
        CloseReason::Denied,
        CloseReason::RateLimited,
        CloseReason::TooManyQueued,
        CloseReason::Unsendable,
    ];

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
    /// This machine or user is short of descriptors or memory (ETOOMANYREFS, ENOMEM, ENOBUFS …): no worker will do for a moment.
    Resources,
    /// This connection cannot be passed to any worker, although others can: a Unix socket with Unix sockets in its queue
    /// (ETOOMANYREFS, before Linux 6.10).
    Client,
}

/// What the event loop should do with a listener's queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accepting {
    /// Accept, and report each connection.
    Yes,
    /// Leave clients in the kernel's queue.
    Pause,
    /// Accept: each one will be closed at once, so that clients don't wait for nothing.
    Refuse,
    /// Stopping, or taken out: accept what has queued, then close it.
    Finish,
}

/// A worker's state, as people see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Gets connections.
    Active,
    /// Left something untaken for too long; is only tested until it takes a connection.
    Suspect,
    /// Said goodbye, or an operator drains it: gets none, keeps what it has.
    Draining,
    /// Left, while the last of its connections are being sorted out. Not shown.
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

/// What a worker with blocking threads says of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Threads {
    /// How many wait in `accept`.
    pub idle: u32,
    /// How long one of them usually is away from `accept`, once one has been.
    pub turnaround: Option<Duration>,
}

/// A token for a spawned process. The event loop makes it; the core only says when.
pub type SpawnToken = Token;
