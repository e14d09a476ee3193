//! Events of a run, and the process or client of each.

use dispatcher_core::WorkerId;

/// A scheduled event of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum What {
    /// A client connects.
    Arrive,
    /// The process reads its channel.
    Step(usize),
    /// A connection of the process ends, if the process that took it still lives.
    End(usize, u64),
    /// The process starts (again).
    Start(usize),
    /// The dispatcher notices the death of a worker.
    Notice(u64),
    /// A fault of the process ends.
    Heal(usize),
    /// The first bytes of an awaited client arrive.
    Say(u32, u64, u64),
    /// A queued client gives up.
    GiveUp(u32, u64),
    Fault(usize),
    Turn,
    /// An operator resumes the worker with this serial number.
    Resume(u64),
    /// Faults and arrivals end.
    Calm,
}

/// A place for worker processes that replace each other, with the current one.
#[derive(Debug, Default)]
pub(super) struct Process {
    /// Number of the current process, so that events of an earlier one are ignored.
    pub(super) life: u64,
    pub(super) worker: Option<WorkerId>,
    pub(super) one_at_a_time: bool,
    pub(super) weight: u16,
    pub(super) priority: u16,
    pub(super) stepping: bool,
    pub(super) opened: u64,
    pub(super) finished: u64,
    pub(super) hung: bool,
    pub(super) losing: bool,
    pub(super) lying: bool,
    pub(super) scribbling: bool,
    pub(super) leaving: bool,
}

impl Process {
    pub(super) fn live(&self) -> u64 {
        self.opened - self.finished
    }
}
