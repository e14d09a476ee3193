//! Waiting, and saying so on stderr: for drained workers to have nothing left, and for whatever takes its time.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::admin::Place;
use super::{Exit, Failure, admin, complain};
use crate::status::Status;

/// For how long nothing is said.
const SILENCE: Duration = Duration::from_secs(1);

/// How often is looked.
const PACE: Duration = Duration::from_millis(200);

/// Waits until none of these workers (id, name) has a connection: they are gone, or drained.
pub(super) fn until_drained(
    place: &Place,
    mut workers: BTreeMap<u64, String>,
    timeout: Duration,
) -> Result<(), Failure> {
    // So late that no clock has a name for it: never.
    let deadline = Instant::now().checked_add(timeout);
    let all = workers.len();
    let mut progress = Progress::default();
    loop {
        let late = deadline.is_some_and(|deadline| Instant::now() >= deadline);
        let status: Status = match look(place) {
            Ok(status) => status,
            // Busy now is no reason to give up what may take an hour.
            Err(failure) if failure.exit == Exit::TempFail && !late => {
                std::thread::sleep(PACE);
                continue;
            }
            Err(failure) => {
                progress.end();
                return Err(failure);
            }
        };
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
        if late {
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
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        std::thread::sleep(left.map_or(PACE, |left| PACE.min(left)));
    }
}

fn look(place: &Place) -> Result<Status, Failure> {
    admin::parse(&admin::get(place, "/v1/status")?, place)
}

/// Says what is waited for, unless it is over within a second: dropped, it says nothing more.
pub(super) struct Patience {
    _over: mpsc::Sender<()>,
}

impl Patience {
    pub(super) fn new(what: &'static str) -> Patience {
        let (over, waits) = mpsc::channel::<()>();
        // Without a thread nothing is said. It ends with what is waited for, or with the process.
        let _ = std::thread::Builder::new().name("patience".to_owned()).spawn(move || {
            if waits.recv_timeout(SILENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
                complain(what);
            }
        });
        Patience { _over: over }
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
