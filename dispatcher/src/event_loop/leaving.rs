//! Removes listeners, in a reload or at the end, without resetting any client that has connected.
//!
//! First no new connection begins: a Unix socket refuses connects, a TCP socket drops SYNs. Then
//! the clients in the queue, and those whose handshake is under way, are accepted, and only then
//! the socket is closed. A socket that a service manager passed is not closed: the manager would
//! keep it open, and its clients would wait forever. It is emptied and kept; later clients are
//! turned away, and a reload can use it again.

use std::os::fd::AsFd;
use std::sync::{Arc, Weak};
use std::time::Duration;

use rustix::net::Shutdown;

use super::EventLoop;
use super::listeners::{Attempt, ListenerIo};
use super::rate_limit::Cause;
use crate::api::status::KeptStatus;
use crate::background::closer::{Owner, Task};
use crate::listen::bind::Listening;
use crate::reload::Reusable;
use crate::sys;
use dispatcher_core::{Accepting, ListenerId, Time};

/// How long handshakes under way may take when a reload removes a listener. The kernel repeats a
/// SYN-ACK after one second.
const HANDSHAKES: Duration = Duration::from_secs(1);

/// The same with `defer_accept`, where a client is accepted only after its first bytes.
const DEFERRED: Duration = Duration::from_secs(2);

/// The same at the end of the dispatcher, which must not take long.
const LAST_HANDSHAKES: Duration = Duration::from_millis(50);

/// The state of a socket that is being removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Leaving {
    /// Its clients are accepted, at least until this time if no new connection can begin.
    Until(Time),
    /// A service manager keeps it open: clients are turned away.
    KeptOpen,
}

impl ListenerIo {
    /// Lets no new connection begin. False if the kernel does not support that.
    fn refuse_new(&self) -> bool {
        let Some(listening) = &self.listening else { return false };
        match listening.is_unix() {
            true => rustix::net::shutdown(&listening.fd, Shutdown::Read).is_ok(),
            false => sys::drop_new_connections(&listening.fd).is_ok(),
        }
    }

    /// Accepts from the socket until its queue is empty.
    fn leave(&mut self, at: Time) {
        self.leaving = Some(Leaving::Until(at));
        // Also without an edge: the last check must read the queue itself.
        self.ready = true;
        self.paused_until = None;
    }

    pub(super) fn is_kept(&self) -> bool {
        self.leaving == Some(Leaving::KeptOpen)
    }

    /// Whether the last check of the queue is due.
    pub(super) fn is_due(&self, now: Time) -> bool {
        match self.leaving {
            Some(Leaving::Until(at)) => at <= now,
            Some(Leaving::KeptOpen) | None => true,
        }
    }

    /// When the last check of the queue is due.
    pub(super) fn due(&self) -> Option<Time> {
        let Some(Leaving::Until(at)) = self.leaving else { return None };
        self.listening.as_ref().map(|_| at)
    }
}

impl EventLoop {
    /// A stop begins. A socket that a service manager keeps open is closed with its queue; the
    /// other sockets are emptied first.
    pub(super) fn finish_listeners(&mut self) {
        let mut closed = Vec::new();
        for listener in &mut self.listeners.sockets {
            if listener.listening.as_ref().is_some_and(|listening| listening.inherited) {
                closed.extend((!listener.is_kept()).then_some(listener.id));
                listener.close(
                    self.wakeup.registry(),
                    &mut self.background.cleaner,
                    &mut self.background.closers,
                );
            } else if listener.listening.is_some() {
                let tcp = listener.listening.as_ref().is_some_and(|l| !l.is_unix());
                let wait = listener.refuse_new() && tcp;
                listener.leave(if wait { self.now + LAST_HANDSHAKES } else { self.now });
            }
        }
        // Listeners that a reload has closed before are already reported.
        closed.sort();
        closed.dedup();
        closed.into_iter().for_each(|id| self.closed(id));
    }

    /// A listener was removed: its sockets are emptied, then closed or kept.
    pub(super) fn drain_listener(&mut self, id: ListenerId) {
        let resources = self.listeners.resources(id).cloned();
        let deferred = resources.as_ref().is_some_and(|it| it.options.defer_accept.is_some());
        let handshakes = if deferred { DEFERRED } else { HANDSHAKES };
        for listener in self.listeners.of_mut(id) {
            let Some(listening) = &listener.listening else { continue };
            let ours = !listening.inherited;
            let unix = listening.is_unix();
            let reusable = resources.as_ref().filter(|_| ours).zip(listening.fd.try_clone().ok());
            listener.reusable = reusable.map(|(resources, fd)| {
                let (address, options) = (resources.address.clone(), resources.options.clone());
                Arc::new(Reusable { address, options, listening: listening.duplicate(fd) })
            });
            let wait = ours && listener.refuse_new() && !unix;
            listener.leave(if wait { self.now + handshakes } else { self.now });
        }
    }

    /// The last check of the queue found no client: closes the socket, or keeps it for a later
    /// reload.
    pub(super) fn leave(&mut self, position: usize) {
        let listener = &mut self.listeners.sockets[position];
        let id = listener.id;
        let kept = listener.listening.as_ref().is_some_and(|listening| listening.inherited);
        if kept && self.run.stop_deadline.is_none() {
            listener.leaving = Some(Leaving::KeptOpen);
            listener.id = ListenerIo::NO_LISTENER;
            listener.ready = true;
            let address = listener.listening.as_ref().map_or("", |listening| &listening.address);
            log::warn!(
                "event=listener_kept listener={} address={address} clients=turned_away \
                 hint=\"the service manager keeps this socket open: configure it again, or stop its .socket unit\"",
                self.core.listener_name(id)
            );
        } else {
            listener.close(
                self.wakeup.registry(),
                &mut self.background.cleaner,
                &mut self.background.closers,
            );
        }
        self.closed(id);
    }

    /// Whether to close the socket although its queue may not be empty: as many clients were
    /// accepted as the queue can hold.
    pub(super) fn has_had_its_share(&mut self, position: usize) -> bool {
        let listener = &mut self.listeners.sockets[position];
        // No new connection can begin until then, so the time is a sufficient bound.
        if !listener.is_due(self.now) {
            return false;
        }
        let over = listener.last == 0;
        listener.last = listener.last.saturating_sub(1);
        over
    }

    /// Turns away the clients of a socket without a listener.
    pub(super) fn turn_away(&mut self, position: usize) {
        for _ in 0..self.config.limits.accept_batch {
            let listener = &mut self.listeners.sockets[position];
            if !listener.ready || listener.paused_until.is_some() {
                return;
            }
            match listener.attempt() {
                Attempt::Client(fd, peer) => {
                    listener.turned_away += 1;
                    let address = listener.listening.as_ref().map_or("", |l| &l.address);
                    if let Some(suppressed) =
                        self.observation.allow(self.now, None, Cause::NoListener)
                    {
                        log::info!(
                            "event=client_turned_away address={address} peer={peer} \
                             reason=no_listener suppressed={suppressed}"
                        );
                    }
                    // The client may have sent descriptors whose close takes long.
                    self.background.closers.task(Task::Drop(Owner::Other, Box::new(fd)));
                }
                Attempt::Again => {}
                Attempt::Empty => listener.ready = false,
                Attempt::Short(_) => {
                    listener.paused_until = Some(self.now + self.config.limits.resource_pause);
                }
            }
        }
    }

    /// Whether to accept from a socket: the core wants its clients, or they are to be turned away.
    pub(super) fn wants_clients(&self, position: usize) -> bool {
        let listener = &self.listeners.sockets[position];
        listener.is_kept() || self.core.accepting(listener.id) != Accepting::Pause
    }

    /// Kept sockets, for the status.
    pub(super) fn kept_sockets(&self) -> Vec<KeptStatus> {
        let kept = self.listeners.sockets.iter().filter(|listener| listener.is_kept());
        kept.filter_map(|listener| {
            let listening = listener.listening.as_ref()?;
            Some(KeptStatus {
                name: listening.name.clone().unwrap_or_default(),
                address: listening.address.clone(),
                turned_away: listener.turned_away,
            })
        })
        .collect()
    }

    /// The names of passed sockets that no listener uses.
    pub(super) fn kept_names(&self) -> Vec<String> {
        let leaving = self.listeners.sockets.iter().filter(|listener| listener.leaving.is_some());
        let left = leaving.filter_map(|listener| listener.listening.as_ref());
        self.listeners.unused.iter().chain(left).filter_map(|l| l.name.clone()).collect()
    }

    /// Sockets of removed listeners that are still open.
    pub(super) fn reusable(&self) -> Vec<Weak<Reusable>> {
        let sockets = self.listeners.sockets.iter();
        sockets.filter_map(|listener| listener.reusable.as_ref().map(Arc::downgrade)).collect()
    }

    /// Takes the sockets of this name that belong to no listener.
    pub(super) fn take_kept(&mut self, name: &str) -> Vec<Listening> {
        let named = |listening: &Listening| listening.name.as_deref() == Some(name);
        let (mut taken, unused): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.listeners.unused).into_iter().partition(named);
        self.listeners.unused = unused;
        taken.extend(self.take_leaving(named));
        taken
    }

    /// A new listener uses a duplicate of this socket: clients can connect again, and the old entry
    /// is removed.
    pub(super) fn take_back(&mut self, listening: &Listening) {
        // The filter may be missing, if the kernel refused it.
        let _ = sys::let_new_connections_in(listening.fd.as_fd());
        let address = listening.address.clone();
        self.take_leaving(|old| old.name.is_none() && !old.is_unix() && old.address == address);
    }

    fn take_leaving(&mut self, wanted: impl Fn(&Listening) -> bool) -> Vec<Listening> {
        let (mut taken, mut closed) = (Vec::new(), Vec::new());
        for listener in &mut self.listeners.sockets {
            let is_it =
                listener.leaving.is_some() && listener.listening.as_ref().is_some_and(&wanted);
            if !is_it {
                continue;
            }
            let _ = listener.watch(self.wakeup.registry(), false);
            closed.extend((!listener.is_kept()).then_some(listener.id));
            listener.reusable = None;
            taken.extend(listener.listening.take());
        }
        closed.sort();
        closed.dedup();
        closed.into_iter().for_each(|id| self.closed(id));
        taken
    }
}
