//! The listeners that a process inherits, as from a service manager.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

use crate::sys::FIRST_INHERITED;

/// The listeners that a process inherits, with their names for `LISTEN_FDNAMES`. The process has
/// them as descriptors 3, 4 and so on, in this order.
///
/// A copy has the same descriptors; they are closed with the last copy.
#[derive(Clone, Debug, Default)]
pub struct Listeners(Arc<[(String, OwnedFd)]>);

impl Listeners {
    /// These listeners. A character that a name cannot have there becomes `_`.
    pub fn new(listeners: impl IntoIterator<Item = (String, OwnedFd)>) -> Listeners {
        let allowed = |character: char| {
            (character.is_ascii_graphic() || character == ' ') && character != ':'
        };
        let name = |name: String| name.replace(|character| !allowed(character), "_");
        Listeners(listeners.into_iter().map(|(text, fd)| (name(text), fd)).collect())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The number that the first one has in the process, for `{fd}`.
    pub(super) fn first(&self) -> Option<RawFd> {
        (!self.is_empty()).then_some(FIRST_INHERITED)
    }

    /// `LISTEN_FDNAMES`.
    pub(super) fn names(&self) -> String {
        let names: Vec<&str> = self.0.iter().map(|(name, _)| name.as_str()).collect();
        names.join(":")
    }

    pub(super) fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        self.0.iter().map(|(_, fd)| fd.as_fd()).collect()
    }
}

/// The same descriptors with the same names: two that are open have different numbers.
impl PartialEq for Listeners {
    fn eq(&self, other: &Listeners) -> bool {
        let key = |(name, fd): &(String, OwnedFd)| (name.clone(), fd.as_raw_fd());
        self.0.iter().map(key).eq(other.0.iter().map(key))
    }
}

impl Eq for Listeners {}
