//! The status JSON: the answer of `GET /v1/status`, which `dispatcher status` reads. Field names
//! are stable.

use std::collections::BTreeMap;

use dispatcher_core::histogram::Histogram;
use dispatcher_core::{
    AffinitySnapshot, CloseReason, ListenerSnapshot, PoolSnapshot, Snapshot, WorkerSnapshot,
};
use serde::{Deserialize, Serialize};

use super::advice::AdviceStatus;

mod hosts;
mod line;
mod processes;
mod relay;
mod steer;

pub use hosts::{AgentStatus, HostDrainStatus};
pub use line::{LineStatus, LineWorkerStatus};
pub use processes::{LeavingStatus, ProcessesStatus, RollStatus};
pub use relay::{RelayProcess, RelayStatus};
pub use steer::{NotSteered, SteerStatus, SteerWorkerStatus};

/// Everything about one dispatcher at one instant.
/// `accepted + returned = queued + in flight + taken + Σ closed` always holds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The version of the dispatcher.
    pub version: String,
    /// The process id of the dispatcher.
    pub pid: u32,
    /// The name of the machine.
    #[serde(default)]
    pub host: String,
    /// Identifies one start of the dispatcher. Worker ids are valid only together with it.
    #[serde(default)]
    pub instance: String,
    /// Seconds since the start.
    pub uptime_seconds: u64,
    /// Whether a stop is in progress.
    pub stopping: bool,
    /// The drain of the whole host; absent without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub draining: Option<HostDrainStatus>,
    /// Connections accepted since the start.
    pub accepted: u64,
    /// Connections that came back from workers of the line protocol since the start: they count
    /// among `taken` too, and in the place that they have now.
    #[serde(default)]
    pub returned: u64,
    /// Connections waiting for a worker now.
    pub queued: u64,
    /// Connections sent and not yet taken now.
    pub in_flight: u64,
    /// Connections taken by workers since the start.
    pub taken: u64,
    /// Connections closed by the dispatcher since the start, by reason.
    pub closed: BTreeMap<String, u64>,
    /// Connections that workers were told to end at the deadline of a drain.
    #[serde(default)]
    pub ended_at_deadline: u64,
    /// The longest time between two sleeps of the event loop, in microseconds.
    pub longest_turn_microseconds: u64,
    /// Connections accepted in each of the last whole seconds, oldest first; at most 300.
    #[serde(default)]
    pub accepted_per_second: Vec<u64>,
    /// The last faults, newest last; at most `fault_history`.
    #[serde(default)]
    pub faults: Vec<FaultStatus>,
    /// Socket files that another program has removed: connecting fails until a reload creates them
    /// again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub socket_files_missing: Vec<SocketFileStatus>,
    /// Measurements of the dispatcher itself.
    #[serde(default)]
    pub meters: Meters,
    /// In the order of the configuration.
    pub listeners: Vec<ListenerStatus>,
    /// In the order of the configuration.
    pub pools: Vec<PoolStatus>,
    /// Advice to clients; absent without `advice_listen`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advice: Option<AdviceStatus>,
    /// The directory of the relay; absent without `relay_directory` and `relay_socket`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relay: Option<RelayStatus>,
    /// The line protocol; absent without `line_socket`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<LineStatus>,
    /// Sockets that a service manager keeps open although no listener uses them: their clients are
    /// refused.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kept_sockets: Vec<KeptStatus>,
}

/// A socket without a listener.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptStatus {
    /// Its name in the service manager.
    pub name: String,
    /// The address it is bound to.
    pub address: String,
    /// Clients refused since its listener was removed.
    pub turned_away: u64,
}

/// The file of a Unix socket.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketFileStatus {
    /// `dispatch_socket`, `admin_socket`, or `listener NAME`.
    pub socket: String,
    /// Its path.
    pub path: String,
}

/// A fault that occurred once or several times.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultStatus {
    /// Time of the last occurrence: RFC 3339, UTC.
    pub time: String,
    /// The kind: `worker_gone`, `worker_suspect`, `worker_refused` … `docs/OPERATING.md` lists
    /// them.
    pub kind: String,
    /// The subject: `POOL/WORKER`, a pool, a listener.
    pub subject: String,
    /// A description; for an ongoing fault, of its current state.
    pub text: String,
    /// Number of occurrences.
    pub count: u64,
    /// Whether the fault is ongoing: for example, the pool still has no worker.
    #[serde(default)]
    pub ongoing: bool,
}

/// A histogram of durations. `counts` has one more entry than `up_to_nanoseconds`, for longer
/// durations than the last bound.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Distribution {
    /// The upper bound of each bucket, ascending.
    pub up_to_nanoseconds: Vec<u64>,
    /// The number in each bucket.
    pub counts: Vec<u64>,
    /// The sum of all durations.
    pub sum_nanoseconds: u64,
}

/// Measurements of the dispatcher itself, since the start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meters {
    /// Time to choose a worker; measured for every 64th connection.
    pub decision: Distribution,
    /// Time between two sleeps of the event loop.
    pub turn: Distribution,
    /// Pauses of accepting because descriptors or memory ran out.
    pub accept_pauses: u64,
    /// Workers that were refused.
    pub workers_refused: u64,
    /// Log lines dropped because the log was too slow.
    pub log_lines_dropped: u64,
    /// Log lines suppressed by the rate limit.
    pub log_lines_limited: u64,
    /// Lines of processes that were not logged.
    #[serde(default)]
    pub process_output_lost: u64,
    /// Descriptors that wait to be closed, or are being closed.
    #[serde(default)]
    pub closing: u64,
    /// Closing threads that were interrupted because a close made no progress.
    #[serde(default)]
    pub closes_interrupted: u64,
    /// Shutdowns skipped because all closing threads were blocked.
    #[serde(default)]
    pub closes_left_out: u64,
    /// Connections in no state or in two states: `accepted` of the listeners minus the counts of
    /// pools and workers. Always 0.
    pub residual: i64,
}

/// One listener.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListenerStatus {
    /// Its name.
    pub name: String,
    /// The bound address, with the port that the kernel chose if 0 was configured.
    pub address: String,
    /// The pool that serves it.
    pub pool: String,
    /// `accepting`, `paused`, `refusing` or `closed`.
    pub state: String,
    /// Connections accepted since the start.
    pub accepted: u64,
    /// Those of them that the dispatcher closed, by reason.
    #[serde(default)]
    pub closed: BTreeMap<String, u64>,
    /// Clients remembered for `rate_limit` and `max_queued_per_client`.
    #[serde(default)]
    pub tracked_clients: u64,
    /// PROXY headers; missing without `proxy_protocol`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy_headers: Option<ProxyHeadersStatus>,
}

/// The PROXY headers of a listener.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProxyHeadersStatus {
    /// The trusted networks; empty for a Unix listener, whose clients are all trusted.
    #[serde(default)]
    pub from: Vec<String>,
    /// Connections whose header is awaited now; they are part of the pool's `queued`.
    pub awaited: u64,
    /// Headers read since the start.
    pub read: u64,
}

/// One pool.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PoolStatus {
    /// Its name.
    pub name: String,
    /// Its base policy.
    pub policy: String,
    /// `ready`, `back-pressure`, `no-worker`, `refusing`, or `removed`: a reload has removed the
    /// pool, and its workers still have connections.
    pub state: String,
    /// Connections waiting for a worker of this pool now.
    pub queued: u64,
    /// Connections taken by its workers since the start, including workers that have left.
    #[serde(default)]
    pub taken: u64,
    /// Connections taken back from its workers since the start.
    #[serde(default)]
    pub revoked: u64,
    /// Connections that did not reach their worker because it had no descriptors left.
    #[serde(default)]
    pub lost: u64,
    /// Connections sent to another worker because a worker's channel was full.
    #[serde(default)]
    pub channel_full: u64,
    /// Times a worker became suspect.
    #[serde(default)]
    pub suspects: u64,
    /// Connections that came back from its workers of the line protocol that have left.
    #[serde(default)]
    pub returned: u64,
    /// The processes that the dispatcher starts; absent if the pool starts none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub processes: Option<ProcessesStatus>,
    /// Workers that have joined since the start.
    #[serde(default)]
    pub joined: u64,
    /// Workers that have left since the start.
    #[serde(default)]
    pub gone: u64,
    /// Time from accept to take, as the dispatcher sees it.
    #[serde(default)]
    pub handoff: Distribution,
    /// The affinity table; absent without `affinity.key`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity: Option<AffinityStatus>,
    /// What HAProxy's agent check is answered; absent without `agent_listen`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<AgentStatus>,
    /// What the kernel counts; absent unless it chooses the workers (`mode = "steer"`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steer: Option<SteerStatus>,
    /// Its workers, by id.
    pub workers: Vec<WorkerStatus>,
}

/// The affinity table of a pool. Counts are of connections since the start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AffinityStatus {
    /// `affinity.key` as configured.
    pub key: String,
    /// Current keys, including expired ones that are not yet removed.
    pub entries: u64,
    /// Whose first bytes are awaited now; they are part of `queued`.
    pub awaiting: u64,
    /// Connections sent to the worker that is stored for their key.
    pub hits: u64,
    /// Connections with an unknown key.
    pub misses: u64,
    /// Connections whose stored worker could not take them; another worker is now stored.
    pub moved: u64,
    /// Connections sent to the worker that their session id names.
    pub routed: u64,
    /// Connections without a key.
    pub unknown: u64,
    /// Those of them whose first bytes did not arrive within `peek_timeout`.
    pub timed_out: u64,
    /// Those of them that did not wait for first bytes because `max_awaiting` others did.
    pub not_awaited: u64,
    /// Keys claimed by workers.
    pub claimed: u64,
    /// Keys removed before they expired because the table had `affinity.max_entries`.
    pub evicted: u64,
}

/// One worker. `load = base + taken + in flight − finished`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WorkerStatus {
    /// Its id at this dispatcher.
    pub id: u64,
    /// The name that the worker gave itself.
    pub name: String,
    /// Its process id.
    pub pid: i32,
    /// `active`, `suspect` or `draining`.
    pub state: String,
    /// Its share of new connections, relative to other workers.
    pub weight: u32,
    /// The effective share of its weight in percent: less than 100 during slow start.
    pub warm_percent: u32,
    /// For failover: the workers with the highest priority that are up get all connections.
    pub priority: u16,
    /// Most connections: the lower of the pool's and the worker's maximum.
    pub max_connections: u32,
    /// Whether the worker has asked for no connections for now.
    #[serde(default)]
    pub paused: bool,
    /// Connections that it had taken before it joined.
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
    pub in_flight: u64,
    /// Connections that were taken back from it.
    pub revoked: u64,
    /// Connections that went elsewhere because its channel had no room.
    pub channel_full: u64,
    /// Whether it has taken a connection since it joined or since it was last suspect.
    #[serde(default)]
    pub proven: bool,
    /// The longest time that it usually needs to take a connection, in milliseconds.
    #[serde(default)]
    pub longest_take_ms: u64,
    /// Number of its threads that wait for a connection; `null` for an event loop, which does not
    /// report it.
    #[serde(default)]
    pub idle_threads: Option<u32>,
    /// Connections that it was told to end at the deadline of its drain.
    #[serde(default)]
    pub ended_at_deadline: u64,
    /// With the policy `least-score`: its score after one more connection; `null` while it is
    /// excluded.
    #[serde(default)]
    pub score: Option<f64>,
    /// With the policy `least-score`: why it is excluded, such as `gauge queue_wait stale: set 7s
    /// ago`.
    #[serde(default)]
    pub not_scored: Option<String>,
    /// What it has reported, if it speaks the line protocol.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<LineWorkerStatus>,
    /// What the kernel counts for it, if the kernel chooses its connections.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steer: Option<SteerWorkerStatus>,
    /// Its gauges, in the order in which it named them.
    #[serde(default)]
    pub gauges: Vec<GaugeStatus>,
}

impl WorkerStatus {
    /// The state for display: `paused` for an active worker that has asked for no connections.
    pub fn shown_state(&self) -> &str {
        if self.paused && self.state == "active" { "paused" } else { &self.state }
    }

    /// The process id, or `-` if it is not known: a member of a steered pool has none.
    pub fn shown_pid(&self) -> String {
        if self.pid == 0 { "-".to_owned() } else { self.pid.to_string() }
    }

    /// The load, or `?` if it is not known.
    pub fn shown_load(&self) -> String {
        let unknown = self.steer.as_ref().is_some_and(|steer| steer.not_counted.is_some());
        if unknown { "?".to_owned() } else { self.load.to_string() }
    }

    /// The state, with `line` for a worker of the line protocol, and `steered` for one whose
    /// connections the kernel chooses, or `hashed` if its hash does.
    pub fn shown_kind(&self) -> String {
        let state = self.shown_state();
        match (&self.line, &self.steer) {
            (Some(_), _) => format!("{state} line"),
            (_, Some(steer)) if steer.problem.is_some() => format!("{state} not steered"),
            (_, Some(steer)) if steer.hashed => format!("{state} hashed"),
            (_, Some(_)) => format!("{state} steered"),
            (None, None) => state.to_owned(),
        }
    }
}

/// A gauge of a worker.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GaugeStatus {
    /// The name that the worker gave it.
    pub name: String,
    /// Its value; `null` if it was never set or is not a number.
    pub value: Option<f64>,
    /// Milliseconds since it was last set; `null` if it was never set.
    pub age_milliseconds: Option<u64>,
}

impl From<&Snapshot> for Status {
    /// The part that the core knows; the event loop and the side thread add the rest.
    fn from(core: &Snapshot) -> Status {
        Status {
            stopping: core.stopping,
            accepted: core.totals.accepted,
            returned: core.totals.returned,
            queued: core.totals.queued,
            ended_at_deadline: core.ended_at_deadline,
            in_flight: core.totals.in_flight,
            taken: core.totals.taken,
            closed: by_reason(
                &core.totals.closed,
                core.listeners.iter().any(|listener| listener.headers.is_some()),
            ),
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
            closed: by_reason(&core.closed, core.headers.is_some()),
            tracked_clients: core.tracked_clients,
            proxy_headers: core.headers.map(|headers| ProxyHeadersStatus {
                from: Vec::new(),
                awaited: headers.awaited,
                read: headers.read,
            }),
        }
    }
}

impl From<&PoolSnapshot> for PoolStatus {
    fn from(core: &PoolSnapshot) -> PoolStatus {
        PoolStatus {
            name: core.name.clone(),
            policy: core.policy.name().to_owned(),
            state: core.state.name().to_owned(),
            queued: core.queued,
            taken: core.taken,
            revoked: core.revoked,
            lost: core.lost,
            channel_full: core.channel_full,
            suspects: core.suspects,
            returned: core.returned,
            processes: core.processes.as_ref().map(ProcessesStatus::from),
            joined: core.joined,
            gone: core.gone,
            handoff: Distribution::from(&core.handoff),
            affinity: core.affinity.as_ref().map(AffinityStatus::from),
            agent: None,
            steer: None,
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
            in_flight: core.in_flight,
            revoked: core.revoked,
            channel_full: core.channel_full,
            proven: core.proven,
            longest_take_ms: u64::try_from(core.longest_take.as_millis()).unwrap_or(u64::MAX),
            idle_threads: core.idle_threads,
            ended_at_deadline: core.ended_at_deadline,
            line: core.line.as_ref().map(LineWorkerStatus::from),
            steer: core.steered.as_ref().map(SteerWorkerStatus::from),
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

/// Without `proxy_protocol` the reasons that only it has are left out, unless they have occurred;
/// so is the one that only the line protocol has.
fn by_reason(
    counts: &[u64; CloseReason::ALL.len()],
    proxy_protocol: bool,
) -> BTreeMap<String, u64> {
    CloseReason::ALL
        .iter()
        .zip(counts)
        .filter(|(reason, count)| {
            let usual = proxy_protocol || !reason.is_of_proxy_protocol();
            **count > 0 || (usual && !reason.is_of_line_protocol())
        })
        .map(|(reason, &count)| (reason.name().to_owned(), count))
        .collect()
}
