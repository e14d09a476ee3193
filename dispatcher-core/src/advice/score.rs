//! The score of a server, and which servers are nearly equal: pure functions of their figures.

use dispatch_protocol::scoreboard::gauge::GaugeName;

use super::{NEAR, Server, ServerState};
use crate::types::{Policy, PoolSettings};

/// The terms of the score of a pool's servers.
#[derive(Clone, Debug, PartialEq)]
pub struct Terms {
    /// Cost of a live connection for a server of weight 1.
    pub connections: f64,
    /// Cost of one unit of each gauge; negative where more is better.
    pub gauges: Vec<(GaugeName, f64)>,
}

impl Default for Terms {
    /// Connections only.
    fn default() -> Terms {
        Terms { connections: 1.0, gauges: Vec::new() }
    }
}

impl Terms {
    /// Those of a pool's policy: `least-score` has gauges, every other policy compares connections.
    pub fn of_pool(settings: &PoolSettings) -> Terms {
        match settings.policy {
            Policy::LeastScore => Terms {
                connections: settings.scores.connections,
                gauges: settings.scores.gauges.iter().map(|g| (g.name, g.multiplier)).collect(),
            },
            Policy::LeastConnections
            | Policy::RoundRobin
            | Policy::Random
            | Policy::TwoChoices
            | Policy::Hash
            | Policy::Failover => Terms::default(),
        }
    }

    /// Replaces the cost of a gauge, or adds the gauge; 0 removes it.
    pub fn set(&mut self, gauge: GaugeName, multiplier: f64) {
        self.gauges.retain(|(name, _)| *name != gauge);
        if multiplier != 0.0 {
            self.gauges.push((gauge, multiplier));
        }
    }

    /// The values that the terms use.
    pub(super) fn of(&self, server: &Server) -> Vec<(GaugeName, Option<f64>)> {
        self.gauges.iter().map(|&(name, _)| (name, value(server, name))).collect()
    }
}

fn value(server: &Server, gauge: GaugeName) -> Option<f64> {
    server.gauges.iter().find(|(name, _)| *name == gauge).map(|&(_, value)| value)
}

/// For each server, `advised` and the score after one more connection:
/// `connections × (load + advised + 1) / weight`, and for each gauge `multiplier × value`.
///
/// A server without one of the gauges has the worst cost that a usable server has for it: it is not
/// preferred because it tells less.
pub(super) fn scores(
    servers: &[Server],
    terms: &Terms,
    advised: impl Fn(&Server) -> u64,
) -> Vec<(u64, f64)> {
    let cost = |server: &Server, (gauge, multiplier): (GaugeName, f64)| {
        value(server, gauge).map(|value| value * multiplier)
    };
    let usable = || servers.iter().filter(|server| server.state == ServerState::Ok);
    let worst: Vec<f64> = terms
        .gauges
        .iter()
        .map(|&term| usable().filter_map(|server| cost(server, term)).max_by(f64::total_cmp))
        .map(|worst| worst.unwrap_or(0.0))
        .collect();
    let scored = servers.iter().map(|server| {
        let advised = advised(server);
        let connections = (server.load + advised + 1) as f64 / server.weight;
        let gauges = terms.gauges.iter().zip(&worst);
        let gauges = gauges.map(|(&term, &worst)| cost(server, term).unwrap_or(worst));
        (advised, terms.connections * connections + gauges.sum::<f64>())
    });
    scored.collect()
}

/// All servers: usable ones first, by score; equal ones by address.
pub(super) fn order(servers: &[Server], scored: &[(u64, f64)]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..servers.len()).collect();
    order.sort_by(|&a, &b| {
        let rank = |at: usize| servers[at].state != ServerState::Ok;
        let score = |at: usize| scored[at].1;
        rank(a)
            .cmp(&rank(b))
            .then_with(|| score(a).total_cmp(&score(b)))
            .then_with(|| servers[a].addresses.cmp(&servers[b].addresses))
    });
    order
}

/// The usable servers whose scores exceed the lowest one by at most a part of it, or by at most
/// the cost of one connection there. They are a prefix of [`order`].
pub(super) fn near(servers: &[Server], scored: &[(u64, f64)], terms: &Terms) -> Vec<usize> {
    let order = order(servers, scored);
    let usable = order.into_iter().filter(|&at| servers[at].state == ServerState::Ok);
    let usable: Vec<usize> = usable.collect();
    let Some(&best) = usable.first() else { return Vec::new() };
    let lowest = scored[best].1;
    let one = (terms.connections / servers[best].weight).abs();
    let limit = lowest + (lowest.abs() * NEAR).max(one);
    usable.into_iter().take_while(|&at| scored[at].1 <= limit).collect()
}
