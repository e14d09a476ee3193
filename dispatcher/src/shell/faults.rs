//! What went wrong, in sentences for the status. What is no fault, or only follows from one, is left to the log.

use std::time::{Duration, SystemTime};

use humantime::format_duration;

use super::Shell;
use crate::pool::{Departure, Event, PoolId, ProcessId, WorkerId};

impl Shell {
    /// Remembers a fault. For use beside a log line, behind the same limit.
    pub(super) fn fault(
        &mut self,
        kind: &'static str,
        subject: &str,
        text: impl FnOnce() -> String,
    ) {
        let most = self.config.limits.fault_history;
        if most > 0 {
            self.faults.note(most, SystemTime::now(), kind, subject.to_owned(), text());
        }
    }

    /// Remembers an event of the core, if it is a fault.
    pub(super) fn note_fault(&mut self, event: &Event) {
        match *event {
            Event::Joined { .. }
            | Event::Draining { .. }
            | Event::DrainOver { .. }
            | Event::Resumed { .. }
            | Event::Goodbye { .. }
            | Event::Trusted { .. }
            | Event::Relieved { .. }
            // Its end, or that it did not start, is remembered already.
            | Event::Restarting { .. } => {}
            Event::Gone { worker, why, resent, live } => {
                let kind = match why {
                    Departure::Disconnected if live == 0 && resent == 0 => return,
                    // Of a killed process either news may come first.
                    Departure::Disconnected | Departure::Died => "worker_gone",
                    Departure::Expelled(_) => "worker_expelled",
                };
                self.worker_fault(kind, worker, |pid| {
                    let what = match why {
                        Departure::Disconnected => "is gone without a goodbye".to_owned(),
                        Departure::Died => "died".to_owned(),
                        Departure::Expelled(reason) => format!("was expelled: {reason}"),
                    };
                    format!(
                        "process {pid} {what}; {resent} untaken went elsewhere, {live} were being served"
                    )
                });
            }
            Event::Suspect { worker, revoked, waited } => {
                self.worker_fault("worker_suspect", worker, |pid| {
                    let waited = format_duration(Duration::from_millis(waited.as_millis() as u64));
                    format!(
                        "process {pid} took nothing for {waited}; {revoked} went elsewhere, \
                         it gets no more until it answers"
                    )
                });
            }
            Event::Lost { worker } => {
                self.worker_fault("connection_lost_by_worker", worker, |pid| {
                    format!("process {pid} did not get what was sent; is it at its limit of open files?")
                });
            }
            Event::ChannelFull { worker } => self.worker_fault("channel_full", worker, |pid| {
                format!("process {pid} reads too slowly: no room to send it more")
            }),
            Event::Clamped { worker, what, said, used } => {
                self.worker_fault("counter_clamped", worker, |pid| {
                    format!("process {pid} reports an impossible {what}: {said}; {used} is used")
                });
            }
            Event::BadGauge { worker, gauge, problem } => {
                self.worker_fault("gauge_impossible", worker, |pid| {
                    let gauge = gauge.as_ref().map_or("a gauge", |gauge| gauge.as_str());
                    format!("process {pid} shows {gauge} with {}", problem.text())
                });
            }
            // Every dispatcher starts without workers.
            Event::NoUsableWorker { .. } if self.now == self.started => {}
            Event::NoUsableWorker { pool } => {
                self.pool_fault("no_worker", pool, || "no worker: clients wait".to_owned());
            }
            Event::Refusing { pool, closed } => self.pool_fault("refusing", pool, || {
                format!("no worker for wait_for_worker: {closed} clients were turned away, and so is everybody now")
            }),
            Event::BackPressure { pool } => self.pool_fault("back_pressure", pool, || {
                "every worker is full or suspect: clients wait".to_owned()
            }),
            Event::Choked { pause } => self.fault("choked", "dispatcher", || {
                let pause = format_duration(pause);
                format!("out of descriptors or memory: everything waits for {pause}")
            }),
        }
    }

    fn worker_fault(
        &mut self,
        kind: &'static str,
        worker: WorkerId,
        text: impl FnOnce(i32) -> String,
    ) {
        let pool = self.core.pool_of_worker(worker).map_or("", |pool| self.core.pool_name(pool));
        let subject = format!("{pool}/{}", self.core.worker_name(worker));
        let pid = self.core.worker_pid(worker).unwrap_or_default();
        self.fault(kind, &subject, || text(pid));
    }

    fn pool_fault(&mut self, kind: &'static str, pool: PoolId, text: impl FnOnce() -> String) {
        let name = self.core.pool_name(pool).to_owned();
        self.fault(kind, &name, text);
    }

    /// What a process we start is called; it joins as a worker of this name unless it chooses another.
    pub(super) fn process_name(&self, process: ProcessId) -> String {
        let pool = self.core.pool_name(process.pool);
        format!("{pool}/{pool}-{}", process.number + 1)
    }
}
