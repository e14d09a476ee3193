//! The parts of the status about several hosts behind a balancer.

use std::collections::BTreeMap;

use dispatcher_core::{HostDrainSnapshot, Time};
use serde::{Deserialize, Serialize};

/// A drain of the whole host (`drain --all`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostDrainStatus {
    /// `announced`: others are told, and the workers still get connections; `draining`: they get
    /// none; `drained`: no worker has a connection, and no client waits.
    pub state: String,
    /// Seconds since the drain was asked for.
    pub seconds: u64,
    /// Milliseconds until the workers get no connections; 0 once they get none.
    pub begins_in_ms: u64,
    /// Milliseconds until the workers end the connections that remain; `null` for never.
    pub deadline_in_ms: Option<u64>,
    /// Live connections of all workers, and clients that wait.
    pub connections: u64,
}

impl HostDrainStatus {
    /// A drain as it is at `now`.
    pub fn new(drain: &HostDrainSnapshot, now: Time) -> HostDrainStatus {
        let until = |at: Time| u64::try_from((at - now).as_millis()).unwrap_or(u64::MAX);
        HostDrainStatus {
            state: drain.state.name().to_owned(),
            seconds: (now - drain.since).as_secs(),
            begins_in_ms: until(drain.begins),
            deadline_in_ms: drain.deadline.map(until),
            connections: drain.connections,
        }
    }
}

/// The agent of a pool, which answers HAProxy's agent check.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentStatus {
    /// The bound addresses: several if a service manager passed several sockets.
    pub listen: Vec<String>,
    /// What it answers now, such as `ready up 75% maxconn:300`.
    pub answer: String,
    /// Answers since the agent was opened, by kind: `ready`, `drain`, `down`.
    #[serde(default)]
    pub answers: BTreeMap<String, u64>,
    /// Connections that were closed without an answer, because their address had too many.
    #[serde(default)]
    pub refused: u64,
}

impl AgentStatus {
    /// The share of the capacity in the answer, in percent: 0 if the pool drains or is down.
    pub fn percent(&self) -> u64 {
        let words = self.answer.split(' ');
        let share = words.filter_map(|word| word.strip_suffix('%')?.parse().ok());
        share.into_iter().next().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_is_that_of_the_answer() {
        let percent = |answer: &str| {
            AgentStatus { answer: answer.to_owned(), ..AgentStatus::default() }.percent()
        };
        assert_eq!(percent("ready up 75% maxconn:300"), 75);
        assert_eq!(percent("drain"), 0);
        assert_eq!(percent("down # no usable worker"), 0);
    }
}
