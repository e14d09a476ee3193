//! Queued connections: nobody could be given them yet. Watched for clients that go away meanwhile, and for first bytes.

use std::os::fd::AsRawFd;

use mio::Interest;
use mio::event::Event;
use mio::unix::SourceFd;

use super::EventLoop;
use super::join::forget;
use super::token::{Key, Source};
use dispatcher_core::ConnId;

impl EventLoop {
    /// Puts newly queued connections into the poll. Most of the time there are none: what comes back from a worker has
    /// usually found another one before anybody sleeps.
    pub(super) fn watch_queued(&mut self) {
        if self.core.totals().queued == 0 {
            return;
        }
        for id in self.core.queued() {
            let Some(Some(conn)) = self.conns.get_mut(id.index as usize) else { continue };
            if conn.watched {
                continue;
            }
            let token = Source::Queued(Key::from(id)).token();
            let raw = conn.fd.as_raw_fd();
            let result =
                self.poll.registry().register(&mut SourceFd(&raw), token, Interest::READABLE);
            // Without it, a client that goes away is noticed by its worker instead.
            conn.watched = result.is_ok();
        }
    }

    /// A client that reset its connection is gone; one that only has nothing more to say still waits for its answer. What
    /// it says matters only while its first bytes are awaited.
    pub(super) fn queued_event(&mut self, key: Key, event: &Event) {
        let Some(Some(conn)) = self.conns.get(key.index as usize) else { return };
        if !conn.watched || !key.is(conn.serial) {
            return;
        }
        let id = ConnId { index: key.index, serial: conn.serial };
        if event.is_error() || event.is_write_closed() {
            self.core.client_gone(self.now, id);
        } else {
            self.look(id, event.is_read_closed());
        }
    }

    /// Takes a connection out of the poll before it is sent or closed: events of a socket that lives on elsewhere
    /// would go on coming, with no way to end them.
    pub(super) fn unwatch(&mut self, id: ConnId) {
        if let Some(Some(conn)) = self.conns.get_mut(id.index as usize)
            && std::mem::take(&mut conn.watched)
        {
            forget(self.poll.registry(), &conn.fd);
        }
    }
}
