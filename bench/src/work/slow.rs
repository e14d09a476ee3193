//! Workers that take seldom: event loops with long rounds, and workers that serve one client at a
//! time; with and without additional workers that take nothing. How long clients wait, compared
//! with a listener that the same workers share.

use std::time::Duration;

use super::{Case, Plan, column};
use crate::contender::{Contender, How, Setup};
use crate::load::Job;
use crate::worker::{Kind, Serve};

/// With the dispatcher they join and take nothing; otherwise they hold the shared listener and
/// accept nothing.
const STUCK: u16 = 3;

pub(super) fn cases(plan: &Plan) -> Vec<Case> {
    let kinds = [(Kind::Mio, "loops"), (Kind::Tokio, "loops"), (Kind::Blocking, "serial")];
    let full = [(2, 50, 0), (2, 320, 0), (8, 50, 0), (8, 320, 0), (2, 50, STUCK), (8, 320, STUCK)];
    let list: &[_] = if plan.quick { &full[..1] } else { &full };
    let mut cases = Vec::new();
    for (kind, what) in kinds {
        for &(workers, round, stuck) in list {
            // Four fifths of what serial workers can serve. Event loops take all that has arrived.
            let rate = match kind {
                Kind::Blocking => 800.0 / round as f64,
                Kind::Mio | Kind::Tokio => 10.0,
            } * f64::from(workers);
            let time = if plan.quick { 0.5 } else { 8.0 };
            let mut setup = Setup::new(Serve::Stamp, workers);
            setup.round = Duration::from_millis(round);
            setup.stuck = stuck;
            let beside =
                if stuck > 0 { format!(", {stuck} stuck beside them") } else { String::new() };
            let mut case = Case::same(
                format!(
                    "slow workers, {workers} {what} of {round} ms ({}){beside}, {rate:.0} clients/s",
                    kind.name()
                ),
                column("wait_p99", "wait p99 ms", 1),
                &[column("wait_max", "longest ms", 1), column("failed", "failed", 0)],
                [How::Dispatcher, How::Shared].map(|how| Contender::new(how, kind)).into(),
                &setup,
                &Job::Slow { count: (rate * time).ceil() as usize, rate },
            );
            case.others = vec![column("wait_p50", "wait p50 ms", 1)];
            cases.push(case);
        }
    }
    cases
}
