//! How many threads wait in `accept`, and for how long one of them usually is away from it.
//!
//! The dispatcher sends a connection ahead only to a worker whose threads come back soon, and gives a connection that waits
//! for a busy worker to the first thread that is idle. A worker that never waits in `accept`, as event loops do not, reports
//! nothing; neither does one whose threads come back to `accept` while what they took is still served elsewhere, for example
//! by a thread for each connection. Changed under the lock of the worker's state only.

use std::cell::Cell;
use std::time::{Duration, Instant};

use dispatch_protocol::scoreboard::Scoreboard;

thread_local! {
    /// When this thread last took a connection.
    static TOOK: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// What a worker reports of its threads.
#[derive(Debug, Default)]
pub(super) struct IdleThreads {
    reports: bool,
    idle: u32,
    /// Threads that have taken a connection and not come back.
    away: u32,
    /// Moving average, in microseconds.
    turnaround: Option<u32>,
}

impl IdleThreads {
    /// This thread waits in `accept` from now on, while `live` connections are being served.
    pub(super) fn enter(&mut self, live: u64) {
        self.idle += 1;
        let took = TOOK.take();
        self.away = self.away.saturating_sub(u32::from(took.is_some()));
        self.reports = live <= u64::from(self.away);
        if let Some(took) = took {
            let away = u32::try_from(took.elapsed().as_micros()).unwrap_or(u32::MAX - 1);
            self.turnaround = Some(match self.turnaround {
                None => away,
                Some(usual) => ((u64::from(usual) * 3 + u64::from(away)) / 4) as u32,
            });
        }
    }

    /// This thread does not wait any more. Before it claims a connection, so that it is never counted together with one.
    pub(super) fn leave(&mut self) {
        self.idle -= 1;
    }

    /// A thread asks without waiting: this is an event loop, unless other threads wait.
    pub(super) fn asks(&mut self) -> bool {
        let stops = self.reports && self.idle == 0;
        self.reports &= !stops;
        stops
    }

    /// This thread, which has left, is about to take a connection.
    pub(super) fn takes(&mut self) {
        self.away += 1;
        TOOK.set(Some(Instant::now()));
    }

    /// Says so on the scoreboard.
    pub(super) fn show(&self, board: &Scoreboard) {
        let turnaround = self.turnaround.map(|us| Duration::from_micros(us.into()));
        board.set_idle_threads(self.reports.then_some(self.idle), turnaround);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_that_wait_are_counted_and_an_event_loop_reports_nothing() {
        let (board, _fd) = Scoreboard::create(1, 0).expect("a scoreboard");
        let mut waiting = IdleThreads::default();
        assert_eq!(board.idle_threads(), None);
        waiting.enter(0);
        waiting.enter(0);
        waiting.show(&board);
        assert_eq!(board.idle_threads(), Some((2, None)));
        assert!(!waiting.asks(), "others wait");
        waiting.leave();
        waiting.takes();
        waiting.leave();
        waiting.show(&board);
        assert_eq!(board.idle_threads(), Some((0, None)));
        waiting.enter(0);
        waiting.show(&board);
        let (idle, turnaround) = board.idle_threads().expect("it reports");
        assert_eq!(idle, 1);
        assert!(turnaround.is_some_and(|away| away < Duration::from_secs(10)));
        waiting.leave();
        assert!(waiting.asks());
        waiting.show(&board);
        assert_eq!(board.idle_threads(), None);
    }

    #[test]
    fn a_thread_that_gives_its_connections_away_is_always_back_soon() {
        let (board, _fd) = Scoreboard::create(1, 0).expect("a scoreboard");
        let mut waiting = IdleThreads::default();
        waiting.enter(0);
        waiting.leave();
        waiting.takes();
        // What it took is served by another thread.
        waiting.enter(1);
        waiting.show(&board);
        assert_eq!(board.idle_threads(), None);
        waiting.leave();
        waiting.takes();
        // What it took has ended.
        waiting.enter(0);
        waiting.show(&board);
        assert!(board.idle_threads().is_some_and(|(idle, _)| idle == 1));
    }
}
