//! Processes the dispatcher keeps running: when to start each, and how long to wait after it ended.

use std::collections::VecDeque;
use std::time::Duration;

use super::Core;
use super::effect::{Effect, Event};
use super::policy::NEVER;
use super::types::{PoolId, ProcessId, State, Time, WorkerId};

/// The first wait after a process ended.
pub const RESTART_MIN: Duration = Duration::from_millis(100);
/// The longest wait.
pub const RESTART_MAX: Duration = Duration::from_secs(30);
/// A process that lived this long is started again after [`RESTART_MIN`].
pub const RESTART_RESET: Duration = Duration::from_secs(10);

/// How the processes of a pool stand. One that has ended and is to be started again counts as starting.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProcessCounts {
    /// So many are to run.
    pub wanted: u32,
    /// Have joined, and get connections.
    pub active: u32,
    /// Of those wanted, have not joined yet.
    pub starting: u32,
    /// Have joined, and get no more connections.
    pub draining: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The event loop was told to start it.
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
    /// Times one was to be started again.
    restarts: u64,
}

impl Processes {
    /// Asks for all of them.
    pub(super) fn new(pool: PoolId, count: u32, effects: &mut VecDeque<Effect>) -> Processes {
        effects
            .extend((0..count).map(|number| Effect::Spawn { process: ProcessId { pool, number } }));
        let process = Process { phase: Phase::Starting, delay: RESTART_MIN };
        Processes {
            pool,
            list: vec![process; count as usize],
            wanted: count,
            due: NEVER,
            restarts: 0,
        }
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

    /// Starts at once those that wait, and those that do not start now wait no longer than at first: what they start from
    /// has changed.
    pub(super) fn retry(&mut self, now: Time) {
        for process in &mut self.list {
            process.delay = RESTART_MIN;
            if let Phase::Waiting { until } = &mut process.phase
                && *until != NEVER
            {
                *until = now;
                self.due = now;
            }
        }
    }

    /// Times one ended or did not start, and was to be started again.
    pub(super) fn restarts(&self) -> u64 {
        self.restarts
    }

    /// How many processes are wanted.
    pub(super) fn wanted(&self) -> u32 {
        self.wanted
    }

    /// Whether none runs, and none will.
    pub(super) fn is_idle(&self) -> bool {
        let idle = |process: &Process| process.phase == Phase::Waiting { until: NEVER };
        self.list.iter().all(idle)
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
        self.restarts += 1;
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

    /// Whether this one is to run, and is started again when it ends.
    pub(super) fn wants(&self, number: u32) -> bool {
        number < self.wanted
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

    /// What a pool's processes start from has changed: those that wait to be started again are started now.
    pub fn retry_processes(&mut self, now: Time, pool: PoolId) {
        if let Some(entry) = self.pools.get_mut(usize::from(pool.0)).filter(|pool| !pool.retired) {
            entry.processes.retry(now);
            entry.processes.tick(now, &mut self.effects);
        }
    }

    /// How a pool's processes stand.
    pub fn processes(&self, pool: PoolId) -> ProcessCounts {
        let p = usize::from(pool.0);
        let mut counts = ProcessCounts::default();
        let Some(entry) = self.pools.get(p) else { return counts };
        counts.wanted = entry.processes.wanted();
        let mut joined = 0;
        for (w, worker) in self.workers.iter().enumerate() {
            let ours = worker.process.is_some_and(|process| process.pool == pool);
            if worker.pool != p || !ours || worker.state == State::Gone {
                continue;
            }
            joined += u32::from(!self.is_surplus(w));
            match worker.is_usable() {
                true => counts.active += 1,
                false => counts.draining += 1,
            }
        }
        counts.starting = counts.wanted.saturating_sub(joined);
        counts
    }

    /// Whether this process is to run: it is started again when it ends.
    pub fn wants_process(&self, process: ProcessId) -> bool {
        let pool = self.pools.get(usize::from(process.pool.0));
        pool.is_some_and(|pool| !pool.retired && pool.processes.wants(process.number))
    }

    /// The process that we started and that a worker is, if it is one.
    pub fn process_of(&self, worker: WorkerId) -> Option<ProcessId> {
        self.find(worker).and_then(|w| self.workers[w].process)
    }

    /// A process ended.
    pub fn exited(&mut self, now: Time, process: ProcessId) {
        // A stopping dispatcher starts one again only for clients that wait for it.
        let p = usize::from(process.pool.0);
        let stopping = self.stop.is_some() && !(p < self.pools.len() && self.has_clients(p));
        if let Some(pool) = self.pools.get_mut(usize::from(process.pool.0)) {
            pool.processes.ended(now, process.number, stopping, &mut self.effects);
        }
    }
}
