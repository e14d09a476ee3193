//! Accepts and refuses control connections.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use dispatch_protocol::wire::{Refused, RefusedCode};
use mio::Interest;
use mio::unix::SourceFd;
use rustix::io::Errno;

use super::super::super::control::Peer;
use super::super::super::join::forget;
use super::super::super::token::Source;
use super::super::super::worker_io::send_record;
use super::super::HandshakeEvent;
use super::super::pending::Pending;
use super::HandshakeThread;
use crate::plural::count;
use dispatcher_core::Refusal;

/// Most control connections accepted in one round.
const ACCEPTS_PER_ROUND: usize = 64;

impl HandshakeThread {
    pub(super) fn watch(&mut self) -> io::Result<()> {
        let raw = self.listener.as_raw_fd();
        let token = Source::Dispatch.token();
        self.poll.registry().register(&mut SourceFd(&raw), token, Interest::READABLE)?;
        self.watched = true;
        Ok(())
    }

    /// Replaces the listening socket, after its file was removed.
    pub(super) fn listen(&mut self, listener: OwnedFd) {
        if std::mem::take(&mut self.watched) {
            forget(self.poll.registry(), &self.listener);
        }
        let old = std::mem::replace(&mut self.listener, listener);
        self.bin.close(vec![old]);
        self.ready = false;
        self.accept_again();
    }

    /// Begins or ends the time in which another dispatcher accepts from the socket.
    pub(super) fn hold(&mut self, held: bool) {
        self.held = held;
        if held {
            if std::mem::take(&mut self.watched) {
                forget(self.poll.registry(), &self.listener);
            }
            self.ready = false;
        } else {
            self.accept_again();
        }
    }

    fn accept_again(&mut self) {
        let wanted = !self.held && !self.watched && self.paused_until.is_none();
        if wanted && self.watch().is_err() {
            self.pause(self.settings.limits.resource_pause);
        }
    }

    /// Stops accepting for a while: connections wait in the socket's queue.
    pub(super) fn pause(&mut self, pause: Duration) {
        if std::mem::take(&mut self.watched) {
            forget(self.poll.registry(), &self.listener);
        }
        self.ready = false;
        self.paused_until = Some(self.now + pause);
    }

    pub(super) fn accept(&mut self) {
        for _ in 0..ACCEPTS_PER_ROUND {
            let most = self.settings.limits.connect_rate;
            if let Err(again) =
                self.connects.take(self.now, most, (most / 10).max(ACCEPTS_PER_ROUND as u32))
            {
                return self.pause(again - self.now);
            }
            let flags = rustix::net::SocketFlags::CLOEXEC | rustix::net::SocketFlags::NONBLOCK;
            match rustix::net::accept_with(&self.listener, flags) {
                Ok(socket) => self.admit(socket),
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(Errno::AGAIN) => {
                    self.ready = false;
                    return;
                }
                Err(errno) => {
                    // EMFILE or a similar error: the worker stays in the socket's queue.
                    self.pause(self.settings.limits.resource_pause);
                    return self.outbox.report(HandshakeEvent::Short(errno.to_string()));
                }
            }
        }
    }

    pub(super) fn admit(&mut self, socket: OwnedFd) {
        let mut peer = match Peer::of(&socket) {
            Ok(peer) => peer,
            Err(error) => {
                let peer = Peer { pid: 0, uid: u32::MAX, gids: Vec::new() };
                self.refused(&peer, format!("no credentials: {error}"), None);
                return self.bin.close(vec![socket]);
            }
        };
        let uid = peer.uid;
        let limits = &self.settings.limits;
        let (rate, burst) = (limits.join_rate, limits.join_burst);
        let (of_user, of_all) =
            (limits.max_pending_hellos as usize, limits.max_handshakes as usize);
        let deadline = self.now + limits.hello_timeout;
        let why = if !self.rates.take(self.now, uid, rate, burst) {
            Some((
                "join_rate",
                format!("user {uid} connects more than {} a second", count(rate.into(), "time")),
            ))
        } else if self.pending.count_of(uid) >= of_user {
            let open = count(of_user as u64, "connection");
            let reason = format!("user {uid} has {open} without a hello");
            Some(("max_pending_hellos", reason))
        } else if self.pending.len() >= of_all {
            match self.pending.victim(uid).and_then(|key| self.pending.take(key)) {
                Some(victim) => {
                    let reason = format!("{of_all} handshakes are under way");
                    self.refuse(victim, again("max_handshakes", reason));
                    None
                }
                None => Some(("max_handshakes", format!("{of_all} handshakes are under way"))),
            }
        } else {
            None
        };
        if let Some((key, reason)) = why {
            return self.refuse_at(socket, &peer, again(key, reason));
        }
        peer.add_groups(&socket);
        let raw = socket.as_raw_fd();
        let key = self.pending.insert(socket, peer, deadline);
        let token = Source::Pending(key).token();
        let registry = self.poll.registry();
        if let Err(error) = registry.register(&mut SourceFd(&raw), token, Interest::READABLE)
            && let Some(pending) = self.pending.take(key)
        {
            let reason = format!("cannot watch its connection: {error}");
            self.refuse(pending, Refusal { code: RefusedCode::Resources, reason, key: None });
        }
    }

    /// Refuses connections without a hello in time.
    pub(super) fn refuse_silent(&mut self) {
        while let Some(late) = self.pending.late(self.now).and_then(|key| self.pending.take(key)) {
            let Pending { socket, peer, .. } = late;
            forget(self.poll.registry(), &socket);
            self.refused(&peer, "no hello in time".to_owned(), None);
            self.bin.close(vec![socket]);
        }
    }

    pub(super) fn refuse(&mut self, pending: Pending, refusal: Refusal) {
        forget(self.poll.registry(), &pending.socket);
        self.refuse_at(pending.socket, &pending.peer, refusal);
    }

    /// Tells the peer and the hot thread the reason. The record is small and the socket new, so the
    /// record fits.
    pub(super) fn refuse_at(&mut self, socket: OwnedFd, peer: &Peer, refusal: Refusal) {
        let Refusal { code, reason, key } = refusal;
        self.refused(peer, reason.clone(), key.clone());
        let mut record = Vec::new();
        Refused { code, reason, key }.encode(&mut record);
        let _ = send_record(socket.as_fd(), &record, &[]);
        self.bin.close(vec![socket]);
    }

    /// Reports a refusal to the hot thread, within the user's rate limit; the others are counted.
    pub(super) fn refused(&mut self, peer: &Peer, reason: String, key: Option<String>) {
        let Peer { pid, uid, .. } = *peer;
        let gid = peer.gids.first().copied().unwrap_or_default();
        if let Some(more) = self.refusals.allow(self.now, uid) {
            self.outbox.report(HandshakeEvent::Refused { pid, uid, gid, reason, key, more });
        }
    }

    pub(super) fn report_suppressed(&mut self) {
        for (uid, count) in self.refusals.unreported(self.now) {
            self.outbox.report(HandshakeEvent::RefusedMore { uid, count });
        }
    }
}
/// A refusal that the worker can retry.
fn again(key: &str, reason: String) -> Refusal {
    let reason = format!("{reason}; try again");
    Refusal { code: RefusedCode::Resources, reason, key: Some(key.to_owned()) }
}
