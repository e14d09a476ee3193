//! One place of a pool and the processes that were started for it.
//!
//! Guarantees: a place tells which processes fill it, and a process tells when it is to be ended or
//! replaced. Neither changes anything else. Needs the time and, in [`Process::view`], what is known
//! of the workers.

use std::time::Duration;

use super::processes::{EndReason, RESTART_MIN, RESTART_RESET, Replacement};
use super::roll::Generation;
use super::settings::Supervision;
use crate::policy::NEVER;
use crate::types::{ProcessId, Time};

/// How long a process that knows nothing of the dispatcher may be without connections before it is
/// ended, once it gets no more.
const UNAWARE: Duration = Duration::from_secs(1);

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
    /// It knows nothing of the dispatcher: the kernel gives it connections.
    pub(crate) unaware: bool,
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
    /// Which command it has.
    pub(crate) generation: Generation,
    /// It has to become ready before it replaces an older process.
    pub(crate) step: bool,
    /// Since when its worker has been ready: since the join without a ready check, or since the
    /// check.
    pub(crate) ready_since: Option<Time>,
    /// Its ready check is under way.
    pub(crate) checking: bool,
    /// When the step has failed if it is not ready.
    pub(crate) ready_by: Time,
    /// When it is ended although it has connections.
    pub(crate) end_by: Time,
}

impl Process {
    pub(crate) fn new(id: ProcessId, generation: Generation) -> Process {
        Process {
            id,
            phase: Phase::Asked,
            joined_at: None,
            expires: NEVER,
            most_served: u64::MAX,
            replace: None,
            adopted: false,
            view: View::default(),
            generation,
            step: false,
            ready_since: None,
            checking: false,
            ready_by: NEVER,
            end_by: NEVER,
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
                let late = self.step && self.ready_by <= now;
                match is_hung {
                    true => Some(EndReason::Hung),
                    false if late && !self.is_ready(now, settings.min_ready) => {
                        Some(EndReason::NotReady)
                    }
                    false => None,
                }
            }
            Phase::Leaving { since, idle_since, why } => {
                // The worker of an adopted process that was already leaving need not join again: it
                // may have any number of connections.
                let known = !self.adopted || self.joined_at.is_some();
                let idle = known && seen.load == 0;
                let idle_since = idle.then(|| idle_since.unwrap_or(now));
                self.phase = Phase::Leaving { why, since, idle_since };
                // A process that knows nothing of the dispatcher does not end by itself.
                let patience = match seen.unaware {
                    true => settings.stop_timeout.min(UNAWARE),
                    false => settings.stop_timeout,
                };
                let stayed = idle_since.is_some_and(|idle| now - idle >= patience);
                let most = settings.drain_timeout.map(|most| most + patience);
                let kept = most.is_some_and(|most| now - since >= most) || self.end_by <= now;
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
    /// The number of the last start.
    pub(crate) last_start: u32,
    /// Which command the next process has, unless a roll replaces it.
    pub(crate) generation: Generation,
}

impl Place {
    pub(crate) const EMPTY: Place = Place {
        processes: Vec::new(),
        delay: RESTART_MIN,
        not_before: Time(0),
        failures: 0,
        last_start: 0,
        generation: Generation::FIRST,
    };

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

    /// The processes that count for `max_surge`.
    pub(crate) fn counted(&self) -> u32 {
        self.processes.iter().filter(|process| !process.is_leaving_for_roll()).count() as u32
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
