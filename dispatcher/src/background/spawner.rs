//! Starts the processes of pools, waits for their ends, and stops them. It runs on the side thread,
//! because starting a process takes a fraction of a millisecond, too long for the hot thread.
//!
//! Decides nothing: the core decides when to start and whether to restart.

mod group;
mod output;
pub(crate) mod reaper;
mod start;

use std::collections::HashMap;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use dispatch_protocol::wire::Token;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use tokio::sync::{mpsc as tokio_mpsc, watch};
use tokio::task::JoinSet;

use self::output::Reading;
pub use self::output::{LastOutput, OutputLine, Stream, lost_lines};
use self::reaper::Own;
use self::start::Started;
use crate::config::OnDispatcherLoss;
use crate::config::ProcessSetup;
use crate::wake::Wake;
use dispatcher_core::{PoolId, ProcessId};

/// Most processes that wait to be started; as many as one pool may have.
const MAX_WAITING: usize = 1024;

/// How long a process may remain after SIGKILL: a process in an uninterruptible call can remain for
/// any time.
const KILLED: Duration = Duration::from_secs(2);

/// A process to start.
#[derive(Clone, Debug)]
pub struct SpawnRequest {
    /// Identifies the process in every report.
    pub process: ProcessId,
    /// Program and arguments. With placeholders (see [`crate::config::expand`]), like the values of
    /// `environment`, and `directory`.
    pub command: Vec<String>,
    /// Added to the dispatcher's own environment.
    pub environment: Vec<(String, String)>,
    /// Working directory, if not the dispatcher's.
    pub directory: Option<String>,
    /// For `DISPATCH_SOCKET`.
    pub dispatch_socket: PathBuf,
    /// For `DISPATCH_POOL`.
    pub pool: String,
    /// For `DISPATCH_NAME`.
    pub name: String,
    /// For `DISPATCH_TOKEN`.
    pub token: Token,
    /// For `DISPATCH_ON_LOSS`.
    pub on_dispatcher_loss: OnDispatcherLoss,
    /// How long the remaining processes of the group may take to end once this process has ended.
    pub patience: Duration,
    /// Limits of open files, soft and hard, if `setup` has none: those with which the dispatcher
    /// was started, if it has raised its own.
    pub descriptors: Option<(u64, u64)>,
    /// Account, permissions, limits and output.
    pub setup: ProcessSetup,
}

/// A report about a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// The process runs.
    Spawned {
        /// The process.
        process: ProcessId,
        /// Its process id, and the id of its process group.
        pid: i32,
    },
    /// The process could not be started.
    SpawnFailed {
        /// The process.
        process: ProcessId,
        /// The error text.
        error: String,
    },
    /// The process and its process group have ended. Comes once after every `Spawned`.
    Exited {
        /// The process.
        process: ProcessId,
        /// The process id it had.
        pid: i32,
        /// The exit status, for display: `exit status 1`, `signal 9 (SIGKILL)`.
        status_text: String,
    },
    /// After [`Spawner::stop`]: all processes have ended, `killed` of them by SIGKILL. The last
    /// report.
    Stopped {
        /// How many did not end in time.
        killed: u32,
    },
}

/// The hot thread's handle.
#[derive(Debug)]
pub struct Spawner {
    requests: tokio_mpsc::Sender<SpawnRequest>,
    stop: watch::Sender<Stops>,
    last_output: LastOutput,
}

/// The processes to end, and how long each may take before SIGKILL.
#[derive(Clone, Debug, Default)]
struct Stops {
    all: Option<Duration>,
    pools: HashMap<PoolId, Duration>,
}

impl Stops {
    fn of(&self, pool: PoolId) -> Option<Duration> {
        self.all.or_else(|| self.pools.get(&pool).copied())
    }
}

impl Spawner {
    /// Requests a process. `Spawned` or `SpawnFailed` follows.
    ///
    /// # Errors
    ///
    /// Returns the request when too many are waiting or the service has ended: then no report
    /// follows.
    pub fn spawn(&self, request: SpawnRequest) -> Result<(), Box<SpawnRequest>> {
        self.requests.try_send(request).map_err(|error| Box::new(error.into_inner()))
    }

    /// The last lines that a process has written, oldest first; see [`LastOutput`].
    pub fn last_output(&self, process: ProcessId) -> Vec<OutputLine> {
        self.last_output.of(process)
    }

    /// The last lines of all processes, for other threads.
    pub fn last_outputs(&self) -> LastOutput {
        self.last_output.clone()
    }

    /// Ends all processes: SIGTERM to each process group now, SIGKILL after `timeout`. `Exited` for
    /// each and then `Stopped` follow; no further process is started.
    pub fn stop(&self, timeout: Duration) {
        self.stop.send_modify(|stops| stops.all = Some(timeout));
    }

    /// Ends the processes of one pool in the same way. `Stopped` does not follow.
    pub fn stop_pool(&self, pool: PoolId, timeout: Duration) {
        self.stop.send_modify(|stops| {
            stops.pools.insert(pool, timeout);
        });
    }
}

/// The service, before it runs.
pub(crate) struct Service {
    requests: tokio_mpsc::Receiver<SpawnRequest>,
    stop: watch::Receiver<Stops>,
    reports: Reports,
    processes: JoinSet<bool>,
    own: Own,
    last_output: LastOutput,
}

/// The destination of reports. The channel is unbounded, but the number is bounded: two reports per
/// request of the hot thread.
#[derive(Clone)]
struct Reports {
    sender: mpsc::Sender<Report>,
    wake: Wake,
}

impl Reports {
    fn send(&self, report: Report) {
        // Sending fails only when the hot thread is gone, and then no report is needed.
        if self.sender.send(report).is_ok() {
            (self.wake)();
        }
    }
}

/// A handle, the service behind it, and its reports.
pub(crate) fn service(wake: Wake) -> (Spawner, Service, Receiver<Report>) {
    let (request_sender, requests) = tokio_mpsc::channel(MAX_WAITING);
    let (stop_sender, stop) = watch::channel(Stops::default());
    let (sender, reports) = mpsc::channel();
    let last_output = LastOutput::default();
    (
        Spawner { requests: request_sender, stop: stop_sender, last_output: last_output.clone() },
        Service {
            requests,
            stop,
            reports: Reports { sender, wake },
            processes: JoinSet::new(),
            own: Own::default(),
            last_output,
        },
        reports,
    )
}

impl Service {
    /// Runs until it was stopped and all processes have ended, or its handle is gone (processes
    /// then stay). After a panic it can run again, with the processes it had.
    pub(crate) async fn run(&mut self) {
        // A process that is only a dispatcher has no children but these and inherited ones.
        let own = self.own.clone();
        let reaper = crate::signals::is_dispatcher().then(|| {
            tokio::spawn(crate::background::restart::task("reaper", move || {
                reaper::reap(own.clone())
            }))
        });
        let _ends = AbortOnDrop(reaper);
        loop {
            tokio::select! {
                biased;
                changed = self.stop.changed() => match changed {
                    Ok(()) if self.stop.borrow_and_update().all.is_some() => break,
                    Ok(()) => {}
                    Err(_) => {
                        self.processes.detach_all();
                        return;
                    }
                },
                request = self.requests.recv() => match request {
                    Some(request) => {
                        let process = process(
                            request,
                            self.stop.clone(),
                            self.reports.clone(),
                            self.own.clone(),
                            self.last_output.clone(),
                        );
                        self.processes.spawn(process);
                    }
                    None => {
                        self.processes.detach_all();
                        return;
                    }
                },
                Some(_) = self.processes.join_next() => {}
            }
        }
        self.requests.close();
        while let Some(request) = self.requests.recv().await {
            self.reports.send(Report::SpawnFailed {
                process: request.process,
                error: "the dispatcher is stopping".to_owned(),
            });
        }
        let mut killed = 0;
        while let Some(ended) = self.processes.join_next().await {
            killed += u32::from(ended.unwrap_or(true));
        }
        self.reports.send(Report::Stopped { killed });
    }
}

/// The reaper, which must not run twice.
struct AbortOnDrop(Option<tokio::task::JoinHandle<()>>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

/// Runs one process and its group from start to end; returns whether any of them had to be killed.
async fn process(
    request: SpawnRequest,
    mut stop: watch::Receiver<Stops>,
    reports: Reports,
    own: Own,
    last_output: LastOutput,
) -> bool {
    let process = request.process;
    let Started { mut child, pid, output } = match start::start(&request, &last_output) {
        Ok(started) => started,
        Err(error) => {
            reports.send(Report::SpawnFailed { process, error });
            return false;
        }
    };
    own.add(pid.as_raw());
    reports.send(Report::Spawned { process, pid: pid.as_raw() });
    let mut end = End { process, pid, reports, own, ended: None, others: None, output };
    let patience = tokio::select! {
        ended = child.wait() => {
            end.leader(ended);
            if group::is_empty(pid) {
                return false;
            }
            end.others = Some("ended");
            request.patience
        }
        patience = stopping(&mut stop, process.pool) => patience,
    };
    group::signal(pid, Signal::SIGTERM);
    let ended = async {
        if end.ended.is_none() {
            end.leader(child.wait().await);
        }
        group::emptied(pid).await;
    };
    let late = tokio::select! {
        ended = tokio::time::timeout(patience, ended) => ended.is_err(),
        // A stop that begins meanwhile may be more urgent.
        () = late(&mut stop, process.pool) => true,
    };
    if !late {
        return false;
    }
    group::signal(pid, Signal::SIGKILL);
    end.others = end.others.map(|_| "killed");
    let killed = async {
        if end.ended.is_none() {
            end.leader(child.wait().await);
        }
        group::emptied(pid).await;
    };
    if tokio::time::timeout(KILLED, killed).await.is_err() && end.ended.is_none() {
        end.leader(Err(std::io::ErrorKind::TimedOut.into()));
    }
    true
}

/// The report at the end of a process, however its task ends.
struct End {
    process: ProcessId,
    pid: Pid,
    reports: Reports,
    own: Own,
    /// How the leader of the group ended, once it has.
    ended: Option<std::io::Result<ExitStatus>>,
    /// How the rest of its group ended, if any was left.
    others: Option<&'static str>,
    /// Its output in the log.
    output: Option<Reading>,
}

impl End {
    /// The leader has ended and was reaped.
    fn leader(&mut self, ended: std::io::Result<ExitStatus>) {
        self.own.remove(self.pid.as_raw());
        self.ended = Some(ended);
    }
}

impl Drop for End {
    fn drop(&mut self) {
        let mut status_text = match self.ended.take() {
            Some(Ok(status)) => describe(status),
            Some(Err(error)) => format!("unknown: {error}"),
            // Its task has panicked. The process is no longer watched, so it must not run beside
            // its replacement.
            None => {
                group::signal(self.pid, Signal::SIGKILL);
                self.own.remove(self.pid.as_raw());
                "unknown: its supervision failed".to_owned()
            }
        };
        if let Some(others) = self.others {
            status_text.push_str("; what it had started was ");
            status_text.push_str(others);
        }
        // What it has written comes before its end.
        drop(self.output.take());
        self.reports.send(Report::Exited {
            process: self.process,
            pid: self.pid.as_raw(),
            status_text,
        });
    }
}

/// Waits for the order to stop. Waits forever once no order can come any more.
async fn stopping(stop: &mut watch::Receiver<Stops>, pool: PoolId) -> Duration {
    let given = stop.wait_for(|stops| stops.of(pool).is_some()).await;
    match given.ok().and_then(|stops| stops.of(pool)) {
        Some(timeout) => timeout,
        None => std::future::pending().await,
    }
}

/// Waits until the time of an ordered stop is over; forever without such an order.
async fn late(stop: &mut watch::Receiver<Stops>, pool: PoolId) {
    loop {
        let timeout = stopping(stop, pool).await;
        tokio::select! {
            () = tokio::time::sleep(timeout) => return,
            changed = stop.changed() => if changed.is_err() {
                return tokio::time::sleep(timeout).await;
            },
        }
    }
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(number)) => match Signal::try_from(number) {
            Ok(signal) => format!("signal {number} ({signal})"),
            Err(_) => format!("signal {number}"),
        },
        (None, None) => status.to_string(),
    }
}

#[cfg(test)]
mod tests;
