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
        )?;
        page.gauges(
            "pool_generation",
            "The number of the deploy that the pool has",
            of(|it| it.generation.into()),
        )?;
        page.gauges(
            "pool_restart_needed",
            "1 while the configuration has other settings than the processes of the pool",
            of(|it| u64::from(it.restart_needed)),
        )?;
        page.gauges(
            "rolls",
            "1 for the state of the last roll of the pool",
            pools().flat_map(|(name, it)| {
                let now = it.roll.as_ref().map(|roll| roll.state.as_str());
                ["progressing", "stopped", "done"].map(|state| {
                    (Labels::new([("pool", name), ("state", state)]), u64::from(now == Some(state)))
                })
            }),
        )?;
        page.gauges(
            "leaving_generations",
            "Former generations of the pool that have connections",
            of(|it| it.leaving_generations.len() as u64),
        )?;
        page.gauges(
            "leaving_generation_connections",
            "Connections of former generations",
            of(|it| it.leaving_generations.iter().map(|leaving| leaving.connections).sum()),
        )?;
        page.counters(
            "ready_checks",
            "Ready checks of new processes; their connections count nowhere else",
            pools().flat_map(|(name, it)| {
                [("passed", it.ready_checks_passed), ("failed", it.ready_checks_failed)].map(
                    |(result, count)| (Labels::new([("pool", name), ("result", result)]), count),
                )
            }),
        )
    }
}
