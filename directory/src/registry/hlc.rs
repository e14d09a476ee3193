//! A hybrid logical clock: stamps that follow the wall clock, never repeat and never go back.
//!
//! A stamp is milliseconds since 1970 (48 bits) and a counter (16 bits). Two hosts that exchange
//! stamps order what happened on one because of the other; the host decides between equal stamps.
//! Only stamps of other directories' clocks move this one. Those that members bring do not: they
//! order the registrations of their id, and nothing else.

/// Bits of the counter.
const COUNTER: u32 = 16;

/// The clock of one directory.
#[derive(Debug, Default)]
pub(crate) struct Hlc {
    last: u64,
}

impl Hlc {
    /// A stamp that is later than all that this clock has made or seen. `wall` in milliseconds.
    pub(crate) fn stamp(&mut self, wall: u64) -> u64 {
        self.last = self.last.saturating_add(1).max(wall << COUNTER);
        self.last
    }

    /// The last stamp.
    pub(crate) fn last(&self) -> u64 {
        self.last
    }

    /// Whether a stamp is at most `drift` milliseconds ahead of `wall`.
    pub(crate) fn is_near(stamp: u64, wall: u64, drift: u64) -> bool {
        stamp >> COUNTER <= wall.saturating_add(drift)
    }

    /// Takes another clock's stamp into account; false if it is more than `drift` milliseconds
    /// ahead of `wall`, and then it is ignored: it would make every later stamp as wrong.
    pub(crate) fn observe(&mut self, stamp: u64, wall: u64, drift: u64) -> bool {
        let near = Hlc::is_near(stamp, wall, drift);
        if near {
            self.last = self.last.max(stamp);
        }
        near
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_grow_whatever_the_wall_clock_does() {
        let (mut a, mut b) = (Hlc::default(), Hlc::default());
        let mut last = 0;
        for wall in [1000, 1000, 5, 0, 1001, 900] {
            let stamp = a.stamp(wall);
            assert!(stamp > last, "{wall}");
            last = stamp;
        }
        assert!(b.observe(last, 990, 50), "11 ms ahead");
        assert!(b.stamp(10) > last);
        assert!(!b.observe(2000 << COUNTER, 1000, 50));
        assert!(b.stamp(1000) < 1999 << COUNTER);
    }
}
