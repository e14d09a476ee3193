//! The JSON of decisions: what `GET /v1/pools/NAME/history` and `/explain` answer, and the commands of these names read.
//!
//! Owns field names and how moments, addresses and keys are written. Field names are stable. The hot thread only hands
//! out what it has ([`Past`], [`Next`]); writing it down is the side thread's work.

use std::sync::Arc;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use dispatcher_core::{Decision, Explanation, Time};

/// What the hot thread tells of a pool's past.
#[derive(Clone, Debug)]
pub struct Past {
    /// The pool's policy.
    pub policy: &'static str,
    /// How many decisions are kept.
    pub size: u32,
    /// Which moment of the decisions' clock is which of the wall's.
    pub clock: (Time, SystemTime),
    /// By position.
    pub listeners: Vec<String>,
    /// Oldest first.
    pub decisions: Vec<Arc<Decision>>,
}

/// What the hot thread tells of a pool's next decision.
#[derive(Clone, Debug)]
pub struct Next {
    /// The pool's policy.
    pub policy: &'static str,
    /// Which moment of the decision's clock is which of the wall's.
    pub clock: (Time, SystemTime),
    /// The decision.
    pub explanation: Explanation,
}

/// The last decisions of a pool.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct History {
    /// The pool.
    pub pool: String,
    /// Its policy.
    pub policy: String,
    /// How many decisions are kept; 0 if none are.
    pub size: u32,
    /// Oldest first.
    pub decisions: Vec<Decided>,
}

/// One decision.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Decided {
    /// Counts the pool's decisions from 1; `null` for one that was only asked for.
    pub number: Option<u64>,
    /// When, in UTC.
    pub at: String,
    /// The connection's number.
    pub connection: Option<u64>,
    /// The listener it came through.
    pub listener: Option<String>,
    /// Where it came from: address and port, or `unix`.
    pub from: String,
    /// What the client is known by, in hexadecimal.
    pub key: Option<String>,
    /// Whether it was sent to another worker before.
    pub resent: bool,
    /// The id of the worker that was chosen.
    pub chosen: Option<u64>,
    /// Workers that were looked at, the chosen one first.
    pub candidates: Vec<Considered>,
    /// How many more workers there were.
    pub left_out: usize,
}

/// A worker in a decision, before it got the connection.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Considered {
    /// Its id.
    pub id: u64,
    /// Its name.
    pub name: String,
    /// Live connections, untaken ones included.
    pub load: u64,
    /// Its weight, less than it was given while it starts slowly.
    pub weight: f64,
    /// The number the policy compared, if it compares numbers.
    pub score: Option<f64>,
    /// Why it was chosen or passed over.
    pub why: String,
    /// With the policy `least-score`: which gauge kept it out, such as `gauge queue_wait stale: set 7s ago`.
    #[serde(default)]
    pub gauge: Option<String>,
}

/// What would become of the next connection.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Explained {
    /// The pool.
    pub pool: String,
    /// Its policy.
    pub policy: String,
    /// Why it would be sent to nobody now; `null` if it would.
    pub obstacle: Option<String>,
    /// The decision.
    #[serde(flatten)]
    pub decision: Decided,
}

impl Past {
    /// As an answer.
    pub fn write(&self, pool: String) -> History {
        let decisions = self.decisions.iter();
        History {
            pool,
            policy: self.policy.to_owned(),
            size: self.size,
            decisions: decisions.map(|d| Decided::write(d, self.clock, &self.listeners)).collect(),
        }
    }
}

impl Next {
    /// As an answer.
    pub fn write(&self, pool: String) -> Explained {
        let decision = Decided::write(&self.explanation.decision, self.clock, &[]);
        Explained {
            pool,
            policy: self.policy.to_owned(),
            obstacle: self.explanation.obstacle.map(|obstacle| obstacle.name().to_owned()),
            decision: Decided { number: None, ..decision },
        }
    }
}

impl Decided {
    fn write(decision: &Decision, clock: (Time, SystemTime), listeners: &[String]) -> Decided {
        let (now, wall) = clock;
        let at = wall.checked_sub(now - decision.at).unwrap_or(SystemTime::UNIX_EPOCH);
        let candidates = decision.candidates.iter().map(|seen| Considered {
            id: seen.worker,
            name: seen.name.to_string(),
            load: seen.load,
            weight: seen.weight,
            score: seen.score,
            why: seen.why.name().to_owned(),
            gauge: seen.out.map(|out| out.to_string()),
        });
        let listener = decision.listener;
        Decided {
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
