//! Processes the dispatcher keeps running: when to start each, and how long to wait after it ended.

use std::collections::VecDeque;
use std::time::Duration;

use super::Core;
use super::effect::{Effect, Event};
use super::policy::NEVER;
use super::types::{PoolId, ProcessId, Time};

/// The first wait after a process ended.
pub const RESTART_MIN: Duration = Duration::from_millis(100);
/// The longest wait.
pub const RESTART_MAX: Duration = Duration::from_secs(30);
/// A process that lived this long is started again after [`RESTART_MIN`].
pub const RESTART_RESET: Duration = Duration::from_secs(10);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The shell was told to start it.
    Starting,
    Running {
        since: Time,
    },
    Waiting {
        until: Time,
    },
}

#[derive(Clone, Copy, Debug)]
struct Process {
    phase: Phase,
    /// The next wait.
    delay: Duration,
}

/// The processes of one pool.
#[derive(Debug)]
pub(super) struct Processes {
    pool: PoolId,
    list: Vec<Process>,
    /// Those from here on are not started again.
    wanted: u32,
    due: Time,
}

impl Processes {
    /// Asks for all of them.
    pub(super) fn new(pool: PoolId, count: u32, effects: &mut VecDeque<Effect>) -> Processes {
        effects
            .extend((0..count).map(|number| Effect::Spawn { process: ProcessId { pool, number } }));
        let process = Process { phase: Phase::Starting, delay: RESTART_MIN };
        Processes { pool, list: vec![process; count as usize], wanted: count, due: NEVER }
    }

    /// Wants so many from now on. Those that are too many are not started again; to end them is not done here.
    pub(super) fn resize(&mut self, count: u32, effects: &mut VecDeque<Effect>) {
        let pool = self.pool;
        let new = Process { phase: Phase::Waiting { until: NEVER }, delay: RESTART_MIN };
        if self.list.len() < count as usize {
            self.list.resize(count as usize, new);
        }
        for (process, number) in self.list.iter_mut().zip(0..) {
            let Phase::Waiting { until } = &mut process.phase else { continue };
            if number >= count {
                *until = NEVER;
            } else if number >= self.wanted {
                *process = Process { phase: Phase::Starting, delay: RESTART_MIN };
                effects.push_back(Effect::Spawn { process: ProcessId { pool, number } });
            }
        }
        self.wanted = count;
    }

    pub(super) fn started(&mut self, now: Time, number: u32) {
        if let Some(process) = self.list.get_mut(number as usize)
            && process.phase == Phase::Starting
        {
            process.phase = Phase::Running { since: now };
        }
    }

    /// It ended, or did not start. While `stopping` it stays so.
    pub(super) fn ended(
        &mut self,
        now: Time,
        number: u32,
        stopping: bool,
        effects: &mut VecDeque<Effect>,
    ) {
        let Some(process) = self.list.get_mut(number as usize) else {
            return;
        };
        match process.phase {
            Phase::Waiting { .. } => return,
            Phase::Running { since } if now - since >= RESTART_RESET => process.delay = RESTART_MIN,
            Phase::Running { .. } | Phase::Starting => {}
        }
        if stopping || number >= self.wanted {
            process.phase = Phase::Waiting { until: NEVER };
            return;
        }
        let delay = process.delay;
        process.phase = Phase::Waiting { until: now + delay };
        process.delay = (delay * 2).min(RESTART_MAX);
        self.due = self.due.min(now + delay);
        effects.push_back(Effect::Event(Event::Restarting {
            process: ProcessId { pool: self.pool, number },
            delay,
        }));
    }

    /// Starts those whose wait is over.
    pub(super) fn tick(&mut self, now: Time, effects: &mut VecDeque<Effect>) {
        if now < self.due {
            return;
        }
        self.due = NEVER;
        for (process, number) in self.list.iter_mut().zip(0..) {
            match process.phase {
                Phase::Waiting { until } if until <= now && until != NEVER => {
                    process.phase = Phase::Starting;
                    effects.push_back(Effect::Spawn {
                        process: ProcessId { pool: self.pool, number },
                    });
                }
                Phase::Waiting { until } => self.due = self.due.min(until),
                Phase::Starting | Phase::Running { .. } => {}
            }
        }
    }

    /// Starts nothing any more.
    pub(super) fn stop(&mut self) {
        for process in &mut self.list {
            if let Phase::Waiting { until } = &mut process.phase {
                *until = NEVER;
            }
        }
        self.due = NEVER;
    }

    pub(super) fn due(&self) -> Time {
        self.due
    }
}

impl Core {
    /// A process was started (`true`) or could not be.
    pub fn spawned(&mut self, now: Time, process: ProcessId, started: bool) {
        if !started {
            return self.exited(now, process);
        }
        if let Some(pool) = self.pools.get_mut(usize::from(process.pool.0)) {
            pool.processes.started(now, process.number);
        }
    }

    /// A process ended.
    pub fn exited(&mut self, now: Time, process: ProcessId) {
        let stopping = self.stop.is_some();
        if let Some(pool) = self.pools.get_mut(usize::from(process.pool.0)) {
            pool.processes.ended(now, process.number, stopping, &mut self.effects);
        }
    }
}
