//! What the threads that read what workers write have in common: their rounds ([`run`]), the way to
//! the hot thread ([`Outbox`]), refusals of each user ([`Refusals`]), and receives that take
//! descriptors along ([`receive`]).
//!
//! Guarantees: a thread continues after a panic or a failed poll; it wakes the hot thread at most
//! once in a round unless the mailbox is full; memory for refusals is bounded. Needs a thread that
//! may wait for the hot thread, which never waits for it.

use std::collections::HashMap;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{SyncSender, TrySendError};
use std::time::Duration;

use mio::{Events, Poll};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags};

use super::clock;
use super::rate_limit::RateLimit;
use crate::background::closer::Watched;
use crate::background::restart;
use crate::wake::Wake;
use dispatcher_core::Time;

/// How long the end of a connection waits for the end of its process: a killed process closes its
/// descriptors just before its end is visible.
pub(super) const DYING: Duration = Duration::from_millis(3);

/// Most users whose refusals are counted separately.
const REFUSED_USERS: usize = 1_024;

/// The most descriptors that the kernel lets a message carry.
const MOST_FDS: usize = 253;

/// One of the threads, as [`run`] drives it.
pub(super) trait PeerThread {
    /// Its name in the log.
    const NAME: &'static str;

    fn poll(&mut self) -> &mut Poll;

    /// How long the poll may wait; `None`: until an event.
    fn timeout(&self) -> Option<Duration>;

    /// Handles the events of one poll, and what is due at `now`.
    fn round(&mut self, now: Time, events: &Events, watched: Option<&Watched>);

    /// Wakes the hot thread if there are events for it.
    fn announce(&mut self);

    /// Whether the hot thread has ended, or has told this thread to end.
    fn is_over(&self) -> bool;

    /// Restarts after a failure. Edges may have been missed, so everything is registered with a new
    /// poll, which reports them again.
    fn begin_again(&mut self) -> io::Result<()>;
}

/// Runs a thread until it is over. After a failure it begins again.
pub(super) fn run<T: PeerThread>(thread: &mut T, watched: Option<&Watched>) {
    let mut failed = false;
    restart::thread(T::NAME, || {
        if std::mem::replace(&mut failed, true) {
            if let Some(watched) = watched {
                watched.end();
            }
            thread.begin_again().map_err(|error| error.to_string())?;
        }
        rounds(thread, watched).map_err(|error| error.to_string())
    });
}

fn rounds(thread: &mut impl PeerThread, watched: Option<&Watched>) -> io::Result<()> {
    let mut events = Events::with_capacity(256);
    while !thread.is_over() {
        let timeout = thread.timeout();
        if let Err(error) = thread.poll().poll(&mut events, timeout) {
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
            events.clear();
        }
        if let Some(watched) = watched {
            watched.begin();
        }
        thread.round(clock(), &events, watched);
        if let Some(watched) = watched {
            watched.end();
        }
        thread.announce();
    }
    Ok(())
}

/// The way to the hot thread: a bounded mailbox.
pub(super) struct Outbox<E> {
    events: SyncSender<E>,
    wake: Wake,
    /// There are events that the hot thread was not woken for.
    unannounced: bool,
    over: bool,
}

impl<E> Outbox<E> {
    pub(super) fn new(events: SyncSender<E>, wake: Wake) -> Outbox<E> {
        Outbox { events, wake, unannounced: false, over: false }
    }

    /// Puts an event into the mailbox; waits while that is full.
    pub(super) fn report(&mut self, event: E) {
        let event = match self.events.try_send(event) {
            Ok(()) => {
                self.unannounced = true;
                return;
            }
            Err(TrySendError::Disconnected(_)) => {
                self.over = true;
                return;
            }
            Err(TrySendError::Full(event)) => event,
        };
        (self.wake)();
        self.unannounced = true;
        self.over |= self.events.send(event).is_err();
    }

    /// Wakes the hot thread if there are events for it.
    pub(super) fn announce(&mut self) {
        if std::mem::take(&mut self.unannounced) {
            (self.wake)();
        }
    }

    /// Whether the hot thread has ended.
    pub(super) fn is_over(&self) -> bool {
        self.over
    }

    /// The mailbox, for a thread that reports one event by itself.
    pub(super) fn ends(&self) -> (SyncSender<E>, Wake) {
        (self.events.clone(), Wake::clone(&self.wake))
    }
}

/// The refusals of each user: so many are reported, the others are counted.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    users: HashMap<u32, RateLimit>,
}

impl Refusals {
    /// Whether a refusal of this user is reported; if so, how many before it were suppressed.
    pub(super) fn allow(&mut self, now: Time, uid: u32) -> Option<u64> {
        let known = self.users.len() < REFUSED_USERS || self.users.contains_key(&uid);
        self.users.entry(if known { uid } else { u32::MAX }).or_default().allow(now)
    }

    /// When suppressed refusals must be reported.
    pub(super) fn due(&self) -> Option<Time> {
        self.users.values().filter_map(RateLimit::due).min()
    }

    /// Suppressed refusals by user that no later refusal has reported within a second. The caller
    /// reports them.
    pub(super) fn unreported(&mut self, now: Time) -> Vec<(u32, u64)> {
        let mut unreported = Vec::new();
        self.users.retain(|&uid, limit| {
            if limit.due().is_some_and(|due| due <= now) {
                unreported.push((uid, limit.take_suppressed()));
            }
            !limit.is_over(now)
        });
        unreported
    }
}

/// One receive.
#[derive(Clone, Copy, Debug)]
pub(super) struct Message {
    pub(super) bytes: usize,
    /// Descriptors came with it.
    pub(super) had_fds: bool,
    /// It was longer than the buffer.
    pub(super) truncated: bool,
}

/// Receives without waiting. Descriptors are added to `rubbish`, to be closed on a thread that may
/// block; the kernel closes those without room (`MSG_CTRUNC`) here.
pub(super) fn receive(
    socket: &OwnedFd,
    buffer: &mut [u8],
    rubbish: &mut Vec<OwnedFd>,
) -> Result<Message, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
    let before = rubbish.len();
    let received = loop {
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let mut parts = [IoSliceMut::new(buffer)];
        match rustix::net::recvmsg(socket.as_fd(), &mut parts, &mut ancillary, flags) {
            Err(Errno::INTR) => {}
            other => {
                for message in ancillary.drain() {
                    if let RecvAncillaryMessage::ScmRights(fds) = message {
                        rubbish.extend(fds);
                    }
                }
                break other?;
            }
        }
    };
    Ok(Message {
        bytes: received.bytes,
        had_fds: rubbish.len() > before || received.flags.contains(ReturnFlags::CTRUNC),
        truncated: received.flags.contains(ReturnFlags::TRUNC),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc::sync_channel;

    use super::*;

    #[test]
    fn the_hot_thread_is_woken_once_for_many_events() {
        let wakes = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&wakes);
        let wake: Wake = Arc::new(move || _ = counter.fetch_add(1, Ordering::Relaxed));
        let (sender, events) = sync_channel(8);
        let mut outbox = Outbox::new(sender, wake);
        outbox.announce();
        (0..5).for_each(|number| outbox.report(number));
        assert_eq!(wakes.load(Ordering::Relaxed), 0);
        outbox.announce();
        outbox.announce();
        assert_eq!(wakes.load(Ordering::Relaxed), 1);
        assert_eq!(events.try_iter().collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
        drop(events);
        assert!(!outbox.is_over());
        outbox.report(5);
        assert!(outbox.is_over());
    }

    #[test]
    fn refusals_are_counted_by_user_in_bounded_memory() {
        let mut refusals = Refusals::default();
        let start = Time(1_000_000_000_000);
        let reported = (0..100).filter(|_| refusals.allow(start, 1).is_some()).count() as u64;
        assert!(refusals.allow(start, 2).is_some(), "another user's are its own");
        let due = refusals.due().unwrap();
        assert_eq!(refusals.unreported(start), []);
        assert_eq!(refusals.unreported(due), [(1, 100 - reported)]);
        assert_eq!((refusals.due(), refusals.users.len()), (None, 0));
        for uid in 0..100_000 {
            refusals.allow(start, uid);
        }
        assert!(refusals.users.len() <= REFUSED_USERS + 1);
    }
}
