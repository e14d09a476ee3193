//! Where entries point: at a worker's name rather than at the worker, so that one that comes back finds its clients.
//!
//! A home belongs to the worker that has its name. When that is gone, or has said goodbye, the next one of the same name
//! moves in. A second worker of a name that is in use has a home without a name: entries never waver between the two.
//! Homes without worker and entries are used again.

use std::collections::BTreeMap;

use super::super::types::AffinityKey;

/// Nobody.
const NOBODY: u32 = u32::MAX;

#[derive(Clone, Copy, Debug)]
struct Home {
    /// Hash of the worker's name, unless that was taken.
    name: Option<AffinityKey>,
    worker: u32,
    entries: u32,
}

#[derive(Debug, Default)]
pub(super) struct Homes {
    homes: Vec<Home>,
    free: Vec<u32>,
    named: BTreeMap<AffinityKey, u32>,
}

impl Homes {
    /// A worker of this name joins; answers its home.
    pub(super) fn move_in(
        &mut self,
        name: AffinityKey,
        worker: u32,
        is_usable: impl Fn(u32) -> bool,
    ) -> u32 {
        let name = match self.named.get(&name) {
            Some(&at) => {
                let home = &mut self.homes[at as usize];
                if home.worker == NOBODY || !is_usable(home.worker) {
                    home.worker = worker;
                    return at;
                }
                None
            }
            None => Some(name),
        };
        let home = Home { name, worker, entries: 0 };
        let at = match self.free.pop() {
            Some(at) => {
                self.homes[at as usize] = home;
                at
            }
            None => {
                self.homes.push(home);
                (self.homes.len() - 1) as u32
            }
        };
        if let Some(name) = name {
            self.named.insert(name, at);
        }
        at
    }

    /// The worker is gone. Somebody else may have moved in already.
    pub(super) fn move_out(&mut self, at: u32, worker: u32) {
        if self.homes[at as usize].worker == worker {
            self.homes[at as usize].worker = NOBODY;
            self.clear(at);
        }
    }

    pub(super) fn add_entry(&mut self, at: u32) {
        self.homes[at as usize].entries += 1;
    }

    pub(super) fn remove_entry(&mut self, at: u32) {
        self.homes[at as usize].entries -= 1;
        self.clear(at);
    }

    fn clear(&mut self, at: u32) {
        let Home { name, worker, entries } = self.homes[at as usize];
        if worker == NOBODY && entries == 0 {
            if let Some(name) = name {
                self.named.remove(&name);
            }
            self.free.push(at);
        }
    }

    pub(super) fn worker(&self, at: u32) -> Option<u32> {
        Some(self.homes[at as usize].worker).filter(|&worker| worker != NOBODY)
    }

    /// The worker of this name.
    pub(super) fn worker_named(&self, name: AffinityKey) -> Option<u32> {
        self.worker(*self.named.get(&name)?)
    }

    /// Panics unless `entries` are exactly those that are counted. For checks.
    pub(super) fn check(&self, entries: impl Iterator<Item = u32>) {
        // A number for each home, whose sums are equal only if the counts are: a table of counts would be memory of the hot
        // thread, which is watched.
        let mark = |at: u32| AffinityKey::of(&at.to_ne_bytes()).0;
        let found = entries.fold(0u64, |sum, at| sum.wrapping_add(mark(at)));
        let mut counted = 0u64;
        for (at, home) in (0..).zip(&self.homes) {
            counted = counted.wrapping_add(mark(at).wrapping_mul(u64::from(home.entries)));
            let free = self.free.contains(&at);
            assert_eq!(free, home.entries == 0 && home.worker == NOBODY, "home {at}");
            if let Some(name) = home.name.filter(|_| !free) {
                assert_eq!(self.named.get(&name), Some(&at));
            }
        }
        assert_eq!(found, counted, "entries of all homes");
    }
}
