//! Short connections: connect, read one byte, reset; or wait for the end first.

use std::time::Duration;

use super::{Case, Column, Plan, column};
use crate::contender::Setup;
use crate::load::Job;
use crate::worker::Serve;

const RATE: Column = column("rate", "conn/s", 0);

const COLUMNS: [Column; 8] = [
    column("p50", "p50 µs", 0),
    column("p99", "p99 µs", 0),
    column("p999", "p99.9 µs", 0),
    column("cpu_front", "front CPU µs", 2),
    column("cpu_workers", "worker CPU µs", 2),
    column("cpu_load", "client CPU µs", 2),
    column("load_busy", "client busy", 2),
    column("failed", "failed", 0),
];

pub(super) fn cases(plan: &Plan, fin: bool) -> Vec<Case> {
    let (warm, time) = match plan.quick {
        true => (Duration::from_millis(50), Duration::from_millis(250)),
        false => (Duration::from_millis(300), Duration::from_millis(1500)),
    };
    let mut columns = COLUMNS.to_vec();
    if fin {
        columns.insert(3, column("fin_p99", "FIN p99 µs", 0));
        columns.insert(3, column("fin_p50", "FIN p50 µs", 0));
    }
    // The time stamp is that of the worker's close.
    let serve = if fin { Serve::Stamp } else { Serve::Byte };
    let end = if fin { "client waits for the FIN" } else { "client resets" };
    [16, 256]
        .map(|clients| {
            Case::same(
                format!("short connections, {clients} clients, {end}, 2 workers"),
                RATE,
                &columns,
                plan.contenders(),
                &Setup::new(serve, 2),
                &Job::Short { clients, threads: 1, fin, warm, time },
            )
        })
        .into()
}
