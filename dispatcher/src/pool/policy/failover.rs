//! The highest priority that is up takes all; the others stand by.
//!
//! Owns who is up, and which priority is the highest of them. Within it, least connections decide. Full is not down:
//! while the workers of the highest priority are full, clients wait for them. Who comes back is used again at once.

/// One worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Stand {
    priority: u16,
    up: bool,
    /// Load and weight, if it could be chosen were it not for the others.
    available: Option<(u64, u32)>,
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

    pub(super) fn set(&mut self, at: usize, up: bool, available: Option<(u64, u32)>) -> Change {
        let stand = &mut self.stands[at];
        let same = stand.up == up;
        (stand.up, stand.available) = (up, available);
        if same { Change::One } else { self.look() }
    }

    fn look(&mut self) -> Change {
        let up = self.stands.iter().filter(|stand| stand.up);
        let top = up.map(|stand| stand.priority).max();
        let before = std::mem::replace(&mut self.top, top);
        if before == top { Change::One } else { Change::All }
    }

    /// Load and weight of the worker at `at`, if it may be chosen.
    pub(super) fn available(&self, at: usize) -> Option<(u64, u32)> {
        let stand = self.stands[at];
        stand.available.filter(|_| !self.stands_by(at))
    }

    /// Whether somebody of a higher priority takes its connections.
    pub(super) fn stands_by(&self, at: usize) -> bool {
        self.top.is_some_and(|top| self.stands[at].priority < top)
    }
}
