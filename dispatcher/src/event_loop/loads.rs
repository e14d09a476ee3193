//! The figures for advice: gathered here, completed on the side thread.

use std::sync::Arc;

use super::EventLoop;
use super::fault_kind::FaultKind;
use super::gauges;
use super::time::Stamps;
use crate::api::advice::{GaugeRecord, WorkerDetail};
use crate::mailbox::advice_faults::PeerEvent;
use crate::mailbox::loads::{DeferredLoads, ListenerAddresses, OwnLoads, OwnPoolLoad};
use dispatch_protocol::scoreboard::Scoreboard;
use dispatcher_core::advice::PoolLoad;
use dispatcher_core::{MAX_GAUGE_VALUE, WorkerId};

/// Most gauges of a pool with a mean.
const MOST_GAUGES: usize = 64;

/// Most workers of a pool that an answer names.
const MOST_WORKERS: usize = 256;

impl EventLoop {
    /// The sums of all pools, and the addresses of all listeners.
    pub(super) fn loads(&self) -> DeferredLoads {
        let advice = &self.config.advice;
        let mut boards: Vec<(u64, Arc<Scoreboard>)> = self
            .workers
            .table
            .iter()
            .flatten()
            .filter(|io| io.lane.board.named_gauges() > 0)
            .map(|io| (io.id.serial, Arc::clone(&io.lane.board)))
            .collect();
        let pools: Vec<(PoolLoad, Vec<WorkerDetail>)> = self
            .core
            .pool_loads(self.now)
            .into_iter()
            .map(|load| {
                let detail = if advice.detail { self.details(&load) } else { Vec::new() };
                (load, detail)
            })
            .collect();
        let listeners = self.core.listeners().map(|id| ListenerAddresses {
            pool: self.core.pool_of_listener(id).map_or("", |p| self.core.pool_name(p)).to_owned(),
            advertise: self.listeners.resources(id).and_then(|it| it.advertise.clone()),
            // A dispatcher that stops has closed its listeners, and says that it is draining.
            bound: self.core.listener_address(id).split(", ").map(str::to_owned).collect(),
        });
        let (listeners, instance) = (listeners.collect(), self.run.instance.clone());
        let valid_for = u64::try_from(advice.valid_for.as_millis()).unwrap_or(u64::MAX);
        DeferredLoads(Box::new(move || {
            boards.sort_unstable_by_key(|(serial, _)| *serial);
            let stamps = Stamps::now();
            let pools = pools.into_iter().map(|(load, workers)| {
                let of = |workers: &[(WorkerId, f64)]| means(workers, &boards, &stamps, valid_for);
                let gauges = of(&load.workers);
                let single = load.advertised.iter().map(|one| of(&[(one.worker, 1.0)]));
                OwnPoolLoad { advertised: single.collect(), load, gauges, workers }
            });
            OwnLoads { instance, pools: pools.collect(), listeners }
        }))
    }

    fn details(&self, load: &PoolLoad) -> Vec<WorkerDetail> {
        let detail = |&(worker, weight): &(WorkerId, f64)| WorkerDetail {
            name: self.core.worker_name(worker).to_owned(),
            pid: self.core.worker_pid(worker).unwrap_or_default(),
            load: self.core.load(worker).unwrap_or_default(),
            max_connections: self.core.max_connections_of(worker).unwrap_or_default(),
            weight,
        };
        load.workers.iter().take(MOST_WORKERS).map(detail).collect()
    }

    /// Adds faults for peers that advice leaves out, and updates them when they answer again.
    pub(super) fn note_advice_peers(&mut self) {
        const KIND: FaultKind = FaultKind::AdvicePeer;
        let most = self.config.limits.fault_history;
        for PeerEvent { at, peer, text, left_out } in self.side.advice_faults.take() {
            if left_out && most > 0 {
                self.observation.faults.note(most, at, KIND, peer.clone(), text.clone());
            }
            self.observation.faults.update(KIND, &peer, text, left_out);
        }
    }
}

/// The mean of each gauge over the workers that have set it within `valid_for` milliseconds, by
/// their weights.
fn means(
    workers: &[(WorkerId, f64)],
    boards: &[(u64, Arc<Scoreboard>)],
    stamps: &Stamps,
    valid_for: u64,
) -> Vec<GaugeRecord> {
    // Name, weighted sum, sum of weights, greatest age.
    let mut sums: Vec<(String, f64, f64, u64)> = Vec::new();
    for &(worker, weight) in workers {
        let Ok(at) = boards.binary_search_by_key(&worker.serial, |(serial, _)| *serial) else {
            continue;
        };
        for gauge in gauges::all(&boards[at].1, stamps) {
            let (Some(value), Some(age)) = (gauge.value, gauge.age_milliseconds) else { continue };
            if age > valid_for {
                continue;
            }
            let value = value.clamp(-MAX_GAUGE_VALUE, MAX_GAUGE_VALUE) * weight;
            match sums.iter().position(|(name, ..)| *name == gauge.name) {
                Some(at) => {
                    let (_, sum, weights, oldest) = &mut sums[at];
                    *sum += value;
                    *weights += weight;
                    *oldest = age.max(*oldest);
                }
                None if sums.len() < MOST_GAUGES => sums.push((gauge.name, value, weight, age)),
                None => {}
            }
        }
    }
    sums.into_iter()
        .filter(|(_, _, weights, _)| *weights > 0.0)
        .map(|(name, sum, weights, age_ms)| GaugeRecord { name, value: sum / weights, age_ms })
        .collect()
}
