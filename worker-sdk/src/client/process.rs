//! Which process this is, without a system call: every connection asks several times.
//!
//! Owns one number that differs between a process and the children forked off it: it lives in memory that the kernel
//! wipes at a fork (`MADV_WIPEONFORK`), so no way of forking escapes it. It says nothing across an exec, and need not.
//!
//! And a count of the children forked off this process: each has a copy of every descriptor that was open then. The C
//! library counts (`pthread_atfork`), so a child made by a raw `clone` system call is not seen.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use dispatch_protocol::Mapping;

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

/// Children forked off this process so far, as the C library knows; `None` if it cannot count them.
static FORKS: AtomicU32 = AtomicU32::new(0);
static COUNTED: OnceLock<bool> = OnceLock::new();

extern "C" fn forking() {
    FORKS.fetch_add(1, Ordering::Relaxed);
}

/// How many children this process had forked at some moment. Taken before a descriptor is used, and compared later, it says
/// whether a child may have a copy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Forks(Option<u32>);

impl Forks {
    pub(crate) fn now() -> Forks {
        let counted = *COUNTED.get_or_init(|| crate::sys::before_every_fork(forking));
        Forks(counted.then(|| FORKS.load(Ordering::Relaxed)))
    }

    /// Whether a child may have been forked since. Where nobody counts, one may have.
    pub(crate) fn more_since(self) -> bool {
        self.0.is_none() || self != Forks::now()
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
