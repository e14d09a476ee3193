//! Orders to end processes, as the tasks of the processes see them.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use dispatcher_core::{PoolId, ProcessId};

/// The processes to end, and how long each may take before SIGKILL.
#[derive(Clone, Debug, Default)]
pub(super) struct Stops {
    pub(super) all: Option<Duration>,
    /// For each: how long it may take to end by itself, and then from SIGTERM to SIGKILL.
    pub(super) processes: HashMap<ProcessId, (Duration, Duration)>,
    /// Pools whose processes outlive the dispatcher.
    pub(super) left: HashSet<PoolId>,
    /// The longest time from now to the SIGKILL of every process that is stopped.
    pub(super) most: Option<Duration>,
}

/// What happens to a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// SIGTERM after `wait`, and SIGKILL after a further `timeout`.
    End { wait: Duration, timeout: Duration },
    /// It runs on without the dispatcher.
    Leave,
}

impl Stops {
    pub(super) fn of(&self, process: ProcessId) -> Option<Stop> {
        let (wait, timeout) = match self.processes.get(&process) {
            Some(stop) => *stop,
            None if self.left.contains(&process.pool) => return Some(Stop::Leave),
            None => (Duration::ZERO, self.all?),
        };
        Some(match self.most {
            Some(most) => Stop::End { wait: Duration::ZERO, timeout: timeout.min(most) },
            None => Stop::End { wait, timeout },
        })
    }
}
