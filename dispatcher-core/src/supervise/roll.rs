//! Rolls: the processes of a pool are replaced by processes of another generation, step by step.
//!
//! A *step* is a new process that has to become ready before it replaces an older one. Guarantees:
//! an old process is untouched until the process that replaces it is ready; at the first step that
//! fails the roll stops, and no further process is replaced. See [`super::processes`].

use std::time::Duration;

use super::place::{Leave, Phase, Process};
use super::processes::{Act, Action, EndReason, Processes, Replacement};
use crate::types::{ProcessId, Time};

mod questions;

/// The number of a deploy of a pool, from 1. Processes of one generation have the same command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Generation(pub u32);

impl Generation {
    /// The generation of the first processes of a pool.
    pub const FIRST: Generation = Generation(1);
}

/// Whether a roll goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RollState {
    /// Processes are being replaced.
    Progressing,
    /// A step failed, or the roll was interrupted: nothing more is replaced.
    Stopped,
    /// Every process is of the new generation.
    Done,
}

impl RollState {
    /// The name in status and metrics.
    pub fn name(self) -> &'static str {
        match self {
            RollState::Progressing => "progressing",
            RollState::Stopped => "stopped",
            RollState::Done => "done",
        }
    }
}

/// Why a step failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepFailure {
    /// The process could not be started.
    NotStarted,
    /// The process ended before it was ready.
    Ended,
    /// Its worker did not join within `start_timeout`.
    Late,
    /// It did not pass its ready check.
    NotReady,
    /// Its worker was suspect at the end of `ready_timeout` and `min_ready`.
    Suspect,
    /// Its worker left.
    Left,
}

impl StepFailure {
    /// The name in the log and in status.
    pub fn name(self) -> &'static str {
        match self {
            StepFailure::NotStarted => "not-started",
            StepFailure::Ended => "ended",
            StepFailure::Late => "start-timeout",
            StepFailure::NotReady => "not-ready",
            StepFailure::Suspect => "suspect",
            StepFailure::Left => "left",
        }
    }
}

/// A roll, in progress or over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Roll {
    /// The generation of the new processes.
    pub generation: Generation,
    /// The generation that `undo` returns to.
    pub former: Generation,
    /// The only place whose process is replaced; `None`: all.
    pub place: Option<u32>,
    /// Whether it goes on.
    pub state: RollState,
    /// It returns to a generation that was there before.
    pub undo: bool,
    /// The step that failed. With `undo`, that of the roll that it undoes.
    pub failure: Option<(ProcessId, StepFailure)>,
    /// Steps that became ready.
    pub replaced: u32,
    /// When it began.
    pub began: Time,
    /// When it stopped, or was done.
    pub ended: Option<Time>,
}

/// Processes of one generation that leave because of a roll and have connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeavingGeneration {
    /// The generation.
    pub generation: Generation,
    /// Its processes that have connections, or may have some.
    pub processes: u32,
    /// Their connections.
    pub connections: u64,
}

/// Why a roll does not begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RollRefusal {
    /// `max_leaving_generations` generations have connections; this is the oldest.
    TooManyGenerations(LeavingGeneration),
    /// The pool has had no roll.
    NothingToUndo,
    /// The process does not fill a place.
    NotServing,
    /// The host drains: nothing is started.
    HostDrains,
}

/// A roll has begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RollBegun {
    /// The generation of the new processes.
    pub generation: Generation,
    /// The number of processes to start.
    pub processes: u32,
}

/// New connections go to the new generation while its worker has at most this multiple of the
/// pool's mean load, in percent.
pub const PREFERRED_LOAD: u64 = 125;

/// How long a process whose connections are to be ended may take before SIGTERM.
const END_GRACE: Duration = Duration::from_secs(1);

impl Roll {
    fn covers(&self, place: u32) -> bool {
        self.place.is_none_or(|only| only == place)
    }

    /// Whether processes of the place are being replaced.
    fn replaces(&self, place: u32) -> bool {
        self.state == RollState::Progressing && self.covers(place)
    }
}

impl Processes {
    // --- inputs: settle() must follow ------------------------------------------------------

    /// Replaces every process, or only that of one place, by one of the given generation.
    pub(crate) fn roll(
        &mut self,
        now: Time,
        place: Option<u32>,
        generation: Generation,
        actions: &mut Vec<Act>,
    ) -> RollBegun {
        let former = match place {
            None => self.current,
            Some(place) => self.places[place as usize].generation,
        };
        let roll = Roll {
            generation,
            former,
            place,
            state: RollState::Progressing,
            undo: false,
            failure: None,
            replaced: 0,
            began: now,
            ended: None,
        };
        self.newest = self.newest.max(generation);
        self.begin(now, roll, actions)
    }

    /// Returns to the generation before the last roll.
    pub(crate) fn undo(&mut self, now: Time, actions: &mut Vec<Act>) -> Option<RollBegun> {
        let last = self.roll?;
        let roll = Roll {
            generation: last.former,
            former: last.generation,
            state: RollState::Progressing,
            undo: true,
            replaced: 0,
            began: now,
            ended: None,
            ..last
        };
        Some(self.begin(now, roll, actions))
    }

    fn begin(&mut self, now: Time, roll: Roll, actions: &mut Vec<Act>) -> RollBegun {
        self.clear_flags();
        self.cancel_steps(now, actions);
        let again = roll.generation;
        let wanted = self.wanted as usize;
        let mut processes = 0;
        for (place, number) in self.places.iter_mut().take(wanted).zip(0..) {
            if !roll.covers(number) {
                continue;
            }
            let mut filled = false;
            for process in place.processes.iter_mut().filter(|process| process.holds()) {
                filled = true;
                // An undone roll may have replaced only some of them.
                if !roll.undo || process.generation != again {
                    process.replace = Some(Replacement::Restart);
                    processes += 1;
                }
            }
            if !filled {
                processes += 1;
                if roll.undo {
                    place.generation = again;
                }
            }
        }
        self.roll = Some(roll);
        RollBegun { generation: again, processes }
    }

    /// The roll is known from an earlier dispatcher, whose processes were adopted.
    pub(crate) fn resume_roll(&mut self, now: Time, roll: Option<Roll>, current: Generation) {
        self.current = current;
        self.newest = self.newest.max(current);
        self.roll = roll;
        let moving = roll.filter(|roll| roll.state == RollState::Progressing);
        if let Some(roll) = roll {
            self.newest = self.newest.max(roll.generation).max(roll.former);
        }
        let mut replaced = 0;
        for (place, number) in self.places.iter_mut().zip(0..) {
            let settled = |process: &&Process| {
                process.holds() && moving.is_none_or(|roll| process.generation != roll.generation)
            };
            let older = place.processes.iter().find(settled).map(|process| process.generation);
            let youngest = place.holders().last().map(|process| process.generation);
            place.generation = older.or(youngest).unwrap_or(current);
            let Some(roll) = moving.filter(|roll| roll.covers(number)) else { continue };
            let is_new = older.is_none() && youngest == Some(roll.generation);
            replaced += u32::from(is_new && number < self.wanted);
            for process in place.processes.iter_mut().filter(|process| process.holds()) {
                if process.generation != roll.generation {
                    process.replace = Some(Replacement::Restart);
                } else if older.is_some() {
                    // Whether it was ready is not known.
                    process.step = true;
                }
            }
        }
        if let Some(roll) = self.roll.as_mut().filter(|_| moving.is_some()) {
            // The earlier dispatcher may have ended before it could record the last steps.
            roll.replaced = replaced;
        }
        for place in &mut self.places {
            let youngest = place.holders().last().map_or(current, |process| process.generation);
            for process in &mut place.processes {
                // It left because of this roll or an earlier one.
                if !process.holds() && process.generation != youngest {
                    process.replace = Some(Replacement::Restart);
                }
            }
        }
        self.due = now;
    }

    /// The command of the generation that a roll is to start is not known any more.
    pub(crate) fn interrupt_roll(&mut self, now: Time, actions: &mut Vec<Act>) {
        if let Some(roll) = self.roll.as_mut().filter(|it| it.state == RollState::Progressing) {
            roll.state = RollState::Stopped;
            roll.ended = Some(now);
            self.clear_flags();
            self.cancel_steps(now, actions);
        }
    }

    /// A process passed its ready check, or did not. Returns whether it is a step.
    pub(crate) fn checked(&mut self, now: Time, id: ProcessId, passed: bool) -> bool {
        let step = self.get(id).filter(|process| process.step && process.holds());
        let Some(process) = step else { return false };
        process.checking = false;
        match passed {
            true => process.ready_since = Some(now),
            false => process.ready_by = Time(0),
        }
        true
    }

    /// A version that no process has had: places whose starts fail, or that are empty, start from
    /// it. A roll goes on with its own.
    pub(crate) fn renew(&mut self, generation: Generation) {
        if self.roll.is_some_and(|roll| roll.state == RollState::Progressing) {
            return;
        }
        let serving = self.serves();
        let mut used = !serving;
        for place in &mut self.places {
            if !serving || place.failures > 0 || place.holders().next().is_none() {
                place.generation = generation;
                used = true;
            }
        }
        if !serving {
            self.current = generation;
        }
        if used {
            self.newest = self.newest.max(generation);
        }
    }

    /// Processes that leave are to end their connections: or else they are ended.
    pub(crate) fn end_connections(&mut self, now: Time, ids: &[ProcessId]) {
        let until = now + self.settings.stop_timeout.min(END_GRACE);
        for id in ids {
            if let Some(process) = self.get(*id) {
                process.end_by = until;
            }
        }
    }

    // --- part of settle() ------------------------------------------------------------------

    /// Steps that are ready replace the older processes of their places.
    pub(crate) fn complete_steps(&mut self, now: Time) {
        for (place, number) in self.places.iter_mut().zip(0..) {
            let min_ready = self.settings.min_ready;
            let Some(process) = place.processes.iter_mut().rev().find(|process| process.holds())
            else {
                continue;
            };
            if !process.step || !process.is_ready(now, min_ready) {
                continue;
            }
            process.step = false;
            place.generation = process.generation;
            if let Some(roll) = &mut self.roll
                && roll.replaces(number)
                && roll.generation == process.generation
            {
                roll.replaced += 1;
            }
        }
    }

    /// Whether every place that the roll covers has its new process.
    pub(crate) fn finish_roll(&mut self, now: Time, actions: &mut Vec<Act>) {
        let Some(roll) = self.roll.filter(|roll| roll.state == RollState::Progressing) else {
            return;
        };
        let places = self.places.iter().take(self.wanted as usize).zip(0..);
        let mut covered = places.filter(|(_, number)| roll.covers(*number));
        let is_done = covered.all(|(place, _)| {
            let mut holders = place.holders();
            let only = holders.next().filter(|_| holders.next().is_none());
            only.is_some_and(|process| {
                !process.step
                    && process.phase == Phase::Serving
                    && process.replace != Some(Replacement::Restart)
            })
        });
        if !is_done {
            return;
        }
        if let Some(roll) = &mut self.roll {
            roll.state = RollState::Done;
            roll.ended = Some(now);
        }
        if roll.place.is_none() {
            self.current = roll.generation;
            // Places that are not wanted now may be wanted later.
            for place in self.places.iter_mut().skip(self.wanted as usize) {
                place.generation = roll.generation;
            }
        }
        actions.push((self.whole(), Action::TellRolled(roll.generation)));
    }

    /// A step has failed. False if it belongs to no roll: then its start is repeated.
    pub(crate) fn step_failed(
        &mut self,
        now: Time,
        (id, generation): (ProcessId, Generation),
        cause: StepFailure,
        actions: &mut Vec<Act>,
    ) -> bool {
        let rolls = |roll: &&mut Roll| roll.replaces(id.place) && roll.generation == generation;
        let Some(roll) = self.roll.as_mut().filter(rolls) else { return false };
        roll.state = RollState::Stopped;
        roll.failure = Some((id, cause));
        roll.ended = Some(now);
        let (undone, target) = (roll.undo, roll.generation);
        actions.push((id, Action::TellRollStopped(cause)));
        self.clear_flags();
        self.cancel_steps(now, actions);
        let place = self.places.get(id.place as usize);
        if place.is_some_and(|place| place.holders().next().is_none()) {
            self.failed(now, id, actions);
        }
        let remains = |process: &Process| process.holds() && process.generation == target;
        let mut all = self.places.iter().flat_map(|place| &place.processes);
        let remains = all.any(remains) || self.places.iter().any(|it| it.generation == target);
        if self.settings.undo_on_failure && !undone && remains {
            self.undo(now, actions);
        }
        true
    }

    fn clear_flags(&mut self) {
        for process in self.places.iter_mut().flat_map(|place| &mut place.processes) {
            if process.holds() && process.replace == Some(Replacement::Restart) {
                process.replace = None;
            }
        }
    }

    /// Ends the steps that are not ready and stand beside an older process.
    fn cancel_steps(&mut self, now: Time, actions: &mut Vec<Act>) {
        for place in &mut self.places {
            let several = place.holders().count() > 1;
            for process in place.processes.iter_mut().filter(|it| it.step && it.holds()) {
                if !several {
                    process.step = false;
                } else {
                    process.retreat(now, EndReason::Unwanted, actions);
                }
            }
        }
    }
}

impl Process {
    /// Whether it has been ready for `min_ready`, and is not suspect.
    pub(crate) fn is_ready(&self, now: Time, min_ready: Duration) -> bool {
        self.phase == Phase::Serving
            && self.view.suspect_since.is_none()
            && self.ready_since.is_some_and(|since| now - since >= min_ready)
    }

    /// Whether it leaves because a roll replaced it. Such processes do not count for `max_surge`.
    pub(crate) fn is_leaving_for_roll(&self) -> bool {
        matches!(self.phase, Phase::Leaving { .. }) && self.replace == Some(Replacement::Restart)
    }

    /// Whether it leaves because of a roll, with connections that it is not told to end now. The
    /// worker of an adopted process may have some that are not known yet.
    pub(crate) fn may_have_connections(&self) -> bool {
        let unknown = self.adopted && self.joined_at.is_none();
        let has = self.view.load > 0 || unknown;
        self.is_leaving_for_roll() && self.end_by == crate::policy::NEVER && has
    }

    /// It is not to replace the older process: without clients it is ended, with clients it is
    /// drained. A process that was never ready has no clients, only connections of its ready check.
    pub(crate) fn retreat(&mut self, now: Time, why: EndReason, actions: &mut Vec<Act>) {
        self.step = false;
        let had_clients = self.ready_since.is_some() || self.adopted;
        if self.phase == Phase::Serving && self.view.load > 0 && had_clients {
            self.phase = Phase::leaving(Leave::Replaced, now);
            actions.push((self.id, Action::Drain { bounded: true }));
        } else {
            self.phase = Phase::Ending;
            actions.push((self.id, Action::End(why)));
        }
    }
}
