//! Events of a run, and the process or client of each.

use dispatcher_core::WorkerId;

/// Something that happens at a moment of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum What {
    /// A client connects.
    Arrive,
    /// The process looks into its channel.
    Step(usize),
    /// A connection of the process ends, if it is still the one that took it.
    End(usize, u64),
    /// The process starts (again).
    Start(usize),
    /// The death of a worker is noticed.
    Notice(u64),
    /// The process is as it should be again.
    Heal(usize),
    /// The first bytes of an awaited client arrive.
    Say(u32, u64, u64),
    /// A queued client gives up.
    GiveUp(u32, u64),
    Fault(usize),
    Turn,
    /// An operator makes the worker with this serial number active again.
    Resume(u64),
    /// The last fault and the last client are over.
    Calm,
}

/// A slot of a worker process, and the process in it now.
#[derive(Debug, Default)]
pub(super) struct Process {
    /// Counts lives, so that what belongs to an earlier one is ignored.
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
