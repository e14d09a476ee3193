//! Times computed from settings. No duration overflows.

use std::time::{Duration, Instant};

/// Longer than any process runs, and within the range of every clock.
const FAR: Duration = Duration::from_secs(100 * 366 * 24 * 3600);

/// The time after `delay`, at most a hundred years from now.
pub(super) fn after(delay: Duration) -> Instant {
    Instant::now() + delay.min(FAR)
}

/// A timeout within the range of the kernel's timers.
pub(super) fn bounded(delay: Duration) -> Duration {
    delay.min(FAR)
}

/// A duration for people, to the millisecond.
pub(super) fn shown(time: Duration) -> String {
    let whole = Duration::from_millis(bounded(time).as_millis() as u64);
    humantime::format_duration(whole.max(Duration::from_millis(1))).to_string()
}

#[test]
fn every_duration_has_a_moment() {
    for delay in
        [Duration::ZERO, Duration::from_secs(1), Duration::from_secs(1 << 62), Duration::MAX]
    {
        assert!(after(delay) >= Instant::now() - Duration::from_secs(1));
        assert!(bounded(delay) <= FAR);
        assert!(shown(delay).len() < 60);
    }
}
