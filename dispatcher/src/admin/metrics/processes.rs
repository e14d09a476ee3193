//! The metrics of the processes that the dispatcher starts.

use std::fmt;

use super::Snapshot;
use super::page::{Labels, Page};
use crate::api::status::ProcessesStatus;

impl Snapshot {
    /// A pool that starts no processes has zeros, so that no series comes and goes.
    pub(super) fn processes(&self, page: &mut Page<'_>) -> fmt::Result {
        let none = ProcessesStatus::default();
        let pools = || {
            let pools = self.status.pools.iter();
            pools.map(|pool| (&*pool.name, pool.processes.as_ref().unwrap_or(&none)))
        };
        let of = |value: fn(&ProcessesStatus) -> u64| {
            pools().map(move |(name, it)| (Labels::new([("pool", name)]), value(it)))
        };
        page.gauges(
            "processes",
            "Processes by state, and how many are wanted",
            pools().flat_map(|(name, it)| {
                [
                    ("wanted", it.wanted),
                    ("active", it.active),
                    ("starting", it.starting),
                    ("leaving", it.leaving),
                    ("outdated", it.outdated),
                ]
                .map(|(state, count)| {
                    (Labels::new([("pool", name), ("state", state)]), u64::from(count))
                })
            }),
        )?;
        page.counters(
            "process_restarts",
            "Restarts of processes that ended or failed to start",
            of(|it| it.restarts),
        )?;
        page.counters(
            "processes_replaced",
            "Processes replaced because of age, connections or memory, or by an operator",
            of(|it| it.replaced),
        )?;
        page.counters(
            "processes_stopped",
            "Processes ended by the dispatcher: they did not join in time, or were hung",
            pools().flat_map(|(name, it)| {
                [("late", it.ended_late), ("hung", it.ended_hung)].map(|(reason, count)| {
                    (Labels::new([("pool", name), ("reason", reason)]), count)
                })
            }),
        )?;
        page.gauges(
            "process_crash_loop",
            "1 while starts of processes of the pool have failed too often",
            of(|it| u64::from(it.crash_loop)),
        )
    }
}
