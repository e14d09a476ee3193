//! Affinity: an identified client goes to the worker that it had before, if that worker is
//! eligible.
//!
//! Owns the bindings of keys and their precedence: first the worker that a session id names (its
//! route), then the worker that the key is bound to, then the policy's choice, to which the key is
//! bound. `key::KeySource` defines keys.

mod bindings;
pub(super) mod key;
mod table;

use self::bindings::Bindings;
use self::table::Table;
use super::Core;
use super::types::*;
use crate::affinity::key::{ClientIdentity, KeySource};
use crate::snapshot::AffinitySnapshot;

/// Expired entries that are removed for each new one: more than one, so that their number shrinks.
const OLD_PER_ENTRY: usize = 2;

/// The bindings of a pool's clients.
#[derive(Debug)]
pub(super) struct Memory {
    table: Table,
    bindings: Bindings,
    counts: Counts,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    routed: u64,
    hits: u64,
    misses: u64,
    moved: u64,
    claimed: u64,
    evicted: u64,
}

/// Result of looking a client up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Recall {
    /// Its session id names this worker.
    Routed(u32),
    /// Its key is bound to this worker.
    Here(u32),
    /// Its worker is not eligible now, or is gone.
    Away,
    /// Its key has no binding.
    New,
}

/// The outcome of a worker's claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClaimOutcome {
    /// The key is bound to the worker.
    Noted,
    /// The worker is leaving and gets no connections.
    Leaving,
    /// The pool has no affinity.
    NoAffinity,
    /// The value cannot be a key of the pool's clients.
    NotAKey,
}

impl Memory {
    pub(super) fn new(settings: &Affinity, seed: u64) -> Memory {
        Memory {
            table: Table::new(settings.max_entries, settings.ttl, seed),
            bindings: Bindings::default(),
            counts: Counts::default(),
        }
    }

    pub(super) fn set_seed(&mut self, seed: u64) {
        self.table.set_seed(seed);
    }

    /// A worker joins; returns its binding.
    pub(super) fn bind(&mut self, name: &str, worker: u32, is_usable: impl Fn(u32) -> bool) -> u32 {
        self.bindings.bind(AffinityKey::of(name.as_bytes()), worker, is_usable)
    }

    /// Whether clients of this binding go to this worker.
    pub(super) fn is_bound_to(&self, binding: u32, worker: u32) -> bool {
        self.bindings.worker(binding) == Some(worker)
    }

    pub(super) fn unbind(&mut self, binding: u32, worker: u32) {
        self.bindings.unbind(binding, worker);
    }

    /// Looks up the worker of a client.
    pub(super) fn recall(
        &self,
        now: Time,
        identity: ClientIdentity,
        is_eligible: impl Fn(u32) -> bool,
    ) -> Recall {
        let named = identity.route.and_then(|route| self.bindings.worker_named(route));
        if let Some(worker) = named.filter(|&worker| is_eligible(worker)) {
            return Recall::Routed(worker);
        }
        match self.table.binding(now, identity.key) {
            Some(binding) => {
                match self.bindings.worker(binding).filter(|&worker| is_eligible(worker)) {
                    Some(worker) => Recall::Here(worker),
                    None => Recall::Away,
                }
            }
            None if named.is_some() => Recall::Away,
            None => Recall::New,
        }
    }

    /// Records that the client goes to the worker with this binding.
    pub(super) fn note(&mut self, now: Time, key: AffinityKey, binding: u32, recall: Recall) {
        let count = match recall {
            Recall::Routed(_) => &mut self.counts.routed,
            Recall::Here(_) => &mut self.counts.hits,
            Recall::Away => &mut self.counts.moved,
            Recall::New => &mut self.counts.misses,
        };
        *count += 1;
        // A routed client needs no entry: its session id names the worker.
        if !matches!(recall, Recall::Routed(_)) {
            self.enter(now, key, binding);
        }
    }

    fn enter(&mut self, now: Time, key: AffinityKey, binding: u32) {
        self.bindings.add_entry(binding);
        self.forget_old(now, OLD_PER_ENTRY);
        if self.table.is_full() && self.table.binding(now, key).is_none() {
            // If the key's own entry has expired, that entry may be the one that is removed, or one
            // entry more than needed is removed: both are harmless.
            self.counts.evicted += u64::from(!self.table.has_old(now));
            self.drop_oldest();
        }
        if let Some(before) = self.table.enter(now, key, binding) {
            self.bindings.remove_entry(before);
        }
    }

    /// Removes up to `most` expired entries.
    pub(super) fn forget_old(&mut self, now: Time, most: usize) {
        for _ in 0..most {
            if !self.table.has_old(now) {
                return;
            }
            self.drop_oldest();
        }
    }

    fn drop_oldest(&mut self) {
        if let Some(binding) = self.table.drop_oldest() {
            self.bindings.remove_entry(binding);
        }
    }

    pub(super) fn snapshot(&self, key: &KeySource) -> AffinitySnapshot {
        AffinitySnapshot {
            key: key.clone(),
            entries: u64::from(self.table.len()),
            hits: self.counts.hits,
            misses: self.counts.misses,
            moved: self.counts.moved,
            routed: self.counts.routed,
            claimed: self.counts.claimed,
            evicted: self.counts.evicted,
            awaiting: 0,
            unknown: 0,
            timed_out: 0,
            not_awaited: 0,
        }
    }

    /// Number of entries that [`Memory::check`] examines.
    #[cfg(any(test, debug_assertions))]
    pub(super) fn size(&self) -> usize {
        self.table.len() as usize
    }

    pub(super) fn check(&self) {
        self.bindings.check(self.table.bindings());
        assert_eq!(self.table.bindings().count(), self.table.len() as usize);
    }
}

impl Core {
    /// A worker claims a key: from the next connection on, clients with this key go to this worker.
    pub fn claim(&mut self, now: Time, worker: WorkerId, key: &[u8]) -> ClaimOutcome {
        let Some(w) = self.find(worker).filter(|&w| self.workers[w].is_usable()) else {
            return ClaimOutcome::Leaving;
        };
        let (p, binding) = (self.workers[w].pool, self.workers[w].binding);
        let pool = &mut self.pools[p];
        let (Some(affinity), Some(memory)) = (&pool.settings.affinity, &mut pool.memory) else {
            return ClaimOutcome::NoAffinity;
        };
        let Some(identity) = affinity.key.of_value(key) else { return ClaimOutcome::NotAKey };
        memory.counts.claimed += 1;
        memory.enter(now, identity.key, binding);
        self.after(now, p);
        ClaimOutcome::Noted
    }
}
