//! Requests for the next connection: blocking threads as leader and followers, event loops without
//! waiting.

use super::*;

impl WorkerCore {
    /// Waits for the next connection, but not beyond `until`; `None` if the worker is closed or
    /// drained.
    pub(crate) fn accept(
        self: &Arc<Self>,
        until: Option<Instant>,
    ) -> Result<Option<Accepted>, Error> {
        self.check_process()?;
        let mut waits = false;
        let accepted = self.accept_waiting(until, &mut waits);
        if waits {
            self.stop_waiting(&mut self.lock());
        }
        accepted
    }

    /// `waits`: whether this thread is counted as waiting.
    fn accept_waiting(
        self: &Arc<Self>,
        until: Option<Instant>,
        waits: &mut bool,
    ) -> Result<Option<Accepted>, Error> {
        let mut state = self.lock();
        // Whether an attempt without waiting has found nothing since the time ran out.
        let mut looked = false;
        loop {
            if !state.queue.is_empty() {
                if mem::take(waits) {
                    self.stop_waiting(&mut state);
                }
                let Some(popped) = self.pop(&mut state) else { continue };
                if popped.accepted.is_some() {
                    state.idle_threads.note_take();
                }
                match self.hand_out(state, popped, false) {
                    Some(accepted) => return Ok(Some(accepted)),
                    None => state = self.lock(),
                }
                continue;
            }
            if !mem::replace(waits, true) {
                self.start_waiting(&mut state);
            }
            if matches!(state.link, Link::Closed) {
                return Ok(None);
            } else if self.draining.now().is_some() {
                // The drain may have ended since.
                match if state.leader { Step::Blocked } else { self.step(&mut state)? } {
                    Step::Again => {}
                    Step::Blocked => {
                        self.pass_on(&state);
                        return Ok(None);
                    }
                }
            } else if until.is_some_and(|until| until <= Instant::now()) {
                let step = if state.leader || looked {
                    Step::Blocked
                } else {
                    looked = true;
                    self.step(&mut state)?
                };
                if let Step::Blocked = step {
                    self.pass_on(&state);
                    return Err(Error::TimedOut);
                }
            } else {
                let result;
                (state, result) = self.follow_or_lead(state, until);
                result?;
            }
        }
    }

    fn start_waiting(&self, state: &mut State) {
        state.idle_threads.enter(self.live());
        if let Some(session) = state.link.session() {
            state.idle_threads.publish(&session.board);
            session.ring_if_wanted(want::IDLE);
        }
    }

    fn stop_waiting(&self, state: &mut State) {
        state.idle_threads.leave();
        if let Some(session) = state.link.session() {
            state.idle_threads.publish(&session.board);
        }
    }

    /// The next connection if one is available now; `None` means to wait until the descriptor is
    /// readable.
    pub(crate) fn try_accept(self: &Arc<Self>) -> Result<Option<Accepted>, Error> {
        self.check_process()?;
        let mut state = self.lock();
        if state.idle_threads.note_nonblocking_accept()
            && let Some(session) = state.link.session()
        {
            state.idle_threads.publish(&session.board);
        }
        loop {
            if let Some(popped) = self.pop(&mut state) {
                match self.hand_out(state, popped, true) {
                    Some(accepted) => return Ok(Some(accepted)),
                    None => state = self.lock(),
                }
            } else {
                match if state.leader { Step::Blocked } else { self.step(&mut state)? } {
                    Step::Again => {}
                    Step::Blocked => {
                        self.pass_on(&state);
                        let drained = self.draining.now().is_some();
                        return if drained { Err(Error::Draining) } else { Ok(None) };
                    }
                }
            }
        }
    }

    /// Waits until no drain is in progress (true) or the worker is closed (false).
    pub(crate) fn resumed(self: &Arc<Self>) -> Result<bool, Error> {
        self.check_process()?;
        let mut state = self.lock();
        loop {
            if matches!(state.link, Link::Closed) {
                return Ok(false);
            } else if self.draining.now().is_none() {
                self.pass_on(&state);
                return Ok(true);
            }
            let result;
            (state, result) = self.follow_or_lead(state, None);
            result?;
        }
    }

    /// As [`resumed`](WorkerCore::resumed) without waiting; `None` means to wait until the
    /// descriptor is readable.
    #[cfg(feature = "tokio")]
    pub(crate) fn try_resumed(self: &Arc<Self>) -> Result<Option<bool>, Error> {
        self.check_process()?;
        let mut state = self.lock();
        loop {
            if matches!(state.link, Link::Closed) {
                return Ok(Some(false));
            } else if self.draining.now().is_none() {
                return Ok(Some(true));
            } else if state.leader {
                return Ok(None);
            } else if let Step::Blocked = self.step(&mut state)? {
                return Ok(None);
            }
        }
    }

    /// Waits for a change, as the leader if there is none yet.
    fn follow_or_lead<'a>(
        self: &'a Arc<Self>,
        mut state: Locked<'a>,
        until: Option<Instant>,
    ) -> (Locked<'a>, Result<(), Error>) {
        if state.leader {
            state.followers += 1;
            state = state.wait(&self.handed_over, self, until);
            state.followers -= 1;
            return (state, Ok(()));
        }
        state.leader = true;
        let result;
        (state, result) = self.lead(state, until);
        state.leader = false;
        if result.is_err() {
            self.pass_on(&state);
        }
        (state, result)
    }

    /// Every release of the lock calls this, or entries (or the leadership) would wait for a
    /// sleeping thread.
    pub(super) fn pass_on(&self, state: &State) {
        if !state.leader && state.followers > 0 {
            self.handed_over.notify_one();
        }
    }
}
