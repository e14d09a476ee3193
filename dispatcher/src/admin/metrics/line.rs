//! The line protocol. Without `line_socket` these metrics have no series.

use std::fmt;

use super::Snapshot;
use super::page::{Labels, Page, signed};
use crate::api::status::LineWorkerStatus;

impl Snapshot {
    pub(super) fn line(&self, page: &mut Page<'_>) -> fmt::Result {
        let Some(line) = &self.status.line else { return Ok(()) };
        page.gauge(
            "line_loads_exact",
            "1 if the kernel tells the ends of connections, so that loads of line workers are exact",
            None,
            line.exact.into(),
        )?;
        page.counter(
            "line_overruns",
            "Times the kernel's messages about ended sockets overflowed",
            line.overruns,
        )?;
        page.gauge(
            "line_tracked_sockets",
            "Sockets whose end the kernel will tell",
            None,
            signed(line.tracked),
        )?;
        page.counter("line_reports", "Reports of line workers", line.reports)?;
        page.counter(
            "line_recovered_connections",
            "Connections that a line worker had not read when it left, given to another worker",
            line.recovered,
        )?;
        let of_pool = |value: fn(&LineWorkerStatus) -> u64| {
            self.status.pools.iter().map(move |pool| {
                let lines = pool.workers.iter().filter_map(|worker| worker.line.as_ref());
                (Labels::new([("pool", &pool.name)]), lines.map(value).sum())
            })
        };
        page.gauges("line_workers", "Workers of the line protocol", of_pool(|_| 1))?;
        page.gauges(
            "line_unread_connections",
            "Connections in the sockets of line workers, not read yet",
            of_pool(|line| line.unread),
        )
    }
}
