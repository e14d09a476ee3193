//! Which process this is, without a system call: every connection asks several times.
//!
//! Owns one number that differs between a process and the children forked off it: it lives in memory that the kernel
//! wipes at a fork (`MADV_WIPEONFORK`), so no way of forking escapes it. It says nothing across an exec, and need not.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::sys::Mapping;

/// Equal iff taken in the same process. Not a pid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Process(u32);

/// How many generations of processes have asked. Copied at a fork, so that a child counts on from its parent.
static GENERATIONS: AtomicU32 = AtomicU32::new(0);

static PAGE: OnceLock<Option<Mapping>> = OnceLock::new();

impl Process {
    pub(crate) fn current() -> Process {
        match PAGE.get_or_init(|| Mapping::wiped_on_fork().ok()) {
            Some(page) => Process(number(page.u32(0))),
            // Before Linux 4.14, or no memory at all.
            None => Process(std::process::id()),
        }
    }

    pub(crate) fn is_current(self) -> bool {
        self == Process::current()
    }
}

fn number(word: &AtomicU32) -> u32 {
    match word.load(Ordering::Relaxed) {
        0 => {
            let next = GENERATIONS.fetch_add(1, Ordering::Relaxed) + 1;
            // Threads may race to be the first: one number wins.
            match word.compare_exchange(0, next, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => next,
                Err(theirs) => theirs,
            }
        }
        number => number,
    }
}
