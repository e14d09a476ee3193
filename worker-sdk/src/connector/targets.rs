//! The addresses of a service: the list, which of them are set aside, and the choice of the next.
//!
//! One value belongs to all connections of a connector, so that one connection's failure spares the
//! others the attempt. Facts and time come in as arguments; the module does no I/O.

use std::hash::Hash;
use std::mem;
use std::time::{Duration, Instant};

use super::selection::{Candidate, Random, Selection, Turn};
use super::set_aside::{Pauses, SetAside, Standing};

/// An address for the next attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chosen<A> {
    pub(crate) address: A,
    /// The attempt probes an address that had been set aside, and no other attempt does.
    pub(crate) probe: bool,
}

/// The most addresses of earlier lists that are kept.
const MOST_FORMER: usize = 64;

#[derive(Debug)]
pub(crate) struct Targets<A> {
    list: Vec<Candidate<A>>,
    /// Addresses of earlier lists, the latest first. An advised list is some seconds old: a server
    /// that is back may not be in it yet.
    former: Vec<A>,
    /// When the list has to be fetched again; none: never.
    stale_at: Option<Instant>,
    set_aside: SetAside<A>,
    selection: Selection,
    /// It begins again at random when an address fails or recovers: all clients of a server lose it
    /// and find it again at the same times. If each went on where it was, all would be at the same
    /// place, and they would move from server to server together.
    turn: Turn,
    sticky: bool,
    /// The server of earlier connections.
    stuck_to: Option<A>,
}

impl<A: Clone + Eq + Hash> Targets<A> {
    pub(crate) fn new(selection: Selection, sticky: bool, pauses: Pauses) -> Targets<A> {
        Targets {
            list: Vec::new(),
            former: Vec::new(),
            stale_at: None,
            set_aside: SetAside::new(pauses),
            selection,
            turn: Turn::default(),
            sticky,
            stuck_to: None,
        }
    }

    /// Replaces the list. What is known of addresses that stay is kept.
    pub(crate) fn replace(&mut self, list: Vec<Candidate<A>>, stale_at: Option<Instant>) {
        self.set_aside.retain(|address| list.iter().any(|known| known.address == *address));
        let is_listed = |address: &A| list.iter().any(|known| known.address == *address);
        let before = mem::take(&mut self.list).into_iter().map(|known| known.address);
        let mut former: Vec<A> = before.filter(|address| !is_listed(address)).collect();
        self.former.retain(|address| !is_listed(address));
        former.append(&mut self.former);
        former.truncate(MOST_FORMER);
        self.former = former;
        self.list = list;
        self.stale_at = stale_at;
    }

    /// Keeps the list until `stale_at`.
    pub(crate) fn keep_until(&mut self, stale_at: Instant) {
        self.stale_at = Some(stale_at);
    }

    pub(crate) fn is_stale(&self, now: Instant) -> bool {
        self.stale_at.is_some_and(|at| now >= at)
    }

    /// Whether the list comes from advice.
    pub(super) fn is_advised(&self) -> bool {
        self.stale_at.is_some()
    }

    pub(super) fn all(&self, holds: impl Fn(&A) -> bool) -> bool {
        self.list.iter().all(|known| holds(&known.address))
    }

    /// Whether an address of the list is not usable.
    pub(super) fn has_failures(&self, now: Instant) -> bool {
        let usable =
            |known: &Candidate<A>| self.set_aside.standing(&known.address, now).is_usable();
        !self.list.iter().all(usable)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    pub(crate) fn contains(&self, address: &A) -> bool {
        self.list.iter().any(|known| known.address == *address)
    }

    pub(crate) fn selection(&self) -> Selection {
        self.selection
    }

    /// Chooses this address, if it is usable, whatever the selection says.
    pub(super) fn this(&mut self, address: &A, now: Instant) -> Option<Chosen<A>> {
        let probe = match self.set_aside.standing(address, now) {
            Standing::Usable => false,
            Standing::ToProbe => self.set_aside.claim_probe(address, now),
            Standing::SetAside(_) | Standing::BeingProbed => return None,
        };
        Some(Chosen { address: address.clone(), probe })
    }

    /// Chooses among the usable addresses that are not excluded: the server of earlier connections
    /// in sticky mode, else `best`, else by the selection.
    pub(super) fn usable(
        &mut self,
        now: Instant,
        excluded: impl Fn(&A) -> bool,
        best: Option<&A>,
        random: Random<'_>,
    ) -> Option<Chosen<A>> {
        let stuck_to = self.stuck_to.clone().filter(|address| self.contains(address));
        for preferred in [stuck_to.as_ref(), best].into_iter().flatten() {
            if !excluded(preferred)
                && let Some(chosen) = self.this(preferred, now)
            {
                return Some(chosen);
            }
        }
        let Targets { list, set_aside, selection, turn, .. } = self;
        let usable = |candidate: &&Candidate<A>| {
            !excluded(&candidate.address) && set_aside.standing(&candidate.address, now).is_usable()
        };
        let among: Vec<&Candidate<A>> = list.iter().filter(usable).collect();
        let address = selection.choose(&among, turn, random)?.address.clone();
        self.this(&address, now)
    }

    /// Of addresses that are all set aside, the one whose pause ends first: when nothing else is
    /// left, it is tried during its pause.
    pub(super) fn set_aside(
        &self,
        now: Instant,
        excluded: impl Fn(&A) -> bool,
    ) -> Option<Chosen<A>> {
        let pause = |candidate: &&Candidate<A>| {
            let left = match self.set_aside.standing(&candidate.address, now) {
                Standing::Usable | Standing::ToProbe => Duration::ZERO,
                Standing::SetAside(until) => until.saturating_duration_since(now),
                Standing::BeingProbed => Duration::MAX,
            };
            (left, candidate.weight == 0)
        };
        let remaining = self.list.iter().filter(|candidate| !excluded(&candidate.address));
        let address = remaining.min_by_key(pause)?.address.clone();
        Some(Chosen { address, probe: false })
    }

    /// An address of an earlier list, when nothing else is left.
    pub(super) fn former(&self, excluded: impl Fn(&A) -> bool) -> Option<Chosen<A>> {
        let address = self.former.iter().find(|address| !excluded(address))?.clone();
        Some(Chosen { address, probe: false })
    }

    /// When the first pause ends; none if nothing is set aside.
    pub(super) fn first_end(&self, now: Instant) -> Option<Instant> {
        let standings =
            self.list.iter().map(|candidate| self.set_aside.standing(&candidate.address, now));
        let ends = standings.filter_map(|standing| match standing {
            Standing::SetAside(until) => Some(until),
            Standing::Usable | Standing::ToProbe | Standing::BeingProbed => None,
        });
        ends.min()
    }

    /// A chosen address was not tried after all.
    pub(super) fn release(&mut self, chosen: &Chosen<A>) {
        if chosen.probe {
            self.set_aside.release_probe(&chosen.address);
        }
    }

    pub(super) fn failed(&mut self, address: &A, now: Instant, random: u64) {
        self.set_aside.failed(address, now, random);
        self.turn = Turn::default();
        if self.stuck_to.as_ref() == Some(address) {
            self.stuck_to = None;
        }
    }

    pub(super) fn failed_for(&mut self, address: &A, now: Instant, pause: Duration) {
        self.set_aside.failed_for(address, now, pause);
    }

    pub(super) fn succeeded(&mut self, address: &A) {
        if self.set_aside.succeeded(address) {
            self.turn = Turn::default();
        }
        if self.sticky && self.stuck_to.is_none() {
            self.stuck_to = Some(address.clone());
        }
    }

    /// It answers, and another one may be of more use: in sticky mode it is not kept.
    pub(super) fn works(&mut self, address: &A) {
        self.set_aside.succeeded(address);
        if self.stuck_to.as_ref() == Some(address) {
            self.stuck_to = None;
        }
    }

    #[cfg(test)]
    pub(super) fn standing(&self, address: &A, now: Instant) -> Standing {
        self.set_aside.standing(address, now)
    }
}
