//! A timer that ends a sleep and stays set.
//!
//! The kernel sets the timeout of a wait at its beginning and removes it at its end. In a virtual
//! machine each can cost microseconds, and the removal delays the client on its way to a worker.
//! This timer is only ever set to an earlier time; when it goes off without need, it costs one turn
//! at a time without load.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Interest, Registry};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use super::token::Source;
use dispatcher_core::Time;

#[derive(Debug)]
pub(super) struct Timer {
    /// In the poll, edge-triggered, and never read: setting it again resets its count.
    fd: OwnedFd,
    /// When the timer goes off, unless that time is past.
    at: Time,
}

impl Timer {
    pub(super) fn new(registry: &Registry) -> io::Result<Timer> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let fd = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        let token = Source::Timer.token();
        registry.register(&mut SourceFd(&fd.as_raw_fd()), token, Interest::READABLE)?;
        Ok(Timer { fd, at: Time(0) })
    }

    /// Makes sure that an event comes at `time` or before.
    pub(super) fn set(&mut self, now: Time, time: Time) -> io::Result<()> {
        if now < self.at && self.at <= time {
            return Ok(());
        }
        let since_boot = Duration::from_nanos(time.0);
        let it_value = Timespec {
            tv_sec: i64::try_from(since_boot.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: since_boot.subsec_nanos().into(),
        };
        let it_interval = Timespec { tv_sec: 0, tv_nsec: 0 };
        let value = Itimerspec { it_interval, it_value };
        timerfd_settime(&self.fd, TimerfdTimerFlags::ABSTIME, &value)?;
        self.at = time;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use mio::{Events, Poll};

    use super::*;
    use crate::event_loop::clock;

    fn went_off(poll: &mut Poll, within: Duration) -> bool {
        let mut events = Events::with_capacity(4);
        poll.poll(&mut events, Some(within)).unwrap();
        events.iter().any(|event| Source::of(event.token()) == Some(Source::Timer))
    }

    #[test]
    fn the_timer_goes_off_once_at_the_earliest_set_time() {
        let mut poll = Poll::new().unwrap();
        let mut timer = Timer::new(poll.registry()).unwrap();
        let now = clock();
        let hour = Duration::from_secs(3600);
        timer.set(now, now + hour).unwrap();
        assert!(!went_off(&mut poll, Duration::ZERO));
        // An earlier time replaces the setting, a later time does not.
        timer.set(now, now + Duration::from_millis(1)).unwrap();
        timer.set(now, now + hour).unwrap();
        assert!(went_off(&mut poll, Duration::from_secs(60)));
        let later = clock();
        assert!(now + Duration::from_millis(1) <= later);
        assert!(!went_off(&mut poll, Duration::ZERO), "one time, one event");
        // The set time is past, so a later time is set; a time in the past goes off at once.
        timer.set(later, later + hour).unwrap();
        assert!(!went_off(&mut poll, Duration::ZERO));
        timer.set(later, now).unwrap();
        assert!(went_off(&mut poll, Duration::from_secs(60)));
    }
}
