//! The core in a virtual world where everything goes wrong, run by run, each from a seed of its own.
//!
//! `SIM_SEED` is the first seed (default 1), `SIM_EVENTS` how much has to happen in all (default 1,500,000). A failure names
//! the seed, and the fewest faults found that fail as well: `SIM_SEED=… SIM_EVENTS=1` repeats it.

use std::time::{Duration, Instant};

use dispatcher::sim::{Plan, attempt, shrink};

/// How long to look for a shorter history that fails as well.
const SHRINKING: Duration = Duration::from_secs(60);

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| {
        text.parse().unwrap_or_else(|_| panic!("{name} is not a number: {text}"))
    })
}

#[test]
fn nothing_is_lost_and_nothing_is_served_twice() {
    let mut seed = number("SIM_SEED", 1);
    let wanted = number("SIM_EVENTS", 1_500_000);
    let (mut events, mut runs, mut served) = (0, 0, 0);
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let mut failed = None;
    while events < wanted {
        let plan = Plan::from_seed(seed);
        match attempt(&plan) {
            Ok(outcome) => {
                events += outcome.events;
                served += outcome.totals.taken;
                runs += 1;
                seed += 1;
            }
            Err(why) => {
                let until = Instant::now() + SHRINKING;
                let fails = |plan: &Plan| Instant::now() < until && attempt(plan).is_err();
                failed = Some((why, shrink(&plan, fails)));
                break;
            }
        }
    }
    std::panic::set_hook(hook);
    if let Some((why, shortest)) = failed {
        panic!("SIM_SEED={seed} fails: {why}\nit fails as well with: {shortest:#?}");
    }
    println!("{runs} runs, {events} events, {served} connections served");
}
