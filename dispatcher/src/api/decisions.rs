//! The JSON of decisions: the answers of `GET /v1/pools/NAME/history` and `/explain`, which the
//! commands of the same names read.
//!
//! Owns field names and the formats of times, addresses and keys. Field names are stable. The event
//! loop returns raw data ([`RawHistory`], [`RawExplanation`]); the side thread formats it.

use std::sync::Arc;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use dispatcher_core::{Decision, Explanation, Time};

/// The raw data of a pool's last decisions.
#[derive(Clone, Debug)]
pub struct RawHistory {
    /// The policy of the pool.
    pub policy: &'static str,
    /// The kernel chooses the pool's workers.
    pub steered: bool,
    /// Number of decisions that are kept.
    pub size: u32,
    /// One instant in the clock of the decisions and in wall-clock time, for conversion.
    pub clock: (Time, SystemTime),
    /// By position.
    pub listeners: Vec<String>,
    /// Oldest first.
    pub decisions: Vec<Arc<Decision>>,
}

/// The raw data of a pool's next decision.
#[derive(Clone, Debug)]
pub struct RawExplanation {
    /// The policy of the pool.
    pub policy: &'static str,
    /// The kernel chooses the pool's workers.
    pub steered: bool,
    /// One instant in the clock of the decision and in wall-clock time, for conversion.
    pub clock: (Time, SystemTime),
    /// The decision.
    pub explanation: Explanation,
}

/// The last decisions of a pool.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HistoryAnswer {
    /// The pool.
    pub pool: String,
    /// The policy of the pool.
    pub policy: String,
    /// The kernel chooses the pool's workers: no decision is kept.
    #[serde(default, skip_serializing_if = "is_false")]
    pub steered: bool,
    /// Number of decisions that are kept; 0 if none are.
    pub size: u32,
    /// Oldest first.
    pub decisions: Vec<DecisionRecord>,
}

/// One decision.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DecisionRecord {
    /// Number within the pool, from 1; `null` for an explanation.
    pub number: Option<u64>,
    /// Time in UTC.
    pub at: String,
    /// Number of the connection.
    pub connection: Option<u64>,
    /// The listener of the connection.
    pub listener: Option<String>,
    /// Address and port of the client, or `unix`.
    pub from: String,
    /// Affinity key of the client, in hexadecimal.
    pub key: Option<String>,
    /// Whether the connection was sent to another worker before.
    pub resent: bool,
    /// The id of the chosen worker.
    pub chosen: Option<u64>,
    /// The considered workers, the chosen one first.
    pub candidates: Vec<CandidateRecord>,
    /// Number of further workers.
    pub left_out: usize,
}

/// A worker in a decision, in its state before the decision.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CandidateRecord {
    /// The id.
    pub id: u64,
    /// The name.
    pub name: String,
    /// Live connections, untaken ones included.
    pub load: u64,
    /// The effective weight: lower than the configured one during slow start.
    pub weight: f64,
    /// The number that the policy compared, if it compares numbers.
    pub score: Option<f64>,
    /// Why the worker was or was not chosen.
    pub why: String,
    /// With the policy `least-score`: the gauge that excluded the worker, such as `gauge queue_wait
    /// stale: set 7s ago`.
    #[serde(default)]
    pub gauge: Option<String>,
}

/// The decision for the next connection.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExplainAnswer {
    /// The pool.
    pub pool: String,
    /// The policy of the pool.
    pub policy: String,
    /// The kernel chooses the pool's workers: this is what it would choose, by the counts that were
    /// read last.
    #[serde(default, skip_serializing_if = "is_false")]
    pub steered: bool,
    /// Why the connection would not be sent now; `null` if it would.
    pub obstacle: Option<String>,
    /// The decision.
    #[serde(flatten)]
    pub decision: DecisionRecord,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_false(value: &bool) -> bool {
    !*value
}

impl RawHistory {
    /// Formats the answer.
    pub fn write(&self, pool: String) -> HistoryAnswer {
        let decisions = self.decisions.iter();
        HistoryAnswer {
            pool,
            policy: self.policy.to_owned(),
            steered: self.steered,
            size: self.size,
            decisions: decisions
                .map(|d| DecisionRecord::write(d, self.clock, &self.listeners))
                .collect(),
        }
    }
}

impl RawExplanation {
    /// Formats the answer.
    pub fn write(&self, pool: String) -> ExplainAnswer {
        let decision = DecisionRecord::write(&self.explanation.decision, self.clock, &[]);
        ExplainAnswer {
            pool,
            policy: self.policy.to_owned(),
            steered: self.steered,
            obstacle: self.explanation.obstacle.map(|obstacle| obstacle.name().to_owned()),
            decision: DecisionRecord { number: None, ..decision },
        }
    }
}

impl DecisionRecord {
    fn write(
        decision: &Decision,
        clock: (Time, SystemTime),
        listeners: &[String],
    ) -> DecisionRecord {
        let (now, wall) = clock;
        let at = wall.checked_sub(now - decision.at).unwrap_or(SystemTime::UNIX_EPOCH);
        let candidates = decision.candidates.iter().map(|seen| CandidateRecord {
            id: seen.worker,
            name: seen.name.to_string(),
            load: seen.load,
            weight: seen.weight,
            score: seen.score,
            why: seen.why.name().to_owned(),
            gauge: seen.out.map(|out| out.to_string()),
        });
        let listener = decision.listener;
        DecisionRecord {
            number: Some(decision.number),
            at: humantime::format_rfc3339_millis(at).to_string(),
            connection: decision.conn,
            listener: listener.and_then(|id| listeners.get(usize::from(id.0)).cloned()),
            from: decision.peer.to_string(),
            key: decision.key.map(|key| format!("{:016x}", key.0)),
            resent: decision.resent,
            chosen: decision.chosen,
            candidates: candidates.collect(),
            left_out: decision.left_out,
        }
    }
}
