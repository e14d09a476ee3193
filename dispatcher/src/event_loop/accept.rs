//! Clients at the door: accepting from the listeners as far as the core says, and no further.

use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use dispatch_protocol::ClientAddr;
use mio::unix::SourceFd;
use mio::{Interest, Registry};
use rustix::io::Errno;
use rustix::net::SocketFlags;

use super::EventLoop;
use super::leaving::Leaving;
use super::rate_limit::Cause;
use super::token::Source;
use crate::background::cleaner::Cleaner;
use crate::background::closer::Closers;
use crate::background::logger::quoted;
use crate::listen::bind::Listening;
use dispatcher_core::{Accepting, Client, ListenerId, Time};

/// One listening socket. A configured listener has one, or several when a service manager passed several under its name.
#[derive(Debug)]
pub(super) struct ListenerIo {
    pub(super) id: ListenerId,
    /// `None` once a stop has closed it, or a reload that took it out.
    pub(super) listening: Option<Listening>,
    /// Position in the event loop's table; part of its token.
    position: usize,
    /// May have clients waiting. Set by an edge, cleared only by EAGAIN.
    pub(super) ready: bool,
    /// In the poll. Not while the core wants no clients, or each arrival would wake us for nothing.
    watched: bool,
    /// Resting after EMFILE and its kind.
    pub(super) paused_until: Option<Time>,
    /// Another socket has taken its place: it is emptied and closed.
    retiring: bool,
    /// No client has been accepted since it last paused for that.
    short: bool,
    /// Times in a row that it paused only for a descriptor that is about to be closed.
    waits: u32,
    /// Clients still to be accepted from this socket before it is closed, once it is to be.
    pub(super) last: u32,
    /// `Some` once it is taken out.
    pub(super) leaving: Option<Leaving>,
    /// Clients that found no listener behind it.
    pub(super) turned_away: u64,
}

/// A connection of which we still have a copy.
#[derive(Debug)]
pub(super) struct Conn {
    pub(super) fd: OwnedFd,
    pub(super) peer: ClientAddr,
    pub(super) accepted: Time,
    pub(super) listener: ListenerId,
    pub(super) serial: u64,
    /// In the poll, because it is queued. Must be taken out before it is sent or closed.
    pub(super) watched: bool,
    /// The last worker that it was sent to, which may have a copy.
    pub(super) at_worker: Option<u64>,
    /// What looking at its first bytes has cost so far.
    pub(super) looked: u32,
}

/// How long to rest when descriptors are about to be closed.
const CLOSING: Duration = Duration::from_millis(1);

/// After so many such rests in a row there is a shortage.
const MOST_WAITS: u32 = 20;

/// What one attempt to accept gave.
pub(super) enum Attempt {
    Client(OwnedFd, ClientAddr),
    /// A client that was gone again, or a signal: try the next.
    Again,
    Empty,
    /// No descriptor or memory for it now.
    Short(Errno),
}

impl ListenerIo {
    /// The id of a socket that belongs to no listener. There are fewer than that: see `reload`.
    pub(super) const NOBODY: ListenerId = ListenerId(u16::MAX);

    pub(super) fn new(
        id: ListenerId,
        listening: Listening,
        position: usize,
        last: u32,
    ) -> ListenerIo {
        ListenerIo {
            id,
            listening: Some(listening),
            position,
            ready: false,
            watched: false,
            paused_until: None,
            retiring: false,
            short: false,
            waits: 0,
            last,
            leaving: None,
            turned_away: 0,
        }
    }

    /// Whether another socket has taken its place.
    pub(super) fn is_retiring(&self) -> bool {
        self.retiring
    }

    /// Another socket takes its place.
    pub(super) fn retire(&mut self) {
        self.retiring = true;
        // Even if no edge said so: the last look must be at the queue itself.
        self.ready = true;
    }

    /// Notes an edge of the poll.
    pub(super) fn edge(&mut self) {
        self.ready = true;
    }

    /// Puts the socket into the poll or takes it out. Putting it in gives a new edge if clients wait.
    pub(super) fn watch(&mut self, registry: &Registry, wanted: bool) -> std::io::Result<()> {
        let Some(listening) = &self.listening else { return Ok(()) };
        if wanted == self.watched {
            return Ok(());
        }
        let raw = listening.fd.as_raw_fd();
        if wanted {
            let token = Source::Listener(self.position).token();
            registry.register(&mut SourceFd(&raw), token, Interest::READABLE)?;
        } else {
            registry.deregister(&mut SourceFd(&raw))?;
            self.ready = false;
        }
        self.watched = wanted;
        Ok(())
    }

    /// The socket goes, and its file: in a file system, which may be slow.
    pub(super) fn close(
        &mut self,
        registry: &Registry,
        cleaner: &mut Cleaner,
        closers: &mut Closers,
    ) {
        let _ = self.watch(registry, false);
        if let Some(listening) = self.listening.take() {
            listening.close(cleaner, closers);
        }
        self.ready = false;
    }

    pub(super) fn attempt(&self) -> Attempt {
        let Some(listening) = &self.listening else { return Attempt::Empty };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        match rustix::net::acceptfrom_with(&listening.fd, flags) {
            Ok((fd, address)) => {
                let inet = address.and_then(|any| SocketAddr::try_from(any).ok());
                Attempt::Client(fd, inet.map_or(ClientAddr::Unix, ClientAddr::from))
            }
            Err(Errno::AGAIN) => Attempt::Empty,
            Err(
                errno @ (Errno::MFILE
                | Errno::NFILE
                | Errno::NOBUFS
                | Errno::NOMEM
                | Errno::BADF
                | Errno::INVAL
                | Errno::NOTSOCK),
            ) => Attempt::Short(errno),
            // EINTR, ECONNABORTED, EPERM of a firewall, and the network errors of a client that is already gone.
            Err(_) => Attempt::Again,
        }
    }
}

impl EventLoop {
    /// Accepts up to `accept_batch` clients from each listener that has some, in turn.
    pub(super) fn accept_all(&mut self) {
        let count = self.listeners.len();
        for step in 0..count {
            self.accept_from((self.next_listener + step) % count);
            // Each listener's clients are on their way before the next is asked.
            self.perform();
        }
        self.next_listener = (self.next_listener + 1) % count.max(1);
    }

    pub(super) fn accept_from(&mut self, position: usize) {
        if self.listeners[position].is_kept() {
            return self.turn_away(position);
        }
        for _ in 0..self.config.limits.accept_batch {
            let listener = &mut self.listeners[position];
            if !listener.ready || listener.paused_until.is_some() {
                return;
            }
            // Closes are behind: more descriptors would only pile up.
            if self.closers.is_full() {
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
            let listener = &mut self.listeners[position];
            match listener.attempt() {
                Attempt::Client(fd, peer) => {
                    listener.waits = 0;
                    if std::mem::take(&mut listener.short)
                        && let Some(suppressed) = self.limits.allow(
                            self.now,
                            self.core.pool_of_listener(id),
                            Cause::Relieved,
                        )
                    {
                        log::info!(
                            "event=accept_resumed {} left_out={suppressed}",
                            self.listener(id)
                        );
                    }
                    let client = Client::new(id, peer);
                    let conn = if self.meters.samples() {
                        let began = super::clock();
                        let conn = self.core.accepted(self.now, client);
                        self.meters.decision.record(super::clock() - began);
                        conn
                    } else {
                        self.core.accepted(self.now, client)
                    };
                    let index = conn.index as usize;
                    if self.conns.len() <= index {
                        self.conns.resize_with(index + 1, || None);
                    }
                    self.conns[index] = Some(Conn {
                        fd,
                        peer,
                        accepted: self.now,
                        listener: id,
                        serial: conn.serial,
                        watched: false,
                        at_worker: None,
                        looked: 0,
                    });
                    self.look(conn, false);
                    if std::mem::take(&mut self.slept_long) {
                        self.perform();
                    }
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
                Attempt::Short(_) if listener.waits < MOST_WAITS && self.closers.is_busy() => {
                    listener.waits += 1;
                    listener.paused_until = Some(self.now + CLOSING);
                    return;
                }
                Attempt::Short(errno) => {
                    let pause = self.config.limits.resource_pause;
                    listener.paused_until = Some(self.now + pause);
                    listener.short = true;
                    self.meters.accept_pauses += 1;
                    let pool = self.core.pool_of_listener(id);
                    if let Some(suppressed) = self.limits.allow(self.now, pool, Cause::Shortage) {
                        log::warn!(
                            "event=accept_paused {} error={errno} pause={} left_out={suppressed}",
                            self.listener(id),
                            super::events::span(pause),
                            errno = quoted(&errno)
                        );
                        let name = self.core.listener_name(id).to_owned();
                        self.fault("accept_paused", &name, || {
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

    /// Watches exactly the listeners whose clients the core wants. True if one may have clients right now.
    pub(super) fn watch_listeners(&mut self) -> bool {
        let mut work = false;
        for position in 0..self.listeners.len() {
            let wanted = self.wants_clients(position);
            let listener = &mut self.listeners[position];
            if listener.paused_until.is_some_and(|until| until <= self.now) {
                listener.paused_until = None;
            }
            let wanted = wanted && listener.paused_until.is_none();
            // The last look.
            listener.ready |= listener.due().is_some_and(|at| at <= self.now);
            if let Err(error) = listener.watch(self.poll.registry(), wanted) {
                // Out of memory for the poll: come back to it after a pause.
                listener.paused_until = Some(self.now + self.config.limits.resource_pause);
                let pool = self.core.pool_of_listener(listener.id);
                if let Some(suppressed) = self.limits.allow(self.now, pool, Cause::NotWatched) {
                    log::warn!(
                        "event=listener_not_watched listener={} error={error} left_out={suppressed}",
                        self.core.listener_name(listener.id),
                        error = quoted(&error)
                    );
                }
            }
            work |= listener.ready && wanted;
        }
        work
    }

    /// One of its sockets was closed; perhaps the last one.
    pub(super) fn closed(&mut self, id: ListenerId) {
        let mut sockets = self.listeners.iter().filter(|listener| listener.id == id);
        if sockets.all(|socket| socket.listening.is_none()) {
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

    /// How a listener stands, for the status.
    pub(super) fn listener_state(&self, id: ListenerId) -> &'static str {
        let mut sockets = self.listeners.iter().filter(|listener| listener.id == id);
        if sockets.clone().all(|listener| listener.listening.is_none()) {
            return "closed";
        }
        if sockets.any(|listener| listener.paused_until.is_some()) {
            return "paused";
        }
        match self.core.accepting(id) {
            Accepting::Yes => "accepting",
            Accepting::Pause => "paused",
            Accepting::Refuse => "refusing",
            Accepting::Finish => "closed",
        }
    }
}
