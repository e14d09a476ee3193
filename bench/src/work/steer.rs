//! Steering: short connections to workers with listeners, chosen by the dispatcher's programs in
//! the kernel, by the kernel's hash or by a proxy; and what the dispatcher does meanwhile.

use std::time::Duration;

use super::{Case, Column, Plan, Variant, column};
use crate::calls;
use crate::contender::{Contender, How, Ports, Setup};
use crate::load::Job;
use crate::worker::{Kind, Serve};

const RATE: Column = column("rate", "conn/s", 0);
const LATENCIES: [Column; 2] = [column("p50", "p50 µs", 0), column("p99", "p99 µs", 0)];

const COLUMNS: [Column; 6] = [
    column("cpu_front", "front CPU µs", 2),
    column("cpu_workers", "worker CPU µs", 2),
    column("worker_sleeps", "worker sleeps/conn", 2),
    column("cpu_load", "client CPU µs", 2),
    column("load_busy", "client busy", 2),
    column("failed", "failed", 0),
];

/// All workers serve until the client ends the connection, so that it counts as live until then.
const SERVE: Serve = Serve::Hold;

const STEERED: [How; 2] = [How::Steered(Ports::Own), How::Steered(Ports::Shared)];

pub(super) fn cases(plan: &Plan) -> Vec<Case> {
    let [own, shared] = STEERED;
    let all = [How::ReusePort, own, shared, How::Dispatcher, How::Shared, How::HaProxy, How::Nginx];
    let mut cases = vec![rate(plan, 16, 2, &all), rate(plan, 256, 2, &all)];
    let many: &[u16] = if plan.quick { &[64] } else { &[1, 64, 256] };
    cases.extend(many.iter().map(|&workers| rate(plan, 16, workers, &all[..3])));
    cases.push(calls(plan));
    cases
}

fn job(plan: &Plan, clients: usize) -> Job {
    let (warm, time) = match plan.quick {
        true => (Duration::from_millis(50), Duration::from_millis(250)),
        false => (Duration::from_millis(300), Duration::from_millis(1500)),
    };
    // Over the loopback device a thread that connects does the kernel's part for the new connection,
    // too: with one thread this would be the limit.
    let threads = plan.threads.min(clients.max(1));
    Job::Short { clients, threads, fin: false, warm, time }
}

/// Each contender has a cgroup of its own, because steering needs one.
fn setup(workers: u16) -> Setup {
    Setup { own_cgroup: true, ..Setup::new(SERVE, workers) }
}

fn rate(plan: &Plan, clients: usize, workers: u16, contenders: &[How]) -> Case {
    let plural = if workers == 1 { "" } else { "s" };
    let contenders = contenders.iter().map(|&how| Contender::new(how, Kind::Mio)).collect();
    let mut case = Case::same(
        format!("steering: short connections, {clients} clients, {workers} worker{plural}"),
        RATE,
        &COLUMNS,
        contenders,
        &setup(workers),
        &job(plan, clients),
    );
    case.others = LATENCIES.to_vec();
    case
}

/// The same load with the calls of the dispatcher counted. strace makes each of them slow, so
/// the rate is not to be compared with that of other cases.
fn calls(plan: &Plan) -> Case {
    let loads: &[(u16, usize)] = if plan.quick {
        &[(2, 0), (2, 16)]
    } else {
        &[(2, 0), (2, 1), (2, 16), (2, 256), (1, 16), (64, 16), (256, 16)]
    };
    let variant = |how: How, &(workers, clients): &(u16, usize)| {
        let mut setup = setup(workers);
        setup.count_calls = true;
        let contender = Contender::new(how, Kind::Mio);
        Variant {
            label: format!("{}, workers {workers}, clients {clients}", contender.name()),
            contender,
            setup,
            job: job(plan, clients),
            excuse: calls::missing(),
        }
    };
    Case {
        title: "steering: what the dispatcher and its programs in the kernel do".to_owned(),
        main: column("calls", "system calls/s", 0),
        others: Vec::new(),
        columns: vec![
            RATE,
            column("calls_each", "calls/conn", 4),
            column("lookup_ns", "choice ns", 0),
            column("lookup_runs", "choices/conn", 2),
            column("events_ns", "count ns", 0),
            column("events_runs", "counts/conn", 2),
        ],
        variants: STEERED
            .iter()
            .flat_map(|&how| loads.iter().map(move |load| variant(how, load)))
            .collect(),
    }
}
