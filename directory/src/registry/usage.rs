//! What each user has taken of the registry, so that none can take what others need.

use std::collections::HashMap;

/// Of one user: what its members have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Usage {
    pub(super) members: usize,
    pub(super) ids: usize,
    /// Ended registrations whose grace runs.
    pub(super) graces: usize,
    /// Groups that exist because of it.
    pub(super) groups: usize,
    /// Memberships, and groups that its members send to.
    pub(super) memberships: usize,
    pub(super) watches: usize,
    /// Look-ups that wait.
    pub(super) lookups: usize,
    /// Links that its members have asked for.
    pub(super) links: usize,
}

/// All users of this host. What members of other hosts take is not counted here: their directories
/// do that.
#[derive(Debug, Default)]
pub(super) struct Users(HashMap<u32, Usage>);

impl Users {
    /// What the user has; nothing for `None`, a member of another host.
    pub(super) fn of(&self, user: Option<u32>) -> Usage {
        user.and_then(|user| self.0.get(&user)).copied().unwrap_or_default()
    }

    /// Changes what the user has. A user that has nothing any more takes no memory.
    pub(super) fn change(&mut self, user: Option<u32>, change: impl FnOnce(&mut Usage)) {
        let Some(user) = user else { return };
        let usage = self.0.entry(user).or_default();
        change(usage);
        if *usage == Usage::default() {
            self.0.remove(&user);
        }
    }

    /// The sum of one number over all users.
    pub(super) fn sum(&self, of: impl Fn(&Usage) -> usize) -> usize {
        self.0.values().map(of).sum()
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
