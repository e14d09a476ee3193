//! The answers that named a server, as far as its load may not include them yet.
//!
//! Bounded, however long figures are valid and however often clients ask: answers that the figures
//! include are forgotten, and old ones are counted together, in coarser steps the older they are.

use std::collections::VecDeque;
use std::time::Duration;

use super::SETTLES_IN;
use crate::types::Time;

/// Most entries. When there are so many, neighbours are merged.
pub(super) const MOST: usize = 256;

/// Answers within this time are one entry.
const GRAIN: Duration = Duration::from_millis(10);

/// Entries of this age and younger keep their grain: figures that arrive now decide on them.
const EXACT: Duration = Duration::from_secs(1);

/// Older entries span at most this part of their age.
const COARSENESS: u32 = 8;

/// When, and how many; oldest first. An entry counts until its last answer would.
#[derive(Debug, Default)]
pub(super) struct Advised {
    entries: VecDeque<Entry>,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    first: Time,
    last: Time,
    count: u64,
}

impl Advised {
    /// An answer named the server.
    pub(super) fn add(&mut self, now: Time) {
        match self.entries.back_mut() {
            Some(entry) if now - entry.first < GRAIN => {
                entry.last = entry.last.max(now);
                entry.count += 1;
            }
            Some(_) | None => {
                if self.entries.len() >= MOST {
                    self.merge(now);
                }
                self.entries.push_back(Entry { first: now, last: now, count: 1 });
            }
        }
    }

    /// The answers that figures of the time `figures` may not include, and that are younger than
    /// `counts_for`.
    pub(super) fn count(&self, now: Time, counts_for: Duration, figures: Time) -> u64 {
        let counts =
            |entry: &&Entry| entry.last + counts_for > now && entry.last + SETTLES_IN > figures;
        self.entries.iter().filter(counts).map(|entry| entry.count).sum()
    }

    /// Forgets answers that figures of this time include.
    pub(super) fn forget_included(&mut self, figures: Time) {
        while self.entries.front().is_some_and(|entry| entry.last + SETTLES_IN <= figures) {
            self.entries.pop_front();
        }
    }

    /// Forgets answers that count no more.
    pub(super) fn forget_old(&mut self, now: Time, counts_for: Duration) {
        while self.entries.front().is_some_and(|entry| entry.last + counts_for <= now) {
            self.entries.pop_front();
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Merges old neighbours. At least a quarter of the entries is free then.
    fn merge(&mut self, now: Time) {
        let before = std::mem::take(&mut self.entries);
        for entry in before {
            let age = now - entry.last;
            match self.entries.back_mut() {
                Some(older) if age > EXACT && entry.last - older.first <= age / COARSENESS => {
                    (older.last, older.count) = (entry.last, older.count + entry.count);
                }
                Some(_) | None => self.entries.push_back(entry),
            }
        }
        // Only times that no clock shows are too far apart for that.
        let surplus = self.entries.len().saturating_sub(MOST * 3 / 4);
        for _ in 0..surplus {
            if let (Some(oldest), Some(next)) = (self.entries.pop_front(), self.entries.front_mut())
            {
                (next.first, next.count) = (oldest.first, next.count + oldest.count);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merged_answers_count_until_the_last_of_them_would_and_steps_are_fine() {
        let start = Time(1 << 60);
        let mut advised = Advised::default();
        let step = Duration::from_millis(20);
        let mut now = start;
        for n in 0..50_000u64 {
            now = start + step * n as u32;
            advised.add(now);
            assert!(advised.len() <= MOST);
        }
        let forever = Duration::from_secs(1 << 30);
        assert_eq!(advised.count(now, forever, start), 50_000);
        // Figures of any time: at most an eighth of what they correct is counted too long.
        for back in [1, 5, 20, 100, 500u64].map(Duration::from_secs) {
            let figures = Time(now.0 - back.as_nanos() as u64);
            let exact = ((back + SETTLES_IN).as_nanos() / step.as_nanos()) as u64;
            let counted = advised.count(now, forever, figures);
            assert!(counted >= exact && counted <= exact + exact / 7 + 2, "{counted}: {exact}");
        }
        advised.forget_included(now + SETTLES_IN);
        assert_eq!(advised.len(), 0);
    }

    #[test]
    fn the_number_of_entries_is_bounded_for_all_times() {
        let mut advised = Advised::default();
        let mut rng = 1u64;
        let mut now = Time(0);
        for _ in 0..100_000 {
            rng =
                rng.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            // Steps from nanoseconds to years.
            now = Time(now.0.saturating_add(1 << (rng >> 59)));
            advised.add(now);
            assert!(advised.len() <= MOST);
        }
        assert_eq!(advised.entries.iter().map(|entry| entry.count).sum::<u64>(), 100_000);
    }
}
