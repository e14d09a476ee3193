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
use super::settings::Supervision;
use crate::policy::NEVER;
use crate::random::Random;
use crate::types::{PoolId, ProcessId, Time};

/// The first delay before a process is started again.
pub const RESTART_MIN: Duration = Duration::from_millis(100);

/// A process that served for this long has not failed: the next one starts after [`RESTART_MIN`].
pub const RESTART_RESET: Duration = Duration::from_secs(10);

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

/// Why a process gets no more connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leave {
    /// It leaves by its own decision.
    Own,
    /// Fewer processes are wanted. It stays if more are wanted again.
    Surplus,
    /// Another process serves in its place.
    Replaced,
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
}

/// What is known of the workers of a process.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct View {
    /// A worker is there.
    pub(crate) joined: bool,
    /// Live connections of all its workers.
    pub(crate) load: u64,
    /// Connections that its workers have taken.
    pub(crate) served: u64,
    /// A worker has been suspect since then.
    pub(crate) suspect_since: Option<Time>,
    /// No worker has announced that it leaves.
    pub(crate) stays: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The event loop was asked to start it.
    Asked,
    /// It runs. Its worker is to have joined by then.
    Running { until: Time },
    /// Its worker has joined.
    Serving,
    /// Its place is free.
    Leaving { why: Leave, since: Time, idle_since: Option<Time> },
    /// It was ended by a signal. Its place is free.
    Ending,
}

impl Phase {
    pub(crate) fn leaving(why: Leave, since: Time) -> Phase {
        Phase::Leaving { why, since, idle_since: None }
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Process {
    pub(crate) id: ProcessId,
    pub(crate) phase: Phase,
    /// When its worker joined for the first time.
    pub(crate) joined_at: Option<Time>,
    /// When it is to be replaced.
    pub(crate) expires: Time,
    /// The number of connections after which it is to be replaced.
    pub(crate) most_served: u64,
    /// It is to be replaced as soon as that is permitted.
    pub(crate) replace: Option<Replacement>,
    /// It was started by an earlier dispatcher: its worker may have connections.
    pub(crate) adopted: bool,
    /// What was last known of its workers.
    pub(crate) view: View,
}

impl Process {
    pub(crate) fn new(id: ProcessId) -> Process {
        Process {
            id,
            phase: Phase::Asked,
            joined_at: None,
            expires: NEVER,
            most_served: u64::MAX,
            replace: None,
            adopted: false,
            view: View::default(),
        }
    }

    /// Whether it fills its place.
    pub(crate) fn holds(&self) -> bool {
        match self.phase {
            Phase::Asked | Phase::Running { .. } | Phase::Serving => true,
            Phase::Leaving { .. } | Phase::Ending => false,
        }
    }

    /// Why it is to be ended now, if it is. Decides, too, whether it is to be replaced.
    pub(crate) fn end(&mut self, now: Time, settings: &Supervision) -> Option<EndReason> {
        let seen = self.view;
        let hung = seen.suspect_since.zip(settings.kill_hung_after);
        let is_hung = hung.is_some_and(|(since, most)| now - since >= most);
        match self.phase {
            Phase::Asked | Phase::Ending => None,
            Phase::Running { until } => (until <= now).then_some(EndReason::Late),
            Phase::Serving => {
                if self.expires <= now {
                    self.replace.get_or_insert(Replacement::Age);
                } else if self.most_served <= seen.served {
                    self.replace.get_or_insert(Replacement::Served);
                }
                is_hung.then_some(EndReason::Hung)
            }
            Phase::Leaving { since, idle_since, why } => {
                let idle_since = (seen.load == 0).then(|| idle_since.unwrap_or(now));
                self.phase = Phase::Leaving { why, since, idle_since };
                let patience = settings.stop_timeout;
                let stayed = idle_since.is_some_and(|idle| now - idle >= patience);
                let most = settings.drain_timeout.map(|most| most + patience);
                let kept = most.is_some_and(|most| now - since >= most);
                match is_hung {
                    true => Some(EndReason::Hung),
                    false => (stayed || kept).then_some(EndReason::Left),
                }
            }
        }
    }

    /// Whether it has served for so long that its start did not fail.
    pub(crate) fn has_lasted(&self, now: Time) -> bool {
        self.joined_at.is_some_and(|at| now - at >= RESTART_RESET)
    }
}

/// A place for one process that gets connections.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// Every process that was asked for and has not ended, in the order of the starts.
    pub(crate) processes: Vec<Process>,
    /// The next delay.
    pub(crate) delay: Duration,
    /// No process is started before then.
    pub(crate) not_before: Time,
    /// Failed starts in succession.
    pub(crate) failures: u32,
}

impl Place {
    pub(crate) const EMPTY: Place =
        Place { processes: Vec::new(), delay: RESTART_MIN, not_before: Time(0), failures: 0 };

    /// The last start has not failed.
    pub(crate) fn forgive(&mut self) {
        self.failures = 0;
        self.delay = RESTART_MIN;
    }

    /// The next start need not wait.
    pub(crate) fn retry(&mut self) {
        self.forgive();
        self.not_before = Time(0);
    }

    /// The processes that fill the place: two while one replaces the other.
    pub(crate) fn holders(&self) -> impl Iterator<Item = &Process> {
        self.processes.iter().filter(|process| process.holds())
    }

    pub(crate) fn filling(&self) -> Filling {
        let mut holders = self.holders();
        match (holders.next(), holders.next()) {
            (None, _) => Filling::Empty,
            (Some(process), None) => Filling::One(process.id, process.replace),
            (Some(_), Some(_)) => Filling::Several,
        }
    }
}

/// The processes that fill a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Filling {
    Empty,
    /// This one, and why it is to be replaced, if it is.
    One(ProcessId, Option<Replacement>),
    /// The youngest replaces the others.
    Several,
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
    pub(crate) due: Time,
    /// When the last decisions were made.
    pub(crate) settled: Time,
    pub(crate) restarts: u64,
    pub(crate) replaced: u64,
    pub(crate) ended_late: u64,
    pub(crate) ended_hung: u64,
    pub(crate) random: Random,
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
            due: if wanted > 0 { now } else { NEVER },
            settled: now,
            restarts: 0,
            replaced: 0,
            ended_late: 0,
            ended_hung: 0,
            random: Random::new(seed),
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
        self.places.resize(places, Place::EMPTY);
    }

    /// A process of an earlier dispatcher runs. `leaving`: it was about to leave.
    pub(crate) fn adopt(&mut self, now: Time, place: u32, start: u32, leaving: bool) -> ProcessId {
        let id = ProcessId { pool: self.pool, place, start };
        self.at_least(place as usize + 1);
        self.starts = self.starts.max(start);
        let phase = match leaving {
            true => Phase::leaving(Leave::Own, now),
            false => Phase::Running { until: now + self.settings.start_timeout },
        };
        let processes = &mut self.places[place as usize].processes;
        processes.push(Process { phase, adopted: true, ..Process::new(id) });
        processes.sort_by_key(|process| process.id.start);
        id
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

    /// The worker of a process has joined.
    pub(crate) fn joined(&mut self, now: Time, id: ProcessId) {
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
        let Some(process) = self.get(id) else { return };
        if let Phase::Asked | Phase::Running { .. } = process.phase {
            process.phase = Phase::Serving;
        }
        if process.joined_at.is_none() {
            process.joined_at = Some(now);
            process.expires = age.map_or(NEVER, |age| now + age);
            process.most_served = most.unwrap_or(u64::MAX);
        }
    }

    /// The worker of a process announced that it leaves.
    pub(crate) fn leaves(&mut self, now: Time, id: ProcessId, actions: &mut Vec<Act>) {
        let Some(process) = self.get(id).filter(|process| process.holds()) else { return };
        process.phase = Phase::leaving(Leave::Own, now);
        let lasted = process.has_lasted(now);
        if id.place >= self.wanted || self.stopped {
            return;
        }
        self.restarts += 1;
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

    /// Every process is to be replaced. Returns their number.
    pub(crate) fn replace_all(&mut self, why: Replacement) -> u32 {
        let processes = self.places.iter_mut().flat_map(|place| &mut place.processes);
        let mut replaced = 0;
        for process in processes.filter(|process| process.holds()) {
            process.replace = Some(why);
            replaced += 1;
        }
        replaced
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
    }

    // --- questions -------------------------------------------------------------------------

    fn get(&mut self, id: ProcessId) -> Option<&mut Process> {
        let place = self.places.get_mut(id.place as usize)?;
        place.processes.iter_mut().find(|process| process.id == id)
    }

    fn find(&self, id: ProcessId) -> Option<&Process> {
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

/// An action and its process.
pub(crate) type Act = (ProcessId, Action);
