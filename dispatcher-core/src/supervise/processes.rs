//! The processes of one pool: which ones run, which ones are started, replaced and ended, and when.
//!
//! A pool has *places*, one for each wanted process. A place has at most one process that gets
//! connections. A process that leaves frees its place at once: the next process starts beside it,
//! as far as `max_surge` permits. Guarantees: a place never has two processes that get connections
//! for longer than it takes to drain the older one; the processes beyond one per place never
//! exceed `max_surge`; failed starts are repeated with exponential back-off.
//!
//! Needs: [`Processes::settle`] after every input and whenever [`Processes::due`] has come.

use std::time::Duration;

use super::decide::REVIEW;
use super::place::{Leave, Phase, Place, Process, View};
use super::roll::{Generation, Roll, StepFailure};
use super::settings::Supervision;
use crate::policy::NEVER;
use crate::random::Random;
use crate::types::{PoolId, ProcessId, Time};

/// The first delay before a process is started again.
pub const RESTART_MIN: Duration = Duration::from_millis(100);

/// A process that served for this long has not failed: the next one starts after [`RESTART_MIN`].
pub const RESTART_RESET: Duration = Duration::from_secs(10);

/// The result of a ready check, which tells why it failed, comes a moment after `ready_timeout`.
const CHECK_RESULT: Duration = Duration::from_secs(1);

/// Why a process is replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replacement {
    /// It has reached `max_age`.
    Age,
    /// It has taken `max_connections_served` connections.
    Served,
    /// It uses more than `max_memory`.
    Memory,
    /// An operator restarts it.
    Restart,
}

impl Replacement {
    /// The name in the log: the key that decides, or `restart`.
    pub fn name(self) -> &'static str {
        match self {
            Replacement::Age => "max_age",
            Replacement::Served => "max_connections_served",
            Replacement::Memory => "max_memory",
            Replacement::Restart => "restart",
        }
    }
}

/// Why a process is ended by a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndReason {
    /// Its worker did not join within `start_timeout`.
    Late,
    /// Its worker was suspect for `kill_hung_after`.
    Hung,
    /// It has no connections and did not end by itself within `stop_timeout`, or it kept its
    /// connections for longer than `drain_timeout`.
    Left,
    /// It was started and is not wanted any more.
    Unwanted,
    /// It was to replace another process and did not become ready.
    NotReady,
}

/// What is to be done with a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Start it.
    Start,
    /// Drain its workers; they end their connections after `drain_timeout` if it is `bounded`.
    Drain { bounded: bool },
    /// Give its workers connections again.
    Resume,
    /// SIGTERM, then SIGKILL after `stop_timeout`.
    End(EndReason),
    /// Log that it will be started again after this delay.
    TellRestart(Duration),
    /// Log that a process is replaced.
    TellReplace(Replacement),
    /// Log that its place is in a crash loop, after so many failures.
    TellCrashLoop(u32),
    /// Log that a process of the pool stays, and the crash loop is over.
    TellRecovered,
    /// Log that a roll stopped at this process.
    TellRollStopped(StepFailure),
    /// Log that every process is of this generation.
    TellRolled(Generation),
}

/// The processes of one pool.
#[derive(Debug)]
pub(crate) struct Processes {
    pub(crate) pool: PoolId,
    pub(crate) settings: Supervision,
    pub(crate) wanted: u32,
    /// Places from `wanted` on are kept while they have processes.
    pub(crate) places: Vec<Place>,
    /// The number of the last start.
    pub(crate) starts: u32,
    /// A place in a crash loop is tried again then.
    pub(crate) next_trial: Time,
    /// Whether the operator was last told of a crash loop.
    pub(crate) told_crash_loop: bool,
    /// Nothing is started any more.
    pub(crate) stopped: bool,
    /// Nothing is started for now, because the host drains.
    pub(crate) held: bool,
    pub(crate) due: Time,
    /// When the last decisions were made.
    pub(crate) settled: Time,
    pub(crate) restarts: u64,
    pub(crate) replaced: u64,
    pub(crate) ended_late: u64,
    pub(crate) ended_hung: u64,
    pub(crate) random: Random,
    /// The generation of new places: that of the last roll of the whole pool that was done.
    pub(crate) current: Generation,
    /// The highest generation so far.
    pub(crate) newest: Generation,
    /// The last roll.
    pub(crate) roll: Option<Roll>,
}

/// Counters since the start of the dispatcher.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProcessTotals {
    /// Processes that ended or did not start, and were to be started again.
    pub restarts: u64,
    /// Processes that another process has replaced, for the reasons of [`Replacement`].
    pub replaced: u64,
    /// Processes that were ended because they did not join within `start_timeout`.
    pub ended_late: u64,
    /// Processes that were ended because they were suspect for `kill_hung_after`.
    pub ended_hung: u64,
}

impl Processes {
    pub(crate) fn new(
        pool: PoolId,
        wanted: u32,
        settings: Supervision,
        now: Time,
        seed: u64,
    ) -> Processes {
        Processes {
            pool,
            settings,
            wanted,
            places: vec![Place::EMPTY; wanted as usize],
            starts: 0,
            next_trial: Time(0),
            told_crash_loop: false,
            stopped: false,
            held: false,
            due: if wanted > 0 { now } else { NEVER },
            settled: now,
            restarts: 0,
            replaced: 0,
            ended_late: 0,
            ended_hung: 0,
            random: Random::new(seed),
            current: Generation::FIRST,
            newest: Generation::FIRST,
            roll: None,
        }
    }

    // --- inputs: settle() must follow ------------------------------------------------------

    /// So many processes are wanted, and supervised with these settings.
    pub(crate) fn change(&mut self, wanted: u32, settings: &Supervision) {
        self.wanted = wanted;
        if self.settings != *settings {
            self.settings = settings.clone();
        }
        self.at_least(wanted as usize);
        self.places.iter_mut().skip(wanted as usize).for_each(Place::retry);
    }

    fn at_least(&mut self, places: usize) {
        let places = self.places.len().max(places);
        self.places.resize(places, Place { generation: self.current, ..Place::EMPTY });
    }

    /// A process of an earlier dispatcher runs. `leaving`: it was about to leave. Gets another
    /// number than `start` if a process has that: dispatchers and pools with the same name count
    /// anew. [`Processes::resume_roll`] follows after the last one.
    pub(crate) fn adopt(
        &mut self,
        now: Time,
        place: u32,
        start: u32,
        leaving: bool,
        generation: Generation,
    ) -> ProcessId {
        self.at_least(place as usize + 1);
        let start = self.unused(start);
        let id = ProcessId { pool: self.pool, place, start };
        self.starts = self.starts.max(start);
        self.newest = self.newest.max(generation);
        let phase = match leaving {
            true => Phase::leaving(Leave::Own, now),
            false => Phase::Running { until: now + self.settings.start_timeout },
        };
        let place = &mut self.places[place as usize];
        place.last_start = place.last_start.max(start);
        place.processes.push(Process { phase, adopted: true, ..Process::new(id, generation) });
        place.processes.sort_by_key(|process| process.id.start);
        id
    }

    /// `start`, or the next number that no process has.
    pub(crate) fn unused(&self, start: u32) -> u32 {
        let mut free = start;
        while self.ids().any(|(id, _)| id.start == free) {
            free = free.wrapping_add(1);
        }
        free
    }

    /// A process runs.
    pub(crate) fn started(&mut self, now: Time, id: ProcessId) {
        let until = now + self.settings.start_timeout;
        if let Some(process) = self.get(id)
            && process.phase == Phase::Asked
        {
            process.phase = Phase::Running { until };
        }
    }

    /// The worker of a process has joined. Returns whether it is checked.
    pub(crate) fn joined(&mut self, now: Time, id: ProcessId) -> Checked {
        let early = |most: u64, random: &mut Random, jitter: u32| {
            most - random.below(most.saturating_mul(u64::from(jitter.min(100))) / 100 + 1)
        };
        let jitter = self.settings.jitter;
        let age = self.settings.max_age.map(|age| {
            let nanoseconds = u64::try_from(age.as_nanos()).unwrap_or(u64::MAX);
            Duration::from_nanos(early(nanoseconds, &mut self.random, jitter))
        });
        let most = self.settings.max_connections_served;
        let most = most.map(|most| early(most, &mut self.random, jitter).max(1));
        let (check, timeout) = (self.settings.ready_check, self.settings.ready_timeout);
        let timeout = timeout + self.settings.min_ready;
        let timeout = if check { timeout + CHECK_RESULT } else { timeout };
        let Some(process) = self.get(id) else { return Checked::No };
        if let Phase::Asked | Phase::Running { .. } = process.phase {
            process.phase = Phase::Serving;
        }
        if process.joined_at.is_none() {
            process.joined_at = Some(now);
            process.expires = age.map_or(NEVER, |age| now + age);
            process.most_served = most.unwrap_or(u64::MAX);
        }
        if !process.step || process.phase != Phase::Serving {
            return Checked::No;
        }
        if process.ready_by == NEVER {
            process.ready_by = now + timeout;
        }
        if !check {
            process.ready_since.get_or_insert(now);
        }
        match check && process.ready_since.is_none() {
            false => Checked::No,
            // One check for each process, however often its worker joins.
            true if std::mem::replace(&mut process.checking, true) => Checked::Already,
            true => Checked::Now,
        }
    }

    /// The worker of a process announced that it leaves, or the process has closed its listeners.
    pub(crate) fn leaves(&mut self, now: Time, id: ProcessId, actions: &mut Vec<Act>) {
        let Some(process) = self.get(id).filter(|process| process.holds()) else { return };
        process.phase = Phase::leaving(Leave::Own, now);
        let lasted = process.has_lasted(now) || process.adopted;
        let (step, generation) = (std::mem::take(&mut process.step), process.generation);
        if id.place >= self.wanted || self.stopped {
            return;
        }
        self.restarts += 1;
        if step && self.step_failed(now, (id, generation), StepFailure::Left, actions) {
            return;
        }
        if lasted {
            self.places[id.place as usize].forgive();
        } else {
            // It has left as soon as it came. Without a delay this would repeat without end.
            self.failed(now, id, actions);
        }
    }

    /// A process has no worker any more.
    pub(crate) fn lost_worker(&mut self, now: Time, id: ProcessId) {
        let until = now + self.settings.start_timeout;
        if let Some(process) = self.get(id)
            && process.phase == Phase::Serving
        {
            process.phase = Phase::Running { until };
        }
    }

    /// A process ended, or could not be started.
    pub(crate) fn ended(&mut self, now: Time, id: ProcessId, actions: &mut Vec<Act>) {
        let Some(place) = self.places.get_mut(id.place as usize) else { return };
        let Some(at) = place.processes.iter().position(|process| process.id == id) else { return };
        let process = place.processes.remove(at);
        if !process.holds() || id.place >= self.wanted || self.stopped {
            return;
        }
        self.restarts += 1;
        if process.has_lasted(now) {
            place.forgive();
        }
        let cause = match process.phase {
            Phase::Asked => StepFailure::NotStarted,
            _ => StepFailure::Ended,
        };
        if process.step && self.step_failed(now, (id, process.generation), cause, actions) {
            return;
        }
        self.failed(now, id, actions);
    }

    /// A process uses more than `max_memory`.
    pub(crate) fn replace(&mut self, id: ProcessId, why: Replacement) {
        if let Some(process) = self.get(id)
            && process.holds()
        {
            process.replace = Some(why);
        }
    }

    /// What the processes start from has changed: starts that wait for a delay wait no longer.
    pub(crate) fn retry(&mut self) {
        self.places.iter_mut().for_each(Place::retry);
        self.next_trial = Time(0);
    }

    /// Whether nothing is started any more.
    pub(crate) fn set_stopped(&mut self, stopped: bool) {
        self.stopped = stopped;
    }

    /// Whether nothing is started for now.
    pub(crate) fn set_held(&mut self, held: bool) {
        self.held = held;
    }

    /// Forgets what was known of all workers: [`Processes::see`] follows for each of them, and then
    /// [`Processes::settle`].
    pub(crate) fn look_again(&mut self) {
        for process in self.places.iter_mut().flat_map(|place| &mut place.processes) {
            process.view = View { stays: true, ..View::default() };
        }
    }

    /// Tells of a worker of a process.
    pub(crate) fn see(&mut self, id: ProcessId, seen: View) {
        let Some(process) = self.get(id) else { return };
        let view = &mut process.view;
        view.joined = true;
        view.load = view.load.saturating_add(seen.load);
        view.served = view.served.saturating_add(seen.served);
        view.suspect_since = match (view.suspect_since, seen.suspect_since) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        };
        view.stays &= seen.stays;
        view.unaware |= seen.unaware;
    }

    // --- questions -------------------------------------------------------------------------

    pub(crate) fn get(&mut self, id: ProcessId) -> Option<&mut Process> {
        let place = self.places.get_mut(id.place as usize)?;
        place.processes.iter_mut().find(|process| process.id == id)
    }

    pub(crate) fn find(&self, id: ProcessId) -> Option<&Process> {
        let place = self.places.get(id.place as usize)?;
        place.processes.iter().find(|process| process.id == id)
    }

    /// Whether the starts of a place have failed too often.
    pub(crate) fn is_crash_loop(&self) -> bool {
        (0..self.places.len()).any(|place| self.is_looping(place))
    }

    /// When [`Processes::settle`] is to be called next at the latest.
    pub(crate) fn due(&self) -> Time {
        self.due
    }

    /// Whether [`Processes::settle`] is to be called now. A turn in which connections were taken
    /// can make a replacement due.
    pub(crate) fn is_due(&self, now: Time) -> bool {
        let counts = self.settings.max_connections_served.is_some();
        self.due <= now || (counts && now - self.settled >= REVIEW)
    }

    pub(crate) fn wanted(&self) -> u32 {
        self.wanted
    }

    pub(crate) fn totals(&self) -> ProcessTotals {
        ProcessTotals {
            restarts: self.restarts,
            replaced: self.replaced,
            ended_late: self.ended_late,
            ended_hung: self.ended_hung,
        }
    }

    /// Whether no process runs, and none will be started.
    pub(crate) fn is_idle(&self) -> bool {
        (self.wanted == 0 || self.stopped) && self.ids().next().is_none()
    }

    /// The number of processes that another one is to replace.
    pub(crate) fn outdated(&self) -> u32 {
        let processes = self.places.iter().take(self.wanted as usize).flat_map(Place::holders);
        processes.filter(|process| process.replace.is_some()).count() as u32
    }

    /// Whether a process is to run: it is started again when it ends.
    pub(crate) fn wants(&self, id: ProcessId) -> bool {
        id.place < self.wanted && self.find(id).is_some_and(Process::holds)
    }

    /// Every process that has not ended, and whether it is leaving or ending.
    pub(crate) fn ids(&self) -> impl Iterator<Item = (ProcessId, bool)> + '_ {
        let processes = self.places.iter().flat_map(|place| &place.processes);
        processes.map(|process| (process.id, !process.holds()))
    }

    /// The number of wanted places that have a process whose worker has joined.
    pub(crate) fn filled(&self) -> u32 {
        let serves =
            |place: &&Place| place.holders().any(|process| process.phase == Phase::Serving);
        self.places.iter().take(self.wanted as usize).filter(serves).count() as u32
    }

    /// Panics if a guarantee of the module does not hold.
    #[cfg(any(test, debug_assertions))]
    pub(crate) fn check(&self) {
        let mut starts = Vec::new();
        for (number, place) in self.places.iter().enumerate() {
            let holders = place.holders().count();
            let adopted = place.processes.iter().filter(|process| process.adopted).count();
            assert!(holders <= 2.max(adopted), "place {number}: {place:?}");
            starts.extend(place.processes.iter().map(|process| process.id.start));
        }
        let all = starts.len();
        starts.sort_unstable();
        starts.dedup();
        assert_eq!(starts.len(), all, "each start has one process: {:?}", self.places);
    }
}

/// Whether the worker of a process is checked before it gets clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Checked {
    No,
    /// The check begins.
    Now,
    /// It is under way.
    Already,
}

/// An action and its process.
pub(crate) type Act = (ProcessId, Action);
