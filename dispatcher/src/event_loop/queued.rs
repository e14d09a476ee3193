//! Queued connections: no worker is available yet. The poll watches them for clients that go away,
//! and for first bytes.

use std::os::fd::AsRawFd;

use mio::Interest;
use mio::event::Event;
use mio::unix::SourceFd;

use super::EventLoop;
use super::token::{Key, Source};
use dispatcher_core::ConnId;

impl EventLoop {
    /// Puts newly queued connections into the poll. Usually there are none: a revoked connection
    /// has another worker before the loop sleeps.
    pub(super) fn watch_queued(&mut self) {
        if self.core.totals().queued == 0 {
            return;
        }
        for id in self.core.queued() {
            let Some(conn) = self.connections.get_mut(id.index) else { continue };
            if conn.watched {
                continue;
            }
            let token = Source::Queued(Key::from(id)).token();
            let raw = conn.fd.as_raw_fd();
            let result =
                self.wakeup.registry().register(&mut SourceFd(&raw), token, Interest::READABLE);
            // If this fails, the worker notices that the client has gone.
            conn.watched = result.is_ok();
        }
    }

    /// A client that reset its connection is gone; a client that only half-closed it still waits
    /// for an answer. Its bytes matter only while the first bytes are awaited.
    pub(super) fn queued_event(&mut self, key: Key, event: &Event) {
        let Some(conn) = self.connections.get(key.index) else { return };
        if !conn.watched || !key.is(conn.serial) {
            return;
        }
        let id = ConnId { index: key.index, serial: conn.serial };
        if event.is_error() || event.is_write_closed() {
            self.core.client_gone(self.now, id);
        } else {
            self.peek(id, event.is_read_closed());
        }
    }
}
