//! The text of `GET /metrics`.
//!
//! Owns names, labels and help texts; a test compares them with `docs/METRICS.md`.
//! `metrics_max_workers` bounds the series per worker; the configuration bounds all others.

mod advice;
mod hosts;
mod line;
mod page;
mod processes;
mod relay;
mod steer;

use std::fmt;
use std::sync::Arc;

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, text};
use prometheus_client::registry::{Registry, Unit};

use self::page::{Labels, Page, signed};
use crate::api::status::{AffinityStatus, PoolStatus, Status, WorkerStatus};
use dispatcher_core::Policy;

/// The data for one page of metrics.
#[derive(Debug)]
pub(super) struct Snapshot {
    pub(super) status: Arc<Status>,
    pub(super) last_reload: LastReload,
    /// Most workers with series of their own.
    pub(super) max_workers: usize,
}

/// The result of the last load of the configuration; the first is the start.
#[derive(Clone, Copy, Debug)]
pub(super) struct LastReload {
    pub(super) successful: bool,
    /// Time of the last successful load, in seconds since 1970.
    pub(super) success_at: f64,
}

/// Data of the kernel about this process. The metric names are the standard ones of Prometheus.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Process {
    cpu_seconds: f64,
    /// In seconds since 1970.
    start_seconds: f64,
    open_fds: u64,
    max_fds: u64,
    resident_bytes: u64,
    virtual_bytes: u64,
}

impl Process {
    /// Reads the data; a value that cannot be read is 0.
    pub(super) fn read() -> Process {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
        let mut pages = statm.split(' ').map(|pages| pages.parse::<u64>().unwrap_or(0));
        let page = rustix::param::page_size() as u64;
        let mut bytes = || pages.next().unwrap_or(0) * page;
        let (virtual_bytes, resident_bytes) = (bytes(), bytes());
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        let used = getrusage(UsageWho::RUSAGE_SELF);
        let seconds = |time: TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
        Process {
            cpu_seconds: used
                .map_or(0.0, |used| seconds(used.user_time()) + seconds(used.system_time())),
            start_seconds: start_seconds().unwrap_or(0.0),
            // One entry is the descriptor of the directory itself.
            open_fds: std::fs::read_dir("/proc/self/fd")
                .map_or(0, |list| (list.count() as u64).saturating_sub(1)),
            max_fds: limit.current.unwrap_or(u64::MAX),
            resident_bytes,
            virtual_bytes,
        }
    }
}

/// Start time of this process in seconds since 1970: the boot time plus the offset of the process.
fn start_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The name of the program may contain any character; the fields after its closing bracket are
    // fixed.
    let (_, fields) = stat.rsplit_once(')')?;
    let ticks: f64 = fields.split_whitespace().nth(22 - 3)?.parse().ok()?;
    let machine = std::fs::read_to_string("/proc/stat").ok()?;
    let booted = machine.lines().find_map(|line| line.strip_prefix("btime "))?;
    let booted: f64 = booted.trim().parse().ok()?;
    Some(booted + ticks / rustix::param::clock_ticks_per_second() as f64)
}

impl Collector for Process {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut page = Page(encoder);
        page.counter_float(
            "cpu",
            "Processor time used, of user and system",
            Some(&Unit::Seconds),
            self.cpu_seconds,
        )?;
        page.gauge_float(
            "start_time",
            "When the process was started, in seconds since 1970",
            Some(&Unit::Seconds),
            self.start_seconds,
        )?;
        page.gauge("open_fds", "Open descriptors", None, signed(self.open_fds))?;
        page.gauge("max_fds", "Most open descriptors", None, signed(self.max_fds))?;
        let bytes = Some(&Unit::Bytes);
        page.gauge("resident_memory", "Resident memory", bytes, signed(self.resident_bytes))?;
        page.gauge("virtual_memory", "Virtual memory", bytes, signed(self.virtual_bytes))
    }
}

/// OpenMetrics 1.0.
pub(super) fn openmetrics(snapshot: Snapshot, process: Process) -> String {
    let mut registry = Registry::with_prefix("dispatcher");
    registry.register_collector(Box::new(snapshot));
    let mut usual = Registry::with_prefix("process");
    usual.register_collector(Box::new(process));
    let mut out = String::with_capacity(16 * 1024);
    // Writing to a string cannot fail.
    let _ = text::encode_registry(&mut out, &usual);
    let _ = text::encode(&mut out, &registry);
    out
}

/// The older text format, version 0.0.4: no units, no end mark, and the full name of a counter in
/// its header.
pub(super) fn plain(openmetrics: &str) -> String {
    let mut out = String::with_capacity(openmetrics.len());
    let mut held: Option<(&str, &str)> = None;
    for line in openmetrics.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            // The name depends on the type, which is on the next line.
            held = rest.split_once(' ');
        } else if let Some((name, kind)) =
            line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' '))
        {
            let suffix = if kind == "counter" { "_total" } else { "" };
            if let Some((_, help)) = held.take() {
                out += &format!("# HELP {name}{suffix} {help}\n");
            }
            out += &format!("# TYPE {name}{suffix} {kind}\n");
        } else if !line.starts_with('#') {
            out.push_str(line);
            out.push('\n');
        }
    }
    out
}

impl Collector for Snapshot {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut page = Page(encoder);
        self.itself(&mut page)?;
        self.listeners(&mut page)?;
        self.pools(&mut page)?;
        self.advice(&mut page)?;
        self.relay(&mut page)?;
        self.hosts(&mut page)?;
        self.line(&mut page)?;
        self.steering(&mut page)?;
        self.workers(&mut page)
    }
}

impl Snapshot {
    fn itself(&self, page: &mut Page<'_>) -> fmt::Result {
        let status = &*self.status;
        let meters = &status.meters;
        page.gauges(
            "build_info",
            "1, with the version as a label",
            [(Labels::new([("version", &status.version)]), 1)],
        )?;
        page.gauge(
            "uptime",
            "Time since the start",
            Some(&Unit::Seconds),
            signed(status.uptime_seconds),
        )?;
        page.gauge("stopping", "1 while a stop is under way", None, status.stopping.into())?;
        self.totals(page)?;
        page.gauge(
            "conservation_residual",
            "Connections in no state or in two; a value other than 0 is a defect of the dispatcher",
            None,
            meters.residual,
        )?;
        page.histograms(
            "decision",
            "Time to choose a worker for a new connection; every 64th is measured",
            [(Labels::new([]), &meters.decision)],
        )?;
        page.histograms(
            "turn",
            "Time between two sleeps of the event loop",
            [(Labels::new([]), &meters.turn)],
        )?;
        page.counter(
            "accept_pauses",
            "Pauses of accepting because descriptors or memory ran out",
            meters.accept_pauses,
        )?;
        page.counter("workers_refused", "Workers that were refused", meters.workers_refused)?;
        page.gauge(
            "closing_descriptors",
            "Descriptors that wait to be closed, or are being closed",
            None,
            signed(meters.closing),
        )?;
        page.counter(
            "closes_interrupted",
            "Closing threads interrupted because a close made no progress",
            meters.closes_interrupted,
        )?;
        page.counter(
            "closes_left_out",
            "Shutdowns skipped because all closing threads were blocked",
            meters.closes_left_out,
        )?;
        page.counter(
            "log_lines_dropped",
            "Log lines dropped because the log was too slow",
            meters.log_lines_dropped,
        )?;
        page.counter(
            "log_lines_limited",
            "Log lines suppressed by the rate limit",
            meters.log_lines_limited,
        )?;
        page.counter(
            "process_output_lost_lines",
            "Lines of spawned processes that were not logged",
            meters.process_output_lost,
        )?;
        let reload = self.last_reload;
        page.gauge(
            "config_last_reload_successful",
            "1 if the configuration was good when it was last read",
            None,
            reload.successful.into(),
        )?;
        page.gauge_float(
            "config_last_reload_success_timestamp",
            "Time of the last successful load of the configuration, in seconds since 1970",
            Some(&Unit::Seconds),
            reload.success_at,
        )
    }

    /// Totals over all connections, including those of removed listeners and pools, whose own
    /// series have ended.
    fn totals(&self, page: &mut Page<'_>) -> fmt::Result {
        let status = &*self.status;
        let all = "of all listeners and pools that ever were";
        page.counter(
            "connections_accepted",
            &format!("Connections accepted, {all}"),
            status.accepted,
        )?;
        page.counter(
            "connections_returned",
            "Connections that line workers had not read when they left: they are taken, and placed once more",
            status.returned,
        )?;
        page.gauge(
            "connections_queued",
            &format!("Connections waiting for a worker, {all}"),
            None,
            signed(status.queued),
        )?;
        page.gauge(
            "connections_in_flight",
            &format!("Connections sent and not yet taken, {all}"),
            None,
            signed(status.in_flight),
        )?;
        page.counter(
            "connections_taken",
            &format!("Connections taken by workers, {all}"),
            status.taken,
        )?;
        page.counters(
            "connections_closed",
            &format!("Connections closed by the dispatcher, {all}"),
            status.closed.iter().map(|(reason, &count)| (Labels::new([("reason", reason)]), count)),
        )?;
        page.counter(
            "ended_connections",
            "Connections that workers were told to end at the deadline of a drain",
            status.ended_at_deadline,
        )
    }

    fn listeners(&self, page: &mut Page<'_>) -> fmt::Result {
        let listeners = || self.status.listeners.iter();
        page.counters(
            "listener_accepted_connections",
            "Connections accepted",
            listeners()
                .map(|l| (Labels::new([("listener", &l.name), ("pool", &l.pool)]), l.accepted)),
        )?;
        page.counters(
            "listener_closed_connections",
            "Connections closed by the dispatcher",
            listeners().flat_map(|l| {
                l.closed.iter().map(|(reason, &count)| {
                    let labels = [("listener", &*l.name), ("pool", &l.pool), ("reason", reason)];
                    (Labels::new(labels), count)
                })
            }),
        )?;
        page.gauges(
            "listener_state",
            "1 for the state the listener is in",
            listeners().flat_map(|l| {
                ["accepting", "paused", "refusing", "steered", "closed"].map(|state| {
                    let labels = [("listener", &*l.name), ("pool", &l.pool), ("state", state)];
                    (Labels::new(labels), u64::from(l.state == state))
                })
            }),
        )?;
        page.gauges(
            "tracked_clients",
            "Clients remembered for rate_limit and max_queued_per_client",
            listeners().map(|l| {
                (Labels::new([("listener", &l.name), ("pool", &l.pool)]), l.tracked_clients)
            }),
        )?;
        let headers = || {
            listeners().filter_map(|l| {
                let labels = Labels::new([("listener", &l.name), ("pool", &l.pool)]);
                l.proxy_headers.as_ref().map(|headers| (labels, headers))
            })
        };
        page.gauges(
            "awaited_proxy_headers",
            "Connections whose PROXY header is awaited",
            headers().map(|(labels, headers)| (labels, headers.awaited)),
        )?;
        page.counters(
            "proxy_headers",
            "PROXY headers read",
            headers().map(|(labels, headers)| (labels, headers.read)),
        )
    }

    fn pools(&self, page: &mut Page<'_>) -> fmt::Result {
        let of = |value: fn(&PoolStatus) -> u64| {
            self.status
                .pools
                .iter()
                .map(move |pool| (Labels::new([("pool", &pool.name)]), value(pool)))
        };
        let sum = |value: fn(&WorkerStatus) -> u64| {
            self.status.pools.iter().map(move |pool| {
                (Labels::new([("pool", &pool.name)]), pool.workers.iter().map(value).sum())
            })
        };
        page.gauges(
            "pool_state",
            "1 for the state the pool is in",
            self.status.pools.iter().flat_map(|pool| {
                ["ready", "back-pressure", "no-worker", "refusing"].map(|state| {
                    let labels = Labels::new([("pool", &*pool.name), ("state", state)]);
                    (labels, u64::from(pool.state == state))
                })
            }),
        )?;
        page.gauges(
            "pool_queued_connections",
            "Connections waiting for a worker",
            of(|p| p.queued),
        )?;
        page.gauges(
            "pool_in_flight_connections",
            "Connections sent to a worker and not yet taken",
            sum(|w| w.in_flight),
        )?;
        page.counters("pool_taken_connections", "Connections taken by workers", of(|p| p.taken))?;
        page.counters(
            "revoked_connections",
            "Connections taken back from workers and placed again",
            of(|p| p.revoked),
        )?;
        page.counters(
            "lost_connections",
            "Connections that did not reach their worker and were placed again",
            of(|p| p.lost),
        )?;
        page.counters("suspects", "Times a worker became suspect", of(|p| p.suspects))?;
        page.counters(
            "channel_full",
            "Connections sent to another worker because a worker's channel was full",
            of(|p| p.channel_full),
        )?;
        self.processes(page)?;
        page.counters("workers_joined", "Workers that joined", of(|p| p.joined))?;
        page.counters("workers_gone", "Workers that left", of(|p| p.gone))?;
        page.gauges(
            "workers",
            "Workers by state",
            self.status.pools.iter().flat_map(|pool| {
                ["active", "suspect", "draining"].map(|state| {
                    let labels = Labels::new([("pool", &*pool.name), ("state", state)]);
                    let count = pool.workers.iter().filter(|worker| worker.state == state).count();
                    (labels, count as u64)
                })
            }),
        )?;
        page.gauges(
            "live_connections",
            "Connections at workers, untaken ones included",
            sum(|w| w.load),
        )?;
        page.gauges(
            "capacity_connections",
            "Maximum of connections of all workers of the pool",
            sum(|w| w.max_connections.into()),
        )?;
        page.gauges(
            "workers_not_scored",
            "Workers that least-score skips because a gauge is missing or stale",
            self.status.pools.iter().filter(|pool| pool.policy == Policy::LeastScore.name()).map(
                |pool| {
                    let without = pool.workers.iter().filter(|w| w.not_scored.is_some()).count();
                    (Labels::new([("pool", &pool.name)]), without as u64)
                },
            ),
        )?;
        self.affinity(page)?;
        page.histograms(
            "handoff_latency",
            "Time from accept to take, as the dispatcher sees it",
            self.status
                .pools
                .iter()
                .map(|pool| (Labels::new([("pool", &pool.name)]), &pool.handoff)),
        )
    }

    /// Only pools with an affinity key.
    fn affinity(&self, page: &mut Page<'_>) -> fmt::Result {
        let pools =
            || self.status.pools.iter().filter_map(|p| Some((&*p.name, p.affinity.as_ref()?)));
        let of = |value: fn(&AffinityStatus) -> u64| {
            pools().map(move |(name, a)| (Labels::new([("pool", name)]), value(a)))
        };
        page.gauges(
            "awaited_connections",
            "Connections that wait for first bytes; a part of the queued ones",
            of(|a| a.awaiting),
        )?;
        page.gauges("affinity_entries", "Keys remembered", of(|a| a.entries))?;
        page.counters(
            "affinity_connections",
            "Connections by the result of affinity",
            pools().flat_map(|(name, a)| {
                let counts = [
                    ("hit", a.hits),
                    ("miss", a.misses),
                    ("moved", a.moved),
                    ("routed", a.routed),
                    ("unknown", a.unknown),
                ];
                counts.map(|(result, count)| {
                    (Labels::new([("pool", name), ("result", result)]), count)
                })
            }),
        )?;
        page.counters("affinity_claimed", "Keys claimed by workers", of(|a| a.claimed))?;
        page.counters(
            "affinity_evicted",
            "Keys removed before they expired because the table was full",
            of(|a| a.evicted),
        )?;
        page.counters(
            "peeks_failed",
            "Connections without a key because their first bytes came too late or could not be awaited",
            pools().flat_map(|(name, a)| {
                let counts = [("timed_out", a.timed_out), ("not_awaited", a.not_awaited)];
                counts.map(|(reason, count)| (Labels::new([("pool", name), ("reason", reason)]), count))
            }),
        )
    }

    /// The first `max_workers` workers by id have series of their own, so that the series of a
    /// worker do not come and go.
    fn workers(&self, page: &mut Page<'_>) -> fmt::Result {
        let mut all: Vec<(&PoolStatus, &WorkerStatus)> = self
            .status
            .pools
            .iter()
            .flat_map(|pool| pool.workers.iter().map(move |worker| (pool, worker)))
            .collect();
        all.sort_by_key(|(_, worker)| worker.id);
        let shown = &all[..all.len().min(self.max_workers)];
        page.gauges(
            "workers_not_shown",
            "Workers without series of their own because of metrics_max_workers",
            self.status.pools.iter().map(|pool| {
                let hidden =
                    all[shown.len()..].iter().filter(|(other, _)| other.name == pool.name).count();
                (Labels::new([("pool", &pool.name)]), hidden as u64)
            }),
        )?;
        let of = |value: fn(&WorkerStatus) -> u64| {
            shown.iter().map(move |(pool, worker)| {
                let id = worker.id.to_string();
                let labels = [("pool", &*pool.name), ("worker", &worker.name), ("id", &id)];
                (Labels::new(labels), value(worker))
            })
        };
        page.gauges(
            "worker_state",
            "1, with the worker's state as a label",
            shown.iter().map(|(pool, worker)| {
                let id = worker.id.to_string();
                let labels = [
                    ("pool", &*pool.name),
                    ("worker", &worker.name),
                    ("id", &id),
                    ("state", &worker.state),
                ];
                (Labels::new(labels), 1)
            }),
        )?;
        page.gauges("worker_live_connections", "Connections at the worker", of(|w| w.load))?;
        page.gauges(
            "worker_in_flight_connections",
            "Connections sent to the worker and not yet taken",
            of(|w| w.in_flight),
        )?;
        page.gauges(
            "worker_max_connections",
            "Maximum of connections of the worker",
            of(|w| w.max_connections.into()),
        )?;
        page.gauges("worker_weight", "The worker's share", of(|w| w.weight.into()))?;
        page.counters("worker_taken_connections", "Connections the worker took", of(|w| w.taken))?;
        page.counters(
            "worker_finished_connections",
            "Connections the worker closed, over its lifetime",
            of(|w| w.finished),
        )?;
        page.counters(
            "worker_revoked_connections",
            "Connections taken back from the worker",
            of(|w| w.revoked),
        )?;
        page.counters(
            "worker_channel_full",
            "Times the worker's channel was full",
            of(|w| w.channel_full),
        )
    }
}

#[cfg(test)]
mod tests;
