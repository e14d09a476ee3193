//! The decisions about the processes of a pool: which process is started, replaced, drained and
//! ended now. See [`super::processes`].

use std::time::Duration;

use super::place::{Filling, Leave, Phase, Place, Process};
use super::processes::{Act, Action, EndReason, Processes, RESTART_RESET, Replacement};
use super::roll::StepFailure;
use crate::policy::NEVER;
use crate::types::{ProcessId, Time};

/// How often the workers of processes that leave, or that may hang, are looked at.
pub(crate) const REVIEW: Duration = Duration::from_millis(250);

impl Processes {
    /// Decides what is to be done now.
    pub(crate) fn settle(&mut self, now: Time, actions: &mut Vec<Act>) {
        for place in 0..self.places.len() {
            self.review(now, place, actions);
        }
        self.complete_steps(now);
        for place in 0..self.places.len().min(self.wanted as usize) {
            self.supersede(now, place, actions);
        }
        let mut beyond = self.beyond();
        for place in 0..self.places.len() {
            if place < self.wanted as usize {
                self.fill(now, place, &mut beyond, actions);
            } else {
                self.clear(now, place, actions);
            }
        }
        if self.told_crash_loop && !self.is_crash_loop() {
            self.told_crash_loop = false;
            actions
                .push((ProcessId { pool: self.pool, place: 0, start: 0 }, Action::TellRecovered));
        }
        self.finish_roll(now, actions);
        self.settled = now;
        self.due = self.next_due(now);
    }

    /// Looks at each process of a place: is it late, hung, too old, without connections?
    fn review(&mut self, now: Time, place: usize, actions: &mut Vec<Act>) {
        for at in 0..self.places[place].processes.len() {
            let process = &mut self.places[place].processes[at];
            let (id, held) = (process.id, process.holds());
            let Some(end) = process.end(now, &self.settings) else { continue };
            let lasted = process.has_lasted(now);
            let (step, generation) = (process.step, process.generation);
            let checked = process.ready_since.is_some();
            match end {
                EndReason::NotReady => process.retreat(now, end, actions),
                EndReason::Late | EndReason::Hung | EndReason::Left | EndReason::Unwanted => {
                    process.phase = Phase::Ending;
                    actions.push((id, Action::End(end)));
                }
            }
            match end {
                EndReason::Late => self.ended_late += 1,
                EndReason::Hung => self.ended_hung += 1,
                EndReason::Left | EndReason::Unwanted | EndReason::NotReady => {}
            }
            if !held || id.place >= self.wanted || self.stopped {
                continue;
            }
            self.restarts += 1;
            let cause = match end {
                EndReason::Late => StepFailure::Late,
                EndReason::NotReady if !checked => StepFailure::NotReady,
                _ => StepFailure::Suspect,
            };
            if step && self.step_failed(now, (id, generation), cause, actions) {
                continue;
            }
            match lasted && end == EndReason::Hung {
                true => self.places[place].forgive(),
                false => self.failed(now, id, actions),
            }
        }
        // A process that another one is to replace says nothing about the start of that one.
        let last = self.places[place].last_start;
        let lasts = |process: &Process| {
            process.id.start == last && process.phase == Phase::Serving && process.has_lasted(now)
        };
        if self.places[place].failures > 0 && self.places[place].holders().any(lasts) {
            let was_looping = self.is_looping(place);
            self.places[place].forgive();
            if was_looping {
                // What made the starts of other places fail is probably over, too.
                self.retry();
            }
        }
    }

    /// Sees to it that a wanted place has one process that gets connections. `beyond`: processes
    /// beyond one per place.
    fn fill(&mut self, now: Time, place: usize, beyond: &mut u32, actions: &mut Vec<Act>) {
        let beside = self.places[place].holders().next().is_some();
        match self.places[place].filling() {
            Filling::Empty => {
                if self.take_back(place, actions) || !self.may_start(now, place) {
                    return;
                }
            }
            Filling::One(id, replace) => {
                let Some(why) = replace.filter(|&why| self.may_replace(why)) else { return };
                if !self.may_start(now, place) || !self.has_room(place, *beyond) {
                    return;
                }
                actions.push((id, Action::TellReplace(why)));
            }
            Filling::Several => return,
        }
        if !self.has_room(place, *beyond) {
            return;
        }
        self.starts = self.unused(self.starts.wrapping_add(1));
        let id = ProcessId { pool: self.pool, place: place as u32, start: self.starts };
        let (generation, step) = self.next_generation(place, beside);
        let outdated = self.is_outdated(place, generation).then_some(Replacement::Restart);
        let entry = &mut self.places[place];
        *beyond += u32::from(entry.counted() > 0);
        let process = Process { step, replace: outdated, ..Process::new(id, generation) };
        entry.processes.push(process);
        entry.last_start = id.start;
        if !beside {
            entry.generation = generation;
        }
        actions.push((id, Action::Start));
    }

    /// Once the youngest process of a place serves, the older ones leave.
    fn supersede(&mut self, now: Time, place: usize, actions: &mut Vec<Act>) {
        let processes = &mut self.places[place].processes;
        let Some(youngest) = processes.iter().rposition(Process::holds) else { return };
        if processes[youngest].phase != Phase::Serving || processes[youngest].step {
            return;
        }
        for process in processes[..youngest].iter_mut().filter(|process| process.holds()) {
            if process.phase == Phase::Serving || process.adopted {
                process.phase = Phase::leaving(Leave::Replaced, now);
                actions.push((process.id, Action::Drain { bounded: true }));
            } else {
                process.phase = Phase::Ending;
                actions.push((process.id, Action::End(EndReason::Unwanted)));
            }
            self.replaced += 1;
        }
    }

    /// Frees a place that is not wanted.
    fn clear(&mut self, now: Time, place: usize, actions: &mut Vec<Act>) {
        for process in &mut self.places[place].processes {
            match process.phase {
                Phase::Serving => {
                    process.phase = Phase::leaving(Leave::Surplus, now);
                    actions.push((process.id, Action::Drain { bounded: false }));
                }
                // The worker of an adopted process may have connections: it joins, and is drained.
                Phase::Running { .. } if !process.adopted && process.joined_at.is_none() => {
                    process.phase = Phase::Ending;
                    actions.push((process.id, Action::End(EndReason::Unwanted)));
                }
                Phase::Running { .. } | Phase::Asked | Phase::Leaving { .. } | Phase::Ending => {}
            }
        }
    }

    /// A process that left because it was not wanted serves again, if it still can.
    fn take_back(&mut self, place: usize, actions: &mut Vec<Act>) -> bool {
        let left = |process: &&mut Process| {
            let surplus = matches!(process.phase, Phase::Leaving { why: Leave::Surplus, .. });
            surplus && process.view.joined && process.view.stays
        };
        let Some(process) = self.places[place].processes.iter_mut().find(left) else {
            return false;
        };
        process.phase = Phase::Serving;
        // There is nothing that it replaces.
        process.step = false;
        let (id, generation) = (process.id, process.generation);
        actions.push((id, Action::Resume));
        // The pool may have been rolled meanwhile.
        let former = self.places[place].generation != generation;
        let outdated = former || self.is_outdated(place, generation);
        if let Some(process) = self.get(id).filter(|_| outdated) {
            process.replace = Some(Replacement::Restart);
        }
        true
    }

    /// Whether the delays permit a start.
    fn may_start(&self, now: Time, place: usize) -> bool {
        if self.stopped || self.held || self.places[place].not_before > now {
            return false;
        }
        !self.is_looping(place) || (self.next_trial <= now && !self.has_trial(now))
    }

    /// Whether a process of a place in a crash loop is being tried.
    fn has_trial(&self, now: Time) -> bool {
        (0..self.places.len())
            .filter(|&place| self.is_looping(place))
            .any(|place| self.places[place].holders().any(|process| !process.has_lasted(now)))
    }

    /// Whether one more process at a place is within `max_surge`.
    fn has_room(&self, place: usize, beyond: u32) -> bool {
        self.places[place].counted() == 0 || beyond < self.settings.max_surge.of(self.wanted)
    }

    /// The number of processes beyond one for each wanted place.
    fn beyond(&self) -> u32 {
        let wanted = self.places.iter().take(self.wanted as usize);
        wanted.map(|place| place.counted().saturating_sub(1)).sum()
    }

    /// Whether a replacement may begin: one at a time, more than one only for an operator.
    fn may_replace(&self, why: Replacement) -> bool {
        let replaced = |place: &Place| place.holders().count() > 1;
        why == Replacement::Restart || !self.places.iter().any(replaced)
    }

    /// A start has failed: the next one waits.
    pub(crate) fn failed(&mut self, now: Time, id: ProcessId, actions: &mut Vec<Act>) {
        let most = self.settings.max_restart_delay;
        let Some(place) = self.places.get_mut(id.place as usize) else { return };
        let delay = place.delay.min(most);
        place.failures = place.failures.saturating_add(1);
        place.not_before = now + delay;
        place.delay = (delay * 2).min(most);
        let failures = place.failures;
        actions.push((id, Action::TellRestart(delay)));
        if self.is_looping(id.place as usize) {
            self.next_trial = now + most;
            if !std::mem::replace(&mut self.told_crash_loop, true) {
                actions.push((id, Action::TellCrashLoop(failures)));
            }
        }
    }

    pub(crate) fn is_looping(&self, place: usize) -> bool {
        let place = self.places.get(place).filter(|_| place < self.wanted as usize);
        place.is_some_and(|place| place.failures >= self.settings.crash_loop_after)
    }

    fn next_due(&self, now: Time) -> Time {
        let due = |place: &Place, process: &Process| match process.phase {
            Phase::Asked | Phase::Ending => NEVER,
            Phase::Running { until } => until,
            Phase::Serving => {
                let lasts = match process.joined_at {
                    Some(at) if place.failures > 0 && !process.has_lasted(now) => {
                        at + RESTART_RESET
                    }
                    _ => NEVER,
                };
                let expires = if process.replace.is_none() { process.expires } else { NEVER };
                let lasts = lasts.min(self.step_due(now, process));
                lasts.min(expires).min(self.hung_due(now, process.view.suspect_since))
            }
            Phase::Leaving { .. } => now + REVIEW,
        };
        let places = self.places.iter();
        let ends = places.flat_map(|place| place.processes.iter().map(move |it| due(place, it)));
        ends.chain(self.next_start(now)).min().unwrap_or(NEVER)
    }

    /// When a step can become ready, or has failed.
    fn step_due(&self, now: Time, process: &Process) -> Time {
        if !process.step {
            return NEVER;
        }
        let ready = process.ready_since.map_or(NEVER, |since| since + self.settings.min_ready);
        // A suspect worker becomes trusted without an input here.
        let ready = if ready <= now { now + REVIEW } else { ready };
        ready.min(process.ready_by)
    }

    /// A worker becomes suspect without an input here: so it is looked at again.
    fn hung_due(&self, now: Time, suspect_since: Option<Time>) -> Time {
        match (self.settings.kill_hung_after, suspect_since) {
            (None, _) => NEVER,
            (Some(most), Some(since)) => (since + most).max(now + Duration::from_nanos(1)),
            (Some(most), None) => now + most.max(REVIEW),
        }
    }

    /// The next time at which a start that waits for a delay is due. A start that waits for another
    /// process is decided when that process changes.
    pub(crate) fn next_start(&self, now: Time) -> Option<Time> {
        if self.stopped || self.held {
            return None;
        }
        let waits = |(_, place): &(usize, &Place)| match place.filling() {
            Filling::Empty => true,
            Filling::One(_, replace) => replace.is_some(),
            Filling::Several => false,
        };
        let places = self.places.iter().take(self.wanted as usize).enumerate().filter(waits);
        let at = places.map(|(number, place)| match self.is_looping(number) {
            true => place.not_before.max(self.next_trial),
            false => place.not_before,
        });
        at.filter(|&at| at > now).min()
    }
}
