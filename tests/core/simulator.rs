//! The core in the simulator with all kinds of faults. Each run has a seed of its own.
//!
//! `SIM_SEED` is the first seed (default 1), `SIM_EVENTS` the number of events of all runs (default
//! 1,500,000). A failure shows the seed and the smallest failing set of faults that was found:
//! `SIM_SEED=… SIM_EVENTS=1` repeats it. To run for a given time:
//!
//!     SIM_MINUTES=60 SIM_SEED=1000 cargo test --release -p dispatcher-core --test core simulator -- --nocapture

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use simulator::{Outcome, Plan, attempt, shrink};

/// The name of the threads whose panics are results.
const RUN: &str = "run";

/// How long to search for a smaller set of faults that fails.
const SHRINKING: Duration = Duration::from_secs(60);

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| {
        text.parse().unwrap_or_else(|_| panic!("{name} is not a number: {text}"))
    })
}

/// Runs that several threads share. The results do not depend on the number of threads: runs count
/// in the order of their seeds, until they have enough events.
struct Runs {
    wanted: u64,
    end: Instant,
    next: u64,
    counted: u64,
    uncounted: BTreeMap<u64, Outcome>,
    failed: Option<(u64, String)>,
    runs: u64,
    events: u64,
    workers: u64,
    served: u64,
}

impl Runs {
    fn are_enough(&self) -> bool {
        self.events >= self.wanted && Instant::now() >= self.end
    }

    fn next(&mut self) -> Option<u64> {
        if self.failed.is_some() || self.are_enough() {
            return None;
        }
        self.next += 1;
        Some(self.next - 1)
    }

    fn note(&mut self, seed: u64, result: Result<Outcome, String>) {
        match result {
            Ok(outcome) => drop(self.uncounted.insert(seed, outcome)),
            Err(why) if self.failed.as_ref().is_none_or(|(first, _)| seed < *first) => {
                self.failed = Some((seed, why));
            }
            Err(_) => {}
        }
        while !self.are_enough()
            && let Some(outcome) = self.uncounted.remove(&self.counted)
        {
            self.counted += 1;
            self.runs += 1;
            self.events += outcome.events;
            self.workers += outcome.workers;
            self.served += outcome.totals.taken;
        }
    }
}

#[test]
fn nothing_is_lost_and_nothing_is_served_twice() {
    let first = number("SIM_SEED", 1);
    let runs = Mutex::new(Runs {
        wanted: number("SIM_EVENTS", 1_500_000),
        end: Instant::now() + Duration::from_secs(60 * number("SIM_MINUTES", 0)),
        next: first,
        counted: first,
        uncounted: BTreeMap::new(),
        failed: None,
        runs: 0,
        events: 0,
        workers: 0,
        served: 0,
    });
    let lock = || runs.lock().unwrap_or_else(PoisonError::into_inner);
    // The result of a failed run contains its message.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if thread::current().name() != Some(RUN) {
            hook(panic);
        }
    }));
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            let run = thread::Builder::new().name(RUN.to_owned());
            let runner = run.spawn_scoped(scope, || {
                loop {
                    let Some(seed) = lock().next() else { return };
                    let result = attempt(&Plan::from_seed(seed));
                    lock().note(seed, result);
                }
            });
            runner.expect("a thread");
        }
    });
    let failed = lock().failed.take().map(|(seed, why)| {
        let until = Instant::now() + SHRINKING;
        let fails = |plan: &Plan| Instant::now() < until && attempt(plan).is_err();
        (seed, why, shrink(&Plan::from_seed(seed), fails))
    });
    if let Some((seed, why, shortest)) = failed {
        panic!("SIM_SEED={seed} fails: {why}\nit fails as well with: {shortest:#?}");
    }
    let Runs { runs, events, workers, served, .. } = *lock();
    println!("{runs} runs, {events} events, {workers} workers, {served} connections served");
}
