//! Users and groups: resolves names to ids with the name service of the machine.

use nix::unistd::{Group, User, geteuid};
use rustix::thread::CapabilitySet;

/// User or group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    User,
    Group,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Kind::User => "user",
            Kind::Group => "group",
        }
    }

    /// A command that looks up the name.
    pub(super) fn hint(self) -> &'static str {
        match self {
            Kind::User => " (see `getent passwd`)",
            Kind::Group => " (see `getent group`)",
        }
    }
}

/// The id of a name, or of a number given as text.
pub(super) fn find(text: &str, kind: Kind) -> Result<Option<u32>, nix::Error> {
    if let Ok(id) = text.parse::<u32>()
        && id != u32::MAX
    {
        return Ok(Some(id));
    }
    match kind {
        Kind::User => Ok(User::from_name(text)?.map(|user| user.uid.as_raw())),
        Kind::Group => Ok(Group::from_name(text)?.map(|group| group.gid.as_raw())),
    }
}

/// Whether this process has a capability.
pub(super) fn has(capability: CapabilitySet) -> bool {
    rustix::thread::capabilities(None).is_ok_and(|sets| sets.effective.contains(capability))
}

/// The users that may join by default.
pub(super) fn own_and_root() -> Vec<u32> {
    match geteuid().as_raw() {
        0 => vec![0],
        own => vec![own, 0],
    }
}
