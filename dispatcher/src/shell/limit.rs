//! How often a kind of line may be logged: what a peer can cause again and again must not fill a disk.

use std::time::Duration;

use crate::pool::Time;

/// Lines of one kind in any one second.
const PER_SECOND: u32 = 20;

/// One second.
const WINDOW: Duration = Duration::from_secs(1);

/// Counts the lines of one kind.
#[derive(Debug, Default)]
pub(super) struct Limit {
    window: Option<Time>,
    written: u32,
    left_out: u64,
    /// Since the start.
    total: u64,
}

impl Limit {
    /// Whether a line may be written now; if so, how many were left out before it.
    pub(super) fn allow(&mut self, now: Time) -> Option<u64> {
        if self.window.is_none_or(|start| now - start >= WINDOW) {
            self.window = Some(now);
            self.written = 0;
        }
        if self.written == PER_SECOND {
            self.left_out += 1;
            self.total += 1;
            return None;
        }
        self.written += 1;
        Some(std::mem::take(&mut self.left_out))
    }

    /// Lines left out since the start.
    pub(super) fn total(&self) -> u64 {
        self.total
    }
}

impl Limit {
    /// When lines that were left out are to be told of, should no line of their kind come before.
    fn due(&self) -> Option<Time> {
        self.window.filter(|_| self.left_out > 0).map(|start| start + WINDOW)
    }
}

/// What peers and shortages can make us log again and again.
#[derive(Debug, Default)]
pub(super) struct Limits {
    pub(super) refused: Limit,
    pub(super) broken: Limit,
    pub(super) claims: Limit,
    pub(super) shortage: Limit,
    /// Clients kept out by their listener's rules, by reason.
    pub(super) kept_out: [Limit; 3],
    /// Clients turned away for want of a worker.
    pub(super) turned_away: Limit,
    /// Connections that go to another worker.
    pub(super) resent: Limit,
    /// Ends of shortages.
    pub(super) relieved: Limit,
    /// What the poll refused to watch.
    pub(super) unwatched: Limit,
    /// Processes that start, do not start, end.
    pub(super) processes: [Limit; 3],
    /// By kind of event.
    pub(super) events: [Limit; EVENTS.len()],
}

/// Kinds of lines about events, in the order of [`Limits::events`].
pub(super) const EVENTS: [&str; 18] = [
    "worker_joined",
    "worker_goodbye",
    "worker_gone",
    "worker_suspect",
    "worker_trusted",
    "connection_lost_by_worker",
    "channel_full",
    "counter_clamped",
    "no_worker",
    "refusing",
    "back_pressure",
    "back_pressure_over",
    "choked",
    "process_restarting",
    "worker_draining",
    "worker_resumed",
    "drain_over",
    "gauge_impossible",
];

impl Limits {
    /// Lines left out since the start, of all kinds.
    pub(super) fn total(&mut self) -> u64 {
        self.all().map(|(_, limit)| limit.total()).sum()
    }

    /// When [`Limits::unsaid`] has something at the earliest.
    pub(super) fn due(&mut self) -> Option<Time> {
        self.all().filter_map(|(_, limit)| limit.due()).min()
    }

    /// Lines left out of which no later line has told within a second: their kind, and how many. Told of now.
    pub(super) fn unsaid(&mut self, now: Time) -> impl Iterator<Item = (&'static str, u64)> {
        self.all()
            .filter(move |(_, limit)| limit.due().is_some_and(|due| due <= now))
            .map(|(kind, limit)| (kind, std::mem::take(&mut limit.left_out)))
    }

    /// All of them, by the kind of line that most of what they limit is.
    fn all(&mut self) -> impl Iterator<Item = (&'static str, &mut Limit)> {
        // Taken apart, so that a new one cannot be forgotten here.
        let Limits {
            refused,
            broken,
            claims,
            shortage,
            kept_out,
            turned_away,
            resent,
            relieved,
            unwatched,
            processes,
            events,
        } = self;
        let single = [
            ("worker_refused", refused),
            ("worker_broke_protocol", broken),
            ("claim_ignored", claims),
            ("accept_paused", shortage),
            ("client_turned_away", turned_away),
            ("connection_resent", resent),
            ("accept_resumed", relieved),
            ("worker_not_watched", unwatched),
        ];
        let processes =
            ["process_started", "process_not_started", "process_ended"].into_iter().zip(processes);
        let kept_out = kept_out.iter_mut().map(|limit| ("client_kept_out", limit));
        single.into_iter().chain(kept_out).chain(processes).chain(EVENTS.into_iter().zip(events))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_left_out_is_said_when_silence_follows() {
        let mut limits = Limits::default();
        let start = Time(1_000);
        let flood = |limits: &mut Limits, lines: usize| {
            (0..lines).for_each(|_| _ = limits.resent.allow(start));
            (0..lines).for_each(|_| _ = limits.events[2].allow(start + WINDOW / 2));
        };
        flood(&mut limits, PER_SECOND as usize);
        assert_eq!(limits.due(), None, "nothing is missing");
        flood(&mut limits, 5);
        assert_eq!(limits.due(), Some(start + WINDOW));
        let said = |limits: &mut Limits, now: Time| limits.unsaid(now).collect::<Vec<_>>();
        assert_eq!(said(&mut limits, start + WINDOW / 2), []);
        assert_eq!(said(&mut limits, start + WINDOW), [("connection_resent", 5)]);
        assert_eq!(limits.due(), Some(start + WINDOW / 2 + WINDOW));
        assert_eq!(said(&mut limits, start + WINDOW * 2), [("worker_gone", 5)]);
        assert_eq!((limits.due(), said(&mut limits, start + WINDOW * 3).len()), (None, 0));
        // What was said is said once, and stays in the sum.
        assert_eq!(limits.resent.allow(start + WINDOW * 3), Some(0));
        assert_eq!(limits.total(), 10);
    }

    #[test]
    fn a_flood_is_cut_and_counted() {
        let mut limit = Limit::default();
        let start = Time(1_000);
        let written = (0..1_000).filter(|_| limit.allow(start).is_some()).count();
        assert_eq!(written, PER_SECOND as usize);
        let next = start + Duration::from_secs(1);
        assert_eq!(limit.allow(next), Some(1_000 - u64::from(PER_SECOND)));
        assert_eq!(limit.allow(next), Some(0));
        assert_eq!(limit.total(), 1_000 - u64::from(PER_SECOND));
    }
}
