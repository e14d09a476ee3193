//! The metrics about several hosts: the drain of this one, and the agents that answer HAProxy.

use std::fmt;

use dispatcher_core::HostState;

use super::Snapshot;
use super::page::{Labels, Page};
use crate::api::status::AgentStatus;

/// The state of a host that does not drain.
const SERVING: &str = "serving";

impl Snapshot {
    pub(super) fn hosts(&self, page: &mut Page<'_>) -> fmt::Result {
        let now = self.status.draining.as_ref().map_or(SERVING, |drain| &*drain.state);
        let states = HostState::ALL.map(HostState::name);
        page.gauges(
            "host_state",
            "1 for the state the host is in; all but serving are those of a drain",
            [SERVING]
                .into_iter()
                .chain(states)
                .map(|state| (Labels::new([("state", state)]), u64::from(state == now))),
        )?;
        let agents = || {
            let agent = |pool: &'_ crate::api::status::PoolStatus| pool.agent.is_some();
            self.status.pools.iter().filter(move |pool| agent(pool))
        };
        let of = |value: fn(&AgentStatus) -> u64| {
            agents().filter_map(move |pool| {
                Some((Labels::new([("pool", &*pool.name)]), value(pool.agent.as_ref()?)))
            })
        };
        page.gauges(
            "agent_capacity_percent",
            "The share of the pool's capacity that its agent tells HAProxy; 0 if it drains or is down",
            of(AgentStatus::percent),
        )?;
        page.counters(
            "agent_answers",
            "Answers to HAProxy's agent check, by kind",
            agents().flat_map(|pool| {
                let answers = pool.agent.iter().flat_map(|agent| &agent.answers);
                answers.map(|(answer, &count)| {
                    (Labels::new([("pool", &*pool.name), ("answer", answer)]), count)
                })
            }),
        )?;
        page.counters(
            "agent_refused_connections",
            "Connections to the agent that were closed without an answer: their address had too many",
            of(|agent| agent.refused),
        )
    }
}
