//! Outages of the dispatcher: workers of every layer join again within 200 ms of its return,
//! however long it was away.

use std::path::Path;
use std::time::{Duration, Instant};

use super::*;

/// The promise.
const WITHIN: Duration = Duration::from_millis(200);

/// The times of the log lines with this text, since midnight.
fn times(log: &str, text: &str) -> Vec<Duration> {
    let time = |line: &str| {
        let (_, time) = line.split_once('T')?;
        let (time, _) = time.split_once('Z')?;
        let mut seconds = 0.0;
        for part in time.split(':') {
            seconds = seconds * 60.0 + part.parse::<f64>().ok()?;
        }
        Some(Duration::from_secs_f64(seconds))
    };
    log.lines().filter(|line| line.contains(text)).filter_map(time).collect()
}

/// How long after the dispatcher was ready the last of its workers joined.
fn slowest_join(dir: &Path, workers: usize) -> Duration {
    let joined = wait_for("all workers to join", || {
        let log = std::fs::read_to_string(dir.join("log")).unwrap();
        // The lines of the last dispatcher.
        let (_, log) = log.rsplit_once("event=listening ")?;
        let joined = times(log, "event=worker_joined");
        (joined.len() == workers).then(|| (times(log, "event=ready")[0], joined))
    });
    let (ready, joins) = joined;
    joins.into_iter().map(|join| join.saturating_sub(ready)).max().unwrap()
}

/// Three workers of each layer. `OUTAGES` has other lengths in seconds, separated by spaces.
#[test]
fn workers_join_again_soon_after_any_outage() {
    let lengths = std::env::var("OUTAGES").unwrap_or_else(|_| "0 0.3 3".to_owned());
    let lengths = lengths.split(' ').map(|text| Duration::from_secs_f64(text.parse().unwrap()));
    let temp = configure(PATIENT);
    let mut dispatcher = Dispatcher::start_in(temp.path());
    let flavours = ["blocking", "tokio", "mio"];
    let workers: Vec<Process> =
        (0..9).map(|n| dispatcher.worker(flavours[n % 3], "web", &format!("w{n}"))).collect();
    dispatcher.wait_joined("web", workers.len());
    for outage in lengths {
        // Other processes can take the processor in one round, but hardly in every round.
        let mut rounds = Vec::new();
        while rounds.last().is_none_or(|slowest| *slowest > WITHIN) {
            assert!(rounds.len() < 5, "after {outage:?}: {rounds:?}");
            // By turns as in a crash and as in a restart.
            match rounds.len() % 2 {
                0 => dispatcher.process.kill(),
                _ => assert!(dispatcher.stop().success()),
            }
            let back = Instant::now() + outage;
            // The length of the outage is the condition.
            wait_until("the end of the outage", || Instant::now() >= back);
            dispatcher = Dispatcher::start_in(temp.path());
            rounds.push(slowest_join(temp.path(), workers.len()));
        }
        println!("an outage of {outage:?}: the last worker joined after {rounds:?}");
    }
}
