//! How long clients wait until a worker takes them, in virtual time: compares the core with a
//! shared accept queue and with never moving a connection. Every row is a scenario with
//! requirements, checked for three seeds.
//!
//! `HANDOFF_ROWS` selects rows by a part of their names (default: all), `HANDOFF_SEEDS` the seeds,
//! `HANDOFF_CLIENTS` the number of clients that count in each. The defaults of a release build are
//! three seeds and 30,000 clients; a debug build, which checks all invariants all the time, runs
//! some of the rows with one seed and 200 clients. The test prints a table at the end:
//!
//!     cargo test --release -p dispatcher-core --test core waits -- --nocapture

mod judge;
mod rows;

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use judge::Verdict;
use rows::Row;

/// Seeds and clients.
const DEFAULTS: (&str, &str) =
    if cfg!(debug_assertions) { ("1", "200") } else { ("1,2,3", "30000") };

fn setting(name: &str, default: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| default.to_owned())
}

#[test]
fn no_client_waits_longer_than_the_table_allows() {
    let wanted = setting("HANDOFF_ROWS", "");
    let seeds: Vec<u64> = setting("HANDOFF_SEEDS", DEFAULTS.0)
        .split(',')
        .map(|seed| seed.parse().unwrap_or_else(|_| panic!("HANDOFF_SEEDS: {seed}")))
        .collect();
    let most: u32 = setting("HANDOFF_CLIENTS", DEFAULTS.1).parse().expect("HANDOFF_CLIENTS");
    let step = if cfg!(debug_assertions) && wanted.is_empty() { 16 } else { 1 };
    let rows = rows::all().into_iter().filter(|row| row.name.contains(&wanted)).step_by(step);
    let rows: Vec<Row> = rows.collect();
    let next = Mutex::new(0..rows.len());
    let judged = Mutex::new(BTreeMap::<usize, (String, Vec<Verdict>)>::new());
    let begun = Instant::now();
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let job = next.lock().unwrap_or_else(PoisonError::into_inner).next();
                    let Some(number) = job else { return };
                    let result = judge::row(&rows[number], &seeds, most);
                    let mut judged = judged.lock().unwrap_or_else(PoisonError::into_inner);
                    judged.insert(number, result);
                }
            });
        }
    });
    let judged = judged.into_inner().unwrap_or_else(PoisonError::into_inner);
    let mut failures = Vec::new();
    println!("{}", judge::HEADING);
    for (line, verdicts) in judged.into_values() {
        println!("{line}");
        failures.extend(verdicts.into_iter().filter(|verdict| !verdict.holds));
    }
    println!("{} rows, {} seeds, {:.1} s", rows.len(), seeds.len(), begun.elapsed().as_secs_f64());
    for failure in &failures {
        println!("FAILS  {}", failure.text);
    }
    assert!(failures.is_empty(), "{} requirements do not hold", failures.len());
}
