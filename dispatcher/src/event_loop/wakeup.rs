//! Sleeping and waking: the poll, and the ways to avoid a sleep.

use std::io;
use std::time::Duration;

use mio::{Events, Poll, Registry};

use super::time::clock;
use super::yield_backoff::YieldBackoff;
use crate::listen::error::RunError;

/// Grace period after an event in which workers are not asked to ring the doorbell. At a relevant
/// rate the next client wakes the loop before it ends, and the loop then reads the scoreboards:
/// this saves one eventfd write of the worker and one wake-up of the dispatcher for each
/// connection. A worker that closes a connection meanwhile finds its slot not released and shuts
/// the connection down itself, so no client waits for the end of the grace period.
pub(super) const WAKEUP_GRACE: Duration = Duration::from_millis(2);

/// The result of a poll that does not sleep.
enum PollOutcome {
    /// Events to handle now.
    Found,
    /// No events: sleep for at most this long.
    Sleep(Option<Duration>),
}

/// How the hot thread sleeps and wakes.
#[derive(Debug)]
pub(super) struct Wakeup {
    poll: Poll,
    yield_backoff: YieldBackoff,
    /// An event has just happened, so more events are likely soon: see [`WAKEUP_GRACE`].
    pub(super) in_grace: bool,
    /// The side thread's queues may hold more than one turn takes.
    pub(super) side_ready: bool,
}

impl Wakeup {
    pub(super) fn new(poll: Poll) -> Wakeup {
        Wakeup { poll, yield_backoff: YieldBackoff::default(), in_grace: false, side_ready: false }
    }

    pub(super) fn registry(&self) -> &Registry {
        self.poll.registry()
    }

    /// Waits until an event happens or `timeout` is over. Before it sleeps, it polls without
    /// sleeping if events have just happened; see [`Wakeup::poll_again`].
    pub(super) fn wait(
        &mut self,
        events: &mut Events,
        timeout: Option<Duration>,
        busy_poll: Duration,
    ) -> Result<(), RunError> {
        if let PollOutcome::Sleep(timeout) = self.poll_again(events, timeout, busy_poll)? {
            self.poll_events(events, timeout)?;
        }
        self.in_grace = !events.is_empty();
        Ok(())
    }

    /// Polls once. A signal handler that interrupts the poll counts as no event.
    pub(super) fn poll_events(
        &mut self,
        events: &mut Events,
        timeout: Option<Duration>,
    ) -> Result<(), RunError> {
        match self.poll.poll(events, timeout) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                events.clear();
                Ok(())
            }
            Err(error) => Err(RunError::System { what: "poll", error }),
        }
    }

    /// Polls without sleeping when events have just happened: once after a yield of the CPU, and
    /// repeatedly for `busy_poll`.
    ///
    /// On a machine with more work than cores, clients and workers run during the yield. The next
    /// turn then has more to do, and the system saves the cost of a sleep and a wake-up. With an
    /// idle core the cost is two short system calls.
    fn poll_again(
        &mut self,
        events: &mut Events,
        timeout: Option<Duration>,
        busy_poll: Duration,
    ) -> Result<PollOutcome, RunError> {
        if !self.in_grace || timeout == Some(Duration::ZERO) {
            return Ok(PollOutcome::Sleep(timeout));
        }
        let until = busy_poll.min(timeout.unwrap_or(Duration::MAX));
        let began = clock();
        let mut polled = began;
        loop {
            let yielded = self.yield_backoff.wanted(polled);
            if yielded {
                std::thread::yield_now();
                let now = clock();
                self.yield_backoff.took(now, now - polled);
                polled = now;
            }
            if yielded || !until.is_zero() {
                self.poll_events(events, Some(Duration::ZERO))?;
                if !events.is_empty() {
                    return Ok(PollOutcome::Found);
                }
            }
            if !until.is_zero() {
                polled = clock();
            }
            let spent = polled - began;
            if spent >= until {
                let left = timeout.map(|timeout| timeout.saturating_sub(spent));
                return Ok(PollOutcome::Sleep(left));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_wait_without_an_event_ends_at_its_timeout() {
        let mut wakeup = Wakeup::new(Poll::new().unwrap());
        let mut events = Events::with_capacity(4);
        wakeup.in_grace = true;
        let timeout = Duration::from_micros(2_500);
        let began = Instant::now();
        wakeup.wait(&mut events, Some(timeout), Duration::ZERO).unwrap();
        assert!(began.elapsed() >= timeout);
        assert!(events.is_empty() && !wakeup.in_grace);
    }
}
