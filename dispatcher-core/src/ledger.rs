//! The connections of which the dispatcher has a descriptor, and the queues of those that are at no
//! worker.
//!
//! Owns connection numbers and entries; other modules decide where a connection goes. Entries and
//! links are reused, so that once warm nothing is allocated for a connection.

use std::time::Duration;

use super::types::{AffinityKey, Client, ConnId, ListenerId, Time};
use crate::affinity::key::ClientIdentity;
use dispatch_protocol::ClientAddr;

/// No entry.
const NONE: u32 = u32::MAX;

/// Where a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// The entry is free.
    Free,
    /// Its PROXY header is awaited.
    Header,
    /// Its first bytes are awaited.
    Awaiting,
    /// In the pool's queue.
    Queued,
    /// In flight to this worker.
    InFlight(u32),
    /// Sent to a worker of the line protocol, and so taken; the event loop has its copy until the
    /// worker has read it. `tracked`: the kernel tells the end of its socket.
    Kept { tracked: bool },
    /// Taken or closed; the event loop still has its copy.
    Leaving,
}

/// Why a connection is placed again; the reason determines which workers may get it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Redispatch {
    /// As for a new connection: it was never sent, or its worker left.
    New,
    /// Its worker is busy: any trusted worker with room may get it.
    Busy,
    /// A thread of another worker waits in `accept`.
    Idle,
    /// The worker `from` left it untaken: it goes to a worker that usually takes within `limit`.
    Slow { from: u32, limit: Duration },
    /// The worker `from` failed a trial with it: any other may get it.
    Failed { from: u32 },
}

/// One connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Conn {
    pub(super) serial: u64,
    pub(super) accepted: Time,
    pub(super) listener: ListenerId,
    pub(super) peer: ClientAddr,
    /// The key of its client, if any.
    pub(super) key: Option<AffinityKey>,
    /// The identity by which the pool's affinity finds the client's worker.
    pub(super) identity: Option<ClientIdentity>,
    /// When the wait for its PROXY header or its first bytes began.
    pub(super) since: Time,
    /// Its source may send a PROXY header.
    pub(super) trusted: bool,
    pub(super) place: Place,
    /// Its client's entry in the listener's [`super::access_control::AccessControl`], while that
    /// counts it.
    pub(super) client: u32,
    /// Whether a record that names it may have reached a worker before.
    pub(super) resent: bool,
    /// How often it was revoked because its worker left it untaken.
    pub(super) moves: u8,
    /// It is a trial: its worker is without trust and has less time to take it.
    pub(super) trial: bool,
    /// Its key selected its worker: idle threads of other workers are no reason to move it.
    pub(super) bound: bool,
    /// Why it is placed again, if it is.
    pub(super) redispatch: Redispatch,
    /// Which of the pool's two queues has it, while it is queued.
    returned: bool,
    prev: u32,
    next: u32,
}

/// Every connection.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    conns: Vec<Conn>,
    free: Vec<u32>,
    serial: u64,
    /// Number of used entries by listener.
    of_listener: Vec<u32>,
}

/// First in, first out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Queue {
    head: u32,
    tail: u32,
    len: u64,
}

impl Default for Queue {
    fn default() -> Self {
        Queue { head: NONE, tail: NONE, len: 0 }
    }
}

impl Queue {
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn first(&self) -> Option<u32> {
        Some(self.head).filter(|&head| head != NONE)
    }
}

/// A pool's connections that wait for a worker. Connections that were sent before are older than
/// all others, so they go first.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PoolQueue {
    returned: Queue,
    fresh: Queue,
}

impl PoolQueue {
    pub(super) fn len(&self) -> u64 {
        self.returned.len + self.fresh.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The connection to be placed first.
    pub(super) fn first(&self) -> Option<u32> {
        [self.returned.head, self.fresh.head].into_iter().find(|&head| head != NONE)
    }

    fn queue(&mut self, returned: bool) -> &mut Queue {
        if returned { &mut self.returned } else { &mut self.fresh }
    }
}

impl Ledger {
    /// Makes the entry of a new connection; the caller gives it a place at once.
    pub(super) fn open(&mut self, now: Time, client: Client) -> ConnId {
        self.serial += 1;
        let listener = usize::from(client.listener.0);
        if self.of_listener.len() <= listener {
            self.of_listener.resize(listener + 1, 0);
        }
        self.of_listener[listener] += 1;
        let conn = Conn {
            serial: self.serial,
            accepted: now,
            listener: client.listener,
            peer: client.peer,
            key: client.key,
            identity: None,
            since: Time::default(),
            trusted: false,
            place: Place::Leaving,
            client: super::access_control::UNTRACKED,
            resent: false,
            moves: 0,
            trial: false,
            bound: false,
            redispatch: Redispatch::New,
            returned: false,
            prev: NONE,
            next: NONE,
        };
        let index = match self.free.pop() {
            Some(index) => {
                self.conns[index as usize] = conn;
                index
            }
            None => {
                self.conns.push(conn);
                (self.conns.len() - 1) as u32
            }
        };
        ConnId { index, serial: conn.serial }
    }

    /// The event loop has dropped its copy: frees the entry.
    pub(super) fn forget(&mut self, conn: ConnId) {
        let entry = &mut self.conns[conn.index as usize];
        debug_assert!(entry.place == Place::Leaving && entry.serial == conn.serial);
        entry.place = Place::Free;
        self.of_listener[usize::from(entry.listener.0)] -= 1;
        self.free.push(conn.index);
    }

    /// Whether a used entry names this listener.
    pub(super) fn refers_to(&self, listener: usize) -> bool {
        self.of_listener.get(listener).is_some_and(|&count| count > 0)
    }

    pub(super) fn id(&self, index: u32) -> ConnId {
        ConnId { index, serial: self.conns[index as usize].serial }
    }

    pub(super) fn get(&self, index: u32) -> &Conn {
        &self.conns[index as usize]
    }

    pub(super) fn get_mut(&mut self, index: u32) -> &mut Conn {
        &mut self.conns[index as usize]
    }

    /// The entry of `conn`, if that has not been reused.
    pub(super) fn find(&self, conn: ConnId) -> Option<&Conn> {
        self.conns.get(conn.index as usize).filter(|entry| entry.serial == conn.serial)
    }

    /// Makes the listener's access control count none of its connections.
    pub(super) fn untrack(&mut self, listener: ListenerId) {
        for conn in self.conns.iter_mut().filter(|conn| conn.listener == listener) {
            conn.client = super::access_control::UNTRACKED;
        }
    }

    pub(super) fn entries(&self) -> &[Conn] {
        &self.conns
    }

    pub(super) fn entries_mut(&mut self) -> &mut [Conn] {
        &mut self.conns
    }

    /// Appends a connection to the queue of returned or of new connections.
    pub(super) fn enqueue(&mut self, queued: &mut PoolQueue, index: u32, returned: bool) {
        self.append(queued.queue(returned), index);
        let conn = &mut self.conns[index as usize];
        conn.place = Place::Queued;
        conn.returned = returned;
    }

    /// Appends a connection to the queue of those whose first bytes are awaited.
    pub(super) fn await_bytes(&mut self, awaiting: &mut Queue, index: u32, now: Time) {
        self.append(awaiting, index);
        let conn = &mut self.conns[index as usize];
        conn.place = Place::Awaiting;
        conn.since = now;
    }

    /// Appends a connection to the queue of those whose PROXY header is awaited.
    pub(super) fn await_header(&mut self, queue: &mut Queue, index: u32, now: Time) {
        self.append(queue, index);
        let conn = &mut self.conns[index as usize];
        conn.place = Place::Header;
        conn.since = now;
    }

    fn append(&mut self, queue: &mut Queue, index: u32) {
        let tail = std::mem::replace(&mut queue.tail, index);
        queue.len += 1;
        if tail == NONE {
            queue.head = index;
        } else {
            self.conns[tail as usize].next = index;
        }
        let conn = &mut self.conns[index as usize];
        (conn.prev, conn.next) = (tail, NONE);
    }

    /// Removes the first connection of the queue.
    pub(super) fn pop(&mut self, queued: &mut PoolQueue) -> Option<u32> {
        let head = queued.first()?;
        self.dequeue(queued, head);
        Some(head)
    }

    /// Removes this connection from the queue.
    pub(super) fn dequeue(&mut self, queued: &mut PoolQueue, index: u32) {
        let conn = &mut self.conns[index as usize];
        debug_assert!(conn.place == Place::Queued);
        conn.place = Place::Leaving;
        let returned = conn.returned;
        self.remove(queued.queue(returned), index);
    }

    /// Removes this connection from the queue of those whose first bytes are awaited.
    pub(super) fn end_await(&mut self, awaiting: &mut Queue, index: u32) {
        let conn = &mut self.conns[index as usize];
        debug_assert!(conn.place == Place::Awaiting);
        conn.place = Place::Leaving;
        self.remove(awaiting, index);
    }

    /// Removes this connection from the queue of those whose PROXY header is awaited.
    pub(super) fn end_header(&mut self, queue: &mut Queue, index: u32) {
        let conn = &mut self.conns[index as usize];
        debug_assert!(conn.place == Place::Header);
        conn.place = Place::Leaving;
        self.remove(queue, index);
    }

    fn remove(&mut self, queue: &mut Queue, index: u32) {
        let Conn { prev, next, .. } = self.conns[index as usize];
        queue.len -= 1;
        match prev {
            NONE => queue.head = next,
            prev => self.conns[prev as usize].next = next,
        }
        match next {
            NONE => queue.tail = prev,
            next => self.conns[next as usize].prev = prev,
        }
    }

    /// Every queued connection, in the order of placement.
    pub(super) fn walk<'a>(&'a self, queued: &PoolQueue) -> impl Iterator<Item = u32> + 'a {
        self.walk_queue(&queued.returned).chain(self.walk_queue(&queued.fresh))
    }

    /// Every connection of a queue, in order.
    pub(super) fn walk_queue<'a>(&'a self, queue: &Queue) -> impl Iterator<Item = u32> + use<'a> {
        let some = |at: u32| (at != NONE).then_some(at);
        std::iter::successors(some(queue.head), move |&at| some(self.conns[at as usize].next))
    }
}
