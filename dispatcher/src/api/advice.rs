//! The answers about advice: to clients and peers at `advice_listen`, and to operators at the admin
//! socket. Field names are stable.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// `GET /v1/pools/NAME/best`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BestAnswer {
    /// The address to connect to.
    pub address: String,
    /// Its score: lower is better.
    pub score: f64,
    /// How long the answer may be used.
    pub valid_for_ms: u64,
}

/// `GET /v1/pools/NAME/addresses`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AddressesAnswer {
    /// The pool.
    pub pool: String,
    /// How long the answer may be used.
    pub valid_for_ms: u64,
    /// Addresses that the list has no room for: the last ones. Absent if it has all.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub left_out: usize,
    /// Best first; with `?all` followed by those that cannot be given connections. At most 1,024.
    pub addresses: Vec<AddressRecord>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_zero(number: &usize) -> bool {
    *number == 0
}

/// An address that clients can connect to.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AddressRecord {
    /// `HOST:PORT`.
    pub address: String,
    /// Live connections behind it.
    pub load: u64,
    /// Most live connections; `null` if unknown.
    pub capacity: Option<u64>,
    /// Its score: lower is better.
    pub score: f64,
    /// Its share relative to other addresses.
    pub weight: f64,
    /// `ok`, `full`, `draining`, `refusing` or `unserved`.
    pub state: String,
    /// Age of these figures.
    pub age_ms: u64,
    /// Recent answers that count as load, and may not be part of it yet.
    #[serde(default)]
    pub advised: u64,
    /// The gauges that are part of the score; `null` for one that is not known.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub gauges: BTreeMap<String, Option<f64>>,
    /// With `advice_detail`: the workers behind it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub workers: Vec<WorkerDetail>,
}

/// A worker, for answers with `advice_detail`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WorkerDetail {
    /// Its name.
    pub name: String,
    /// Its process id.
    pub pid: i32,
    /// Live connections.
    pub load: u64,
    /// Most live connections.
    pub max_connections: u32,
    /// Its share relative to other workers.
    pub weight: f64,
}

/// `GET /v1/own`: what one dispatcher knows by itself. Peers ask for it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct OwnAnswer {
    /// Identifies one start of the dispatcher.
    pub instance: String,
    /// Its pools.
    pub pools: Vec<OwnPool>,
}

/// A pool of one dispatcher.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct OwnPool {
    /// Its name.
    pub pool: String,
    /// Its servers.
    pub servers: Vec<ServerRecord>,
}

/// The workers behind one or several public addresses.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ServerRecord {
    /// The addresses that lead to it.
    pub addresses: Vec<String>,
    /// `ok`, `full`, `draining`, `refusing` or `unserved`.
    pub state: String,
    /// Live connections.
    pub load: u64,
    /// Most live connections; `null` if unknown.
    pub capacity: Option<u64>,
    /// Its share relative to other servers.
    pub weight: f64,
    /// Age of these figures.
    pub age_ms: u64,
    /// Means over its workers.
    #[serde(default)]
    pub gauges: Vec<GaugeRecord>,
    /// With `advice_detail`: its workers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub workers: Vec<WorkerDetail>,
}

/// The mean of a gauge over the workers that have set it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GaugeRecord {
    /// Its name.
    pub name: String,
    /// The mean, by the weights of the workers.
    pub value: f64,
    /// Age of the oldest value in it.
    pub age_ms: u64,
}

/// `GET /v1/pools/NAME/advice` of the admin interface.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdviceAnswer {
    /// The pool.
    pub pool: String,
    /// `fresh` or `interval`.
    pub mode: String,
    /// Cost of a connection for a weight of 1, and of one unit of each gauge.
    pub multiplier: BTreeMap<String, f64>,
    /// By score, the unusable ones last.
    pub addresses: Vec<AddressRecord>,
    /// The peers.
    pub peers: Vec<PeerStatus>,
}

/// `GET /v1/pools/NAME/advice/history` of the admin interface.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdviceHistoryAnswer {
    /// The pool.
    pub pool: String,
    /// Most answers kept.
    pub size: u32,
    /// Oldest first.
    pub answers: Vec<AdviceRecord>,
}

/// An answer that a client got.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdviceRecord {
    /// Number of the answer in its pool, from 1.
    pub number: u64,
    /// When: RFC 3339, UTC.
    pub at: String,
    /// `best` or `addresses`.
    pub asked: String,
    /// The client.
    pub client: Option<String>,
    /// The first address of the answer; `null` if no address was usable.
    pub chosen: Option<String>,
    /// In the order of the answer, the unusable ones last.
    pub addresses: Vec<AddressRecord>,
    /// How many more there were.
    pub left_out: usize,
}

/// The part of the status about advice.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AdviceStatus {
    /// The bound address.
    pub listen: String,
    /// `fresh` or `interval`.
    pub mode: String,
    /// Requests since the start: `best`, `addresses`, `own`.
    pub requests: BTreeMap<String, u64>,
    /// Requests that got no advice: `denied` (not in `advice_allow`), `no_address`, `unknown_pool`,
    /// `busy`.
    pub refused: BTreeMap<String, u64>,
    /// What answers had no room for, in all since the start: `addresses` of lists for clients,
    /// `own` (pools, servers and addresses, for peers), `details` of both.
    #[serde(default)]
    pub left_out: BTreeMap<String, u64>,
    /// In the order of the configuration.
    pub peers: Vec<PeerStatus>,
    /// The addresses of each pool, from the figures that are known, by score.
    pub pools: Vec<AdvicePoolStatus>,
}

/// A dispatcher of another host.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Its `advice_listen`, as configured.
    pub address: String,
    /// `ok`, `itself` (this dispatcher), `not-asked`, or why it is left out: `unreachable`,
    /// `silent`, `slow`, `malformed`, `too-long`, `refused`.
    pub state: String,
    /// What is wrong, in words; absent if nothing is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Answers since the start or since it was configured.
    pub answers: u64,
    /// Times it was left out, by reason.
    pub failures: BTreeMap<String, u64>,
    /// Age of its last answer; `null` if it never answered.
    pub age_ms: Option<u64>,
}

/// The addresses of a pool.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AdvicePoolStatus {
    /// The pool.
    pub pool: String,
    /// By score, the unusable ones last.
    pub addresses: Vec<AddressRecord>,
}
