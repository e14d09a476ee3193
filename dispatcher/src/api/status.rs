//! The status JSON: what `GET /v1/status` answers and `dispatcher status` reads. Field names are stable.

use std::collections::BTreeMap;

use dispatcher_core::histogram::Histogram;
use dispatcher_core::{
    AffinitySnapshot, CloseReason, ListenerSnapshot, PoolSnapshot, Snapshot, WorkerSnapshot,
};
use serde::{Deserialize, Serialize};

/// Everything about one dispatcher at one instant.
/// `accepted = held + custody + taken + Σ closed` always holds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The dispatcher's version.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// The name of the machine.
    #[serde(default)]
    pub host: String,
    /// Which start of a dispatcher this is: another after every start. Worker ids are valid only together with it.
    #[serde(default)]
    pub instance: String,
    /// Seconds since it started.
    pub uptime_seconds: u64,
    /// Whether it is stopping.
    pub stopping: bool,
    /// Connections accepted since the start.
    pub accepted: u64,
    /// Connections waiting for a worker now.
    pub held: u64,
    /// Connections sent and not yet taken now.
    pub custody: u64,
    /// Connections taken by workers since the start.
    pub taken: u64,
    /// Connections closed by the dispatcher since the start, by reason.
    pub closed: BTreeMap<String, u64>,
    /// Connections that workers were told to end because the deadline of their drain had come.
    #[serde(default)]
    pub ended_at_deadline: u64,
    /// The longest time the hot thread took from one sleep to the next, in microseconds.
    pub longest_turn_microseconds: u64,
    /// Connections accepted in each of the last whole seconds, oldest first; at most 300.
    #[serde(default)]
    pub accepted_per_second: Vec<u64>,
    /// The last things that went wrong, newest last; at most `fault_history`.
    #[serde(default)]
    pub faults: Vec<FaultStatus>,
    /// Socket files that something else has removed: nothing can connect there until a reload makes them again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub socket_files_missing: Vec<SocketFileStatus>,
    /// What the dispatcher measures of itself.
    #[serde(default)]
    pub meters: Meters,
    /// In the order of the configuration.
    pub listeners: Vec<ListenerStatus>,
    /// In the order of the configuration.
    pub pools: Vec<PoolStatus>,
    /// Sockets that a service manager keeps open and that no listener has any more: their clients are turned away.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kept_sockets: Vec<KeptStatus>,
}

/// A socket that belongs to no listener any more.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptStatus {
    /// What the service manager calls it.
    pub name: String,
    /// The address it is bound to.
    pub address: String,
    /// Clients turned away since its listener was taken out.
    pub turned_away: u64,
}

/// The file of a Unix socket.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketFileStatus {
    /// `dispatch_socket`, `admin_socket`, or `listener NAME`.
    pub socket: String,
    /// Where it was.
    pub path: String,
}

/// Something that went wrong, once or several times.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultStatus {
    /// When, the last time, it began: RFC 3339, UTC.
    pub time: String,
    /// What, in one word: `worker_gone`, `worker_suspect`, `worker_refused` … `docs/OPERATING.md` lists them.
    pub kind: String,
    /// Whom or what it is about: `POOL/WORKER`, a pool, a listener.
    pub subject: String,
    /// A sentence for people; of what is ongoing, as it is now.
    pub text: String,
    /// How often.
    pub count: u64,
    /// Whether it goes on: the pool is still without a worker, say.
    #[serde(default)]
    pub ongoing: bool,
}

/// Durations, by bucket: `counts` has one more entry than `up_to_nanoseconds`, for those longer than the last bound.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Distribution {
    /// The longest duration in each bucket, ascending.
    pub up_to_nanoseconds: Vec<u64>,
    /// How many are in each.
    pub counts: Vec<u64>,
    /// The sum of them all.
    pub sum_nanoseconds: u64,
}

/// What the dispatcher measures of itself, since the start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meters {
    /// How long finding a place for a new connection took; every 64th is timed.
    pub decision: Distribution,
    /// How long the hot thread took from one sleep to the next.
    pub turn: Distribution,
    /// Times accepting rested for want of descriptors or memory.
    pub accept_pauses: u64,
    /// Workers that were not let in.
    pub workers_refused: u64,
    /// Log lines dropped because the log was too slow.
    pub log_lines_dropped: u64,
    /// Log lines suppressed by the rate limit.
    pub log_lines_limited: u64,
    /// Descriptors that wait to be closed, or are being closed.
    #[serde(default)]
    pub closing: u64,
    /// Times a closing thread was interrupted because a close did not get on.
    #[serde(default)]
    pub closes_interrupted: u64,
    /// Shutdowns skipped because all closing threads were blocked.
    #[serde(default)]
    pub closes_left_out: u64,
    /// Connections that are in no place, or in two: `accepted` as listeners count less what pools and workers
    /// count. Always 0.
    pub residual: i64,
}

/// One listener.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListenerStatus {
    /// Its name.
    pub name: String,
    /// The address it is bound to (the port the kernel chose, when 0 was configured).
    pub address: String,
    /// The pool that serves it.
    pub pool: String,
    /// `accepting`, `paused`, `refusing` or `closed`.
    pub state: String,
    /// Connections accepted since the start.
    pub accepted: u64,
    /// Those of them closed by the dispatcher, by reason.
    #[serde(default)]
    pub closed: BTreeMap<String, u64>,
    /// Clients remembered for `rate_limit` and `max_queued_per_client`.
    #[serde(default)]
    pub tracked_clients: u64,
}

/// One pool.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PoolStatus {
    /// Its name.
    pub name: String,
    /// Its base policy.
    pub policy: String,
    /// `ready`, `back-pressure`, `no-worker`, `refusing`, or `removed`: a reload took it out, and its workers have connections yet.
    pub state: String,
    /// Connections waiting for a worker of this pool now.
    pub held: u64,
    /// Connections taken by its workers since the start, those that have left included.
    #[serde(default)]
    pub taken: u64,
    /// Connections taken back from its workers since the start.
    #[serde(default)]
    pub revoked: u64,
    /// Connections that did not reach their worker, for want of descriptors there.
    #[serde(default)]
    pub lost: u64,
    /// Connections sent to another worker because a worker's channel was full.
    #[serde(default)]
    pub channel_full: u64,
    /// Times a worker became suspect.
    #[serde(default)]
    pub suspects: u64,
    /// Times since the start that a process ended or did not start and was to be started again.
    #[serde(default)]
    pub process_restarts: u64,
    /// Workers that have joined since the start.
    #[serde(default)]
    pub joined: u64,
    /// Workers that have left since the start.
    #[serde(default)]
    pub gone: u64,
    /// From accept to take, as the dispatcher sees it.
    #[serde(default)]
    pub handoff: Distribution,
    /// What is remembered of clients; absent without `affinity.key`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity: Option<AffinityStatus>,
    /// Its workers, by id.
    pub workers: Vec<WorkerStatus>,
}

/// What a pool remembers of its clients. Counts are of connections since the start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AffinityStatus {
    /// `affinity.key` as configured.
    pub key: String,
    /// Keys remembered now, those included that are too old and not yet removed.
    pub entries: u64,
    /// Whose first bytes are awaited now; they are part of `held`.
    pub awaiting: u64,
    /// That went to the worker remembered for their key.
    pub hits: u64,
    /// Whose key was not remembered.
    pub misses: u64,
    /// Whose worker could not be given them: they went elsewhere, and that is remembered.
    pub moved: u64,
    /// That went to the worker their session id names.
    pub routed: u64,
    /// Without a key.
    pub unknown: u64,
    /// Of those, whose first bytes did not come within `peek_timeout`.
    pub timed_out: u64,
    /// Of those, whose first bytes were not awaited because `max_awaiting` others were.
    pub not_awaited: u64,
    /// Keys claimed by workers.
    pub claimed: u64,
    /// Keys forgotten before their time because there were `affinity.max_entries`.
    pub evicted: u64,
}

/// One worker. `load = base + taken + custody − finished`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WorkerStatus {
    /// Its id at this dispatcher.
    pub id: u64,
    /// The name it gave itself.
    pub name: String,
    /// Its process.
    pub pid: i32,
    /// `active`, `suspect` or `draining`.
    pub state: String,
    /// Its share relative to others.
    pub weight: u32,
    /// How much of its weight it has, in hundredths: less than 100 during its slow start.
    pub warm_percent: u32,
    /// For failover: the highest that is up takes all.
    pub priority: u16,
    /// Most connections it is given: the smaller of the pool's and its own maximum.
    pub max_connections: u32,
    /// It takes no connections for now, by its own wish.
    #[serde(default)]
    pub paused: bool,
    /// Connections it had taken, over its lifetime, when it joined.
    pub base: u64,
    /// Live connections, untaken ones included.
    pub load: u64,
    /// Connections sent to it by this dispatcher.
    pub sent: u64,
    /// Connections it has taken from this dispatcher.
    pub taken: u64,
    /// Connections it has closed over its lifetime.
    pub finished: u64,
    /// Connections sent and not yet taken.
    pub custody: u64,
    /// Connections that were taken back from it.
    pub revoked: u64,
    /// Connections that went elsewhere because its channel had no room.
    pub channel_full: u64,
    /// Whether it has taken a connection since it joined, or since it was last suspect.
    #[serde(default)]
    pub proven: bool,
    /// The longest time that it usually needs to take a connection, in milliseconds.
    #[serde(default)]
    pub longest_take_ms: u64,
    /// How many of its threads wait for a connection; `null` for an event loop, which does not report that.
    #[serde(default)]
    pub idle_threads: Option<u32>,
    /// Connections it was told to end because the deadline of its drain had come.
    #[serde(default)]
    pub ended_at_deadline: u64,
    /// With the policy `least-score`: what it would have after one more connection; `null` while it is passed over.
    #[serde(default)]
    pub score: Option<f64>,
    /// With the policy `least-score`: why it is passed over, such as `gauge queue_wait stale: set 7s ago`.
    #[serde(default)]
    pub not_scored: Option<String>,
    /// The numbers it shows, in the order in which it named them.
    #[serde(default)]
    pub gauges: Vec<GaugeStatus>,
}

impl WorkerStatus {
    /// Its state as people are shown it: `paused` while it takes no connections by its own wish, and is active otherwise.
    pub fn shown_state(&self) -> &str {
        if self.paused && self.state == "active" { "paused" } else { &self.state }
    }
}

/// A number that a worker shows.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GaugeStatus {
    /// What the worker calls it.
    pub name: String,
    /// Its value; `null` if it was never set, or to what is no number.
    pub value: Option<f64>,
    /// Milliseconds since it was last set; `null` likewise.
    pub age_milliseconds: Option<u64>,
}

impl From<&Snapshot> for Status {
    /// What the core knows; the rest is added by the event loop and the side thread.
    fn from(core: &Snapshot) -> Status {
        Status {
            stopping: core.stopping,
            accepted: core.totals.accepted,
            held: core.totals.held,
            ended_at_deadline: core.ended_at_deadline,
            custody: core.totals.custody,
            taken: core.totals.taken,
            closed: by_reason(&core.totals.closed),
            listeners: core.listeners.iter().map(ListenerStatus::from).collect(),
            pools: core.pools.iter().map(PoolStatus::from).collect(),
            ..Status::default()
        }
    }
}

impl From<&ListenerSnapshot> for ListenerStatus {
    fn from(core: &ListenerSnapshot) -> ListenerStatus {
        ListenerStatus {
            name: core.name.clone(),
            address: core.address.clone(),
            pool: core.pool.clone(),
            state: String::new(),
            accepted: core.accepted,
            closed: by_reason(&core.closed),
            tracked_clients: core.tracked_clients,
        }
    }
}

impl From<&PoolSnapshot> for PoolStatus {
    fn from(core: &PoolSnapshot) -> PoolStatus {
        PoolStatus {
            name: core.name.clone(),
            policy: core.policy.name().to_owned(),
            state: core.state.name().to_owned(),
            held: core.held,
            taken: core.taken,
            revoked: core.revoked,
            lost: core.lost,
            channel_full: core.channel_full,
            suspects: core.suspects,
            process_restarts: core.process_restarts,
            joined: core.joined,
            gone: core.gone,
            handoff: Distribution::from(&core.handoff),
            affinity: core.affinity.as_ref().map(AffinityStatus::from),
            workers: core.workers.iter().map(WorkerStatus::from).collect(),
        }
    }
}

impl From<&AffinitySnapshot> for AffinityStatus {
    fn from(core: &AffinitySnapshot) -> AffinityStatus {
        AffinityStatus {
            key: core.key.to_string(),
            entries: core.entries,
            awaiting: core.awaiting,
            hits: core.hits,
            misses: core.misses,
            moved: core.moved,
            routed: core.routed,
            unknown: core.unknown,
            timed_out: core.timed_out,
            not_awaited: core.not_awaited,
            claimed: core.claimed,
            evicted: core.evicted,
        }
    }
}

impl From<&WorkerSnapshot> for WorkerStatus {
    fn from(core: &WorkerSnapshot) -> WorkerStatus {
        WorkerStatus {
            id: core.id.serial,
            name: core.name.clone(),
            pid: core.pid,
            state: core.state.name().to_owned(),
            weight: core.weight,
            warm_percent: core.warm_percent,
            priority: core.priority,
            max_connections: core.max_connections,
            paused: core.paused,
            base: core.base,
            load: core.load,
            sent: core.sent,
            taken: core.taken,
            finished: core.finished,
            custody: core.custody,
            revoked: core.revoked,
            channel_full: core.channel_full,
            proven: core.proven,
            longest_take_ms: u64::try_from(core.longest_take.as_millis()).unwrap_or(u64::MAX),
            idle_threads: core.idle_threads,
            ended_at_deadline: core.ended_at_deadline,
            ..WorkerStatus::default()
        }
    }
}

impl From<&Histogram> for Distribution {
    fn from(histogram: &Histogram) -> Distribution {
        Distribution {
            up_to_nanoseconds: histogram.bounds().to_vec(),
            counts: histogram.counts().to_vec(),
            sum_nanoseconds: histogram.sum(),
        }
    }
}

fn by_reason(counts: &[u64; CloseReason::ALL.len()]) -> BTreeMap<String, u64> {
    CloseReason::ALL
        .iter()
        .zip(counts)
        .map(|(reason, &count)| (reason.name().to_owned(), count))
        .collect()
}
