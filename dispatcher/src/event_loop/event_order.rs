//! The order of log lines (a cause before its consequences), and the ends of workers and processes
//! that were expected.
//!
//! The core emits the consequences of an event while it handles the event: it places untaken
//! connections again before their number is known. Lines about consequences therefore wait until
//! every effect is performed.

use std::collections::HashMap;

use dispatch_protocol::ClientAddr;

use super::EventLoop;
use dispatcher_core::{CloseReason, ConnId, Event, ListenerId, ProcessId, WorkerId};

/// Most delayed lines. In the few turns with more, further lines are written at once.
const MOST: usize = 256;

/// A consequence, to be logged after its cause.
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
    /// Logs an event now or, if it is a consequence, after the other events of the turn.
    pub(super) fn write_event_in_order(&mut self, event: Event) {
        match event {
            Event::NoUsableWorker { .. } | Event::BackPressure { .. } | Event::Relieved { .. } => {
                return self.delay_event(DelayedEvent::Event(event));
            }
            // These events end the delay: what was delayed came before them.
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

    /// Logs the delayed events.
    pub(super) fn write_delayed_events(&mut self) {
        if self.observation.delayed_events.is_empty() {
            return;
        }
        let mut lines = std::mem::take(&mut self.observation.delayed_events);
        // Events of a pool are the cause of what happened to its clients.
        let (events, others): (Vec<DelayedEvent>, Vec<DelayedEvent>) =
            lines.drain(..).partition(|line| matches!(line, DelayedEvent::Event(_)));
        for line in events.into_iter().chain(others) {
            self.write_delayed_event(line);
        }
        // Keeps the capacity.
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

/// Workers and processes that were told to leave, or announced that they would.
#[derive(Debug, Default)]
pub(super) struct ExpectedEnds {
    /// Until the worker is gone: whether the deadline of its drain has passed.
    workers: HashMap<WorkerId, bool>,
    /// The process id, until the process has ended or is the process of an active worker.
    processes: HashMap<ProcessId, i32>,
}

impl ExpectedEnds {
    /// The worker is drained, or has said goodbye.
    pub(super) fn leaves(&mut self, worker: WorkerId, process: Option<(ProcessId, i32)>) {
        self.workers.entry(worker).or_default();
        self.processes.extend(process);
    }

    /// The deadline of the drain has passed: the worker must end its connections.
    pub(super) fn is_over(&mut self, worker: WorkerId) {
        self.workers.insert(worker, true);
    }

    /// The worker stays.
    pub(super) fn stays(&mut self, worker: WorkerId, process: Option<ProcessId>) {
        self.workers.remove(&worker);
        if let Some(process) = process {
            self.processes.remove(&process);
        }
    }

    /// The worker is gone: returns whether that was expected. It was not if the worker still had
    /// connections that it was not told to end.
    pub(super) fn gone(&mut self, worker: WorkerId, had: u64) -> bool {
        self.workers.remove(&worker).is_some_and(|over| over || had == 0)
    }

    /// A process has ended: returns whether that was expected.
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
        let process = ProcessId { pool: PoolId(0), place: 0, start: 1 };
        assert!(!expected_ends.gone(worker(1), 0) && !expected_ends.ended(process, 10));
        expected_ends.leaves(worker(2), Some((process, 10)));
        assert!(expected_ends.ended(process, 10) && expected_ends.gone(worker(2), 0));
        assert!(!expected_ends.gone(worker(2), 0), "once");
        // Another process in the same place.
        expected_ends.leaves(worker(3), Some((process, 10)));
        assert!(!expected_ends.ended(process, 11) && !expected_ends.gone(worker(3), 1));
        // The worker was told to end its connections.
        expected_ends.leaves(worker(4), None);
        expected_ends.is_over(worker(4));
        assert!(expected_ends.gone(worker(4), 7));
        expected_ends.leaves(worker(5), Some((process, 12)));
        expected_ends.stays(worker(5), Some(process));
        assert!(!expected_ends.gone(worker(5), 0) && !expected_ends.ended(process, 12));
    }
}
