//! The guard that counts the end of a connection.
//!
//! Owns the rules of closing: when the socket is shut down, what counts, and in which order.

use std::fmt;
use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use super::process::{Forks, Process};
use super::worker_core::WorkerCore;
use dispatch_protocol::scoreboard::{Scoreboard, slot};

/// Counts one connection as held by this worker; dropping the last clone counts it as finished.
///
/// A [`Connection`](crate::Connection) has one inside. Keep one by hand, from
/// [`Connection::into_parts`](crate::Connection::into_parts), when another
/// library owns the stream: drop it after the stream is closed.
///
/// A fork's copy counts nothing: only the process that took the connection does.
///
/// ```no_run
/// use std::net::{Shutdown, TcpStream};
/// use worker_sdk::{Connection, Guard};
///
/// /// A stream of our own. Fields are dropped in this order: the guard last.
/// struct Counted {
///     stream: TcpStream,
///     guard: Guard,
/// }
///
/// impl Drop for Counted {
///     fn drop(&mut self) {
///         if self.guard.must_shut_down() {
///             // It fails when the client is gone already.
///             let _ = self.stream.shutdown(Shutdown::Both);
///         }
///     }
/// }
///
/// fn own(connection: Connection) -> std::io::Result<Counted> {
///     let (stream, guard) = connection.into_parts()?;
///     Ok(Counted { stream, guard })
/// }
/// ```
#[derive(Clone)]
pub struct Guard(Arc<Counted>);

struct Counted {
    core: Arc<WorkerCore>,
    process: Process,
    /// When the application took it: a child forked since may serve it.
    forks: Forks,
    /// The descriptor has left our control: the application may have duplicated it, or given it away.
    exposed: AtomicBool,
    /// Where the dispatcher shows whether it still has a copy; `None` without a dispatcher.
    taken_slot: Option<TakenSlot>,
    /// Its place among the live connections, once it has a descriptor there.
    place: OnceLock<u32>,
}

pub(super) struct TakenSlot {
    pub(super) board: Arc<Scoreboard>,
    pub(super) slot: u32,
    pub(super) seq: u64,
    /// Wakes the dispatcher.
    pub(super) doorbell: Arc<OwnedFd>,
    /// Another process that will never serve it may have a copy, too: another worker, or a child forked before it was taken.
    pub(super) resent: bool,
}

impl TakenSlot {
    fn dispatcher_has_copy(&self) -> bool {
        self.board.slot(self.slot).is_some_and(|slot| slot::dispatcher_has_copy(slot, self.seq))
    }
}

impl Guard {
    pub(super) fn new(core: Arc<WorkerCore>, taken_slot: Option<TakenSlot>) -> Guard {
        let process = core.process();
        let (forks, exposed, place) = (Forks::now(), AtomicBool::new(false), OnceLock::new());
        Guard(Arc::new(Counted { core, process, forks, exposed, taken_slot, place }))
    }

    /// Enters the connection among the live ones; `fd` stays open until [`Guard::disown`].
    fn register(&self, fd: BorrowedFd<'_>) {
        if self.0.process.is_current() {
            self.0.place.get_or_init(|| self.0.core.live_connections().enter(fd));
        }
    }

    /// The descriptor leaves our control, for good: see [`Counted::exposed`].
    pub(crate) fn expose(&self) {
        self.0.exposed.store(true, Ordering::Relaxed);
    }

    /// A duplicate for the application to own.
    pub(crate) fn part(&self, stream: &TcpStream) -> io::Result<TcpStream> {
        self.expose();
        let stream = stream.try_clone()?;
        if let Some(at) = self.place() {
            self.0.core.live_connections().part(at, stream.as_fd());
        }
        Ok(stream)
    }

    /// False in a forked child.
    #[cfg(feature = "tokio")]
    pub(crate) fn is_ours(&self) -> bool {
        self.0.process.is_current()
    }

    fn disown(&self) {
        if let Some(at) = self.place() {
            self.0.core.live_connections().disown(at);
        }
    }

    /// Nothing in a forked child: its copy of the lock may be locked for ever.
    fn place(&self) -> Option<u32> {
        self.0.place.get().copied().filter(|_| self.0.process.is_current())
    }

    /// Whether the dispatcher may still hold a copy of the socket, so that the client sees the end a little later if the
    /// stream is merely closed. Its owner may shut it down first (both directions), if nothing else serves it: no
    /// duplicate, no child process.
    ///
    /// False in a forked child, after a later fork, and while this guard has clones: then the connection need not end
    /// yet. The [example above](Guard) shows where to ask. Without it the guard, when it is dropped, has the dispatcher
    /// close its copy at once.
    pub fn must_shut_down(&self) -> bool {
        // Fork comes first: nothing may end what the parent, or a child, still serves.
        if !self.0.process.is_current()
            || Arc::strong_count(&self.0) > 1
            || self.0.forks.more_since()
        {
            return false;
        }
        self.0
            .taken_slot
            .as_ref()
            .is_some_and(|taken_slot| taken_slot.resent || taken_slot.dispatcher_has_copy())
    }

    /// The same for the SDK's own close: never once the descriptor has left its control.
    fn shuts_down(&self) -> bool {
        !self.0.exposed.load(Ordering::Relaxed) && self.must_shut_down()
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        if self.process.is_current() {
            if let Some(&at) = self.place.get() {
                self.core.live_connections().leave(at);
            }
            // Closed without a shutdown: whatever else serves it goes on, and its end must not wait for the dispatcher's
            // copy. That is released as soon as the dispatcher looks.
            if (*self.exposed.get_mut() || self.forks.more_since())
                && let Some(taken_slot) =
                    self.taken_slot.as_ref().filter(|taken_slot| taken_slot.dispatcher_has_copy())
            {
                // It can fail only when the counter is full, and then the dispatcher is awake.
                let _ = rustix::io::write(&*taken_slot.doorbell, &1u64.to_ne_bytes());
            }
            self.core.finished_one();
        }
    }
}

impl fmt::Debug for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guard").finish_non_exhaustive()
    }
}

/// A stream and its guard: shut down if need be, then closed, then counted, in this order.
pub(crate) struct CountedStream<S: AsFd> {
    // Declared, and so dropped, before the guard: what is counted as finished is closed.
    pub(crate) stream: S,
    pub(crate) guard: Guard,
}

impl<S: AsFd> CountedStream<S> {
    pub(crate) fn new(stream: S, guard: Guard) -> CountedStream<S> {
        guard.register(stream.as_fd());
        CountedStream { stream, guard }
    }
}

impl<S: AsFd> Drop for CountedStream<S> {
    fn drop(&mut self) {
        if self.guard.shuts_down() {
            // It fails when the client is gone already.
            let _ = rustix::net::shutdown(&self.stream, rustix::net::Shutdown::Both);
        }
        // Last of all, before the stream is closed.
        self.guard.disown();
    }
}
