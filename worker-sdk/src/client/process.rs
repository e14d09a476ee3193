//! The identity of this process, without a system call, because every connection checks it several
//! times.
//!
//! A number differs between a process and its forked children: it lives in memory that the kernel
//! wipes at every fork (`MADV_WIPEONFORK`). It does not survive an exec.
//!
//! A counter counts the forked children, which have copies of all open descriptors. The C library
//! counts (`pthread_atfork`), so a child of a raw `clone` system call is not noticed.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use dispatch_protocol::Mapping;

/// Equal if and only if taken in the same process. Not a pid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Process(u32);

/// Numbers given out so far. A forked child continues from its parent's value.
static GENERATIONS: AtomicU32 = AtomicU32::new(0);

static PAGE: OnceLock<Option<Mapping>> = OnceLock::new();

impl Process {
    pub(crate) fn current() -> Process {
        match PAGE.get_or_init(|| Mapping::wiped_on_fork().ok()) {
            Some(page) => Process(number(page.u32(0))),
            // A kernel before Linux 4.14, or no memory.
            None => Process(std::process::id()),
        }
    }

    pub(crate) fn is_current(self) -> bool {
        self == Process::current()
    }
}

/// Children forked so far, as counted by the C library.
static FORKS: AtomicU32 = AtomicU32::new(0);
static COUNTED: OnceLock<bool> = OnceLock::new();

extern "C" fn forking() {
    FORKS.fetch_add(1, Ordering::Relaxed);
}

/// The number of forked children at some moment; `None` without counting. Taken before a descriptor
/// is used and compared later, it tells whether a child may have a copy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Forks(Option<u32>);

impl Forks {
    pub(crate) fn now() -> Forks {
        let counted = *COUNTED.get_or_init(|| crate::sys::before_every_fork(forking));
        Forks(counted.then(|| FORKS.load(Ordering::Relaxed)))
    }

    /// Whether a child may have been forked since; true without counting.
    pub(crate) fn more_since(self) -> bool {
        self.0.is_none() || self != Forks::now()
    }
}

fn number(word: &AtomicU32) -> u32 {
    match word.load(Ordering::Relaxed) {
        0 => {
            let next = GENERATIONS.fetch_add(1, Ordering::Relaxed) + 1;
            // Threads may race; one number wins.
            match word.compare_exchange(0, next, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => next,
                Err(theirs) => theirs,
            }
        }
        number => number,
    }
}
