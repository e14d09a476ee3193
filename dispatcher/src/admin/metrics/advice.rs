//! The metrics of advice; none without `advice_listen`.

use std::fmt;

use super::Snapshot;
use super::page::{Labels, Page};

/// The states of addresses, so that no series comes and goes.
const STATES: [&str; 5] = ["ok", "full", "draining", "refusing", "unserved"];

impl Snapshot {
    pub(super) fn advice(&self, page: &mut Page<'_>) -> fmt::Result {
        let Some(advice) = &self.status.advice else { return Ok(()) };
        page.counters(
            "advice_requests",
            "Requests for advice, and of peers for the own figures",
            advice.requests.iter().map(|(name, &n)| (Labels::new([("request", name)]), n)),
        )?;
        page.counters(
            "advice_refused",
            "Requests that got no advice",
            advice.refused.iter().map(|(name, &n)| (Labels::new([("reason", name)]), n)),
        )?;
        page.counters(
            "advice_left_out",
            "What answers had no room for: addresses for clients, own figures for peers, details",
            advice.left_out.iter().map(|(name, &n)| (Labels::new([("what", name)]), n)),
        )?;
        page.gauges(
            "advice_addresses",
            "Addresses that clients can be advised, by state",
            advice.pools.iter().flat_map(|pool| {
                STATES.map(|state| {
                    let count = pool.addresses.iter().filter(|one| one.state == state).count();
                    (Labels::new([("pool", &*pool.pool), ("state", state)]), count as u64)
                })
            }),
        )?;
        page.gauges(
            "advice_peer_up",
            "1 if the last question to the peer was answered",
            advice.peers.iter().map(|peer| {
                let up = ["ok", "itself"].contains(&peer.state.as_str());
                (Labels::new([("peer", &*peer.address)]), u64::from(up))
            }),
        )?;
        page.counters(
            "advice_peer_failures",
            "Questions to the peer after which advice left it out",
            advice.peers.iter().flat_map(|peer| {
                peer.failures.iter().map(|(reason, &count)| {
                    (Labels::new([("peer", &*peer.address), ("reason", reason)]), count)
                })
            }),
        )
    }
}
