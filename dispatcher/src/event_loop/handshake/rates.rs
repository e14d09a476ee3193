//! Rate limits by user: for each user the time when its bucket is full again. Like the rates of a
//! listener in the core's access rules.

use std::collections::HashMap;
use std::time::Duration;

use dispatcher_core::Time;

/// Most users with a bucket of their own; further users share one bucket.
const MOST: usize = 4_096;

/// The shared bucket.
const SHARED: u32 = u32::MAX;

/// One bucket.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::event_loop) struct Bucket {
    full: Time,
}

impl Bucket {
    /// Takes a token, if there is one; otherwise returns when there will be one.
    pub(in crate::event_loop) fn take(
        &mut self,
        now: Time,
        per_second: u32,
        burst: u32,
    ) -> Result<(), Time> {
        let every = Duration::from_secs(1) / per_second.max(1);
        let full = self.full.max(now) + every;
        let most = every * burst.max(1);
        if full - now > most {
            return Err(now + ((full - now) - most));
        }
        self.full = full;
        Ok(())
    }
}

/// The buckets of all users.
#[derive(Debug, Default)]
pub(in crate::event_loop) struct Rates {
    users: HashMap<u32, Bucket>,
}

impl Rates {
    pub(in crate::event_loop) fn take(
        &mut self,
        now: Time,
        uid: u32,
        per_second: u32,
        burst: u32,
    ) -> bool {
        let key = if self.users.contains_key(&uid) || self.users.len() < MOST {
            uid
        } else {
            // A full bucket needs no memory.
            self.users.retain(|_, bucket| bucket.full > now);
            if self.users.len() < MOST { uid } else { SHARED }
        };
        self.users.entry(key).or_default().take(now, per_second, burst).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_user_has_a_burst_and_a_rate() {
        let mut rates = Rates::default();
        let start = Time(1_000_000_000_000);
        let taken = |rates: &mut Rates, uid, now| {
            (0..1_000).filter(|_| rates.take(now, uid, 10, 100)).count()
        };
        assert_eq!(taken(&mut rates, 1, start), 100);
        assert_eq!(taken(&mut rates, 2, start), 100, "another user's are its own");
        assert_eq!(taken(&mut rates, 1, start + Duration::from_secs(3)), 30);
        assert_eq!(taken(&mut rates, 1, start + Duration::from_secs(3_600)), 100);
    }

    #[test]
    fn a_bucket_says_when_to_come_again() {
        let mut bucket = Bucket::default();
        let now = Time(1_000_000_000_000);
        assert_eq!(bucket.take(now, 10, 1), Ok(()));
        let Err(again) = bucket.take(now, 10, 1) else { panic!("it is empty") };
        assert_eq!(again, now + Duration::from_millis(100));
        assert_eq!(bucket.take(again, 10, 1), Ok(()));
    }

    #[test]
    fn many_users_need_bounded_memory() {
        let mut rates = Rates::default();
        let now = Time(1_000_000_000_000);
        for uid in 0..100_000 {
            rates.take(now, uid, 1, 1);
        }
        assert!(rates.users.len() <= MOST + 1);
        assert!(!rates.take(now, 99_999, 1, 1), "the shared one is empty");
        assert!(rates.take(now + Duration::from_secs(5), 99_999, 1, 1));
    }
}
