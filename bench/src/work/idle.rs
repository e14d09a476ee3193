//! Latency when all processes sleep: from the client's connect to the worker's application.

use std::time::Duration;

use super::{Case, Plan, column};
use crate::contender::{Contender, How, Setup};
use crate::load::Job;
use crate::worker::{Kind, Serve};

pub(super) fn cases(plan: &Plan) -> Vec<Case> {
    let count = if plan.quick { 200 } else { 2000 };
    let mut contenders = plan.contenders();
    contenders.insert(1, Contender::new(How::Busy, Kind::Mio));
    vec![Case::same(
        "idle latency, connect to application, 1 client, 2 workers".to_owned(),
        column("p50", "p50 µs", 1),
        &[
            column("p99", "p99 µs", 1),
            column("fin_p50", "close to FIN p50 µs", 1),
            column("fin_p99", "p99 µs", 1),
            column("cpu_front", "front CPU µs", 1),
            column("cpu_workers", "worker CPU µs", 1),
        ],
        contenders,
        &Setup::new(Serve::Stamp, 2),
        &Job::Idle { count, pause: Duration::from_millis(1) },
    )]
}
