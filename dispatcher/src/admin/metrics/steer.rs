//! Steered pools. Without one these metrics have no series.

use std::fmt;

use super::Snapshot;
use super::page::{Labels, Page};
use crate::api::status::{PoolStatus, SteerStatus, SteerWorkerStatus};

impl Snapshot {
    pub(super) fn steering(&self, page: &mut Page<'_>) -> fmt::Result {
        let pools = || self.status.pools.iter().filter_map(|p| Some((p, p.steer.as_ref()?)));
        if pools().next().is_none() {
            return Ok(());
        }
        let labels = |pool: &PoolStatus| Labels::new([("pool", &pool.name)]);
        let of = |value: fn(&SteerStatus) -> u64| {
            pools().map(move |(pool, steer)| (labels(pool), value(steer)))
        };
        let sum = |value: fn(&SteerWorkerStatus) -> u64| {
            pools().map(move |(pool, _)| {
                let workers = pool.workers.iter().filter_map(|worker| worker.steer.as_ref());
                (labels(pool), workers.map(value).sum())
            })
        };
        page.gauges(
            "steer_attached",
            "1 if the kernel chooses the pool's workers",
            of(|steer| steer.attached.into()),
        )?;
        page.gauges(
            "steer_pinned",
            "1 if the kernel goes on choosing without the dispatcher",
            of(|steer| steer.pinned.into()),
        )?;
        page.gauges(
            "steer_failing",
            "1 while counts cannot be read or settings cannot be written",
            of(|steer| steer.error.is_some().into()),
        )?;
        page.counters(
            "steer_chosen_connections",
            "SYNs given to a worker",
            of(|steer| steer.chosen),
        )?;
        page.counters(
            "steer_dropped_syns",
            "SYNs dropped, which the client's kernel sends again",
            pools().flat_map(|(pool, steer)| {
                [("full", steer.dropped_full), ("no_worker", steer.dropped_no_worker)].map(
                    |(reason, count)| {
                        (Labels::new([("pool", &pool.name), ("reason", reason)]), count)
                    },
                )
            }),
        )?;
        page.counters(
            "steer_refused_syns",
            "SYNs reset because there was no usable worker",
            of(|steer| steer.refused),
        )?;
        page.counters(
            "steer_failed_choices",
            "Listeners that could not be given a connection",
            of(|steer| steer.failed),
        )?;
        page.gauges(
            "steer_not_steered_workers",
            "Workers that get no connections",
            of(|steer| steer.not_steered.len() as u64),
        )?;
        page.gauges(
            "steer_pending_connections",
            "Handshakes under way",
            sum(|worker| worker.pending),
        )?;
        page.gauges(
            "steer_unaccepted_connections",
            "Connections in the accept queues of workers",
            sum(|worker| worker.queued),
        )
    }
}
