//! Evenness: held connections that come and go, a burst, and workers of unequal speed.

use std::time::Duration;

use super::{Case, Plan, column};
use crate::contender::{How, Setup};
use crate::load::{Job, Lifetimes};
use crate::worker::{Kind, Serve};

/// A proxy has two descriptors for each connection, and no process here may have more than 20,000.
const MOST_PROXIED: usize = 9000;

pub(super) fn cases(plan: &Plan) -> Vec<Case> {
    use Lifetimes::{Exponential, HeavyTailed};
    const WORKERS: u16 = 8;
    let slow = Duration::from_micros(500);
    let full = [
        (320, 4000, Exponential, Duration::ZERO),
        (2000, 8000, Exponential, Duration::ZERO),
        (2000, 8000, HeavyTailed, Duration::ZERO),
        (10_000, 10_000, Exponential, Duration::ZERO),
        (2000, 4000, Exponential, slow),
    ];
    let quick = [(320, 640, Exponential, Duration::ZERO), (320, 640, HeavyTailed, slow)];
    let list: &[_] = if plan.quick { &quick } else { &full };
    list.iter()
        .map(|&(held, churn, lifetimes, delay)| {
            let contenders = plan.contenders().into_iter();
            let mut setup = Setup::new(Serve::Hold, WORKERS);
            setup.delay = delay;
            let burst = held.min(1000);
            let lives = match lifetimes {
                Exponential => "exponential",
                HeavyTailed => "heavy-tailed",
            };
            let speed = if delay.is_zero() { "" } else { ", two workers slow" };
            let mut case = Case::same(
                format!(
                    "evenness, {held} held by {WORKERS} workers, {churn} close and open, {lives} lives{speed}, \
                     then a burst of {burst}"
                ),
                column("churn_max_over_mean", "churn max/mean", 4),
                &[
                    column("churn_max_over_mean_p99", "p99", 4),
                    column("churn_variation", "CV", 4),
                    column("churn_variation_p99", "CV p99", 4),
                    column("churn_spread", "max−min", 0),
                    column("fill_max_over_mean", "filled max/mean", 4),
                    column("burst_max_over_mean", "burst max/mean", 4),
                ],
                contenders.filter(|contender| contender.kind == Kind::Mio).collect(),
                &setup,
                &Job::Even { workers: usize::from(WORKERS), held, churn, lifetimes, burst },
            );
            for variant in &mut case.variants {
                let proxy = matches!(variant.contender.how, How::HaProxy | How::Nginx);
                if proxy && held > MOST_PROXIED {
                    variant.excuse = Some("needs more descriptors than a process may have".to_owned());
                }
                if variant.contender.how == How::Node && !delay.is_zero() {
                    variant.excuse = Some("has no slow worker".to_owned());
                }
            }
            case
        })
        .collect()
}
