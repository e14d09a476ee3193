//! Accepts clients from the listeners, exactly as far as the core allows.

use std::time::Duration;

use super::EventLoop;
use super::connections::Conn;
use super::fault_kind::FaultKind;
use super::listeners::{Attempt, ListenerIo};
use super::rate_limit::Cause;
use crate::background::logger::quoted;
use dispatcher_core::{Accepting, Client, ListenerId};

/// The pause while descriptors are about to be closed.
const CLOSING: Duration = Duration::from_millis(1);

/// After so many such pauses in a row there is a shortage.
const MOST_WAITS: u32 = 20;

impl EventLoop {
    /// Accepts up to `accept_batch` clients from each listener with waiting clients, in turn.
    pub(super) fn accept_all(&mut self) {
        for position in self.listeners.rotate() {
            self.accept_from(position);
            // The clients of one listener are on their way before the loop accepts from the next.
            self.perform();
        }
    }

    pub(super) fn accept_from(&mut self, position: usize) {
        if self.listeners.sockets[position].is_kept() {
            return self.turn_away(position);
        }
        for _ in 0..self.config.limits.accept_batch {
            let listener = &mut self.listeners.sockets[position];
            if !listener.ready || listener.paused_until.is_some() {
                return;
            }
            // The closers are behind: more descriptors would only pile up.
            if self.background.closers.is_full() {
                listener.paused_until = Some(self.now + CLOSING);
                return;
            }
            let id = listener.id;
            match self.core.accepting(id) {
                Accepting::Yes | Accepting::Refuse => {}
                Accepting::Pause => return,
                Accepting::Finish => {
                    if self.has_had_its_share(position) {
                        return self.leave(position);
                    }
                }
            }
            let listener = &mut self.listeners.sockets[position];
            match listener.attempt() {
                Attempt::Client(fd, peer) => {
                    listener.waits = 0;
                    if std::mem::take(&mut listener.short)
                        && let Some(suppressed) = self.observation.allow(
                            self.now,
                            self.core.pool_of_listener(id),
                            Cause::Relieved,
                        )
                    {
                        log::info!(
                            "event=accept_resumed {} suppressed={suppressed}",
                            self.listener(id)
                        );
                    }
                    let client = Client::new(id, peer);
                    let conn = if self.observation.meters.samples() {
                        let began = super::clock();
                        let conn = self.core.accepted(self.now, client);
                        self.observation.meters.decision.record(super::clock() - began);
                        conn
                    } else {
                        self.core.accepted(self.now, client)
                    };
                    let index = conn.index;
                    self.connections.insert(
                        index,
                        Conn {
                            fd,
                            peer,
                            accepted: self.now,
                            listener: id,
                            serial: conn.serial,
                            watched: false,
                            at_worker: None,
                            search_cost: 0,
                            header_len: 0,
                            proxy: None,
                        },
                    );
                    self.peek(conn, false);
                }
                Attempt::Again => {}
                Attempt::Empty => {
                    listener.ready = false;
                    let over = listener.retiring || self.core.accepting(id) == Accepting::Finish;
                    if over && listener.is_due(self.now) {
                        self.leave(position);
                    }
                    return;
                }
                Attempt::Short(_)
                    if listener.waits < MOST_WAITS && self.background.closers.is_busy() =>
                {
                    listener.waits += 1;
                    listener.paused_until = Some(self.now + CLOSING);
                    return;
                }
                Attempt::Short(errno) => {
                    let pause = self.config.limits.resource_pause;
                    listener.paused_until = Some(self.now + pause);
                    listener.short = true;
                    self.observation.meters.accept_pauses += 1;
                    let pool = self.core.pool_of_listener(id);
                    if let Some(suppressed) =
                        self.observation.allow(self.now, pool, Cause::Shortage)
                    {
                        log::warn!(
                            "event=accept_paused {} error={errno} pause={} suppressed={suppressed}",
                            self.listener(id),
                            super::events::span(pause),
                            errno = quoted(&errno)
                        );
                        let name = self.core.listener_name(id).to_owned();
                        self.fault(FaultKind::AcceptPaused, &name, || {
                            format!(
                                "clients wait for {}: {errno}",
                                humantime::format_duration(pause)
                            )
                        });
                    }
                    return;
                }
            }
        }
    }

    /// Puts exactly the listeners whose clients the core wants into the poll. True if a listener
    /// may have clients now.
    pub(super) fn watch_listeners(&mut self) -> bool {
        let mut work = false;
        for position in 0..self.listeners.sockets.len() {
            let wanted = self.wants_clients(position);
            let listener = &mut self.listeners.sockets[position];
            if listener.paused_until.is_some_and(|until| until <= self.now) {
                listener.paused_until = None;
            }
            let wanted = wanted && listener.paused_until.is_none();
            // The last check of the queue is due.
            listener.ready |= listener.due().is_some_and(|at| at <= self.now);
            if let Err(error) = listener.watch(self.wakeup.registry(), wanted) {
                // Out of memory for the poll: try again after a pause.
                listener.paused_until = Some(self.now + self.config.limits.resource_pause);
                let pool = self.core.pool_of_listener(listener.id);
                if let Some(suppressed) = self.observation.allow(self.now, pool, Cause::NotWatched)
                {
                    log::warn!(
                        "event=listener_not_watched listener={} error={error} suppressed={suppressed}",
                        self.core.listener_name(listener.id),
                        error = quoted(&error)
                    );
                }
            }
            work |= listener.ready && wanted;
        }
        work
    }

    /// One socket of the listener was closed, perhaps the last one.
    pub(super) fn closed(&mut self, id: ListenerId) {
        let mut sockets = self.listeners.of(id);
        if sockets.all(ListenerIo::is_closed) {
            if self.core.is_listener_retired(id) {
                log::info!("event=listener_closed {}", self.listener(id));
            }
            self.core.listener_closed(self.now, id);
        }
    }

    /// A listener and its pool, for a log line.
    fn listener(&self, id: ListenerId) -> String {
        let pool = self.core.pool_of_listener(id).map_or("", |pool| self.core.pool_name(pool));
        format!("listener={} pool={pool}", self.core.listener_name(id))
    }

    /// The state of a listener, for the status.
    pub(super) fn listener_state(&self, id: ListenerId) -> &'static str {
        let mut sockets = self.listeners.of(id);
        if sockets.clone().all(ListenerIo::is_closed) {
            return "closed";
        }
        if sockets.any(|listener| listener.paused_until.is_some()) {
            return "paused";
        }
        let pool = self.core.pool_of_listener(id);
        match self.core.accepting(id) {
            Accepting::Yes => "accepting",
            Accepting::Pause if pool.is_some_and(|pool| self.is_steered(pool)) => "steered",
            Accepting::Pause => "paused",
            Accepting::Refuse => "refusing",
            Accepting::Finish => "closed",
        }
    }
}
