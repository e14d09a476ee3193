//! Bytes after the handoff.

use super::{Case, Plan, column};
use crate::contender::Setup;
use crate::load::Job;
use crate::worker::Serve;

pub(super) fn cases(plan: &Plan) -> Vec<Case> {
    let mib: u64 = if plan.quick { 64 } else { 1024 };
    vec![Case::same(
        format!("bulk, {mib} MiB through one connection in answers of 64 KiB, 2 workers"),
        column("rate", "GiB/s", 3),
        &[
            column("cpu_front", "front CPU ms/GiB", 1),
            column("cpu_workers", "worker CPU ms/GiB", 0),
            column("cpu_load", "client CPU ms/GiB", 0),
        ],
        plan.contenders(),
        &Setup::new(Serve::Bulk, 2),
        &Job::Bulk { bytes: mib << 20 },
    )]
}
