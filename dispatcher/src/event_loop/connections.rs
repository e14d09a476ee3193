//! The connections of which the dispatcher has a copy, and what sending them to workers needs.

use std::os::fd::OwnedFd;

use dispatch_protocol::ClientAddr;
use dispatch_protocol::wire::{Entry, ProxyHeader};
use mio::Registry;

use super::handoff_check::HandoffCheck;
use super::join::forget;
use dispatcher_core::{ConnId, ListenerId, Time};

/// A connection of which we still have a copy.
#[derive(Debug)]
pub(super) struct Conn {
    pub(super) fd: OwnedFd,
    pub(super) peer: ClientAddr,
    pub(super) accepted: Time,
    pub(super) listener: ListenerId,
    pub(super) serial: u64,
    /// In the poll, because it is held. Must be taken out before it is sent or closed.
    pub(super) watched: bool,
    /// The last worker that it was sent to, which may have a copy.
    pub(super) at_worker: Option<u64>,
    /// What looking at its first bytes has cost so far.
    pub(super) search_cost: u32,
    /// Length of its PROXY header, which was read.
    pub(super) header_len: u32,
    /// What a proxy said about it, once its PROXY header is read: `peer` is the client then.
    pub(super) proxy: Option<Box<ProxyHeader>>,
}

impl Conn {
    /// The address of the other end of the socket.
    pub(super) fn source(&self) -> ClientAddr {
        self.proxy.as_ref().map_or(self.peer, |header| header.address)
    }
}

/// All connections of which the dispatcher has a copy.
#[derive(Debug)]
pub(super) struct Connections {
    /// By `ConnId::index`.
    pub(super) table: Vec<Option<Conn>>,
    /// The difference between `CLOCK_REALTIME` and the loop's clock, in this turn.
    pub(super) to_realtime: u64,
    pub(super) handoff_check: HandoffCheck,
    /// Buffers that are reused, so that a connection costs no allocation.
    pub(super) entries: Vec<Entry>,
    pub(super) record: Vec<u8>,
    pub(super) first_bytes: Vec<u8>,
    pub(super) decoded: Vec<u8>,
}

impl Connections {
    pub(super) fn new() -> std::io::Result<Connections> {
        Ok(Connections {
            table: Vec::new(),
            to_realtime: 0,
            handoff_check: HandoffCheck::new()?,
            entries: Vec::new(),
            record: Vec::new(),
            first_bytes: Vec::new(),
            decoded: Vec::new(),
        })
    }

    pub(super) fn insert(&mut self, index: u32, conn: Conn) {
        let index = index as usize;
        if self.table.len() <= index {
            self.table.resize_with(index + 1, || None);
        }
        self.table[index] = Some(conn);
    }

    pub(super) fn get(&self, index: u32) -> Option<&Conn> {
        self.table.get(index as usize)?.as_ref()
    }

    pub(super) fn get_mut(&mut self, index: u32) -> Option<&mut Conn> {
        self.table.get_mut(index as usize)?.as_mut()
    }

    pub(super) fn take(&mut self, id: ConnId) -> Option<Conn> {
        self.table.get_mut(id.index as usize)?.take()
    }

    /// Takes a connection out of the poll before it is sent or closed. The worker's copy keeps the
    /// socket open, so its events would go on and could no longer be stopped.
    pub(super) fn unwatch(&mut self, registry: &Registry, id: ConnId) {
        if let Some(conn) = self.get_mut(id.index)
            && std::mem::take(&mut conn.watched)
        {
            forget(registry, &conn.fd);
        }
    }
}
