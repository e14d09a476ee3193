//! Accepts and refuses streams.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use mio::Interest;
use mio::unix::SourceFd;
use rustix::io::Errno;

use super::super::super::control::Peer;
use super::super::super::join::forget;
use super::super::super::token::{Key, Source};
use super::super::LineEvent;
use super::super::streams::Stream;
use super::LineThread;
use crate::plural::count;

/// The shortest time to wait for the first report: coroutine servers of acl write theirs after a
/// second. A longer `hello_timeout` applies.
const FIRST_REPORT: Duration = Duration::from_secs(5);

/// Most streams accepted from one socket in one round.
const ACCEPTS_PER_ROUND: usize = 64;

impl LineThread {
    /// Puts the sockets into the poll, or takes them out.
    pub(super) fn watch(&mut self) {
        let wanted = !self.held && self.paused_until.is_none();
        let mut failed = false;
        for (position, listener) in self.listeners.iter_mut().enumerate() {
            let Some(fd) = &listener.socket.fd else { continue };
            if wanted && !listener.watched {
                let token = Source::Listener(position).token();
                let raw = fd.as_raw_fd();
                let registry = self.poll.registry();
                let done = registry.register(&mut SourceFd(&raw), token, Interest::READABLE);
                listener.watched = done.is_ok();
                failed |= done.is_err();
            } else if !wanted && std::mem::take(&mut listener.watched) {
                forget(self.poll.registry(), fd);
                listener.ready = false;
            }
        }
        if failed {
            self.pause();
        }
    }

    /// Stops accepting for a while: streams wait in the queues of the sockets.
    pub(super) fn pause(&mut self) {
        self.paused_until = Some(self.now + self.limits.resource_pause);
        self.watch();
    }

    pub(super) fn accept(&mut self, position: usize) {
        for _ in 0..ACCEPTS_PER_ROUND {
            let Some(listener) = self.listeners.get_mut(position).filter(|it| it.ready) else {
                return;
            };
            let Some(fd) = &listener.socket.fd else { return };
            let flags = rustix::net::SocketFlags::CLOEXEC | rustix::net::SocketFlags::NONBLOCK;
            match rustix::net::accept_with(fd, flags) {
                Ok(socket) => self.admit(socket, position),
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(Errno::AGAIN) => {
                    listener.ready = false;
                    return;
                }
                Err(errno) => {
                    // EMFILE or a similar error: the worker stays in the socket's queue.
                    self.pause();
                    return self.outbox.report(LineEvent::Short(errno.to_string()));
                }
            }
        }
    }

    fn admit(&mut self, socket: OwnedFd, position: usize) {
        let Some(listener) = self.listeners.get(position) else { return };
        let (pool, types) = (listener.socket.pool.clone(), Arc::clone(&listener.socket.types));
        let mut peer = match Peer::of(&socket) {
            Ok(peer) => peer,
            Err(error) => {
                let peer = Peer { pid: 0, uid: u32::MAX, gids: Vec::new() };
                self.refused(&peer, format!("no credentials: {error}"), None);
                return self.bin.close(vec![socket]);
            }
        };
        let uid = peer.uid;
        let (of_user, of_all) = self.streams.new_ones(uid);
        let (rate, burst) = (self.limits.join_rate, self.limits.join_burst);
        let (most_of_user, most) = (self.limits.max_pending_hellos, self.limits.max_handshakes);
        let why = if !self.rates.take(self.now, uid, rate, burst) {
            let times = count(rate.into(), "time");
            Some(("join_rate", format!("user {uid} connects more than {times} a second")))
        } else if of_user >= most_of_user as usize {
            let open = count(most_of_user.into(), "stream");
            Some(("max_pending_hellos", format!("user {uid} has {open} without a report")))
        } else if of_all >= most as usize {
            Some(("max_handshakes", format!("{most} workers have not reported yet")))
        } else {
            None
        };
        if let Some((key, reason)) = why {
            self.refused(&peer, reason, Some(key.to_owned()));
            return self.bin.close(vec![socket]);
        }
        peer.add_groups(&socket);
        let until = self.now + FIRST_REPORT.max(self.limits.hello_timeout);
        let raw = socket.as_raw_fd();
        let key = self.streams.insert(Stream::new(socket, peer, pool, types, until));
        let token = Source::Pending(key).token();
        let registry = self.poll.registry();
        if let Err(error) = registry.register(&mut SourceFd(&raw), token, Interest::READABLE) {
            self.refuse(key, format!("its stream cannot be watched: {error}"), None);
        }
    }

    /// Closes a stream whose worker may not join. The protocol has no answer for it; the log and
    /// the faults of the status say why.
    pub(super) fn refuse(&mut self, key: Key, reason: String, config_key: Option<String>) {
        let Some(stream) = self.take(key) else { return };
        self.refused(&stream.peer, reason, config_key);
        self.bin.close(vec![stream.socket]);
    }

    /// Reports a refusal to the hot thread, within the user's rate limit; the others are counted.
    pub(super) fn refused(&mut self, peer: &Peer, reason: String, key: Option<String>) {
        let Peer { pid, uid, .. } = *peer;
        let gid = peer.gids.first().copied().unwrap_or_default();
        if let Some(more) = self.refusals.allow(self.now, uid) {
            self.outbox.report(LineEvent::Refused { pid, uid, gid, reason, key, more });
        }
    }

    pub(super) fn report_suppressed(&mut self) {
        for (uid, count) in self.refusals.unreported(self.now) {
            self.outbox.report(LineEvent::RefusedMore { uid, count });
        }
    }
}
