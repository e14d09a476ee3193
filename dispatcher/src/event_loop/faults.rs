//! Turns events into faults: sentences for the status. Events that are no fault, or only follow
//! from one, are only logged.

use std::time::{Duration, SystemTime};

use humantime::format_duration;

use super::EventLoop;
use super::conditions::Condition;
use super::events::{span, stop_reason};
use super::fault_kind::FaultKind;
use crate::api::status::SocketFileStatus;
use crate::background::logger::value;
use crate::listen::files::FileEvent;
use dispatcher_core::{Departure, EndReason, Event, PoolId, ProcessId, WorkerId};

impl EventLoop {
    /// Adds a fault. Called beside a log line, behind the same rate limit.
    pub(super) fn fault(&mut self, kind: FaultKind, subject: &str, text: impl FnOnce() -> String) {
        let most = self.config.limits.fault_history;
        if most > 0 {
            self.observation.faults.note(most, SystemTime::now(), kind, subject.to_owned(), text());
        }
    }

    /// Adds faults for missing socket files, and updates them when the files are back.
    pub(super) fn note_socket_files(&mut self) {
        const KIND: FaultKind = FaultKind::SocketFileMissing;
        let most = self.config.limits.fault_history;
        for FileEvent { at, file, missed } in self.side.files.events() {
            let SocketFileStatus { socket, path } = file;
            let path = value(&path);
            match missed {
                None if most == 0 => {}
                None => {
                    let text = format!(
                        "{path} is missing: no client can connect; a reload creates it again"
                    );
                    self.observation.faults.note(most, at, KIND, socket.clone(), text.clone());
                    self.observation.faults.update(KIND, &socket, text, true);
                }
                Some(missed) => {
                    let text = format!("{path} was missing for {}", span(missed));
                    self.observation.faults.update(KIND, &socket, text, false);
                }
            }
        }
    }

    /// Notes which workers are expected to end; returns whether this event is an expected end.
    pub(super) fn note_order(&mut self, event: &Event) -> bool {
        self.follow_conditions(false);
        match *event {
            Event::Goodbye { worker, .. } | Event::Draining { worker, .. } => {
                let process = self.core.process_of(worker);
                if let Some(process) = process.filter(|&process| !self.core.wants_process(process))
                {
                    self.side.spawner.leaving(process);
                }
                let process = process.zip(self.core.worker_pid(worker));
                self.observation.expected_ends.leaves(worker, process);
            }
            Event::DrainOver { worker, .. } => self.observation.expected_ends.is_over(worker),
            Event::Resumed { worker } => {
                let process = self.core.process_of(worker);
                if let Some(process) = process.filter(|&process| self.core.wants_process(process)) {
                    self.side.spawner.stays(process);
                }
                self.observation.expected_ends.stays(worker, process);
            }
            Event::Gone { worker, live, resent, .. } => {
                return self.observation.expected_ends.gone(worker, live + u64::from(resent));
            }
            _ => {}
        }
        false
    }

    /// Updates the faults of conditions that have ended, and with `ongoing` of those that last.
    pub(super) fn follow_conditions(&mut self, ongoing: bool) {
        if self.observation.conditions.is_empty() {
            return;
        }
        let core = &self.core;
        let over = self.observation.conditions.over(|pool| core.pool_state(pool));
        let over = over.iter().map(|one| (one, false));
        let on =
            self.observation.conditions.ongoing().iter().filter(|_| ongoing).map(|one| (one, true));
        for (one, ongoing) in over.chain(on) {
            let clients = self.observation.conditions.clients_of(one);
            let text = one.condition.text(self.now - one.since, clients, ongoing);
            let name = self.core.pool_name(one.pool);
            self.observation.faults.update(one.condition.kind(), name, text, ongoing);
        }
    }

    /// Adds a fault for an event, if it is one. An `ordered` end is none.
    pub(super) fn note_fault(&mut self, event: &Event, ordered: bool) {
        match *event {
            Event::Joined { .. }
            | Event::Draining { .. }
            | Event::DrainOver { .. }
            | Event::Resumed { .. }
            | Event::HostDraining { .. }
            | Event::HostResumed
            | Event::Paused { .. }
            | Event::Updated { .. }
            | Event::Goodbye { .. }
            | Event::Trusted { .. }
            | Event::Relieved { .. }
            | Event::Served { .. }
            // The end or the failed start has already been added.
            | Event::Restarting { .. }
            | Event::Replacing { .. }
            | Event::Rolled { .. }
            | Event::ProcessStopped { reason: EndReason::Left | EndReason::Unwanted, .. } => {}
            Event::ProcessStopped { process, reason } => {
                let subject = self.process_name(process);
                // The old process serves on, so a new one that is not ready needs no successor.
                let what = match reason {
                    EndReason::NotReady => "ended",
                    _ => "ended and replaced",
                };
                self.fault(FaultKind::ProcessStopped, &subject, || {
                    format!("the process is {what}: {}", stop_reason(reason))
                });
            }
            Event::CrashLoop { process, failures } => {
                let name = self.core.pool_name(process.pool).to_owned();
                self.fault(FaultKind::CrashLoop, &name, || crash_loop_text(failures));
                self.observation.faults.update(FaultKind::CrashLoop, &name, crash_loop_text(failures), true);
            }
            Event::RollStopped { process, .. } => {
                let name = self.core.pool_name(process.pool).to_owned();
                let reason = self.roll_reason(process.pool);
                self.fault(FaultKind::RollStopped, &name, || reason);
            }
            Event::CrashLoopOver { pool } => {
                let name = self.core.pool_name(pool).to_owned();
                let text = "the processes of the pool failed to start; they start again".to_owned();
                self.observation.faults.update(FaultKind::CrashLoop, &name, text, false);
            }
            Event::Gone { worker, why, resent, live } => {
                let kind = match why {
                    Departure::Disconnected if live == 0 && resent == 0 => return,
                    Departure::Disconnected | Departure::Died if ordered => return,
                    Departure::Released => return,
                    // When a process is killed, either event may come first.
                    Departure::Disconnected | Departure::Died => FaultKind::WorkerGone,
                    Departure::Expelled(_) => FaultKind::WorkerExpelled,
                };
                self.worker_fault(kind, worker, |pid| {
                    let what = match why {
                        Departure::Disconnected => "is gone without a goodbye".to_owned(),
                        Departure::Died => "died".to_owned(),
                        Departure::Expelled(reason) => format!("was expelled: {reason}"),
                        Departure::Released => "was released".to_owned(),
                    };
                    format!(
                        "process {pid} {what}; {resent} untaken went to other workers, {live} {} being served",
                        if live == 1 { "was" } else { "were" }
                    )
                });
            }
            Event::Suspect { worker, revoked, waited } => {
                self.worker_fault(FaultKind::WorkerSuspect, worker, |pid| {
                    let waited = format_duration(Duration::from_millis(waited.as_millis() as u64));
                    format!(
                        "process {pid} took nothing for {waited}; {revoked} went to other workers, \
                         it gets no more until it answers"
                    )
                });
            }
            Event::Lost { worker } => {
                self.worker_fault(FaultKind::ConnectionLostByWorker, worker, |pid| {
                    format!("process {pid} did not receive a connection; is it at its limit of open files?")
                });
            }
            Event::ChannelFull { worker } => self.worker_fault(FaultKind::ChannelFull, worker, |pid| {
                format!("process {pid} reads too slowly: no room to send it more")
            }),
            Event::Clamped { worker, what, said, used } => {
                self.worker_fault(FaultKind::CounterClamped, worker, |pid| {
                    format!("process {pid} reports an impossible {what}: {said}; {used} is used")
                });
            }
            Event::BadGauge { worker, gauge, problem } => {
                self.worker_fault(FaultKind::GaugeImpossible, worker, |pid| {
                    let gauge = gauge.as_ref().map_or("a gauge", |gauge| gauge.as_str());
                    format!("process {pid} shows {gauge} with {}", problem.text())
                });
            }
            // Every dispatcher starts without workers.
            Event::NoUsableWorker { .. } if self.now == self.run.started => {}
            Event::NoUsableWorker { pool } => {
                self.condition(Condition::NoWorker, pool, 0);
            }
            Event::Refusing { pool, closed, unserved: false } => {
                self.condition(Condition::Refusing, pool, closed.into());
            }
            Event::Refusing { pool, closed, unserved: true } => {
                self.condition(Condition::Unserved, pool, closed.into());
            }
            // The condition lasts and counts by itself.
            Event::StillRefusing { .. } => {}
            Event::BackPressure { pool } => self.condition(Condition::BackPressure, pool, 0),
            Event::OutOfResources { pause } => self.fault(FaultKind::OutOfResources, "dispatcher", || {
                let pause = format_duration(pause);
                format!("out of descriptors or memory: nothing is placed for {pause}")
            }),
        }
    }

    fn worker_fault(
        &mut self,
        kind: FaultKind,
        worker: WorkerId,
        text: impl FnOnce(i32) -> String,
    ) {
        let pool = self.core.pool_of_worker(worker).map_or("", |pool| self.core.pool_name(pool));
        let subject = format!("{pool}/{}", self.core.worker_name(worker));
        let pid = self.core.worker_pid(worker).unwrap_or_default();
        self.fault(kind, &subject, || text(pid));
    }

    /// A fault of a pool that lasts until the pool's state changes.
    fn condition(&mut self, condition: Condition, pool: PoolId, clients: u64) {
        self.observation.conditions.begin(condition, pool, self.now, clients);
        let name = self.core.pool_name(pool).to_owned();
        self.fault(condition.kind(), &name, || condition.text(Duration::ZERO, clients, true));
    }

    /// The name of a process of the dispatcher; it joins as a worker of this name unless it chooses
    /// another.
    pub(super) fn process_name(&self, process: ProcessId) -> String {
        let pool = self.core.pool_name(process.pool);
        format!("{pool}/{pool}-{}", process.place + 1)
    }
}

fn crash_loop_text(failures: u32) -> String {
    format!(
        "{failures} starts in succession have failed: one process is tried at a time, after \
         max_restart_delay; `dispatcher restart` tries again at once"
    )
}
