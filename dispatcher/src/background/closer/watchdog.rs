//! The watchdog: interrupts threads that make no progress, and assigns their work to other threads.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::thread::Pid;

use super::{Shared, State, lanes};
use crate::background::restart;
use crate::sys;

/// The interval between checks. A call that lasts from one check to the next is interrupted.
pub(super) const TICK: Duration = Duration::from_millis(20);

/// After so many checks without activity the watchdog sleeps.
const QUIET: u32 = 50;

/// After so many checks without progress, in spite of interruptions, a thread counts as blocked.
pub(super) const HELD_UP: u32 = 50;

/// A thread, as the watchdog sees it.
#[derive(Debug)]
pub(super) struct Member {
    tid: Pid,
    /// Odd while the thread is in a call that may block; every change is progress.
    steps: AtomicU64,
    /// For the watchdog alone: the value it saw last, and how often in a row.
    seen: AtomicU64,
    looks: AtomicU64,
}

impl Member {
    /// The calling thread.
    pub(super) fn here() -> Member {
        Member {
            tid: rustix::thread::gettid(),
            steps: AtomicU64::new(0),
            seen: AtomicU64::new(0),
            looks: AtomicU64::new(0),
        }
    }

    pub(super) fn begin(&self) {
        self.steps.store(self.steps.load(Ordering::Relaxed) | 1, Ordering::Relaxed);
    }

    /// Ends one call that may block and begins the next.
    pub(super) fn next(&self) {
        self.steps.store((self.steps.load(Ordering::Relaxed) | 1) + 2, Ordering::Relaxed);
    }

    pub(super) fn end(&self) {
        self.steps.store((self.steps.load(Ordering::Relaxed) | 1) + 1, Ordering::Relaxed);
    }

    pub(super) fn is_busy(&self) -> bool {
        self.steps.load(Ordering::Relaxed) % 2 == 1
    }

    /// The number of checks in a row that found the thread in the same call.
    pub(super) fn looks(&self) -> u32 {
        self.looks.load(Ordering::Relaxed) as u32
    }

    /// Interrupts the thread if it is in the same call as at the last check. True if so.
    fn check(&self) -> bool {
        let steps = self.steps.load(Ordering::Relaxed);
        let same = steps % 2 == 1 && self.seen.swap(steps, Ordering::Relaxed) == steps;
        let looks = if same { self.looks.load(Ordering::Relaxed) + 1 } else { 0 };
        self.looks.store(looks.min(u64::from(u32::MAX)), Ordering::Relaxed);
        if same {
            sys::interrupt(self.tid);
        }
        same
    }
}

/// The watchdog's thread.
pub(super) fn run(shared: &Arc<Shared>) {
    restart::thread("watchdog", || {
        look_until_over(shared);
        Ok(())
    });
}

fn look_until_over(shared: &Arc<Shared>) {
    let mut quiet = 0;
    loop {
        let mut state = shared.lock();
        while !state.watching && !state.over {
            state = shared.watch.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        if state.over && state.members.iter().all(|member| !member.is_busy()) {
            return;
        }
        let mut stuck = 0;
        for member in &state.members {
            stuck += u64::from(member.check());
        }
        shared.interrupted.fetch_add(stuck, Ordering::Relaxed);
        // The second check in a row finds the first closer in a call, and there is work: the second
        // closer takes it.
        if stuck > 0 && state.has_work() {
            state.called = true;
        }
        lanes::look_after_slow(shared, &mut state);
        if state.called {
            shared.second.notify_one();
        }
        let active = !state.asleep
            || state.slow.has_work()
            || state.members.iter().any(|member| member.is_busy());
        quiet = if active { 0 } else { quiet + 1 };
        if quiet > QUIET {
            quiet = 0;
            state.watching = false;
            continue;
        }
        tick(shared, state);
    }
}

fn tick(shared: &Shared, state: std::sync::MutexGuard<'_, State>) {
    if state.over {
        drop(state);
        std::thread::sleep(TICK);
    } else {
        drop(shared.watch.wait_timeout(state, TICK));
    }
}
