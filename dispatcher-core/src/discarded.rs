//! What is no longer needed and takes long to drop: tables of clients and decisions, which may be hundreds of megabytes.
//!
//! Changes of the configuration put it here instead of dropping it; the event loop drops it on another thread.

use std::collections::VecDeque;
use std::sync::Arc;

use super::Core;
use super::access_control::AccessControl;
use super::affinity::Memory;
use super::history::Decision;

/// Something that is only there to be dropped.
#[derive(Debug)]
pub struct Discarded {
    _kept: Kept,
}

#[derive(Debug)]
#[expect(dead_code, reason = "only to be dropped")]
pub(super) enum Kept {
    AccessControl(Box<AccessControl>),
    Memory(Memory),
    Decisions(VecDeque<Arc<Decision>>),
}

impl Core {
    pub(super) fn discard(&mut self, kept: Kept) {
        if matches!(&kept, Kept::Decisions(decisions) if decisions.is_empty()) {
            return;
        }
        self.discarded.push(Discarded { _kept: kept });
    }

    /// What has been put aside since the last time; `None` if nothing.
    pub fn discarded(&mut self) -> Option<Vec<Discarded>> {
        (!self.discarded.is_empty()).then(|| std::mem::take(&mut self.discarded))
    }
}
