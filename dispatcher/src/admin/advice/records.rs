//! Figures in the forms of the interfaces and of the core.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use dispatcher_core::Time;
use dispatcher_core::advice::{Advice, Ranked, Server, ServerState};

use super::{milliseconds, state_of};
use crate::api::advice::{AddressRecord, AdviceRecord, OwnAnswer, ServerRecord};

/// A record for the core. Gauges that are too old are left out.
pub(super) fn server(
    record: &ServerRecord,
    addresses: &[&str],
    at: Time,
    age: Duration,
    valid_for: Duration,
) -> Server {
    let own_age = Duration::from_millis(record.age_ms);
    let gauges = record.gauges.iter().filter_map(|gauge| {
        let older = Duration::from_millis(gauge.age_ms).saturating_sub(own_age);
        let name = gauge.name.parse().ok()?;
        (age + older <= valid_for).then_some((name, gauge.value))
    });
    Server {
        addresses: addresses.iter().map(|&address| Arc::from(address)).collect(),
        state: state_of(&record.state).unwrap_or(ServerState::Unserved),
        load: record.load,
        capacity: record.capacity,
        weight: record.weight,
        gauges: gauges.collect(),
        at,
    }
}

pub(super) fn address_record(
    ranked: &Ranked,
    records: &[(Arc<OwnAnswer>, usize, usize)],
) -> AddressRecord {
    let workers = records.get(ranked.server).and_then(|(answer, pool, server)| {
        Some(answer.pools.get(*pool)?.servers.get(*server)?.workers.clone())
    });
    AddressRecord { workers: workers.unwrap_or_default(), ..figures(ranked) }
}

fn figures(ranked: &Ranked) -> AddressRecord {
    AddressRecord {
        address: ranked.address.to_string(),
        load: ranked.load,
        capacity: ranked.capacity,
        score: ranked.score,
        weight: ranked.weight,
        state: ranked.state.name().to_owned(),
        age_ms: milliseconds(ranked.age),
        advised: ranked.advised,
        gauges: ranked.gauges.iter().map(|&(name, value)| (name.to_string(), value)).collect(),
        workers: Vec::new(),
    }
}

pub(super) fn advice_record(advice: &Advice, (now, wall): (Time, SystemTime)) -> AdviceRecord {
    let at = wall.checked_sub(now - advice.at).unwrap_or(wall);
    AdviceRecord {
        number: advice.number,
        at: humantime::format_rfc3339_millis(at).to_string(),
        asked: advice.asked.name().to_owned(),
        client: advice.client.map(|client| client.to_string()),
        chosen: advice.chosen.as_ref().map(ToString::to_string),
        addresses: advice.ranked.iter().map(figures).collect(),
        left_out: advice.left_out,
    }
}
