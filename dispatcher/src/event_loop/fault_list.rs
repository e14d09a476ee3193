//! The last faults, and the number of clients in each of the last seconds, for the status.
//!
//! Both are bounded, and no decision depends on them. A second's count takes no memory; a fault
//! takes some, and is as rare as its log line.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, SystemTime};

use super::fault_kind::FaultKind;
use crate::api::status::FaultStatus;
use dispatcher_core::Time;

/// The number of complete seconds that are remembered.
pub(super) const SECONDS: usize = 300;

/// One fault, or several of the same kind about the same subject.
#[derive(Clone, Debug)]
struct Fault {
    at: SystemTime,
    kind: FaultKind,
    /// The pool, worker or socket that the fault concerns.
    subject: String,
    text: String,
    count: u64,
    /// The fault has not ended.
    ongoing: bool,
}

/// The last faults, newest last.
#[derive(Clone, Debug, Default)]
pub(super) struct FaultList {
    list: VecDeque<Fault>,
}

impl FaultList {
    /// Adds a fault to a list of `most`. A repeated fault is only counted and becomes the newest,
    /// so that one failing worker does not push out the other faults.
    pub(super) fn note(
        &mut self,
        most: u32,
        at: SystemTime,
        kind: FaultKind,
        subject: String,
        text: String,
    ) {
        let same = |fault: &Fault| fault.kind == kind && fault.subject == subject;
        let before = self.list.iter().position(same).and_then(|place| self.list.remove(place));
        let count = before.map_or(0, |fault| fault.count) + 1;
        // Some faults are reported late.
        let place = self.list.iter().rposition(|fault| fault.at <= at).map_or(0, |last| last + 1);
        self.list.insert(place, Fault { at, kind, subject, text, count, ongoing: false });
        while self.list.len() > most as usize {
            self.drop_one();
        }
    }

    /// Removes the oldest fault of the largest group, by kind and pool: repeated faults in one pool
    /// do not push out those of other pools.
    fn drop_one(&mut self) {
        let group = |fault: &Fault| (fault.kind, pool_of(&fault.subject).to_owned());
        let mut counts: HashMap<_, usize> = HashMap::new();
        for fault in &self.list {
            *counts.entry(group(fault)).or_default() += 1;
        }
        let most = counts.values().max().copied().unwrap_or(0);
        let oldest = self.list.iter().position(|fault| counts.get(&group(fault)) == Some(&most));
        self.list.remove(oldest.unwrap_or(0));
    }

    /// Updates the text of a fault that lasts, or that has just ended.
    pub(super) fn update(&mut self, kind: FaultKind, subject: &str, text: String, ongoing: bool) {
        let same = |fault: &&mut Fault| fault.kind == kind && fault.subject == subject;
        if let Some(fault) = self.list.iter_mut().rev().find(same) {
            fault.text = text;
            fault.ongoing = ongoing;
        }
    }

    pub(super) fn status(&self) -> Vec<FaultStatus> {
        self.list
            .iter()
            .map(|fault| FaultStatus {
                time: humantime::format_rfc3339_millis(fault.at).to_string(),
                kind: fault.kind.name().to_owned(),
                subject: fault.subject.clone(),
                text: fault.text.clone(),
                count: fault.count,
                ongoing: fault.ongoing,
            })
            .collect()
    }
}

/// The pool in a fault's subject: `POOL`, or `POOL/WORKER`.
fn pool_of(subject: &str) -> &str {
    subject.split('/').next().unwrap_or_default()
}

/// Clients accepted in each second. Updated once per turn: in a second without a turn no client
/// came.
#[derive(Debug)]
pub(super) struct Seconds {
    start: Time,
    /// The total of accepted clients at the last update.
    accepted: u64,
    /// The current second, counted from `start`.
    current: u64,
    /// By second, modulo their number; one more than are shown, for the current second.
    counts: [u64; SECONDS + 1],
}

impl Seconds {
    pub(super) fn new(start: Time) -> Seconds {
        Seconds { start, accepted: 0, current: 0, counts: [0; SECONDS + 1] }
    }

    /// Updates the counts: `accepted` clients have been accepted by `now`, since the start.
    pub(super) fn note(&mut self, now: Time, accepted: u64) {
        self.advance(now);
        let new = accepted.saturating_sub(self.accepted);
        self.accepted = accepted;
        self.counts[Seconds::place(self.current)] += new;
    }

    /// The complete seconds up to `now`, oldest first, as many as there have been.
    pub(super) fn whole(&mut self, now: Time) -> Vec<u64> {
        self.advance(now);
        let first = self.current.saturating_sub(SECONDS as u64);
        (first..self.current).map(|second| self.counts[Seconds::place(second)]).collect()
    }

    fn advance(&mut self, now: Time) {
        let second = (now - self.start).as_nanos() / Duration::from_secs(1).as_nanos();
        let second = u64::try_from(second).unwrap_or(u64::MAX);
        if second <= self.current {
            return;
        }
        // After a long sleep every entry is cleared once.
        let first = (self.current + 1).max(second.saturating_sub(SECONDS as u64));
        for skipped in first..=second {
            self.counts[Seconds::place(skipped)] = 0;
        }
        self.current = second;
    }

    fn place(second: u64) -> usize {
        // The remainder is small.
        (second % (SECONDS as u64 + 1)) as usize
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    #[test]
    fn only_the_last_faults_are_kept_and_repeats_are_counted() {
        let mut faults = FaultList::default();
        let at = |second| UNIX_EPOCH + Duration::from_secs(second);
        for second in 0..5 {
            faults.note(
                3,
                at(second),
                FaultKind::WorkerGone,
                format!("web/w{second}"),
                "died".to_owned(),
            );
        }
        faults.note(3, at(9), FaultKind::WorkerGone, "web/w4".to_owned(), "died again".to_owned());
        faults.note(3, at(10), FaultKind::WorkerSuspect, "web/w4".to_owned(), "slow".to_owned());
        let status = faults.status();
        let short: Vec<_> =
            status.iter().map(|f| (f.subject.as_str(), f.text.as_str(), f.count)).collect();
        assert_eq!(
            short,
            [("web/w3", "died", 1), ("web/w4", "died again", 2), ("web/w4", "slow", 1)]
        );
        assert_eq!(status[1].time, "1970-01-01T00:00:09.000Z");
        // A repeated fault, with others after it, becomes the newest.
        faults.note(
            3,
            at(11),
            FaultKind::WorkerGone,
            "web/w4".to_owned(),
            "died once more".to_owned(),
        );
        let status = faults.status();
        let short: Vec<_> = status.iter().map(|f| (f.text.as_str(), f.count)).collect();
        assert_eq!(short, [("died", 1), ("slow", 1), ("died once more", 3)]);
        // An update keeps the place and the count.
        faults.update(FaultKind::WorkerSuspect, "web/w4", "slow for 3s now".to_owned(), true);
        faults.update(FaultKind::WorkerSuspect, "web/w5", "an unknown worker".to_owned(), true);
        let status = faults.status();
        let fault = &status[1];
        assert_eq!((fault.text.as_str(), fault.count, fault.ongoing), ("slow for 3s now", 1, true));
        assert!(!status[0].ongoing && status.len() == 3);
        faults.note(
            1,
            at(11),
            FaultKind::OutOfResources,
            String::new(),
            "out of memory".to_owned(),
        );
        assert_eq!(faults.status().len(), 1);
        faults.note(0, at(11), FaultKind::WorkerGone, String::new(), String::new());
        assert_eq!(faults.status(), []);
    }

    #[test]
    fn a_flood_of_faults_in_one_pool_leaves_those_of_others() {
        let mut faults = FaultList::default();
        let mut note = |kind, subject: String| {
            faults.note(50, UNIX_EPOCH, kind, subject, String::new());
        };
        (0..5).for_each(|n| note(FaultKind::WorkerGone, format!("other/w{n}")));
        (0..1_000).for_each(|n| note(FaultKind::WorkerGone, format!("web/mallory{n}")));
        (0..1_000).for_each(|n| note(FaultKind::WorkerExpelled, format!("web/mallory{n}")));
        let status = faults.status();
        let count =
            |what: &str| status.iter().filter(|fault| fault.subject.starts_with(what)).count();
        assert_eq!((status.len(), count("other/")), (50, 5));
        let last = status.last().expect("the newest");
        assert_eq!(last.subject, "web/mallory999");
    }

    #[test]
    fn every_client_is_counted_in_its_second() {
        let start = Time(7_000_000_123);
        let mut seconds = Seconds::new(start);
        let at = |millis| start + Duration::from_millis(millis);
        assert_eq!(seconds.whole(start), [0; 0]);
        seconds.note(at(10), 3);
        seconds.note(at(990), 5);
        seconds.note(at(1_000), 6);
        // The current second is not complete.
        assert_eq!(seconds.whole(at(1_999)), [5]);
        seconds.note(at(4_500), 10);
        assert_eq!(seconds.whole(at(5_000)), [5, 1, 0, 0, 4]);
        // The window moves on, and is empty after a long pause.
        seconds.note(at(300_500), 11);
        let whole = seconds.whole(at(301_000));
        assert_eq!((whole.len(), whole[0], whole[3], whole[299]), (SECONDS, 1, 4, 1));
        assert_eq!(seconds.whole(at(10_000_000)), [0; SECONDS]);
        seconds.note(at(10_000_001), 12);
        assert_eq!(seconds.whole(at(10_001_000)).iter().sum::<u64>(), 1);
    }
}
