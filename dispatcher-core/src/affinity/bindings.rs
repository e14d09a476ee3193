//! Bindings: the targets of affinity entries. A binding stands for a worker's name, not for the
//! worker, so that a worker that returns under its name gets its clients.
//!
//! A binding belongs to the worker that has its name. When that worker is gone, or has said
//! goodbye, the next worker of the same name takes the binding over. A second worker of a name in
//! use gets a binding without a name, so each entry has one worker. Bindings without worker and
//! entries are reused.

use std::collections::BTreeMap;

use super::super::types::AffinityKey;

/// No worker.
const NO_WORKER: u32 = u32::MAX;

#[derive(Clone, Copy, Debug)]
struct Binding {
    /// Hash of the worker's name; `None` if another binding has the name.
    name: Option<AffinityKey>,
    worker: u32,
    entries: u32,
}

#[derive(Debug, Default)]
pub(super) struct Bindings {
    bindings: Vec<Binding>,
    free: Vec<u32>,
    named: BTreeMap<AffinityKey, u32>,
}

impl Bindings {
    /// A worker of this name joins; returns its binding.
    pub(super) fn bind(
        &mut self,
        name: AffinityKey,
        worker: u32,
        is_usable: impl Fn(u32) -> bool,
    ) -> u32 {
        let name = match self.named.get(&name) {
            Some(&at) => {
                let binding = &mut self.bindings[at as usize];
                if binding.worker == NO_WORKER || !is_usable(binding.worker) {
                    binding.worker = worker;
                    return at;
                }
                None
            }
            None => Some(name),
        };
        let binding = Binding { name, worker, entries: 0 };
        let at = match self.free.pop() {
            Some(at) => {
                self.bindings[at as usize] = binding;
                at
            }
            None => {
                self.bindings.push(binding);
                (self.bindings.len() - 1) as u32
            }
        };
        if let Some(name) = name {
            self.named.insert(name, at);
        }
        at
    }

    /// The worker is gone. Another worker may have the binding already.
    pub(super) fn unbind(&mut self, at: u32, worker: u32) {
        if self.bindings[at as usize].worker == worker {
            self.bindings[at as usize].worker = NO_WORKER;
            self.clear(at);
        }
    }

    pub(super) fn add_entry(&mut self, at: u32) {
        self.bindings[at as usize].entries += 1;
    }

    pub(super) fn remove_entry(&mut self, at: u32) {
        self.bindings[at as usize].entries -= 1;
        self.clear(at);
    }

    fn clear(&mut self, at: u32) {
        let Binding { name, worker, entries } = self.bindings[at as usize];
        if worker == NO_WORKER && entries == 0 {
            if let Some(name) = name {
                self.named.remove(&name);
            }
            self.free.push(at);
        }
    }

    pub(super) fn worker(&self, at: u32) -> Option<u32> {
        Some(self.bindings[at as usize].worker).filter(|&worker| worker != NO_WORKER)
    }

    /// The worker of this name.
    pub(super) fn worker_named(&self, name: AffinityKey) -> Option<u32> {
        self.worker(*self.named.get(&name)?)
    }

    /// Panics unless `entries` are exactly those that are counted. For checks.
    pub(super) fn check(&self, entries: impl Iterator<Item = u32>) {
        // Compares sums of hashes instead of a table of counts, because a test bounds the
        // allocations of the hot thread.
        let mark = |at: u32| AffinityKey::of(&at.to_ne_bytes()).0;
        let found = entries.fold(0u64, |sum, at| sum.wrapping_add(mark(at)));
        let mut counted = 0u64;
        for (at, binding) in (0..).zip(&self.bindings) {
            counted = counted.wrapping_add(mark(at).wrapping_mul(u64::from(binding.entries)));
            let free = self.free.contains(&at);
            assert_eq!(free, binding.entries == 0 && binding.worker == NO_WORKER, "binding {at}");
            if let Some(name) = binding.name.filter(|_| !free) {
                assert_eq!(self.named.get(&name), Some(&at));
            }
        }
        assert_eq!(found, counted, "entries of all bindings");
    }
}
