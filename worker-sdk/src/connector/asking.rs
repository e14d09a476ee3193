//! The questions to the advice hosts before a choice: which host is asked what, and for how long.
//!
//! They have a part of the time of all attempts, so that attempts can follow. No I/O, no wait: the
//! drivers ask and report the answers.

use std::collections::VecDeque;
use std::mem;
use std::sync::Arc;
use std::time::Instant;

use super::Address;
use super::advice::{Answer, Question};
use super::core::Core;
use super::failure::Failure;
use super::machine::Refresh;
use super::targets::Chosen;

/// A question to a host.
#[derive(Debug)]
pub(super) struct Ask {
    pub(super) question: Question,
    pub(super) host: Address,
    /// When its answer has to be whole.
    pub(super) until: Instant,
}

/// One series of questions. Dropping it without an answer lets others ask the host.
#[derive(Debug)]
pub(super) struct Asking {
    core: Arc<Core>,
    questions: VecDeque<Question>,
    /// The hosts that were asked the first of the questions.
    asked: Vec<Address>,
    current: Option<Chosen<Address>>,
    urgent: bool,
    deadline: Instant,
}

impl Asking {
    /// `deadline` is the end of the time for all of them.
    pub(super) fn new(core: &Arc<Core>, what: Refresh, deadline: Instant) -> Asking {
        let questions = [(what.list, Question::Addresses), (what.best, Question::Best)];
        let questions = questions.into_iter().filter(|(wanted, _)| *wanted);
        Asking {
            core: Arc::clone(core),
            questions: questions.map(|(_, question)| question).collect(),
            asked: Vec::new(),
            current: None,
            urgent: what.urgent,
            deadline,
        }
    }

    /// The next question; none if all have an answer, no host is left, or the time is over.
    pub(super) fn next(&mut self) -> Option<Ask> {
        let question = *self.questions.front()?;
        let now = Instant::now();
        if now >= self.deadline {
            return None;
        }
        let (chosen, is_last) = self.core.next_host(&self.asked, self.urgent)?;
        let limit = self.core.config.advice_timeout;
        if question == Question::Addresses {
            self.core.fetching(limit);
        }
        // Another host may answer if this one does not.
        let left = self.deadline.saturating_duration_since(now);
        let share = if is_last { left } else { left / 2 };
        let ask = Ask { question, host: chosen.address.clone(), until: now + limit.min(share) };
        self.asked.push(chosen.address.clone());
        self.current = Some(chosen);
        Some(ask)
    }

    /// The answer to the last question. Returns the best address, if that was asked for.
    pub(super) fn answered(&mut self, answer: Result<Answer, Failure>) -> Option<Address> {
        let host = self.current.take()?;
        let advised = self.core.answered(&host, answer).ok()?;
        self.questions.pop_front();
        // The same host is asked the next one.
        self.asked.clear();
        advised
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        if let Some(host) = mem::take(&mut self.current) {
            self.core.release_host(&host);
        }
    }
}
