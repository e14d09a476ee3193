//! In which order the log tells: a cause before its consequence. And which ends were ordered.
//!
//! The core asks for the consequences of an event while it sorts the event out: untaken connections are placed again before it
//! is known how many there were. Lines about consequences therefore wait until everything is performed.

use std::collections::HashMap;

use dispatch_protocol::ClientAddr;

use super::EventLoop;
use dispatcher_core::{CloseReason, ConnId, Event, ListenerId, ProcessId, WorkerId};

/// Most lines that wait. In the few turns that have more the rest is told at once, as far as the limits let it.
const MOST: usize = 256;

/// A consequence, to be told once its cause has been.
#[derive(Debug)]
pub(super) enum Later {
    /// An event of a pool.
    Event(Event),
    /// A connection goes to another worker.
    Resent { to: WorkerId, conn: ConnId, peer: ClientAddr },
    /// A client is turned away.
    Closed { conn: ConnId, peer: ClientAddr, listener: ListenerId, reason: CloseReason },
}

impl EventLoop {
    /// Tells of an event now or, if it follows from others, after them.
    pub(super) fn tell_in_order(&mut self, event: Event) {
        match event {
            Event::NoUsableWorker { .. } | Event::BackPressure { .. } | Event::Relieved { .. } => {
                return self.later(Later::Event(event));
            }
            // These end what was to be told before.
            Event::Joined { .. } | Event::Resumed { .. } | Event::Trusted { .. } => {
                self.tell_later()
            }
            _ => {}
        }
        self.tell(&event);
    }

    pub(super) fn later(&mut self, line: Later) {
        if self.later.len() < MOST {
            self.later.push(line);
        } else {
            self.tell_one(line);
        }
    }

    /// Tells what waits.
    pub(super) fn tell_later(&mut self) {
        if self.later.is_empty() {
            return;
        }
        let mut lines = std::mem::take(&mut self.later);
        // What happened to a pool is the cause of what happened to its clients.
        let (events, others): (Vec<Later>, Vec<Later>) =
            lines.drain(..).partition(|line| matches!(line, Later::Event(_)));
        for line in events.into_iter().chain(others) {
            self.tell_one(line);
        }
        // It stays as large as it was.
        self.later = lines;
    }

    fn tell_one(&mut self, line: Later) {
        match line {
            Later::Event(event) => self.tell(&event),
            Later::Resent { to, conn, peer } => self.tell_resent(to, conn, &peer),
            Later::Closed { conn, peer, listener, reason } => {
                self.tell_closed(conn, &peer, listener, reason);
            }
        }
    }
}

/// Workers and processes that leave because they were told to, or said so themselves.
#[derive(Debug, Default)]
pub(super) struct Orderly {
    /// Whether the deadline of its drain has come. Until it is gone.
    workers: HashMap<WorkerId, bool>,
    /// The process id. Until it has ended or is a worker's in service.
    processes: HashMap<ProcessId, i32>,
}

impl Orderly {
    /// It is drained, or has said goodbye.
    pub(super) fn leaves(&mut self, worker: WorkerId, process: Option<(ProcessId, i32)>) {
        self.workers.entry(worker).or_default();
        self.processes.extend(process);
    }

    /// The deadline of its drain has come: it ends what it has.
    pub(super) fn is_over(&mut self, worker: WorkerId) {
        self.workers.insert(worker, true);
    }

    /// It stays.
    pub(super) fn stays(&mut self, worker: WorkerId, process: Option<ProcessId>) {
        self.workers.remove(&worker);
        if let Some(process) = process {
            self.processes.remove(&process);
        }
    }

    /// It is gone: whether that was ordered. It was not if it still had connections, unless it was to end them.
    pub(super) fn gone(&mut self, worker: WorkerId, had: u64) -> bool {
        self.workers.remove(&worker).is_some_and(|over| over || had == 0)
    }

    /// A process has ended: whether that was ordered.
    pub(super) fn ended(&mut self, process: ProcessId, pid: i32) -> bool {
        self.processes.remove(&process) == Some(pid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dispatcher_core::PoolId;

    #[test]
    fn an_end_is_ordered_if_it_was_announced_and_nothing_was_lost() {
        let mut orderly = Orderly::default();
        let worker = |serial| WorkerId { index: 0, serial };
        let process = ProcessId { pool: PoolId(0), number: 0 };
        assert!(!orderly.gone(worker(1), 0) && !orderly.ended(process, 10));
        orderly.leaves(worker(2), Some((process, 10)));
        assert!(orderly.ended(process, 10) && orderly.gone(worker(2), 0));
        assert!(!orderly.gone(worker(2), 0), "once");
        // Another process in its place.
        orderly.leaves(worker(3), Some((process, 10)));
        assert!(!orderly.ended(process, 11) && !orderly.gone(worker(3), 1));
        // It was to end what it had.
        orderly.leaves(worker(4), None);
        orderly.is_over(worker(4));
        assert!(orderly.gone(worker(4), 7));
        orderly.leaves(worker(5), Some((process, 12)));
        orderly.stays(worker(5), Some(process));
        assert!(!orderly.gone(worker(5), 0) && !orderly.ended(process, 12));
    }
}
