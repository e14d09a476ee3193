//! Users and groups: names to numbers, by whatever the machine uses to know them.

use nix::unistd::{Group, User, geteuid};

/// Which of the two.
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

    /// How to look for the name oneself.
    pub(super) fn hint(self) -> &'static str {
        match self {
            Kind::User => " (see `getent passwd`)",
            Kind::Group => " (see `getent group`)",
        }
    }
}

/// The id of a name, or of a number written as text.
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

/// Who may join when nothing is configured.
pub(super) fn own_and_root() -> Vec<u32> {
    match geteuid().as_raw() {
        0 => vec![0],
        own => vec![own, 0],
    }
}
