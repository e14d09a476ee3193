//! Listeners that are taken out, by a reload or at the end: nobody who has connected to one of them is reset.
//!
//! First no new connection begins (a Unix socket refuses them, a TCP socket drops what would begin one), then those that are in the queue, or
//! whose handshake is under way, are accepted, and only then the socket is closed. A socket that a service manager passed is
//! not ours to close: the manager would keep it open, and its clients would wait for nothing. It is emptied and kept; whoever
//! comes then is turned away, and a reload can use it again.

use std::os::fd::AsFd;
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

/// How long handshakes that are under way may take when a reload takes a listener out. The kernel repeats its half of one
/// after a second.
const HANDSHAKES: Duration = Duration::from_secs(1);

/// The same where clients are accepted only when they have said something.
const DEFERRED: Duration = Duration::from_secs(2);

/// The same at the end of the dispatcher, for which others wait.
const LAST_HANDSHAKES: Duration = Duration::from_millis(50);

/// How a socket that is taken out stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Leaving {
    /// Its queue is accepted, at least until then if no new connection begins meanwhile.
    Until(Time),
    /// A service manager keeps it open: clients are turned away.
    Kept,
}

impl ListenerIo {
    /// Lets no new connection begin. False if that cannot be had.
    fn close_door(&self) -> bool {
        let Some(listening) = &self.listening else { return false };
        match listening.is_unix() {
            true => rustix::net::shutdown(&listening.fd, Shutdown::Read).is_ok(),
            false => sys::drop_new_connections(&listening.fd).is_ok(),
        }
    }

    /// Its queue is looked at until it is empty.
    fn leave(&mut self, at: Time) {
        self.leaving = Some(Leaving::Until(at));
        // Even if no edge said so: the last look must be at the queue itself.
        self.ready = true;
        self.paused_until = None;
    }

    pub(super) fn is_kept(&self) -> bool {
        self.leaving == Some(Leaving::Kept)
    }

    /// Whether its queue is to be looked at for the last time.
    pub(super) fn is_due(&self, now: Time) -> bool {
        match self.leaving {
            Some(Leaving::Until(at)) => at <= now,
            Some(Leaving::Kept) | None => true,
        }
    }

    /// When that is.
    pub(super) fn due(&self) -> Option<Time> {
        let Some(Leaving::Until(at)) = self.leaving else { return None };
        self.listening.as_ref().map(|_| at)
    }
}

impl EventLoop {
    /// A stop begins. Sockets that somebody else keeps open are left with their queue; ours are emptied first.
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
                let wait = listener.close_door() && tcp;
                listener.leave(if wait { self.now + LAST_HANDSHAKES } else { self.now });
            }
        }
        // Those that a reload has taken out and closed before are known to be.
        closed.sort();
        closed.dedup();
        closed.into_iter().for_each(|id| self.closed(id));
    }

    /// A listener was taken out: its sockets are emptied, then closed or kept.
    pub(super) fn drain_listener(&mut self, id: ListenerId) {
        let configured = self.config.listeners.get(usize::from(id.0));
        let deferred = configured.is_some_and(|listener| listener.options.defer_accept.is_some());
        let handshakes = if deferred { DEFERRED } else { HANDSHAKES };
        for listener in self.listeners.of_mut(id) {
            let Some(listening) = &listener.listening else { continue };
            let ours = !listening.inherited;
            let unix = listening.is_unix();
            let wait = ours && listener.close_door() && !unix;
            listener.leave(if wait { self.now + handshakes } else { self.now });
        }
    }

    /// The last look at its queue found nothing more: closed, or kept for a reload that wants it again.
    pub(super) fn leave(&mut self, position: usize) {
        let listener = &mut self.listeners.sockets[position];
        let id = listener.id;
        let kept = listener.listening.as_ref().is_some_and(|listening| listening.inherited);
        if kept && self.run.stop_deadline.is_none() {
            listener.leaving = Some(Leaving::Kept);
            listener.id = ListenerIo::NOBODY;
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

    /// Whether it is to be closed now, although its queue may not be empty: so many have been accepted as could wait in it.
    pub(super) fn has_had_its_share(&mut self, position: usize) -> bool {
        let listener = &mut self.listeners.sockets[position];
        // No new connections begin until then, so time is bound enough.
        if !listener.is_due(self.now) {
            return false;
        }
        let over = listener.last == 0;
        listener.last = listener.last.saturating_sub(1);
        over
    }

    /// Clients of a socket that belongs to no listener any more.
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
                             reason=no_listener left_out={suppressed}"
                        );
                    }
                    // It may have sent descriptors whose close takes long.
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

    /// Whether the core wants a socket's clients, or we do, to turn them away.
    pub(super) fn wants_clients(&self, position: usize) -> bool {
        let listener = &self.listeners.sockets[position];
        listener.is_kept() || self.core.accepting(listener.id) != Accepting::Pause
    }

    /// Sockets that are kept, for the status.
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

    /// Sockets that were taken out and are still there, and those that nobody has asked for yet.
    pub(super) fn reusable(&self) -> Vec<Reusable> {
        let unused = self.listeners.unused.iter().filter_map(|listening| listening.name.clone());
        let mut reusable: Vec<Reusable> = unused.map(Reusable::systemd).collect();
        for listener in &self.listeners.sockets {
            let (Some(listening), true) = (&listener.listening, listener.leaving.is_some()) else {
                continue;
            };
            if let Some(name) = &listening.name {
                reusable.push(Reusable::systemd(name.clone()));
                continue;
            }
            let configured = self.config.listeners.get(usize::from(listener.id.0));
            if let (Some(configured), Ok(fd)) = (configured, listening.fd.try_clone()) {
                reusable.push(Reusable {
                    address: configured.address.clone(),
                    options: configured.options.clone(),
                    listening: Some(listening.duplicate(fd)),
                });
            }
        }
        reusable
    }

    /// Takes the sockets of this name that belong to no listener any more.
    pub(super) fn take_kept(&mut self, name: &str) -> Vec<Listening> {
        let named = |listening: &Listening| listening.name.as_deref() == Some(name);
        let (mut taken, unused): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.listeners.unused).into_iter().partition(named);
        self.listeners.unused = unused;
        taken.extend(self.take_leaving(named));
        taken
    }

    /// A duplicate of one of our sockets is used for a new listener: its clients come in again, and the old one goes.
    pub(super) fn take_back(&mut self, listening: &Listening) {
        // It may have none, if it could not be set.
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
            taken.extend(listener.listening.take());
        }
        closed.sort();
        closed.dedup();
        closed.into_iter().for_each(|id| self.closed(id));
        taken
    }
}
