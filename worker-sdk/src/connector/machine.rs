//! The attempts of one connect or reconnect, as a state machine without I/O.
//!
//! [`Machine::next`] says what to do next; the driver does it and reports the result. Time, random
//! numbers and results come in as arguments, so every course of events can be tested. The blocking
//! connector, the one for tokio, and a worker that looks for its dispatcher drive the same machine.

use std::hash::Hash;
use std::mem;
use std::time::{Duration, Instant};

use super::error::Outcome;
use super::event::{Attempt, Decision};
use super::failure::Failure;
use super::plan::{Persistence, Plan};
use super::selection::{Random, Selection};
use super::targets::{Chosen, Targets};

/// What the driver does next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step<A> {
    /// Ask for advice, then call `next` again, whatever the result.
    Refresh(Refresh),
    /// Call `next` again at this time.
    Wait(Instant),
    /// Tell the application, then call `begin` with the address that it leaves or chooses.
    Attempt(Attempt<A>),
    /// All attempts failed: ask the application, then call `decide`.
    Ask,
    /// The end, without a connection.
    GiveUp,
}

/// What to ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refresh {
    /// The list of addresses.
    pub(crate) list: bool,
    /// The best address.
    pub(crate) best: bool,
    /// Without an answer there is nothing to try: also ask hosts that are set aside.
    pub(crate) urgent: bool,
}

#[derive(Debug)]
enum State<A> {
    /// A round begins.
    Begin,
    Waiting(Instant),
    /// An attempt may be made.
    Ready,
    /// The application has been told of the attempt.
    Announced(Chosen<A>, Attempt<A>),
    /// The attempt is under way since this time.
    Under(Chosen<A>, Attempt<A>, Instant),
    /// All attempts of the round failed.
    Over,
    /// There is a connection, or the application gave up.
    End,
}

/// One connect or reconnect.
#[derive(Debug)]
pub(crate) struct Machine<A> {
    plan: Plan,
    state: State<A>,
    /// The server of the lost connection: it is tried first.
    lost: Option<A>,
    /// The address that the advice names.
    best: Option<A>,
    current: Option<Chosen<A>>,
    /// Attempts made: on the current address, on alternatives.
    made: (u32, u32),
    /// Whether advice was asked for before the next attempt.
    asked: bool,
    /// The addresses that failed in this round; the last failure last.
    failed: Vec<A>,
    round_began: Option<Instant>,
    /// Failures in a row; further rounds continue it.
    failures: u32,
    /// The back-off that is due before the next round.
    pause: Duration,
    outcomes: Vec<Outcome<A>>,
    timed_out: bool,
}

impl<A: Clone + Eq + Hash> Machine<A> {
    /// A connect; with `lost` a reconnect, after the loss of a connection to that address.
    pub(crate) fn new(plan: Plan, lost: Option<A>) -> Machine<A> {
        Machine {
            plan,
            state: State::Begin,
            lost,
            best: None,
            current: None,
            made: (0, 0),
            asked: false,
            failed: Vec::new(),
            round_began: None,
            failures: 0,
            pause: Duration::ZERO,
            outcomes: Vec::new(),
            timed_out: false,
        }
    }

    /// The next step. Calling it again before that is done gives the same step.
    pub(crate) fn next(
        &mut self,
        targets: &mut Targets<A>,
        now: Instant,
        random: Random<'_>,
    ) -> Step<A> {
        loop {
            match &self.state {
                State::Begin => self.begin_round(now, random),
                State::Waiting(until) if now < *until => return Step::Wait(*until),
                State::Waiting(_) => self.state = State::Ready,
                State::Ready => {
                    if let Some(step) = self.propose(targets, now, random) {
                        return step;
                    }
                }
                State::Announced(_, attempt) => return Step::Attempt(attempt.clone()),
                // The driver reports the result first.
                State::Under(_, _, since) => return Step::Wait(*since + self.plan.attempt_timeout),
                State::Over => match self.plan.persistence {
                    Persistence::Ask => return Step::Ask,
                    Persistence::Rounds | Persistence::Endless => {
                        self.decide(Decision::TryAgain, random);
                    }
                },
                State::End => return Step::GiveUp,
            }
        }
    }

    fn begin_round(&mut self, now: Instant, random: Random<'_>) {
        if self.lost.is_some() && self.failures == 0 {
            // The clients of one server lose it at the same time.
            self.pause = self.plan.back_off.wait(1, random());
        }
        // The pause is not a part of the round, so that a long one leaves time for attempts.
        let begins = now + mem::take(&mut self.pause);
        self.round_began = Some(begins);
        (self.made, self.asked) = ((0, 0), false);
        self.failed.clear();
        self.outcomes.clear();
        self.timed_out = false;
        (self.current, self.best) = (None, None);
        self.state = State::Waiting(begins);
    }

    /// The next attempt, or what has to come before it; none if the round is over.
    fn propose(
        &mut self,
        targets: &mut Targets<A>,
        now: Instant,
        random: Random<'_>,
    ) -> Option<Step<A>> {
        let endless = self.plan.persistence == Persistence::Endless;
        if self.time_left(now).is_zero() && !endless {
            self.timed_out = true;
            self.state = State::Over;
            return None;
        }
        let Some((alternative, retries_left)) = self.kind_of_next() else {
            self.state = State::Over;
            return None;
        };
        if let Some(refresh) = self.refresh(targets, alternative, now) {
            return Some(Step::Refresh(refresh));
        }
        let chosen = if endless {
            let chosen = self.endless(targets, now, random);
            if chosen.is_none() {
                let until = targets.first_end(now).unwrap_or(now + self.plan.attempt_timeout);
                return Some(Step::Wait(until));
            }
            chosen
        } else if alternative {
            self.alternative(targets, now, random)
        } else {
            self.current(targets, now, random)
        };
        let Some(chosen) = chosen else {
            self.state = State::Over;
            return None;
        };
        let attempt = Attempt { alternative, retries_left, address: chosen.address.clone() };
        self.state = State::Announced(chosen, attempt);
        None
    }

    /// Whether the next attempt goes to an alternative, and how many of its kind are left then.
    fn kind_of_next(&self) -> Option<(bool, u32)> {
        let (current, alternative) = self.made;
        if current < self.plan.max_retries {
            Some((false, self.plan.max_retries - current - 1))
        } else if alternative < self.plan.max_retries_alternative {
            Some((true, self.plan.max_retries_alternative - alternative - 1))
        } else {
            None
        }
    }

    /// Advice is asked for before each choice: the list if it is out of date, or if all of it has
    /// failed, and the best address. A new connection to the best address needs no list, if there
    /// is one.
    fn refresh(
        &mut self,
        targets: &Targets<A>,
        alternative: bool,
        now: Instant,
    ) -> Option<Refresh> {
        if mem::replace(&mut self.asked, true) || !(alternative || self.current.is_none()) {
            return None;
        }
        let advised = targets.selection() == Selection::Best;
        let has_failed = |address: &A| {
            alternative
                && (self.failed.contains(address)
                    || self.current.as_ref().is_some_and(|current| current.address == *address))
        };
        // Also if there is none.
        let urgent = targets.all(has_failed);
        // The best address may be one of those that are set aside here.
        let is_enough =
            advised && !alternative && self.lost.is_none() && !targets.has_failures(now);
        let list = targets.is_stale(now) && !is_enough || targets.is_advised() && urgent;
        let chooses = alternative || !self.lost.as_ref().is_some_and(|lost| targets.contains(lost));
        let best = advised && chooses;
        (list || best).then_some(Refresh { list, best, urgent })
    }

    /// The current address. One that was probed without success is left: the others come first.
    fn current(
        &mut self,
        targets: &mut Targets<A>,
        now: Instant,
        random: Random<'_>,
    ) -> Option<Chosen<A>> {
        if let Some(current) = &self.current {
            if current.probe {
                let failed = &self.failed;
                let other = targets.usable(
                    now,
                    |address| failed.contains(address),
                    self.best.as_ref(),
                    random,
                );
                if other.is_some() {
                    self.current.clone_from(&other);
                    return other;
                }
            }
            return Some(Chosen { address: current.address.clone(), probe: false });
        }
        let lost = self.lost.as_ref().filter(|lost| targets.contains(lost)).cloned();
        let chosen = lost
            .and_then(|lost| targets.this(&lost, now))
            .or_else(|| targets.usable(now, |_| false, self.best.as_ref(), random))
            .or_else(|| targets.set_aside(now, |_| false));
        self.current.clone_from(&chosen);
        chosen
    }

    /// Another address: one that has not failed in this round, also of an earlier list, else the
    /// one whose failure is longest ago, else the current one.
    fn alternative(
        &mut self,
        targets: &mut Targets<A>,
        now: Instant,
        random: Random<'_>,
    ) -> Option<Chosen<A>> {
        let current = self.current.as_ref().map(|chosen| &chosen.address);
        let excluded = |address: &A| Some(address) == current || self.failed.contains(address);
        let fresh = targets
            .usable(now, excluded, self.best.as_ref(), random)
            .or_else(|| targets.set_aside(now, excluded))
            .or_else(|| targets.former(excluded));
        if fresh.is_some() {
            return fresh;
        }
        let failed =
            self.failed.iter().find(|failed| Some(*failed) != current && targets.contains(failed));
        let address = failed.or(current)?.clone();
        Some(Chosen { address, probe: false })
    }

    /// Of endless attempts the next: each address has its turn before one that has failed is tried
    /// again, so that slow failures of some do not keep it from the others.
    fn endless(
        &mut self,
        targets: &mut Targets<A>,
        now: Instant,
        random: Random<'_>,
    ) -> Option<Chosen<A>> {
        let failed = &self.failed;
        let fresh = targets.usable(now, |address| failed.contains(address), None, random);
        fresh.or_else(|| {
            self.failed.clear();
            targets.usable(now, |_| false, None, random)
        })
    }

    /// The announced attempt begins, with this address. Returns its time limit; none if there is no
    /// time left for it, because the application took long to hear of it.
    pub(crate) fn begin(
        &mut self,
        targets: &mut Targets<A>,
        address: A,
        now: Instant,
    ) -> Option<Duration> {
        let limit = self.plan.attempt_timeout.min(self.time_left(now));
        if let State::Announced(chosen, mut attempt) = mem::replace(&mut self.state, State::Ready) {
            if limit.is_zero() {
                targets.release(&chosen);
                self.timed_out = true;
                self.state = State::Over;
                return None;
            }
            let chosen = if chosen.address == address {
                chosen
            } else {
                targets.release(&chosen);
                Chosen { address: address.clone(), probe: false }
            };
            attempt.address = address;
            self.asked = false;
            self.state = State::Under(chosen, attempt, now);
        }
        Some(limit)
    }

    /// There is a connection. Returns its address.
    pub(crate) fn succeeded(&mut self, targets: &mut Targets<A>) -> Option<A> {
        match mem::replace(&mut self.state, State::End) {
            State::Under(chosen, ..) => {
                targets.succeeded(&chosen.address);
                Some(chosen.address)
            }
            _ => None,
        }
    }

    /// The attempt failed. A shortage of this machine uses it up, and says nothing of the address.
    pub(crate) fn failed(
        &mut self,
        targets: &mut Targets<A>,
        Failure { kind, problem, local }: Failure,
        now: Instant,
        random: Random<'_>,
    ) {
        let State::Under(chosen, attempt, since) = mem::replace(&mut self.state, State::Ready)
        else {
            return;
        };
        let Attempt { alternative, retries_left, address } = attempt;
        if local {
            targets.release(&chosen);
        } else {
            targets.failed(&chosen.address, now, random());
            self.note_failed(&address);
        }
        let made = if alternative { &mut self.made.1 } else { &mut self.made.0 };
        *made = made.saturating_add(1);
        let took = now.saturating_duration_since(since);
        self.outcomes.push(Outcome {
            address,
            alternative,
            retries_left,
            took,
            kind,
            problem,
            local,
        });
        self.failures = self.failures.saturating_add(1);
        let wait = self.plan.back_off.wait(self.failures, random());
        self.state = if self.kind_of_next().is_none() {
            self.pause = wait;
            State::Over
        } else if wait >= self.time_left(now) {
            // The time limit would end the wait.
            (self.pause, self.timed_out) = (wait, true);
            State::Over
        } else {
            State::Waiting(now + wait)
        };
    }

    /// The last failure is the last of the list.
    fn note_failed(&mut self, address: &A) {
        self.failed.retain(|failed| failed != address);
        self.failed.push(address.clone());
    }

    /// The attempt failed, and its address is not tried for this time. For endless attempts only:
    /// the next one may be made at once, on another address.
    pub(crate) fn failed_for(&mut self, targets: &mut Targets<A>, now: Instant, pause: Duration) {
        if let State::Under(chosen, ..) = mem::replace(&mut self.state, State::Ready) {
            targets.failed_for(&chosen.address, now, pause);
            self.note_failed(&chosen.address);
        }
    }

    /// Advice for the next choice: the best address now.
    pub(crate) fn advise(&mut self, best: A) {
        self.best = Some(best);
    }

    /// The application's decision after [`Step::Ask`].
    pub(crate) fn decide(&mut self, decision: Decision, random: Random<'_>) {
        match decision {
            Decision::GiveUp => self.state = State::End,
            Decision::TryAgain => {
                if self.pause.is_zero() {
                    // No attempt was made, for want of an address or of time.
                    self.failures = self.failures.saturating_add(1);
                    self.pause = self.plan.back_off.wait(self.failures, random());
                }
                self.state = State::Begin;
            }
        }
    }

    /// The attempt is given up without a result, and no other follows.
    pub(crate) fn cancel(&mut self, targets: &mut Targets<A>) {
        match mem::replace(&mut self.state, State::End) {
            State::Announced(chosen, _) | State::Under(chosen, ..) => targets.release(&chosen),
            State::Begin | State::Waiting(_) | State::Ready | State::Over | State::End => {}
        }
    }

    /// What is left of the time of the round.
    pub(crate) fn time_left(&self, now: Instant) -> Duration {
        let used =
            self.round_began.map_or(Duration::ZERO, |began| now.saturating_duration_since(began));
        self.plan.total_timeout.saturating_sub(used)
    }

    /// How long a question for advice may take: attempts need time, too.
    pub(crate) fn time_for_advice(&self, now: Instant) -> Duration {
        self.time_left(now) / 2
    }

    /// The outcomes of the round, and whether the time limit ended it.
    pub(crate) fn outcomes(&self) -> (Vec<Outcome<A>>, bool) {
        (self.outcomes.clone(), self.timed_out)
    }
}

#[cfg(test)]
mod tests;
