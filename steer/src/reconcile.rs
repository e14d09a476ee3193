//! Compares the counts of the programs with the kernel's own list of sockets, and corrects them.
//!
//! Each socket that counts says so in its entry of `owners`. A list takes time, and sockets open
//! and close meanwhile. So the counts before and after it give a lower and an upper bound of the
//! error, which are equal on a quiet system. An error is corrected when two comparisons in a row
//! say that there is one, by the least amount that both allow: what counts right is never made
//! wrong.

use std::collections::HashSet;

use crate::error::Error;
use crate::layout::WorkerCounts;
use crate::sockets::{CONNECTED, LISTENING};
use crate::steering::Steering;

/// A count that was corrected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Correction {
    /// The worker.
    pub worker: u32,
    /// Which count.
    pub count: Count,
    /// What was added to it.
    pub change: i64,
}

/// A count that can be corrected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Count {
    /// [`WorkerCounts::live`].
    Live,
    /// [`WorkerCounts::listeners`] for IPv4.
    ListenersV4,
    /// [`WorkerCounts::listeners`] for IPv6.
    ListenersV6,
}

/// By how much a count is too high, at least and at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Excess {
    least: i64,
    most: i64,
}

/// What the last comparison found: counts that were certainly wrong.
#[derive(Debug, Default)]
pub(crate) struct Suspicions {
    live: Vec<(u32, Excess)>,
    listeners: Vec<(u32, [Excess; 2])>,
}

impl Excess {
    /// Of a count that was `before` and `after`, while it grew `grown` times, and for which `found`
    /// sockets were listed.
    ///
    /// A socket that was there all the time was listed, and one that was there at some time may
    /// have been. The count without its excess is the number of sockets.
    fn of(before: i64, after: i64, grown: i64, found: i64) -> Excess {
        let shrunk = grown.saturating_sub(after.saturating_sub(before)).max(0);
        let least = before.saturating_sub(shrunk).saturating_sub(found);
        let most = before.saturating_add(grown).saturating_sub(found);
        Excess { least, most }
    }

    fn and(self, other: Excess) -> Excess {
        Excess { least: self.least.max(other.least), most: self.most.min(other.most) }
    }

    /// The amount nearest to 0 that the bounds allow; 0 if they contradict each other.
    fn certain(self) -> i64 {
        if self.least > self.most { 0 } else { 0i64.clamp(self.least, self.most) }
    }
}

impl Steering {
    /// Compares listeners with the kernel's list, which is short, and corrects
    /// [`WorkerCounts::listeners`]. A difference is corrected when the next call finds it again.
    ///
    /// The programs see the end of a listener, except if it was adopted
    /// ([`Steering::adopt_listeners`]). A worker whose listener has ended is left out from the next
    /// SYN on, corrected or not.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] in another network namespace than the pool's, [`Error::System`] or
    /// [`Error::Refused`] if the kernel fails.
    pub fn verify_listeners(&mut self) -> Result<Vec<Correction>, Error> {
        let before = self.maps.live_counts.all();
        let mut found = vec![[0i64; 2]; before.len()];
        self.read_sockets(LISTENING, &mut |socket| {
            let of = socket.owner.and_then(|owner| found.get_mut(owner.worker as usize));
            if let Some(found) = of {
                found[usize::from(socket.is_v6)] += 1;
            }
        })?;
        let after = self.maps.live_counts.all();
        let mut suspicions = Vec::new();
        let mut corrected = Vec::new();
        for (worker, (before, after)) in (0..).zip(before.iter().zip(&after)) {
            let grown = i64::from(after.listens.wrapping_sub(before.listens));
            let excess = [0, 1].map(|family| {
                let of = |counts: &WorkerCounts| i64::from(counts.listeners[family]);
                Excess::of(of(before), of(after), grown, found[worker as usize][family])
            });
            if excess.iter().all(|excess| excess.certain() == 0) {
                continue;
            }
            let earlier = self.suspicions.listeners.iter().find(|(of, _)| *of == worker);
            let Some((_, earlier)) = earlier else {
                suspicions.push((worker, excess));
                continue;
            };
            for (family, count) in [Count::ListenersV4, Count::ListenersV6].into_iter().enumerate()
            {
                let change = -excess[family].and(earlier[family]).certain();
                if change != 0 {
                    self.maps.live_counts.change_listeners(worker, family == 1, change);
                    corrected.push(Correction { worker, count, change });
                } else if excess[family].certain() != 0 {
                    suspicions.push((worker, excess));
                }
            }
        }
        self.suspicions.listeners = suspicions;
        Ok(corrected)
    }

    /// Compares live connections and listeners with the kernel's list of sockets, and corrects
    /// them. A difference is corrected when the next call finds it again. Returns what was
    /// corrected: the programs count each socket in and out, so nothing is expected to be.
    ///
    /// It reads all connected TCP sockets of the network namespace: some microseconds for each.
    ///
    /// # Errors
    ///
    /// As [`Steering::verify_listeners`].
    pub fn reconcile(&mut self) -> Result<Vec<Correction>, Error> {
        let mut corrected = self.verify_listeners()?;
        let moves = self.moves()?;
        let before = self.maps.live_counts.all();
        let mut found = vec![0i64; before.len()];
        let mut uncounted = HashSet::new();
        self.read_sockets(CONNECTED, &mut |socket| {
            if self.is_waiting_uncounted(&socket) {
                uncounted.insert(socket.cookie);
            }
            let owner = socket.owner.filter(|owner| owner.is_counted);
            let worker = owner.map(|owner| self.present_worker(socket.cookie, owner.worker));
            if let Some(found) = worker.and_then(|worker| found.get_mut(worker as usize)) {
                *found += 1;
            }
        })?;
        let after = self.maps.live_counts.all();
        self.keep_uncounted(&uncounted)?;
        if self.moves()? != moves {
            // Counts went from worker to worker meanwhile: the bounds do not hold.
            self.suspicions.live.clear();
            return Ok(corrected);
        }
        let mut suspicions = Vec::new();
        for (worker, (before, after)) in (0..).zip(before.iter().zip(&after)) {
            let grown = i64::try_from(after.total.wrapping_sub(before.total)).unwrap_or(i64::MAX);
            let excess = Excess::of(before.live, after.live, grown, found[worker as usize]);
            if excess.certain() == 0 {
                continue;
            }
            let earlier = self.suspicions.live.iter().find(|(of, _)| *of == worker);
            let Some((_, earlier)) = earlier else {
                suspicions.push((worker, excess));
                continue;
            };
            let change = -excess.and(*earlier).certain();
            if change != 0 {
                self.maps.live_counts.change_live(worker, change);
                corrected.push(Correction { worker, count: Count::Live, change });
            } else {
                suspicions.push((worker, excess));
            }
        }
        self.suspicions.live = suspicions;
        Ok(corrected)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quiet_count_is_compared_exactly() {
        assert_eq!(Excess::of(5, 5, 0, 5).certain(), 0);
        assert_eq!(Excess::of(7, 7, 0, 5), Excess { least: 2, most: 2 });
        assert_eq!(Excess::of(-1, -1, 0, 5).certain(), -6);
        assert_eq!(Excess::of(i64::MAX, i64::MIN, 0, 5).certain(), 0, "no overflow");
    }

    #[test]
    fn what_changes_meanwhile_is_no_error() {
        // Of 10 sockets 3 ended and 4 came: 7 to 14 may be listed.
        for found in 7..=14 {
            assert_eq!(Excess::of(10, 11, 4, found).certain(), 0, "{found}");
        }
        assert_eq!(Excess::of(10, 11, 4, 6).certain(), 1);
        assert_eq!(Excess::of(10, 11, 4, 15).certain(), -1);
        // Two comparisons together.
        let (one, two) = (Excess { least: 1, most: 8 }, Excess { least: 3, most: 5 });
        assert_eq!(one.and(two).certain(), 3);
        assert_eq!(one.and(Excess { least: -4, most: -1 }).certain(), 0, "a contradiction");
    }
}
