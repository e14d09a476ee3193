//! Addresses that have failed, each set aside for a time.
//!
//! A failed address is not used until its pause is over. Then one attempt at a time probes it: a
//! success ends its being set aside, so that it has its full share again, a failure sets it aside
//! for twice as long. Time comes in as an argument; this module owns no clock.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// The most addresses that are remembered. Beyond it the one whose pause ends first is forgotten,
/// so that it counts as usable.
const MOST: usize = 4_096;

/// What may be done with an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It has not failed, or has recovered.
    Usable,
    /// Its pause is over: one attempt may probe it.
    ToProbe,
    /// Not before this time, unless nothing else is left.
    SetAside(Instant),
    /// An attempt probes it at this moment.
    BeingProbed,
}

impl Standing {
    /// Whether an attempt may choose the address now.
    pub(crate) fn is_usable(self) -> bool {
        match self {
            Standing::Usable | Standing::ToProbe => true,
            Standing::SetAside(_) | Standing::BeingProbed => false,
        }
    }
}

/// How long an address is set aside: the first time, and at most.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pauses {
    pub(crate) first: Duration,
    pub(crate) most: Duration,
}

impl Pauses {
    /// The pause after this many failures in a row: doubled with each, shortened by up to half at
    /// random, so that the clients of one server do not return to it at the same time.
    fn after(self, failures: u32, random: u64) -> Duration {
        let full = doubled(self.first, failures.saturating_sub(1), self.most);
        full / 2 + full.mul_f64(0.5 * fraction(random))
    }
}

/// `first` doubled this many times, at most `most`.
pub(super) fn doubled(first: Duration, times: u32, most: Duration) -> Duration {
    first.saturating_mul(2u32.saturating_pow(times)).min(most)
}

/// A random number as a part of 1, from 0 to less than 1.
pub(super) fn fraction(random: u64) -> f64 {
    // As many bits as the number has.
    (random >> 11) as f64 / (1u64 << 53) as f64
}

#[derive(Debug)]
struct Entry {
    /// Pauses in a row.
    failures: u32,
    until: Instant,
    being_probed: bool,
}

/// The addresses that are set aside.
#[derive(Debug)]
pub(crate) struct SetAside<A> {
    pauses: Pauses,
    entries: HashMap<A, Entry>,
}

impl<A: Clone + Eq + Hash> SetAside<A> {
    pub(crate) fn new(pauses: Pauses) -> SetAside<A> {
        SetAside { pauses, entries: HashMap::new() }
    }

    pub(crate) fn standing(&self, address: &A, now: Instant) -> Standing {
        match self.entries.get(address) {
            None => Standing::Usable,
            Some(entry) if entry.being_probed => Standing::BeingProbed,
            Some(entry) if now >= entry.until => Standing::ToProbe,
            Some(entry) => Standing::SetAside(entry.until),
        }
    }

    /// Reserves the probe of an address whose pause is over. The caller reports the result, or
    /// releases it.
    pub(crate) fn claim_probe(&mut self, address: &A, now: Instant) -> bool {
        let claimed = self.standing(address, now) == Standing::ToProbe;
        if claimed && let Some(entry) = self.entries.get_mut(address) {
            entry.being_probed = true;
        }
        claimed
    }

    /// The probe was not made, or was given up without a result.
    pub(crate) fn release_probe(&mut self, address: &A) {
        if let Some(entry) = self.entries.get_mut(address) {
            entry.being_probed = false;
        }
    }

    /// An attempt failed. Further failures during a pause do not prolong it: several attempts that
    /// were under way at the same time are one failure of the server.
    pub(crate) fn failed(&mut self, address: &A, now: Instant, random: u64) {
        let again = match self.entries.get(address) {
            Some(entry) if now < entry.until => return self.release_probe(address),
            Some(entry) => entry.failures.saturating_add(1),
            None => 1,
        };
        let pause = self.pauses.after(again, random);
        self.insert(address, again, now, pause);
    }

    /// An attempt failed, and the caller knows for how long the address is useless.
    pub(crate) fn failed_for(&mut self, address: &A, now: Instant, pause: Duration) {
        self.insert(address, 1, now, pause);
    }

    fn insert(&mut self, address: &A, failures: u32, now: Instant, pause: Duration) {
        if self.entries.len() >= MOST && !self.entries.contains_key(address) {
            let first = self.entries.iter().min_by_key(|(_, entry)| entry.until);
            if let Some(first) = first.map(|(address, _)| address.clone()) {
                self.entries.remove(&first);
            }
        }
        let until = now.checked_add(pause).unwrap_or(now);
        self.entries.insert(address.clone(), Entry { failures, until, being_probed: false });
    }

    /// An attempt succeeded: the address is used as before. Returns whether it was set aside.
    pub(crate) fn succeeded(&mut self, address: &A) -> bool {
        self.entries.remove(address).is_some()
    }

    /// Forgets the addresses that are not kept.
    pub(crate) fn retain(&mut self, keep: impl Fn(&A) -> bool) {
        self.entries.retain(|address, entry| entry.being_probed || keep(address));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAUSES: Pauses = Pauses { first: Duration::from_secs(1), most: Duration::from_secs(15) };

    #[test]
    fn pauses_double_to_the_maximum_and_a_success_ends_them() {
        let (mut set_aside, mut now) = (SetAside::new(PAUSES), Instant::now());
        for round in 0..2 {
            for full in [1, 2, 4, 8, 15, 15].map(Duration::from_secs) {
                assert!(set_aside.standing(&"a", now).is_usable());
                set_aside.failed(&"a", now, u64::MAX / 3);
                let Standing::SetAside(until) = set_aside.standing(&"a", now) else {
                    panic!("not set aside");
                };
                assert!(until - now >= full / 2 && until - now <= full, "{:?}", until - now);
                // Attempts that were under way do not prolong the pause.
                set_aside.failed(&"a", now, 0);
                assert_eq!(set_aside.standing(&"a", now), Standing::SetAside(until));
                now = until;
            }
            set_aside.succeeded(&"a");
            assert_eq!(set_aside.standing(&"a", now), Standing::Usable, "round {round}");
        }
    }

    #[test]
    fn one_attempt_at_a_time_probes() {
        let (mut set_aside, now) = (SetAside::new(PAUSES), Instant::now());
        assert!(!set_aside.claim_probe(&"a", now), "it has not failed");
        set_aside.failed(&"a", now, 0);
        assert!(!set_aside.claim_probe(&"a", now), "its pause has begun");
        let later = now + PAUSES.first;
        assert!(set_aside.claim_probe(&"a", later));
        assert!(!set_aside.claim_probe(&"a", later), "the second");
        assert_eq!(set_aside.standing(&"a", later), Standing::BeingProbed);
        set_aside.release_probe(&"a");
        assert!(set_aside.claim_probe(&"a", later), "the first was given up");
        set_aside.failed(&"a", later, u64::MAX);
        let almost = later + PAUSES.first * 2 - Duration::from_millis(1);
        assert!(!set_aside.claim_probe(&"a", almost), "the second pause is twice as long");
    }

    #[test]
    fn the_memory_is_bounded() {
        let (mut set_aside, now) = (SetAside::new(PAUSES), Instant::now());
        for n in 0..MOST + 10 {
            set_aside.failed(&n, now + Duration::from_millis(n as u64), 0);
        }
        assert_eq!(set_aside.entries.len(), MOST);
        assert!(set_aside.standing(&0, now).is_usable());
        assert!(!set_aside.standing(&(MOST + 9), now).is_usable());
    }

    #[test]
    fn extreme_pauses_do_no_harm() {
        let longest = Pauses { first: Duration::MAX, most: Duration::MAX };
        for pauses in [longest, Pauses { first: Duration::ZERO, most: Duration::ZERO }] {
            let mut set_aside = SetAside::new(pauses);
            for random in [0, 1, u64::MAX] {
                set_aside.failed(&"a", Instant::now(), random);
            }
        }
    }
}
