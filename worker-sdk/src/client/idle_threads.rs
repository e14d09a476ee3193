//! The number of threads that wait in `accept`, and the usual time a thread spends outside it.
//!
//! The dispatcher sends a connection ahead only to a worker whose threads come back soon, and gives
//! a waiting connection to the first idle thread. Event loops, which never wait in `accept`, report
//! nothing. Neither do workers whose threads return to `accept` while another thread still serves
//! the connection. Changes only under the lock of the worker's state.

use std::cell::Cell;
use std::time::{Duration, Instant};

use dispatch_protocol::scoreboard::Scoreboard;

thread_local! {
    /// When this thread last took a connection.
    static TOOK: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// The worker's report on its threads.
#[derive(Debug, Default)]
pub(super) struct IdleThreads {
    reports: bool,
    idle: u32,
    /// Threads that have taken a connection and not returned.
    away: u32,
    /// A moving average, in microseconds.
    turnaround: Option<u32>,
}

impl IdleThreads {
    /// This thread starts to wait in `accept`; `live` connections are being served.
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

    /// This thread stops waiting. Call it before the take, so that a thread is never counted
    /// together with its connection.
    pub(super) fn leave(&mut self) {
        self.idle -= 1;
    }

    /// A thread asks without waiting: the worker is an event loop, unless other threads wait.
    /// Returns whether the report ends.
    pub(super) fn note_nonblocking_accept(&mut self) -> bool {
        let stops = self.reports && self.idle == 0;
        self.reports &= !stops;
        stops
    }

    /// This thread, which has left, takes a connection.
    pub(super) fn note_take(&mut self) {
        self.away += 1;
        TOOK.set(Some(Instant::now()));
    }

    /// Publishes the report on the scoreboard.
    pub(super) fn publish(&self, board: &Scoreboard) {
        let turnaround = self.turnaround.map(|us| Duration::from_micros(us.into()));
        board.set_idle_threads(self.reports.then_some(self.idle), turnaround);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_threads_are_counted_and_event_loops_are_not() {
        let (board, _fd) = Scoreboard::create(1, 0).expect("a scoreboard");
        let mut waiting = IdleThreads::default();
        assert_eq!(board.idle_threads(), None);
        waiting.enter(0);
        waiting.enter(0);
        waiting.publish(&board);
        assert_eq!(board.idle_threads(), Some((2, None)));
        assert!(!waiting.note_nonblocking_accept(), "other threads wait");
        waiting.leave();
        waiting.note_take();
        waiting.leave();
        waiting.publish(&board);
        assert_eq!(board.idle_threads(), Some((0, None)));
        waiting.enter(0);
        waiting.publish(&board);
        let (idle, turnaround) = board.idle_threads().expect("it reports");
        assert_eq!(idle, 1);
        assert!(turnaround.is_some_and(|away| away < Duration::from_secs(10)));
        waiting.leave();
        assert!(waiting.note_nonblocking_accept());
        waiting.publish(&board);
        assert_eq!(board.idle_threads(), None);
    }

    #[test]
    fn threads_that_give_connections_away_do_not_report() {
        let (board, _fd) = Scoreboard::create(1, 0).expect("a scoreboard");
        let mut waiting = IdleThreads::default();
        waiting.enter(0);
        waiting.leave();
        waiting.note_take();
        // Another thread serves the connection.
        waiting.enter(1);
        waiting.publish(&board);
        assert_eq!(board.idle_threads(), None);
        waiting.leave();
        waiting.note_take();
        // The connection has ended.
        waiting.enter(0);
        waiting.publish(&board);
        assert!(board.idle_threads().is_some_and(|(idle, _)| idle == 1));
    }
}
