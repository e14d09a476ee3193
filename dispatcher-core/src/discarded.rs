//! Values that take long to drop: tables of clients and decisions, which may have hundreds of
//! megabytes.
//!
//! Changes of the configuration move them here instead of dropping them; the event loop passes them
//! to another thread, which drops them.

use std::collections::VecDeque;
use std::sync::Arc;

use super::Core;
use super::access_control::AccessControl;
use super::affinity::Memory;
use super::history::Decision;
use super::proxy::ProxyControl;

/// A value to be dropped outside the hot thread.
#[derive(Debug)]
pub struct Discarded {
    _contents: Contents,
}

#[derive(Debug)]
#[expect(dead_code, reason = "only to be dropped")]
pub(super) enum Contents {
    AccessControl(Box<AccessControl>),
    ProxyControl(Box<ProxyControl>),
    Memory(Memory),
    Decisions(VecDeque<Arc<Decision>>),
}

impl Core {
    pub(super) fn discard(&mut self, contents: Contents) {
        if matches!(&contents, Contents::Decisions(decisions) if decisions.is_empty()) {
            return;
        }
        self.discarded.push(Discarded { _contents: contents });
    }

    /// The values discarded since the last call; `None` if there are none.
    pub fn discarded(&mut self) -> Option<Vec<Discarded>> {
        (!self.discarded.is_empty()).then(|| std::mem::take(&mut self.discarded))
    }
}
