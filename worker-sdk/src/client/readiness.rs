//! One file descriptor that is readable while a non-blocking worker has work.
//!
//! The descriptor is an epoll instance, so mio and tokio register it once, although the worker
//! waits for different descriptors: a timer, the answer to a hello, the channel. All members are
//! level-triggered. An outer edge-triggered poller gets an edge when a ready member is added, and a
//! caller works until nothing is left, so no member stays ready.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, epoll, eventfd, poll};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use super::clock::bounded;
use super::log_queue::{LogQueue, RateLimited};

pub(super) struct Readiness {
    epoll: OwnedFd,
    timer: OwnedFd,
    closed: OwnedFd,
    /// Used under the core's lock.
    log_queue: Arc<LogQueue>,
}

impl Readiness {
    pub(super) fn new(log_queue: Arc<LogQueue>) -> io::Result<Readiness> {
        let ready = Readiness {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            timer: timerfd_create(
                TimerfdClockId::Monotonic,
                TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
            )?,
            closed: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            log_queue,
        };
        ready.watch(ready.timer.as_fd())?;
        ready.watch(ready.closed.as_fd())?;
        Ok(ready)
    }

    pub(super) fn watch(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        // The worker does not ask which member is ready, so all have the same data.
        let data = epoll::EventData::new_u64(0);
        epoll::add(&self.epoll, fd, data, epoll::EventFlags::IN)?;
        Ok(())
    }

    /// Call it before the close: another process (the dispatcher, a forked child) may have a
    /// duplicate, and then the closed descriptor would stay in the set and be ready for ever.
    pub(super) fn forget(&self, fd: BorrowedFd<'_>) {
        if let Err(error) = epoll::delete(&self.epoll, fd) {
            self.log_queue.push_limited(RateLimited::Waiting, log::Level::Error, || {
                format!("cannot stop watching a file descriptor: {error}")
            });
        }
    }

    /// Ready after `delay`; replaces an earlier delay.
    pub(super) fn arm(&self, delay: Duration) {
        // A zero value would disarm the timer.
        self.set_timer(bounded(delay).max(Duration::from_nanos(1)));
    }

    /// Also clears an expiry that has not been handled.
    pub(super) fn disarm(&self) {
        self.set_timer(Duration::ZERO);
    }

    fn set_timer(&self, delay: Duration) {
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let value = Timespec {
            tv_sec: i64::try_from(delay.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: delay.subsec_nanos().into(),
        };
        let spec = Itimerspec { it_interval: zero, it_value: value };
        if let Err(error) = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &spec) {
            let line = || format!("cannot set a timer: {error}");
            self.log_queue.push_limited(RateLimited::Waiting, log::Level::Error, line);
        }
    }

    /// Ready from now on, with one more edge for edge-triggered pollers.
    pub(super) fn close(&self) {
        // It fails only if it is ready already.
        let _ = rustix::io::write(&self.closed, &1u64.to_ne_bytes());
    }

    /// Blocks until ready, until a signal handler has run, or until `until`.
    pub(super) fn wait(&self, until: Option<Instant>) -> io::Result<()> {
        wait_readable(self.epoll.as_fd(), until).map(drop)
    }
}

impl AsFd for Readiness {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

/// Blocks until `fd` is readable (true), until a signal handler has run, or until `until`.
pub(super) fn wait_readable(fd: BorrowedFd<'_>, until: Option<Instant>) -> io::Result<bool> {
    let left = until.map(|until| bounded(until.saturating_duration_since(Instant::now())));
    let timeout = left.and_then(|left| Timespec::try_from(left).ok());
    match poll(&mut [PollFd::new(&fd, PollFlags::IN)], timeout.as_ref()) {
        Ok(ready) => Ok(ready > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}
