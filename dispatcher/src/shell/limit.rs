//! How often a kind of line may be logged: what a peer can cause again and again must not fill a disk.

use std::time::Duration;

use crate::pool::Time;

/// Lines of one kind in any one second.
const PER_SECOND: u32 = 20;

/// Counts the lines of one kind.
#[derive(Debug, Default)]
pub(super) struct Limit {
    window: Option<Time>,
    written: u32,
    left_out: u64,
    /// Since the start.
    total: u64,
}

impl Limit {
    /// Whether a line may be written now; if so, how many were left out before it.
    pub(super) fn allow(&mut self, now: Time) -> Option<u64> {
        if self.window.is_none_or(|start| now - start >= Duration::from_secs(1)) {
            self.window = Some(now);
            self.written = 0;
        }
        if self.written == PER_SECOND {
            self.left_out += 1;
            self.total += 1;
            return None;
        }
        self.written += 1;
        Some(std::mem::take(&mut self.left_out))
    }

    /// Lines left out since the start.
    pub(super) fn total(&self) -> u64 {
        self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_and_counted() {
        let mut limit = Limit::default();
        let start = Time(1_000);
        let written = (0..1_000).filter(|_| limit.allow(start).is_some()).count();
        assert_eq!(written, PER_SECOND as usize);
        let next = start + Duration::from_secs(1);
        assert_eq!(limit.allow(next), Some(1_000 - u64::from(PER_SECOND)));
        assert_eq!(limit.allow(next), Some(0));
        assert_eq!(limit.total(), 1_000 - u64::from(PER_SECOND));
    }
}
