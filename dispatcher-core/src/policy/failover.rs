//! The workers of the highest priority that is up get all connections; the others stand by.
//!
//! Owns which workers are up, and the highest priority among them. Within it, least connections
//! decide. A full worker is up: while the workers of the highest priority are full, clients wait
//! for them. A worker that comes back is used again at once.

use super::Available;

/// One worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Stand {
    priority: u16,
    up: bool,
    /// `Some` if it is eligible, apart from its priority.
    available: Option<Available>,
    open: bool,
}

#[derive(Debug, Default)]
pub(super) struct Failover {
    /// Runs parallel to the candidates.
    stands: Vec<Stand>,
    top: Option<u16>,
}

/// Which candidates need an update after a change.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Only the changed worker.
    One,
    /// All, because the highest priority has changed.
    All,
}

impl Failover {
    pub(super) fn add(&mut self, priority: u16) {
        self.stands.push(Stand { priority, ..Stand::default() });
    }

    pub(super) fn remove(&mut self, at: usize) -> Change {
        self.stands.swap_remove(at);
        self.update_top()
    }

    pub(super) fn set(
        &mut self,
        at: usize,
        up: bool,
        available: Option<Available>,
        open: bool,
    ) -> Change {
        let stand = &mut self.stands[at];
        let same = stand.up == up;
        (stand.up, stand.available, stand.open) = (up, available, open);
        if same { Change::One } else { self.update_top() }
    }

    fn update_top(&mut self) -> Change {
        let up = self.stands.iter().filter(|stand| stand.up);
        let top = up.map(|stand| stand.priority).max();
        let before = std::mem::replace(&mut self.top, top);
        if before == top { Change::One } else { Change::All }
    }

    /// The standing of the worker at `at` under this policy: whether the policy may choose it, and
    /// whether it may get a connection if there is no better worker.
    pub(super) fn standing(&self, at: usize) -> (Option<Available>, bool) {
        let stand = self.stands[at];
        match self.stands_by(at) {
            true => (None, false),
            false => (stand.available, stand.open),
        }
    }

    /// Whether the worker at `at` has a lower priority than the highest that is up.
    pub(super) fn stands_by(&self, at: usize) -> bool {
        self.top.is_some_and(|top| self.stands[at].priority < top)
    }
}
