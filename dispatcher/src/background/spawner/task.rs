//! The life of one process and its process group, from its start, or from its adoption, to its end.

use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use tokio::sync::{oneshot, watch};

use super::journal::Record;
use super::leader::{self, Found, Leader};
use super::output::{self, Reading, Source};
use super::prefork::{self, Forked};
use super::start::{Started, start as start_process};
use super::{Common, GIVEN_UP, Report, SpawnRequest, Stop, Stops, Survivor, group, memory};
use crate::config::OnDispatcherLoss;
use dispatcher_core::ProcessId;

/// How long a process may remain after SIGKILL: a process in an uninterruptible call can remain for
/// any time.
pub(super) const KILLED: Duration = Duration::from_secs(2);

/// How often the memory of a process is read.
const MEMORY: Duration = Duration::from_secs(1);

/// Starts a process, and follows it to its end. Returns whether it had to be killed.
pub(super) async fn start(
    request: SpawnRequest,
    stop: watch::Receiver<Stops>,
    common: Common,
) -> bool {
    let process = request.process;
    let started = common.book.with(|book| {
        if book.refuses(&request) {
            return Err(GIVEN_UP.to_owned());
        }
        let survives = request.on_dispatcher_loss == OnDispatcherLoss::Serve;
        let journal = if survives { book.journal() } else { None };
        let Some(journal) = journal else {
            return start_process(&request, &common.last_output, None, None);
        };
        journal.starts(request.token, record(&request));
        let started = start_process(&request, &common.last_output, Some(journal.file()), None);
        match &started {
            Ok(started) => journal.runs(request.token, started.pid.as_raw()),
            Err(_) => journal.ended(request.token),
        }
        if started.is_ok() {
            book.tokens.insert(process, request.token);
        }
        started
    });
    let Started { child, pid, output } = match started {
        Ok(started) => started,
        Err(error) => {
            common.reports.send(Report::SpawnFailed { process, error });
            return false;
        }
    };
    common.own.add(pid.as_raw());
    common.reports.send(Report::Spawned { process, pid: pid.as_raw() });
    let task = Task { process, pid, patience: request.patience, max_memory: request.max_memory };
    // The process has its own descriptors of its listeners.
    drop(request);
    task.follow(Leader::Child(child), output, stop, common).await
}

/// Waits for a process that its parent forks, and follows it to its end. Returns whether it had to
/// be killed.
pub(super) async fn forked(
    request: SpawnRequest,
    answer: oneshot::Receiver<prefork::Answer>,
    permit: tokio::sync::OwnedSemaphorePermit,
    stop: watch::Receiver<Stops>,
    common: Common,
) -> bool {
    let process = request.process;
    let answer = answer.await.unwrap_or_else(|_| Err("its parent has failed".to_owned()));
    drop(permit);
    let Forked { pid, leader, gate, pipes } = match answer {
        Ok(forked) => forked,
        Err(error) => {
            common.reports.send(Report::SpawnFailed { process, error });
            return false;
        }
    };
    if common.book.with(|book| book.refuses(&request)) {
        // It still waits at its gate, so it has no connections.
        group::signal(pid, Signal::SIGKILL);
        common.reports.send(Report::SpawnFailed { process, error: GIVEN_UP.to_owned() });
        return false;
    }
    // The process is in the journal before it runs the application: it waits at its gate.
    if request.on_dispatcher_loss == OnDispatcherLoss::Serve {
        common.book.with(|book| {
            if let Some(journal) = book.journal() {
                journal.starts(request.token, record(&request));
                journal.runs(request.token, pid.as_raw());
                book.tokens.insert(process, request.token);
            }
        });
    }
    let source = Source {
        pool: request.pool,
        name: request.name,
        pid: pid.as_raw(),
        rate: request.setup.output_rate,
    };
    let output = pipes.map(|pipes| pipes.read(source, process, &common.last_output));
    common.reports.send(Report::Spawned { process, pid: pid.as_raw() });
    gate.open();
    let task = Task { process, pid, patience: request.patience, max_memory: request.max_memory };
    task.follow(leader, output, stop, common).await
}

fn record(request: &SpawnRequest) -> Record {
    Record {
        pool: request.pool.clone(),
        place: request.process.place,
        start: request.process.start,
        generation: request.generation,
        pid: None,
        started: None,
        leaving: false,
        address: request.address,
    }
}

/// Follows a process of an earlier dispatcher to its end. Returns whether it had to be killed.
pub(super) async fn watch(
    process: ProcessId,
    survivor: Survivor,
    patience: Duration,
    max_memory: Option<u64>,
    stop: watch::Receiver<Stops>,
    common: Common,
) -> bool {
    common.book.with(|book| book.tokens.insert(process, survivor.token));
    let leader = match survivor.found {
        Found::Running(pidfd) => match leader::watch(pidfd) {
            Ok(leader) => leader,
            Err(error) => {
                log::error!("event=process_not_watched pid={} error={error}", survivor.pid);
                Leader::Gone
            }
        },
        Found::Group | Found::Nothing => Leader::Gone,
    };
    let source = Source {
        name: format!("{}-{}", survivor.record.pool, survivor.record.place + 1),
        pool: survivor.record.pool,
        pid: survivor.pid,
        rate: survivor.output_rate,
    };
    let output = output::of_survivor(source, process, &common.last_output);
    let pid = Pid::from_raw(survivor.pid);
    Task { process, pid, patience, max_memory }.follow(leader, output, stop, common).await
}

#[derive(Clone, Copy, Debug)]
struct Task {
    process: ProcessId,
    pid: Pid,
    patience: Duration,
    max_memory: Option<u64>,
}

impl Task {
    async fn follow(
        self,
        mut leader: Leader,
        output: Option<Reading>,
        mut stop: watch::Receiver<Stops>,
        common: Common,
    ) -> bool {
        let Task { process, pid, .. } = self;
        let mut end = End { process, pid, common, ended: None, others: None, left: false, output };
        let (wait, patience) = tokio::select! {
            ended = leader.wait() => {
                end.leader(ended);
                // A leader that is not a child may not be reaped yet.
                if group::is_empty(pid) || group::has_only_zombies(pid) {
                    return false;
                }
                end.others = Some("ended");
                (Duration::ZERO, self.patience)
            }
            ordered = ordered(&mut stop, process) => match ordered {
                Stop::End { wait, timeout } => (wait, timeout),
                Stop::Leave => {
                    end.left = true;
                    return false;
                }
            },
            never = self.watch_memory(&end.common) => never,
        };
        if !wait.is_zero() {
            let ended = async {
                end.leader(leader.wait().await);
                group::emptied(pid).await;
            };
            let by_itself = tokio::select! {
                ended = tokio::time::timeout(wait, ended) => ended.is_ok(),
                () = sooner(&mut stop, process, wait) => false,
            };
            if by_itself {
                return false;
            }
        }
        group::signal(pid, Signal::SIGTERM);
        let ended = async {
            if end.ended.is_none() {
                end.leader(leader.wait().await);
            }
            group::emptied(pid).await;
        };
        let late = tokio::select! {
            ended = tokio::time::timeout(patience, ended) => ended.is_err(),
            // A stop that begins meanwhile may be more urgent.
            () = late(&mut stop, process) => true,
        };
        if !late {
            return false;
        }
        group::signal(pid, Signal::SIGKILL);
        end.others = end.others.map(|_| "killed");
        let killed = async {
            if end.ended.is_none() {
                end.leader(leader.wait().await);
            }
            group::emptied(pid).await;
        };
        if tokio::time::timeout(KILLED, killed).await.is_err() && end.ended.is_none() {
            end.leader("unknown: it does not end".to_owned());
        }
        true
    }

    /// Reports once that the process uses too much memory. Never ends.
    async fn watch_memory<T>(&self, common: &Common) -> T {
        if let Some(most) = self.max_memory {
            loop {
                tokio::time::sleep(MEMORY).await;
                match memory::of(self.pid.as_raw()) {
                    Some(bytes) if bytes > most => {
                        let process = self.process;
                        common.reports.send(Report::ExceedsMemory { process, bytes });
                        break;
                    }
                    Some(_) => {}
                    None => break,
                }
            }
        }
        std::future::pending().await
    }
}

/// The report at the end of a process, however its task ends.
struct End {
    process: ProcessId,
    pid: Pid,
    common: Common,
    /// How the leader of the group ended, once it has.
    ended: Option<String>,
    /// How the rest of its group ended, if any was left.
    others: Option<&'static str>,
    /// It runs on without this dispatcher.
    left: bool,
    /// Its output in the log.
    output: Option<Reading>,
}

impl End {
    /// The leader has ended and was reaped.
    fn leader(&mut self, ended: String) {
        self.common.own.remove(self.pid.as_raw());
        self.ended = Some(ended);
    }
}

impl Drop for End {
    fn drop(&mut self) {
        if self.left {
            return;
        }
        let mut status_text = match self.ended.take() {
            Some(ended) => ended,
            // Its task has panicked. The process is no longer watched, so it must not run beside
            // its replacement.
            None => {
                group::signal(self.pid, Signal::SIGKILL);
                self.common.own.remove(self.pid.as_raw());
                "unknown: its supervision failed".to_owned()
            }
        };
        if let Some(others) = self.others {
            status_text.push_str("; what it had started was ");
            status_text.push_str(others);
        }
        // What it has written comes before its end.
        drop(self.output.take());
        self.common.book.ended(self.process);
        self.common.reports.send(Report::Exited {
            process: self.process,
            pid: self.pid.as_raw(),
            status_text,
        });
    }
}

/// Waits for an order. Waits forever once no order can come any more.
pub(super) async fn ordered(stop: &mut watch::Receiver<Stops>, process: ProcessId) -> Stop {
    let given = stop.wait_for(|stops| stops.of(process).is_some()).await;
    match given.ok().and_then(|stops| stops.of(process)) {
        Some(stop) => stop,
        None => std::future::pending().await,
    }
}

/// Waits for an order that gives a process less than `wait`; forever without such an order.
async fn sooner(stop: &mut watch::Receiver<Stops>, process: ProcessId, wait: Duration) {
    let less = |stops: &Stops| matches!(stops.of(process), Some(Stop::End { wait: new, .. }) if new < wait);
    if stop.wait_for(less).await.is_err() {
        std::future::pending().await
    }
}

/// Waits until the time of an ordered stop is over; forever without such an order.
async fn late(stop: &mut watch::Receiver<Stops>, process: ProcessId) {
    loop {
        let Stop::End { timeout, .. } = ordered(stop, process).await else {
            return std::future::pending().await;
        };
        tokio::select! {
            () = tokio::time::sleep(timeout) => return,
            changed = stop.changed() => if changed.is_err() {
                return tokio::time::sleep(timeout).await;
            },
        }
    }
}
