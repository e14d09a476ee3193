//! The highest priority that is up takes all; the others stand by.
//!
//! Owns who is up, and which priority is the highest of them. Within it, least connections decide. Full is not down:
//! while the workers of the highest priority are full, clients wait for them. Who comes back is used again at once.

use super::Available;

/// One worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Stand {
    priority: u16,
    up: bool,
    /// `Some` if it could be chosen were it not for the others.
    available: Option<Available>,
    open: bool,
}

#[derive(Debug, Default)]
pub(super) struct Failover {
    /// Runs parallel to the candidates.
    stands: Vec<Stand>,
    top: Option<u16>,
}

/// What has to be done to the table after a change.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Nothing but for the worker itself.
    One,
    /// Another priority is the highest now: look at all again.
    All,
}

impl Failover {
    pub(super) fn add(&mut self, priority: u16) {
        self.stands.push(Stand { priority, ..Stand::default() });
    }

    pub(super) fn remove(&mut self, at: usize) -> Change {
        self.stands.swap_remove(at);
        self.look()
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
        if same { Change::One } else { self.look() }
    }

    fn look(&mut self) -> Change {
        let up = self.stands.iter().filter(|stand| stand.up);
        let top = up.map(|stand| stand.priority).max();
        let before = std::mem::replace(&mut self.top, top);
        if before == top { Change::One } else { Change::All }
    }

    /// How the policy may choose the worker at `at`, if at all, and whether it may have a connection if there is no
    /// better one.
    pub(super) fn standing(&self, at: usize) -> (Option<Available>, bool) {
        let stand = self.stands[at];
        match self.stands_by(at) {
            true => (None, false),
            false => (stand.available, stand.open),
        }
    }

    /// Whether a worker of a higher priority takes its connections.
    pub(super) fn stands_by(&self, at: usize) -> bool {
        self.top.is_some_and(|top| self.stands[at].priority < top)
    }
}
