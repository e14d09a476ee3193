//! Waiting for drained workers to have nothing left, with progress on stderr.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use super::admin::Place;
use super::{Exit, Failure, admin};
use crate::status::Status;

/// How often is looked.
const PACE: Duration = Duration::from_millis(200);

/// Waits until none of these workers (id, name) has a connection: they are gone, or drained.
pub(super) fn until_drained(
    place: &Place,
    mut workers: BTreeMap<u64, String>,
    timeout: Duration,
) -> Result<(), Failure> {
    let deadline = Instant::now() + timeout;
    let all = workers.len();
    let mut progress = Progress::default();
    loop {
        let status: Status = admin::parse(&admin::get(place, "/v1/status")?, place)?;
        let mut left = 0;
        let there: BTreeMap<u64, _> =
            status.pools.iter().flat_map(|pool| &pool.workers).map(|w| (w.id, w)).collect();
        let resumed = workers
            .iter()
            .find(|(id, _)| there.get(id).is_some_and(|worker| worker.state != "draining"));
        if let Some((id, name)) = resumed {
            progress.end();
            let message = format!("worker {id} ({name}) was made active again meanwhile");
            return Err(Failure::new(Exit::DataErr, message));
        }
        workers.retain(|id, _| match there.get(id) {
            Some(worker) => {
                left += worker.load;
                worker.load > 0
            }
            None => false,
        });
        let done = all - workers.len();
        progress.say(&format!("{done} of {all} workers drained, {left} connections left"));
        if workers.is_empty() {
            progress.end();
            return Ok(());
        }
        if Instant::now() >= deadline {
            progress.end();
            let names: Vec<&str> = workers.values().map(String::as_str).collect();
            let waited = humantime::format_duration(timeout);
            return Err(Failure::new(
                Exit::TempFail,
                format!(
                    "{left} connections are left after {waited}, at {}: they go on; \
                     wait longer with --timeout, or end them with --deadline",
                    names.join(", ")
                ),
            ));
        }
        std::thread::sleep(PACE.min(deadline.saturating_duration_since(Instant::now())));
    }
}

/// One line that changes on a terminal; elsewhere a line for every change.
#[derive(Debug, Default)]
struct Progress {
    last: String,
}

impl Progress {
    fn say(&mut self, text: &str) {
        if self.last == text {
            return;
        }
        text.clone_into(&mut self.last);
        let mut out = std::io::stderr();
        // Nobody to tell is no reason not to wait.
        let _ = if out.is_terminal() {
            write!(out, "\r\x1b[K{text}").and_then(|()| out.flush())
        } else {
            writeln!(out, "{text}")
        };
    }

    fn end(&self) {
        let mut out = std::io::stderr();
        if out.is_terminal() && !self.last.is_empty() {
            let _ = writeln!(out);
        }
    }
}
