//! Reads the first bytes of clients and leaves them in the socket for the worker.
//!
//! The poll says when to read; the settings, for how long and how many bytes; `crate::preface`
//! parses the bytes, and the core decides what follows.

use std::os::fd::AsRawFd;

use mio::Interest;
use mio::unix::SourceFd;
use rustix::io::Errno;
use rustix::net::RecvFlags;

use super::EventLoop;
use super::token::{Key, Source};
use crate::preface::{self, Parsed, is_enough};
use dispatcher_core::ConnId;

impl EventLoop {
    /// Reads the first bytes of a connection that awaits them; with `end`, no more bytes can come.
    ///
    /// The poll is edge-triggered, so later bytes cause another event. The read after the
    /// registration finds bytes that came before it.
    pub(super) fn peek(&mut self, id: ConnId, end: bool) {
        if self.core.awaits_header(id) {
            return self.look_for_header(id, end);
        }
        if !self.core.awaits_bytes(id) {
            return;
        }
        let connections = &mut self.connections;
        let Some(Some(conn)) = connections.table.get_mut(id.index as usize) else { return };
        let pool = self.core.pool_of_listener(conn.listener);
        let settings = pool.and_then(|pool| self.core.pool_settings(pool));
        let Some((affinity, peek)) =
            settings.and_then(|settings| Some((settings.affinity.as_ref()?, settings.peek)))
        else {
            return;
        };
        let most = peek.max_bytes as usize;
        if connections.first_bytes.len() < most {
            connections.first_bytes.resize(most, 0);
        }
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let received = loop {
            match rustix::net::recv(&conn.fd, &mut connections.first_bytes[..most], flags) {
                Err(Errno::INTR) => {}
                other => break other.map(|(_, received)| received.min(most)),
            }
        };
        let known = match received {
            Err(Errno::AGAIN) if !end => return self.watch_first_bytes(id),
            Err(Errno::AGAIN) => None,
            Err(_) => return self.core.client_gone(self.now, id),
            Ok(count) => {
                let last = end
                    || count == 0
                    || count == most
                    || is_enough(&mut conn.search_cost, count, peek.max_bytes);
                let bytes = connections.first_bytes.get(..count).unwrap_or_default();
                match preface::read(&affinity.key, bytes, last, &mut connections.decoded) {
                    Parsed::Identity(known) => Some(known),
                    Parsed::Incomplete => return self.watch_first_bytes(id),
                    Parsed::NoIdentity => None,
                }
            }
        };
        self.core.first_bytes(self.now, id, known);
    }

    /// Puts the connection into the poll, for more bytes and for the end.
    fn watch_first_bytes(&mut self, id: ConnId) {
        if self.watch_for_bytes(id).is_err() {
            // Out of memory for the poll: no event would report the bytes.
            self.core.first_bytes(self.now, id, None);
        }
    }

    /// Puts the connection into the poll if it is not there.
    pub(super) fn watch_for_bytes(&mut self, id: ConnId) -> std::io::Result<()> {
        let Some(conn) = self.connections.get_mut(id.index) else { return Ok(()) };
        if conn.watched {
            return Ok(());
        }
        let token = Source::Queued(Key::from(id)).token();
        let raw = conn.fd.as_raw_fd();
        let registry = self.wakeup.registry();
        registry.register(&mut SourceFd(&raw), token, Interest::READABLE)?;
        conn.watched = true;
        Ok(())
    }
}
