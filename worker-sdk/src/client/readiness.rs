//! One file descriptor that is readable whenever a non-blocking worker has something to do.
//!
//! An epoll instance, so that mio and tokio register one descriptor once although what the worker waits
//! for changes: a timer, the answer to a hello, the channel. Everything inside is level-triggered: an
//! outer edge-triggered poller gets an edge when something is added that is ready already, and whoever
//! acts on readiness acts until nothing is left, so nothing stays ready and spins.

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
    /// It is called under the core's lock.
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
        // Nobody looks at which member is ready, so they all carry the same data.
        let data = epoll::EventData::new_u64(0);
        epoll::add(&self.epoll, fd, data, epoll::EventFlags::IN)?;
        Ok(())
    }

    /// Must come before the descriptor is closed: somebody else (the dispatcher, a forked child) may
    /// hold a duplicate, and then closing ours would leave it in the set, ready for ever.
    pub(super) fn forget(&self, fd: BorrowedFd<'_>) {
        if let Err(error) = epoll::delete(&self.epoll, fd) {
            self.log_queue.push_limited(RateLimited::Waiting, log::Level::Error, || {
                format!("cannot stop watching a file descriptor: {error}")
            });
        }
    }

    /// Ready after `delay`, in place of what was set before.
    pub(super) fn arm(&self, delay: Duration) {
        // Zero would disarm.
        self.set_timer(bounded(delay).max(Duration::from_nanos(1)));
    }

    /// Also takes back an expiry that nobody has acted on.
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

    /// Ready from now on, and once more an edge for those who wait for edges.
    pub(super) fn close(&self) {
        // It can fail only when it is ready already.
        let _ = rustix::io::write(&self.closed, &1u64.to_ne_bytes());
    }

    /// Blocks until ready, until a signal handler has run, or until that moment.
    pub(super) fn wait(&self, until: Option<Instant>) -> io::Result<()> {
        wait_readable(self.epoll.as_fd(), until).map(drop)
    }
}

impl AsFd for Readiness {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

/// Blocks until there is something to read, until a signal handler has run, or until that moment. Whether there is
/// something to read.
pub(super) fn wait_readable(fd: BorrowedFd<'_>, until: Option<Instant>) -> io::Result<bool> {
    let left = until.map(|until| bounded(until.saturating_duration_since(Instant::now())));
    let timeout = left.and_then(|left| Timespec::try_from(left).ok());
    match poll(&mut [PollFd::new(&fd, PollFlags::IN)], timeout.as_ref()) {
        Ok(ready) => Ok(ready > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}
