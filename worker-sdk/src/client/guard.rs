//! The guard that counts the end of a connection.
//!
//! This module owns the rules of a close: when the socket is shut down, and in which order the
//! steps happen.

use std::fmt;
use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use super::process::{Forks, Process};
use super::worker_core::WorkerCore;
use dispatch_protocol::scoreboard::{Scoreboard, slot};

/// Counts one connection as live; dropping the last clone counts it as finished.
///
/// A [`Connection`](crate::Connection) contains one. Keep a guard from
/// [`Connection::into_parts`](crate::Connection::into_parts) if another library owns the stream,
/// and drop it after the stream is closed.
///
/// A copy in a forked child counts nothing; only the process that took the connection counts it.
///
/// ```no_run
/// use std::net::{Shutdown, TcpStream};
/// use worker_sdk::{Connection, Guard};
///
/// /// A stream with its guard. Fields are dropped in this order: the guard last.
/// struct Counted {
///     stream: TcpStream,
///     guard: Guard,
/// }
///
/// impl Drop for Counted {
///     fn drop(&mut self) {
///         if self.guard.must_shut_down() {
///             // It fails if the client is gone.
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
    /// The forks before the take: a child forked later may serve the connection.
    forks: Forks,
    /// Whether the application has had the descriptor: it may have duplicated it, or given it away.
    exposed: AtomicBool,
    /// Shows whether the dispatcher still has a copy; `None` without a dispatcher.
    taken_slot: Option<TakenSlot>,
    /// The index in the table of live connections, once it is registered.
    index: OnceLock<u32>,
}

pub(super) struct TakenSlot {
    pub(super) board: Arc<Scoreboard>,
    pub(super) slot: u32,
    pub(super) seq: u64,
    /// Rings the dispatcher.
    pub(super) doorbell: Arc<OwnedFd>,
    /// Whether a process that will never serve the connection may have a copy: another worker, or a
    /// child forked before the take.
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
        let (forks, exposed, index) = (Forks::now(), AtomicBool::new(false), OnceLock::new());
        Guard(Arc::new(Counted { core, process, forks, exposed, taken_slot, index }))
    }

    /// Registers the connection as live; `fd` stays open until [`Guard::unregister_fd`].
    fn register(&self, fd: BorrowedFd<'_>) {
        if self.0.process.is_current() {
            self.0.index.get_or_init(|| self.0.core.live_connections().insert(fd));
        }
    }

    /// The application gets the descriptor: see [`Counted::exposed`].
    pub(crate) fn expose(&self) {
        self.0.exposed.store(true, Ordering::Relaxed);
    }

    /// A duplicate that the application owns.
    pub(crate) fn duplicate(&self, stream: &TcpStream) -> io::Result<TcpStream> {
        self.expose();
        let stream = stream.try_clone()?;
        if let Some(at) = self.index() {
            self.0.core.live_connections().give_away(at, stream.as_fd());
        }
        Ok(stream)
    }

    /// False in a forked child.
    #[cfg(feature = "tokio")]
    pub(crate) fn is_ours(&self) -> bool {
        self.0.process.is_current()
    }

    fn unregister_fd(&self) {
        if let Some(at) = self.index() {
            self.0.core.live_connections().forget_own_fd(at);
        }
    }

    /// `None` in a forked child, whose copy of the lock may be locked for ever.
    fn index(&self) -> Option<u32> {
        self.0.index.get().copied().filter(|_| self.0.process.is_current())
    }

    /// Whether the dispatcher may still have a copy of the socket, so that a close alone shows the
    /// end to the client with a delay. The owner of the stream may shut it down first (both
    /// directions), if nothing else serves it: no duplicate, no child process.
    ///
    /// False in a forked child, after a later fork, and while this guard has clones, because then
    /// the connection need not end yet. The [example above](Guard) shows where to ask. Without this
    /// shutdown, the drop of the guard makes the dispatcher close its copy immediately.
    pub fn must_shut_down(&self) -> bool {
        // The fork check comes first: a connection that the parent or a child still serves must not
        // end.
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

    /// As `must_shut_down`, but false once the application has had the descriptor.
    fn shuts_down(&self) -> bool {
        !self.0.exposed.load(Ordering::Relaxed) && self.must_shut_down()
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        if self.process.is_current() {
            if let Some(&at) = self.index.get() {
                self.core.live_connections().remove(at);
            }
            // The socket was closed without a shutdown, so its end for the client must not wait for
            // the dispatcher's copy. The doorbell makes the dispatcher release it.
            if (*self.exposed.get_mut() || self.forks.more_since())
                && let Some(taken_slot) =
                    self.taken_slot.as_ref().filter(|taken_slot| taken_slot.dispatcher_has_copy())
            {
                // It fails only if the counter is full; then the dispatcher is awake.
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

/// A stream and its guard. A drop shuts down if necessary, closes, then counts, in this order.
pub(crate) struct CountedStream<S: AsFd> {
    // Declared before the guard, so dropped before it: a finished connection is closed.
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
            // It fails if the client is gone.
            let _ = rustix::net::shutdown(&self.stream, rustix::net::Shutdown::Both);
        }
        // The last step before the stream is closed.
        self.guard.unregister_fd();
    }
}
