//! Steered pools in the status: the kernel chooses their workers.

use dispatcher_core::SteerCounts;
use serde::{Deserialize, Serialize};

/// What the kernel counts for a pool. Counts are since its programs were attached, by this
/// dispatcher or an earlier one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SteerStatus {
    /// The kernel has accepted the programs.
    pub attached: bool,
    /// The kernel goes on choosing while the dispatcher is restarted.
    pub pinned: bool,
    /// Why there are no programs: the kernel's own hash of the addresses chooses
    /// (`fallback = "hash"`), and the counts below are 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hashed: Option<String>,
    /// Why it does not, although it is to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_pinned: Option<String>,
    /// What does not work.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// SYNs that were given to a worker.
    pub chosen: u64,
    /// SYNs that were dropped because all workers were at their maximum: the client's kernel tries
    /// again.
    pub dropped_full: u64,
    /// SYNs that were dropped while there was no usable worker.
    pub dropped_no_worker: u64,
    /// SYNs that were reset because there was no usable worker.
    pub refused: u64,
    /// Workers whose listener could not be given a connection.
    pub failed: u64,
    /// Workers that get no connections, whether or not they have joined.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub not_steered: Vec<NotSteered>,
}

/// A process or member of a steered pool that gets no connections.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotSteered {
    /// Its pool and name.
    pub name: String,
    /// Where it is to listen.
    pub address: String,
    /// Why it gets none.
    pub problem: String,
}

impl SteerStatus {
    /// Whether the kernel chooses, in a word or two.
    pub fn state(&self) -> &'static str {
        match (self.attached, self.pinned) {
            (false, _) if self.hashed.is_some() => "by the kernel's hash",
            (false, _) => "not attached",
            (true, true) => "pinned",
            (true, false) => "attached",
        }
    }
}

/// A worker whose connections the kernel chooses.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SteerWorkerStatus {
    /// Where it listens.
    pub address: String,
    /// Open connections.
    pub live: u64,
    /// Handshakes under way.
    pub pending: u64,
    /// Connections in its accept queue.
    pub queued: u64,
    /// Why it gets no connections although it listens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// The kernel's own hash chooses: connections are counted by samples, about once a second.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub hashed: bool,
    /// Why its connections are not known: its load is not 0 for that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_counted: Option<String>,
}

impl From<&SteerCounts> for SteerWorkerStatus {
    fn from(counts: &SteerCounts) -> SteerWorkerStatus {
        SteerWorkerStatus {
            address: String::new(),
            live: counts.live,
            pending: counts.pending,
            queued: counts.queued,
            problem: None,
            hashed: false,
            not_counted: None,
        }
    }
}
