//! Limits how often a kind of line may be logged: events that peers cause must not fill a disk.
//! Each pool has limits of its own, so that a flood in one pool does not hide the events of
//! another.

use std::collections::HashMap;
use std::time::Duration;

use super::event_kind::EventKind;
use dispatcher_core::{CloseReason, PoolId, Time};

/// Lines of one kind in one second.
const PER_SECOND: u32 = 20;

/// One second.
const WINDOW: Duration = Duration::from_secs(1);

/// Counts the lines of one kind.
#[derive(Debug, Default)]
pub(super) struct RateLimit {
    window: Option<Time>,
    written: u32,
    suppressed: u64,
    /// Suppressed lines since the start.
    total: u64,
}

impl RateLimit {
    /// Whether a line may be written now; if so, how many lines were suppressed before it.
    pub(super) fn allow(&mut self, now: Time) -> Option<u64> {
        if self.window.is_none_or(|start| now - start >= WINDOW) {
            self.window = Some(now);
            self.written = 0;
        }
        if self.written == PER_SECOND {
            self.suppressed += 1;
            self.total += 1;
            return None;
        }
        self.written += 1;
        Some(self.take_suppressed())
    }

    /// Returns the number of suppressed lines, which the caller reports, and resets it.
    pub(super) fn take_suppressed(&mut self) -> u64 {
        std::mem::take(&mut self.suppressed)
    }

    /// When suppressed lines must be reported if no line of their kind comes before.
    pub(super) fn due(&self) -> Option<Time> {
        self.window.filter(|_| self.suppressed > 0).map(|start| start + WINDOW)
    }

    /// Whether this entry can be dropped: no suppressed lines, and its second is over.
    pub(super) fn is_over(&self, now: Time) -> bool {
        self.suppressed == 0 && self.window.is_none_or(|start| now - start >= WINDOW)
    }
}

/// The reason for a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Cause {
    /// A worker broke the protocol or was cut off.
    Broken,
    /// A worker claims an invalid key.
    Claim,
    /// Out of descriptors or memory.
    Shortage,
    /// A client is denied, turned away, or dropped.
    Closed(CloseReason),
    /// A client of a socket without a listener.
    NoListener,
    /// A connection goes to another worker.
    Resent,
    /// A shortage is over.
    Relieved,
    /// The poll refused a registration.
    NotWatched,
    /// A process that an earlier dispatcher started joins.
    LeftOver,
    /// A process started, did not start, or ended.
    Process(ProcessEvent),
    /// An event of the core.
    Event(EventKind),
}

/// See [`Cause::Process`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum ProcessEvent {
    Started,
    NotStarted,
    Ended,
}

impl Cause {
    /// The most frequent kind of line with this cause.
    fn kind(self) -> &'static str {
        match self {
            Cause::Broken => "worker_broke_protocol",
            Cause::Claim => "claim_ignored",
            Cause::Shortage => "accept_paused",
            Cause::Closed(
                CloseReason::Denied
                | CloseReason::RateLimited
                | CloseReason::TooManyQueued
                | CloseReason::ProxyMissing
                | CloseReason::ProxyUntrusted
                | CloseReason::ProxyMalformed
                | CloseReason::ProxyTooLong
                | CloseReason::ProxyTimeout,
            ) => "client_kept_out",
            Cause::Closed(
                CloseReason::NoWorker
                | CloseReason::ClientGone
                | CloseReason::Shutdown
                | CloseReason::HandedOver
                | CloseReason::Unread
                | CloseReason::Unsendable,
            ) => "client_turned_away",
            Cause::NoListener => "client_turned_away",
            Cause::Resent => "connection_resent",
            Cause::Relieved => "accept_resumed",
            Cause::NotWatched => "worker_not_watched",
            Cause::LeftOver => "worker_left_over",
            Cause::Process(ProcessEvent::Started) => "process_started",
            Cause::Process(ProcessEvent::NotStarted) => "process_not_started",
            Cause::Process(ProcessEvent::Ended) => "process_ended",
            Cause::Event(kind) => kind.name(),
        }
    }
}

/// Suppressed lines of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Suppressed {
    pub(super) kind: &'static str,
    pub(super) pool: Option<PoolId>,
    pub(super) count: u64,
}

/// The rate limits by pool and cause: at most one entry for each combination.
#[derive(Debug, Default)]
pub(super) struct RateLimits {
    table: HashMap<(Option<PoolId>, Cause), RateLimit>,
    /// The earliest time at which [`RateLimits::unreported`] returns lines.
    due: Option<Time>,
}

impl RateLimits {
    /// Whether a line may be written now; if so, how many lines were suppressed before it.
    pub(super) fn allow(&mut self, now: Time, pool: Option<PoolId>, cause: Cause) -> Option<u64> {
        let limit = self.table.entry((pool, cause)).or_default();
        let suppressed = limit.allow(now);
        if suppressed.is_none()
            && let Some(due) = limit.due()
        {
            self.due = Some(self.due.map_or(due, |other| other.min(due)));
        }
        suppressed
    }

    /// Suppressed lines of all kinds since the start.
    pub(super) fn total(&self) -> u64 {
        self.table.values().map(|limit| limit.total).sum()
    }

    /// When suppressed lines may have to be reported.
    pub(super) fn due(&self) -> Option<Time> {
        self.due
    }

    /// Suppressed lines that no later line has reported within a second. The caller reports them.
    pub(super) fn unreported(&mut self, now: Time) -> Vec<Suppressed> {
        let mut unreported = Vec::new();
        let mut next: Option<Time> = None;
        for (&(pool, cause), limit) in &mut self.table {
            match limit.due() {
                Some(due) if due <= now => {
                    unreported.push(Suppressed {
                        kind: cause.kind(),
                        pool,
                        count: limit.take_suppressed(),
                    });
                }
                Some(due) => next = Some(next.map_or(due, |other| other.min(due))),
                None => {}
            }
        }
        self.due = next;
        unreported
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WEB: Option<PoolId> = Some(PoolId(0));
    const OTHER: Option<PoolId> = Some(PoolId(1));

    #[test]
    fn suppressed_lines_are_reported_after_the_flood() {
        let mut limits = RateLimits::default();
        let start = Time(1_000);
        let gone = Cause::Event(EventKind::WorkerGone);
        let flood = |limits: &mut RateLimits, lines: usize| {
            (0..lines).for_each(|_| _ = limits.allow(start, WEB, Cause::Resent));
            (0..lines).for_each(|_| _ = limits.allow(start + WINDOW / 2, OTHER, gone));
        };
        flood(&mut limits, PER_SECOND as usize);
        assert_eq!(limits.due(), None, "nothing is missing");
        flood(&mut limits, 5);
        assert_eq!(limits.due(), Some(start + WINDOW));
        let told = |kind, pool| Suppressed { kind, pool, count: 5 };
        assert_eq!(limits.unreported(start + WINDOW / 2), []);
        assert_eq!(limits.unreported(start + WINDOW), [told("connection_resent", WEB)]);
        assert_eq!(limits.due(), Some(start + WINDOW / 2 + WINDOW));
        assert_eq!(limits.unreported(start + WINDOW * 2), [told("worker_gone", OTHER)]);
        assert_eq!((limits.due(), limits.unreported(start + WINDOW * 3).len()), (None, 0));
        // What was said is said once, and stays in the sum.
        assert_eq!(limits.allow(start + WINDOW * 3, WEB, Cause::Resent), Some(0));
        assert_eq!(limits.total(), 10);
    }

    #[test]
    fn a_flood_is_cut_and_counted() {
        let mut limit = RateLimit::default();
        let start = Time(1_000);
        let written = (0..1_000).filter(|_| limit.allow(start).is_some()).count();
        assert_eq!(written, PER_SECOND as usize);
        let next = start + Duration::from_secs(1);
        assert_eq!(limit.allow(next), Some(1_000 - u64::from(PER_SECOND)));
        assert_eq!(limit.allow(next), Some(0));
        assert_eq!(limit.total, 1_000 - u64::from(PER_SECOND));
    }

    #[test]
    fn a_flood_in_one_pool_hides_no_line_of_another() {
        let mut limits = RateLimits::default();
        let gone = Cause::Event(EventKind::WorkerGone);
        (0..1_000).for_each(|_| _ = limits.allow(Time(1_000), WEB, gone));
        assert_eq!(limits.allow(Time(1_001), OTHER, gone), Some(0));
        assert_eq!(
            limits.allow(Time(1_001), WEB, Cause::Event(EventKind::WorkerSuspect)),
            Some(0),
            "nor another cause"
        );
    }
}
