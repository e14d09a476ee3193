//! Waits for drained workers to have no connections, and prints progress to stderr.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::admin::AdminEndpoint;
use super::table::count;
use super::{Exit, Failure, admin, print_error};
use crate::api::status::{HostDrainStatus, Status};
use dispatcher_core::HostState;

/// No message appears before this time has passed.
const SILENCE: Duration = Duration::from_secs(1);

/// Interval between two requests.
const PACE: Duration = Duration::from_millis(200);

/// Workers that are being drained.
pub(super) struct Drained {
    /// The dispatcher instance that drains them. Another instance does not continue the drain and
    /// assigns the same ids to other workers.
    pub(super) instance: String,
    /// Ids and names.
    pub(super) workers: BTreeMap<u64, String>,
}

impl Drained {
    /// Waits until each worker has left or has no connections.
    pub(super) fn wait(self, endpoint: &AdminEndpoint, timeout: Duration) -> Result<(), Failure> {
        let mut progress = Progress::default();
        let outcome = until_drained(endpoint, self, timeout, &mut progress);
        progress.end();
        outcome
    }

    /// The error when the dispatcher ended before the drain did. The state of the workers is
    /// unknown then.
    fn restarted(&self, exit: Exit, how: &str) -> Failure {
        let names: Vec<&str> = self.workers.values().map(String::as_str).collect();
        Failure::new(
            exit,
            format!(
                "the dispatcher {how} before it reported that these workers had no connections left: {}\n\
                 help: a drain ends with the dispatcher; workers that join the next one are active there. \
                 List the workers with `dispatcher workers`, and drain again",
                names.join(", ")
            ),
        )
    }
}

/// Waits until a host that drains has no connections, on whatever worker.
pub(super) fn host_drained(
    endpoint: &AdminEndpoint,
    instance: &str,
    timeout: Duration,
) -> Result<(), Failure> {
    let mut progress = Progress::default();
    let outcome = until_host_drained(endpoint, instance, timeout, &mut progress);
    progress.end();
    outcome
}

fn until_host_drained(
    endpoint: &AdminEndpoint,
    instance: &str,
    timeout: Duration,
    progress: &mut Progress,
) -> Result<(), Failure> {
    let restarted = |exit, how| {
        let message = format!(
            "the dispatcher {how} before it reported that this host had no connections left\n\
             help: a drain ends with the dispatcher; if another one runs, drain again"
        );
        Failure::new(exit, message)
    };
    let mut statuses = Statuses::new(endpoint, timeout);
    loop {
        let status = match statuses.next()? {
            Some(status) => status,
            None => return Err(restarted(Exit::Unavailable, "has ended")),
        };
        if status.instance != instance {
            return Err(restarted(Exit::DataErr, "was started again"));
        }
        let Some(host) = &status.draining else {
            return Err(Failure::new(Exit::DataErr, "the host was resumed meanwhile"));
        };
        progress.say(&super::drain::host_line(&HostDrainStatus {
            // They change with each look.
            begins_in_ms: 0,
            deadline_in_ms: None,
            ..host.clone()
        }));
        if host.state == HostState::Drained.name() {
            return Ok(());
        }
        if statuses.is_late() {
            let waited = humantime::format_duration(timeout);
            let connections = count(host.connections, "connection");
            return Err(Failure::new(
                Exit::TempFail,
                format!(
                    "{connections} left on this host after {waited}: the remaining connections go on; \
                     wait longer with --timeout, or end them with --deadline"
                ),
            ));
        }
        statuses.pause();
    }
}

/// Statuses of one dispatcher, until a time.
struct Statuses<'a> {
    endpoint: &'a AdminEndpoint,
    /// `None` if the deadline is beyond the range of the clock: wait without a limit.
    deadline: Option<Instant>,
    /// Whether the last status was asked for after the deadline.
    late: bool,
    /// Whether an answer was partial.
    broken: bool,
}

impl<'a> Statuses<'a> {
    fn new(endpoint: &'a AdminEndpoint, timeout: Duration) -> Statuses<'a> {
        let deadline = Instant::now().checked_add(timeout);
        Statuses { endpoint, deadline, late: false, broken: false }
    }

    /// The next one; `None` if the dispatcher has ended.
    fn next(&mut self) -> Result<Option<Status>, Failure> {
        loop {
            self.late = self.deadline.is_some_and(|deadline| Instant::now() >= deadline);
            match fetch_status(self.endpoint) {
                Ok(status) => return Ok(Some(status)),
                // The dispatcher is busy for a moment; the wait may take an hour, so it goes on.
                Err(failure) if failure.exit == Exit::TempFail && !self.late => {}
                // A partial answer: the dispatcher has probably just ended. The next request shows
                // it.
                Err(failure) if failure.exit == Exit::Protocol && !self.broken => {
                    self.broken = true;
                }
                Err(failure) if failure.exit == Exit::Unavailable => return Ok(None),
                Err(failure) => return Err(failure),
            }
            std::thread::sleep(PACE);
        }
    }

    fn is_late(&self) -> bool {
        self.late
    }

    fn pause(&self) {
        let left = self.deadline.map(|it| it.saturating_duration_since(Instant::now()));
        std::thread::sleep(left.map_or(PACE, |left| PACE.min(left)));
    }
}

fn until_drained(
    endpoint: &AdminEndpoint,
    mut drained: Drained,
    timeout: Duration,
    progress: &mut Progress,
) -> Result<(), Failure> {
    let mut statuses = Statuses::new(endpoint, timeout);
    let all = drained.workers.len();
    loop {
        let Some(status) = statuses.next()? else {
            return Err(drained.restarted(Exit::Unavailable, "has ended"));
        };
        // Earlier versions do not send the instance.
        if !drained.instance.is_empty() && status.instance != drained.instance {
            return Err(drained.restarted(Exit::DataErr, "was started again"));
        }
        let workers = &mut drained.workers;
        let mut left = 0;
        let there: BTreeMap<u64, _> =
            status.pools.iter().flat_map(|pool| &pool.workers).map(|w| (w.id, w)).collect();
        let resumed = workers
            .iter()
            .find(|(id, _)| there.get(id).is_some_and(|worker| worker.state != "draining"));
        if let Some((id, name)) = resumed {
            let message = format!("worker {id} ({name}) was resumed meanwhile");
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
        let connections = count(left, "connection");
        progress
            .say(&format!("{done} of {} drained, {connections} left", count(all as u64, "worker")));
        if workers.is_empty() {
            return Ok(());
        }
        if statuses.is_late() {
            let names: Vec<&str> = workers.values().map(String::as_str).collect();
            let waited = humantime::format_duration(timeout);
            return Err(Failure::new(
                Exit::TempFail,
                format!(
                    "{connections} left after {waited}, at {}: the remaining connections go on; \
                     wait longer with --timeout, or end them with --deadline",
                    names.join(", ")
                ),
            ));
        }
        statuses.pause();
    }
}

fn fetch_status(endpoint: &AdminEndpoint) -> Result<Status, Failure> {
    admin::parse(&admin::get(endpoint, "/v1/status")?, endpoint)
}

/// Prints `what` if the operation takes longer than a second. Dropping it cancels the message.
pub(super) struct SlowNotice {
    _over: mpsc::Sender<()>,
}

impl SlowNotice {
    pub(super) fn new(what: &'static str) -> SlowNotice {
        let (over, waits) = mpsc::channel::<()>();
        // If no thread can be started, no message appears. The thread ends with the operation or
        // with the process.
        let _ = std::thread::Builder::new().name("slow-notice".to_owned()).spawn(move || {
            if waits.recv_timeout(SILENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
                print_error(what);
            }
        });
        SlowNotice { _over: over }
    }
}

/// One line that is overwritten on a terminal; otherwise a line for each change.
#[derive(Debug, Default)]
pub(super) struct Progress {
    last: String,
}

impl Progress {
    pub(super) fn say(&mut self, text: &str) {
        if self.last == text {
            return;
        }
        text.clone_into(&mut self.last);
        let mut out = std::io::stderr();
        // A closed stderr does not end the wait.
        let _ = if out.is_terminal() {
            write!(out, "\r\x1b[K{text}").and_then(|()| out.flush())
        } else {
            writeln!(out, "{text}")
        };
    }

    pub(super) fn end(&self) {
        let mut out = std::io::stderr();
        if out.is_terminal() && !self.last.is_empty() {
            let _ = writeln!(out);
        }
    }
}
