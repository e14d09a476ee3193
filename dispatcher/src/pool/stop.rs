//! The end of the core: when it begins, and when nothing is left to do.

use super::Core;
use super::types::Time;

/// A stop under way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stop {
    pub(super) deadline: Time,
    /// The deadline has passed: nothing is held any more, whatever the reason.
    pub(super) over: bool,
}

impl Core {
    /// Stop: accept nothing new, empty custody until `deadline` (said again, the earlier one counts); then place what is held wherever a slot is free, and close the rest.
    pub fn stop(&mut self, now: Time, deadline: Time) {
        if let Some(stop) = &mut self.stop {
            // Somebody has lost patience.
            stop.deadline = stop.deadline.min(deadline);
            return;
        }
        self.stop = Some(Stop { deadline, over: false });
        for pool in 0..self.pools.len() {
            self.pools[pool].processes.stop();
        }
        self.after_all(now);
    }

    /// Whether a stop is complete: nothing held, nothing in custody, or the deadline has passed.
    pub fn stopped(&self) -> bool {
        self.stop.is_some_and(|stop| stop.over || self.totals.held + self.totals.custody == 0)
    }
}
