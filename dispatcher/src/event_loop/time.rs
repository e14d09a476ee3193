//! The clock of all deadlines, and the clock of the workers' time stamps.

use rustix::time::ClockId;

use dispatcher_core::Time;

/// Now, in nanoseconds of `CLOCK_MONOTONIC`.
pub(super) fn clock() -> Time {
    Time(nanoseconds(ClockId::Monotonic))
}

/// Now, in nanoseconds of `CLOCK_REALTIME`.
pub(super) fn realtime() -> u64 {
    nanoseconds(ClockId::Realtime)
}

fn nanoseconds(clock: ClockId) -> u64 {
    let now = rustix::time::clock_gettime(clock);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// Converts the times that workers write to the loop's clock. Workers use `CLOCK_REALTIME`, because
/// no time namespace shifts it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stamps {
    pub(super) ours: Time,
    pub(super) realtime: u64,
}

impl Stamps {
    pub(super) fn now() -> Stamps {
        Stamps { ours: clock(), realtime: realtime() }
    }

    /// The time of a stamp; now, if the stamp is in the future because a clock was set back.
    pub(super) fn past(&self, realtime: u64) -> Time {
        self.time(realtime).min(self.ours)
    }

    /// The time of a stamp; now, if the worker wrote none. A future time stays one, so that the
    /// core can clamp and count it.
    pub(super) fn time(&self, realtime: u64) -> Time {
        match realtime {
            0 => self.ours,
            past if past <= self.realtime => Time(self.ours.0.saturating_sub(self.realtime - past)),
            ahead => Time(self.ours.0.saturating_add(ahead - self.realtime)),
        }
    }
}
