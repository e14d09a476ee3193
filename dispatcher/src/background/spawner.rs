//! Starts the processes of spawned pools, waits for their ends, and stops them. Runs on the side thread, because
//! starting a process takes a fraction of a millisecond, which the hot thread does not have.
//!
//! Decides nothing: when to start and whether to start again is the core's business.

mod group;
mod reaper;

use std::collections::HashMap;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use dispatch_protocol::wire::Token;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use tokio::process::Child;
use tokio::sync::{mpsc as tokio_mpsc, watch};
use tokio::task::JoinSet;

use self::reaper::Own;
use crate::config::NOT_INHERITED;
use crate::sys;
use crate::wake::Wake;
use dispatcher_core::{PoolId, ProcessId};

/// Most processes waiting to be started; as many as one pool may have.
const MAX_WAITING: usize = 1024;

/// How long after SIGKILL a process may still be there: one in an uninterruptible call stays as long as it likes.
const KILLED: Duration = Duration::from_secs(2);

/// A process to start.
#[derive(Clone, Debug)]
pub struct SpawnRequest {
    /// Who it is; comes back in every report.
    pub process: ProcessId,
    /// Program and arguments.
    pub command: Vec<String>,
    /// On top of our own environment.
    pub environment: Vec<(String, String)>,
    /// Working directory, if not ours.
    pub directory: Option<PathBuf>,
    /// For `DISPATCH_SOCKET`.
    pub dispatch_socket: PathBuf,
    /// For `DISPATCH_POOL`.
    pub pool: String,
    /// For `DISPATCH_NAME`.
    pub name: String,
    /// For `DISPATCH_TOKEN`.
    pub token: Token,
    /// How long what it leaves behind in its process group may take to end by itself, once it has ended.
    pub patience: Duration,
    /// Limits of open files to start with, soft and hard, if they are not ours.
    pub descriptors: Option<(u64, u64)>,
}

/// What became of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// It runs.
    Spawned {
        /// Which.
        process: ProcessId,
        /// Its process id, and the id of its process group.
        pid: i32,
    },
    /// It could not be started.
    SpawnFailed {
        /// Which.
        process: ProcessId,
        /// Why, for people.
        error: String,
    },
    /// It has ended, and all that it had started in its process group. Comes once after every `Spawned`.
    Exited {
        /// Which.
        process: ProcessId,
        /// The process id it had.
        pid: i32,
        /// How it ended, for people: `exit status 1`, `signal 9 (SIGKILL)`.
        status_text: String,
    },
    /// After [`Spawner::stop`]: all have ended, `killed` of them by SIGKILL. The last report.
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
}

/// Whose processes are to end, and how long each may take: SIGKILL follows.
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
    /// Asks for a process. `Spawned` or `SpawnFailed` will follow.
    ///
    /// # Errors
    /// Gives the request back when too many are waiting, or the service has ended: then no report follows.
    pub fn spawn(&self, request: SpawnRequest) -> Result<(), Box<SpawnRequest>> {
        self.requests.try_send(request).map_err(|error| Box::new(error.into_inner()))
    }

    /// Asks all processes to end: SIGTERM to the process group of each now, SIGKILL after `timeout`. `Exited` for each and
    /// then `Stopped` will follow; nothing is started any more.
    pub fn stop(&self, timeout: Duration) {
        self.stop.send_modify(|stops| stops.all = Some(timeout));
    }

    /// The same for the processes of one pool. `Stopped` does not follow.
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
}

/// Where reports go. Unbounded as a channel, and yet bounded: two per request the hot thread made.
#[derive(Clone)]
struct Reports {
    sender: mpsc::Sender<Report>,
    wake: Wake,
}

impl Reports {
    fn send(&self, report: Report) {
        // Nobody listens only when the hot thread is gone, and then nobody needs to know.
        if self.sender.send(report).is_ok() {
            (self.wake)();
        }
    }
}

/// A handle, the service behind it, and what it reports.
pub(crate) fn service(wake: Wake) -> (Spawner, Service, Receiver<Report>) {
    let (request_sender, requests) = tokio_mpsc::channel(MAX_WAITING);
    let (stop_sender, stop) = watch::channel(Stops::default());
    let (sender, reports) = mpsc::channel();
    (
        Spawner { requests: request_sender, stop: stop_sender },
        Service {
            requests,
            stop,
            reports: Reports { sender, wake },
            processes: JoinSet::new(),
            own: Own::default(),
        },
        reports,
    )
}

impl Service {
    /// Runs until it was stopped and all processes have ended, or its handle is gone (processes then stay). After a panic it
    /// can be run again, and goes on with the processes it had.
    pub(crate) async fn run(&mut self) {
        // A process that is a dispatcher and nothing else has no children but these and those it inherits.
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
                        let process =
                            process(request, self.stop.clone(), self.reports.clone(), self.own.clone());
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

/// One process from start to end, with all that it started in its group; says whether any of them had to be killed.
async fn process(
    request: SpawnRequest,
    mut stop: watch::Receiver<Stops>,
    reports: Reports,
    own: Own,
) -> bool {
    let process = request.process;
    let (mut child, pid) = match start(&request) {
        Ok(started) => started,
        Err(error) => {
            reports.send(Report::SpawnFailed { process, error });
            return false;
        }
    };
    own.add(pid.as_raw());
    reports.send(Report::Spawned { process, pid: pid.as_raw() });
    let mut end = End { process, pid, reports, own, ended: None, others: None };
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

/// What is told of a process at its end, however its task ends.
struct End {
    process: ProcessId,
    pid: Pid,
    reports: Reports,
    own: Own,
    /// How the leader of the group ended, once it has.
    ended: Option<std::io::Result<ExitStatus>>,
    /// What became of the others in its group, if it left some behind.
    others: Option<&'static str>,
}

impl End {
    /// The leader has ended, and its end was collected.
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
            // Its task has panicked. Nothing watches over it any more, so it must not stay beside its replacement.
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
        self.reports.send(Report::Exited {
            process: self.process,
            pid: self.pid.as_raw(),
            status_text,
        });
    }
}

fn start(request: &SpawnRequest) -> Result<(Child, Pid), String> {
    let (program, arguments) = request.command.split_first().ok_or("no command")?;
    let mut command = tokio::process::Command::new(program);
    command
        .args(arguments)
        .envs(request.environment.iter().map(|(name, value)| (name, value)))
        .env("DISPATCH_SOCKET", &request.dispatch_socket)
        .env("DISPATCH_POOL", &request.pool)
        .env("DISPATCH_NAME", &request.name)
        .env("DISPATCH_TOKEN", request.token.to_string())
        .stdin(Stdio::null())
        // A group of its own: Ctrl-C at a terminal reaches only the dispatcher, which then stops the others in order.
        .process_group(0);
    for name in NOT_INHERITED {
        command.env_remove(name);
    }
    if let Some(directory) = &request.directory {
        command.current_dir(directory);
    }
    sys::start_with_default_signals(command.as_std_mut());
    if let Some((soft, hard)) = request.descriptors {
        sys::start_with_descriptor_limit(command.as_std_mut(), soft, hard);
    }
    let child = command.spawn().map_err(|error| match &request.directory {
        // One error for two paths: say both.
        Some(directory) if !directory.is_dir() => {
            format!("{program} in {}: {error}", directory.display())
        }
        _ => format!("{program}: {error}"),
    })?;
    let pid = child
        .id()
        .and_then(|pid| i32::try_from(pid).ok())
        .ok_or_else(|| format!("{program}: no process id"))?;
    Ok((child, Pid::from_raw(pid)))
}

/// Waits for the order to stop. Never, once nobody can give it any more.
async fn stopping(stop: &mut watch::Receiver<Stops>, pool: PoolId) -> Duration {
    let given = stop.wait_for(|stops| stops.of(pool).is_some()).await;
    match given.ok().and_then(|stops| stops.of(pool)) {
        Some(timeout) => timeout,
        None => std::future::pending().await,
    }
}

/// Waits until a stop that was ordered gives no more time; never without one.
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
