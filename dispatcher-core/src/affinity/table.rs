//! The binding of each key: a table of bounded size whose entries expire.
//!
//! Owns entries, their order of use and the index over keys. Every operation is O(1). The table
//! reserves all its memory with the first key and never grows: the kernel provides pages when
//! entries are used, and nothing is moved or rehashed while clients wait.

use std::time::Duration;

use super::super::types::{AffinityKey, Time};

/// No entry.
const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, Debug)]
struct Entry {
    key: AffinityKey,
    used: Time,
    binding: u32,
    /// The next entry at the same place of the index; for a free entry, the next free one.
    next: u32,
    newer: u32,
    older: u32,
}

#[derive(Debug)]
pub(super) struct Table {
    entries: Vec<Entry>,
    /// For each place the first entry plus one, so that the zeroed pages of the kernel are an empty
    /// index.
    index: Vec<u32>,
    free: u32,
    newest: u32,
    oldest: u32,
    len: u32,
    max: u32,
    ttl: Duration,
    /// Odd and secret, so that no client can choose the place of its key in the index.
    factor: u64,
}

impl Table {
    /// An empty table of at most `max` keys, each of which expires `ttl` after its last use.
    pub(super) fn new(max: u32, ttl: Duration, seed: u64) -> Table {
        Table {
            entries: Vec::new(),
            index: Vec::new(),
            free: NONE,
            newest: NONE,
            oldest: NONE,
            len: 0,
            max: max.max(1),
            ttl,
            factor: seed | 1,
        }
    }

    /// Has an effect only before the first key.
    pub(super) fn set_seed(&mut self, seed: u64) {
        if self.index.is_empty() {
            self.factor = seed | 1;
        }
    }

    pub(super) fn len(&self) -> u32 {
        self.len
    }

    /// The place of a key in the index, which must not be empty.
    fn place(&self, key: AffinityKey) -> usize {
        let bits = self.index.len().trailing_zeros();
        (key.0.wrapping_mul(self.factor) >> (u64::BITS - bits)) as usize
    }

    fn find(&self, key: AffinityKey) -> Option<u32> {
        if self.index.is_empty() {
            return None;
        }
        let mut at = self.index[self.place(key)].wrapping_sub(1);
        while at != NONE {
            let entry = &self.entries[at as usize];
            if entry.key == key {
                return Some(at);
            }
            at = entry.next;
        }
        None
    }

    /// The binding of a key that has not expired. Does not count as a use.
    pub(super) fn binding(&self, now: Time, key: AffinityKey) -> Option<u32> {
        let entry = &self.entries[self.find(key)? as usize];
        (now - entry.used < self.ttl).then_some(entry.binding)
    }

    /// Records a use of a key; returns its previous binding, if it had an entry.
    pub(super) fn enter(&mut self, now: Time, key: AffinityKey, binding: u32) -> Option<u32> {
        if let Some(at) = self.find(key) {
            let entry = &mut self.entries[at as usize];
            entry.used = now;
            let before = std::mem::replace(&mut entry.binding, binding);
            if self.newest != at {
                self.unlink(at);
                self.link(at);
            }
            return Some(before);
        }
        if self.index.is_empty() {
            let places = (self.max as usize).next_power_of_two().max(2);
            self.index = vec![0; places];
            self.entries = Vec::with_capacity(self.max as usize);
        }
        debug_assert!(self.len < self.max, "room was made before");
        let place = self.place(key);
        let next = self.index[place].wrapping_sub(1);
        let entry = Entry { key, used: now, binding, next, newer: NONE, older: NONE };
        let at = if self.free == NONE {
            self.entries.push(entry);
            (self.entries.len() - 1) as u32
        } else {
            let at = self.free;
            self.free = self.entries[at as usize].next;
            self.entries[at as usize] = entry;
            at
        };
        self.index[place] = at + 1;
        self.len += 1;
        self.link(at);
        None
    }

    pub(super) fn is_full(&self) -> bool {
        self.len >= self.max
    }

    /// Whether the least recently used key has expired.
    pub(super) fn has_old(&self, now: Time) -> bool {
        self.oldest != NONE && now - self.entries[self.oldest as usize].used >= self.ttl
    }

    /// Removes the least recently used key; returns its binding.
    pub(super) fn drop_oldest(&mut self) -> Option<u32> {
        let at = Some(self.oldest).filter(|&at| at != NONE)?;
        self.unlink(at);
        let Entry { key, binding, next, .. } = self.entries[at as usize];
        let place = self.place(key);
        let mut before = self.index[place].wrapping_sub(1);
        if before == at {
            self.index[place] = next.wrapping_add(1);
        } else {
            while self.entries[before as usize].next != at {
                before = self.entries[before as usize].next;
            }
            self.entries[before as usize].next = next;
        }
        self.entries[at as usize].next = self.free;
        self.free = at;
        self.len -= 1;
        Some(binding)
    }

    /// Appends an entry as the newest.
    fn link(&mut self, at: u32) {
        let before = std::mem::replace(&mut self.newest, at);
        let entry = &mut self.entries[at as usize];
        (entry.newer, entry.older) = (NONE, before);
        match before {
            NONE => self.oldest = at,
            before => self.entries[before as usize].newer = at,
        }
    }

    fn unlink(&mut self, at: u32) {
        let Entry { newer, older, .. } = self.entries[at as usize];
        match newer {
            NONE => self.newest = older,
            newer => self.entries[newer as usize].older = older,
        }
        match older {
            NONE => self.oldest = newer,
            older => self.entries[older as usize].newer = newer,
        }
    }

    /// Every binding that an entry names, the least recently used first. For checks.
    pub(super) fn bindings(&self) -> impl Iterator<Item = u32> + '_ {
        let some = |at: u32| Some(at).filter(|&at| at != NONE);
        std::iter::successors(some(self.oldest), move |&at| some(self.entries[at as usize].newer))
            .map(|at| self.entries[at as usize].binding)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    fn key(n: u64) -> AffinityKey {
        AffinityKey(n.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    /// Enters a key as the core does: it makes room first.
    fn enter(table: &mut Table, now: u64, n: u64, binding: u32) {
        if table.find(key(n)).is_none() && table.is_full() {
            table.drop_oldest();
        }
        table.enter(Time(now), key(n), binding);
    }

    #[test]
    fn a_key_is_forgotten_after_its_last_use() {
        let mut table = Table::new(10, Duration::from_nanos(100), 7);
        enter(&mut table, 0, 1, 5);
        assert_eq!(table.binding(Time(99), key(1)), Some(5));
        assert_eq!(table.binding(Time(100), key(1)), None, "asking is no use");
        enter(&mut table, 60, 1, 5);
        assert_eq!(table.binding(Time(159), key(1)), Some(5));
        assert!(!table.has_old(Time(159)) && table.has_old(Time(160)));
        assert_eq!(table.drop_oldest(), Some(5));
        assert_eq!((table.len(), table.drop_oldest()), (0, None));
    }

    #[test]
    fn the_least_recently_used_goes_first() {
        let mut table = Table::new(3, Duration::MAX, 7);
        for n in 0..3 {
            enter(&mut table, n, n, n as u32);
        }
        enter(&mut table, 3, 0, 0);
        enter(&mut table, 4, 9, 9);
        assert_eq!(table.binding(Time(5), key(1)), None);
        for n in [0, 2, 9] {
            assert_eq!(table.binding(Time(5), key(n)), Some(n as u32));
        }
    }

    /// docs/AFFINITY.md and etc/dispatcher.toml say 36 to 40 bytes.
    #[test]
    fn a_key_takes_36_to_40_bytes() {
        // As many places in the index as keys, up to the next power of two.
        let place = size_of::<u32>();
        assert_eq!((size_of::<Entry>() + place, size_of::<Entry>() + 2 * place), (36, 40));
    }

    #[test]
    fn a_million_keys() {
        const COUNT: u32 = 1_000_000;
        let mut table = Table::new(COUNT, Duration::MAX, 0x9e37_79b9_7f4a_7c15);
        assert_eq!((table.entries.capacity(), table.index.capacity()), (0, 0), "nothing yet");
        // Keys that differ in few bits, as an attacker would choose them to collide.
        for n in 0..3 * u64::from(COUNT) {
            let key = AffinityKey(n << 20);
            if table.is_full() {
                table.drop_oldest();
            }
            table.enter(Time(n), key, n as u32);
        }
        assert_eq!(table.len(), COUNT);
        assert_eq!((table.entries.len(), table.entries.capacity()), (1_000_000, 1_000_000));
        assert_eq!(table.binding(Time(0), AffinityKey(0)), None);
        let mut longest = 0;
        for &first in &table.index {
            let mut at = first.wrapping_sub(1);
            let mut length = 0;
            while at != NONE {
                (length, at) = (length + 1, table.entries[at as usize].next);
            }
            longest = longest.max(length);
        }
        assert!(longest < 50, "{longest} in one place");
        for n in 2 * u64::from(COUNT)..3 * u64::from(COUNT) {
            assert_eq!(table.binding(Time(0), AffinityKey(n << 20)), Some(n as u32));
        }
    }

    proptest::proptest! {
        /// Compares the table with a simple list.
        #[test]
        fn as_a_list_would_do(
            max in 1u32..8,
            ttl in 1u64..40,
            ops in proptest::collection::vec((0u64..12, 0u32..4, 0u64..10), 0..200),
        ) {
            let mut table = Table::new(max, Duration::from_nanos(ttl), ttl);
            let mut list: VecDeque<(u64, u32, u64)> = VecDeque::new();
            let mut now = 0;
            for (n, binding, pause) in ops {
                now += pause;
                let known = list.iter().find(|&&(k, _, used)| k == n && now - used < ttl);
                proptest::prop_assert_eq!(table.binding(Time(now), key(n)), known.map(|&(_, h, _)| h));
                enter(&mut table, now, n, binding);
                list.retain(|&(k, _, _)| k != n);
                if list.len() == max as usize {
                    list.pop_front();
                }
                list.push_back((n, binding, now));
                proptest::prop_assert_eq!(table.len() as usize, list.len());
                let bindings: Vec<u32> = list.iter().map(|&(_, h, _)| h).collect();
                proptest::prop_assert_eq!(table.bindings().collect::<Vec<_>>(), bindings);
            }
        }
    }
}
