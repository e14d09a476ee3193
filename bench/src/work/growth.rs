//! Growth: what more workers, listeners and held connections cost the dispatcher.

use std::time::Duration;

use super::{Case, Plan, Variant, column};
use crate::contender::{Contender, How, Setup};
use crate::load::Job;
use crate::worker::{Kind, Serve};

/// The workers share this many processes, so that only the dispatcher's part of the work grows.
const PROCESSES: u16 = 2;

pub(super) fn cases(plan: &Plan) -> Vec<Case> {
    let workers: &[u16] = if plan.quick { &[2, 256] } else { &[2, 16, 64, 256, 1000] };
    let listeners: &[u16] = if plan.quick { &[1] } else { &[1, 16] };
    let held = if plan.quick { 2000 } else { 15_000 };
    let (warm, time) = match plan.quick {
        true => (Duration::from_millis(50), Duration::from_millis(250)),
        false => (Duration::from_millis(300), Duration::from_millis(1500)),
    };
    let variants = |serve: Serve, listeners: &[u16], workers: &[u16], job: &Job| {
        let mut variants = Vec::new();
        for &listeners in listeners {
            for &workers in workers {
                let mut setup = Setup::new(serve, workers);
                (setup.processes, setup.listeners) = (PROCESSES, listeners);
                let contender = Contender::new(How::Dispatcher, Kind::Mio);
                let plural = if listeners == 1 { "" } else { "s" };
                let label = format!("{workers} workers, {listeners} listener{plural}");
                variants.push(Variant { label, contender, setup, job: job.clone(), excuse: None });
            }
        }
        variants
    };
    let rate = Case {
        title: "growth: short connections, 64 clients, client resets, workers in 2 processes"
            .to_owned(),
        main: column("rate", "conn/s", 0),
        others: Vec::new(),
        columns: vec![
            column("p50", "p50 µs", 0),
            column("p99", "p99 µs", 0),
            column("decision", "decision µs", 2),
            column("cpu_front", "front CPU µs", 2),
            column("cpu_workers", "worker CPU µs", 2),
            column("load_busy", "client busy", 2),
        ],
        variants: variants(
            Serve::Byte,
            listeners,
            workers,
            &Job::Short { clients: 64, threads: 1, fin: false, warm, time },
        ),
    };
    let ends = [workers[0], workers[workers.len() - 1]];
    let memory = Case {
        title: format!("growth: resident memory of the dispatcher, {held} connections held"),
        main: column("memory_held", "MiB, all held", 2),
        others: Vec::new(),
        columns: vec![column("memory_empty", "MiB before", 2)],
        // Several listeners, because the number of client ports for one address is limited.
        variants: variants(Serve::Hold, &[4], &ends, &Job::Held { count: held }),
    };
    vec![rate, memory]
}
