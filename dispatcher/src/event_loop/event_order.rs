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
pub(super) enum DelayedEvent {
    /// An event of a pool.
    Event(Event),
    /// A connection goes to another worker.
    Resent { to: WorkerId, conn: ConnId, peer: ClientAddr },
    /// A client is turned away.
    Closed { conn: ConnId, peer: ClientAddr, listener: ListenerId, reason: CloseReason },
}

impl EventLoop {
    /// Tells of an event now or, if it follows from others, after them.
    pub(super) fn write_event_in_order(&mut self, event: Event) {
        match event {
            Event::NoUsableWorker { .. } | Event::BackPressure { .. } | Event::Relieved { .. } => {
                return self.delay_event(DelayedEvent::Event(event));
            }
            // These end what was to be told before.
            Event::Joined { .. } | Event::Resumed { .. } | Event::Trusted { .. } => {
                self.write_delayed_events()
            }
            _ => {}
        }
        self.write_event(&event);
    }

    pub(super) fn delay_event(&mut self, line: DelayedEvent) {
        if self.observation.delayed_events.len() < MOST {
            self.observation.delayed_events.push(line);
        } else {
            self.write_delayed_event(line);
        }
    }

    /// Tells what waits.
    pub(super) fn write_delayed_events(&mut self) {
        if self.observation.delayed_events.is_empty() {
            return;
        }
        let mut lines = std::mem::take(&mut self.observation.delayed_events);
        // What happened to a pool is the cause of what happened to its clients.
        let (events, others): (Vec<DelayedEvent>, Vec<DelayedEvent>) =
            lines.drain(..).partition(|line| matches!(line, DelayedEvent::Event(_)));
        for line in events.into_iter().chain(others) {
            self.write_delayed_event(line);
        }
        // It stays as large as it was.
        self.observation.delayed_events = lines;
    }

    fn write_delayed_event(&mut self, line: DelayedEvent) {
        match line {
            DelayedEvent::Event(event) => self.write_event(&event),
            DelayedEvent::Resent { to, conn, peer } => self.write_resent(to, conn, &peer),
            DelayedEvent::Closed { conn, peer, listener, reason } => {
                self.write_closed(conn, &peer, listener, reason);
            }
        }
    }
}

/// Workers and processes that leave because they were told to, or said so themselves.
#[derive(Debug, Default)]
pub(super) struct ExpectedEnds {
    /// Whether the deadline of its drain has come. Until it is gone.
    workers: HashMap<WorkerId, bool>,
    /// The process id. Until it has ended or is a worker's in service.
    processes: HashMap<ProcessId, i32>,
}

impl ExpectedEnds {
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
        let mut expected_ends = ExpectedEnds::default();
        let worker = |serial| WorkerId { index: 0, serial };
        let process = ProcessId { pool: PoolId(0), number: 0 };
        assert!(!expected_ends.gone(worker(1), 0) && !expected_ends.ended(process, 10));
        expected_ends.leaves(worker(2), Some((process, 10)));
        assert!(expected_ends.ended(process, 10) && expected_ends.gone(worker(2), 0));
        assert!(!expected_ends.gone(worker(2), 0), "once");
        // Another process in its place.
        expected_ends.leaves(worker(3), Some((process, 10)));
        assert!(!expected_ends.ended(process, 11) && !expected_ends.gone(worker(3), 1));
        // It was to end what it had.
        expected_ends.leaves(worker(4), None);
        expected_ends.is_over(worker(4));
        assert!(expected_ends.gone(worker(4), 7));
        expected_ends.leaves(worker(5), Some((process, 12)));
        expected_ends.stays(worker(5), Some(process));
        assert!(!expected_ends.gone(worker(5), 0) && !expected_ends.ended(process, 12));
    }
}
