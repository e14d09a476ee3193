//! A worker's tickets: what each slot of its scoreboard is used for.
//!
//! Owns slots and sequence numbers. The ring is authoritative for the dispatcher; the words in the
//! scoreboard are only compared with it. Slots are created on demand. A freed slot is reused only
//! when [`SPARE_SLOTS`] others are free: meanwhile the closers write RELEASED into it, and the
//! worker must find that word when it closes the connection.

use std::collections::VecDeque;

use super::policy::NEVER;
use super::types::{Ticket, Time};

/// Slots of a scoreboard beyond `max_untaken`: the number of connections that a worker gets before
/// a slot is reused.
pub const SPARE_SLOTS: u32 = 128;

const NONE: u32 = u32::MAX;

/// The use of a ticket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Item {
    /// Nothing: the slot is free.
    Nothing,
    /// The connection with this index.
    Conn(u32),
    /// A probe.
    Probe,
    /// A connection of a ready check.
    Check,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    seq: u64,
    item: Item,
    sent_at: Time,
    /// When its patience ends, for a connection.
    due: Time,
    /// The event loop has seen the effect, so the scoreboard says SENT or later. Before, the slot
    /// has the word of an earlier ticket.
    offered: bool,
    /// The outcome of an [`super::Effect::Revoke`] is awaited.
    revoking: bool,
    prev: u32,
    next: u32,
}

/// The tickets of one worker, oldest first.
#[derive(Debug)]
pub(super) struct Ring {
    slots: Vec<Slot>,
    /// Ordered by how long they have been free, longest first.
    free: VecDeque<u32>,
    limit: u32,
    seq: u64,
    head: u32,
    tail: u32,
    len: u32,
    conns: u32,
    revoking: u32,
    /// No connection is due before this: [`Ring::overdue`] has nothing to find earlier.
    due: Time,
}

impl Ring {
    /// Reserves memory for every slot, so that no handoff allocates. Memory that no slot has used
    /// is not resident.
    pub(super) fn new(limit: u32) -> Ring {
        let most = (limit + SPARE_SLOTS + 1) as usize;
        Ring {
            slots: Vec::with_capacity(most),
            free: VecDeque::with_capacity(most),
            limit,
            seq: 0,
            head: NONE,
            tail: NONE,
            len: 0,
            conns: 0,
            revoking: 0,
            due: NEVER,
        }
    }

    /// Open tickets.
    pub(super) fn len(&self) -> u32 {
        self.len
    }

    /// Open tickets of connections.
    pub(super) fn conns(&self) -> u32 {
        self.conns
    }

    /// Open tickets that are being revoked.
    pub(super) fn revoking(&self) -> u32 {
        self.revoking
    }

    pub(super) fn has_room(&self) -> bool {
        self.len < self.limit
    }

    /// The same with so many slots less.
    pub(super) fn has_room_beside(&self, others: u32) -> bool {
        self.len.saturating_add(others) < self.limit
    }

    /// Issues a ticket for `item`; a connection is due at `due`. The caller has checked
    /// [`Ring::has_room`].
    pub(super) fn issue(&mut self, now: Time, item: Item, due: Time) -> Ticket {
        debug_assert!(self.has_room() && item != Item::Nothing);
        self.seq += 1;
        let slot = Slot {
            seq: self.seq,
            item,
            sent_at: now,
            due,
            offered: false,
            revoking: false,
            prev: self.tail,
            next: NONE,
        };
        let rested = self.free.len() > SPARE_SLOTS as usize;
        let at = match rested.then(|| self.free.pop_front()).flatten() {
            Some(at) => {
                self.slots[at as usize] = slot;
                at
            }
            None => {
                self.slots.push(slot);
                (self.slots.len() - 1) as u32
            }
        };
        match self.tail {
            NONE => self.head = at,
            tail => self.slots[tail as usize].next = at,
        }
        self.tail = at;
        self.len += 1;
        if let Item::Conn(_) = item {
            self.conns += 1;
            self.due = self.due.min(due);
        }
        Ticket { slot: at, seq: self.seq }
    }

    /// The use of `ticket`, if it is still open.
    pub(super) fn item(&self, ticket: Ticket) -> Option<Item> {
        self.slots
            .get(ticket.slot as usize)
            .filter(|slot| slot.seq == ticket.seq && slot.item != Item::Nothing)
            .map(|slot| slot.item)
    }

    /// Frees the slot of `ticket`, which must be open.
    pub(super) fn settle(&mut self, ticket: Ticket) {
        let slot = &mut self.slots[ticket.slot as usize];
        debug_assert!(slot.seq == ticket.seq && slot.item != Item::Nothing);
        self.conns -= u32::from(matches!(slot.item, Item::Conn(_)));
        self.revoking -= u32::from(slot.revoking);
        self.len -= 1;
        slot.item = Item::Nothing;
        slot.revoking = false;
        let (prev, next) = (slot.prev, slot.next);
        match prev {
            NONE => self.head = next,
            prev => self.slots[prev as usize].next = next,
        }
        match next {
            NONE => self.tail = prev,
            next => self.slots[next as usize].prev = prev,
        }
        self.free.push_back(ticket.slot);
        if self.conns == 0 {
            self.due = NEVER;
        }
    }

    /// When `ticket`, which must be open, was sent.
    pub(super) fn sent_at(&self, ticket: Ticket) -> Time {
        self.slots[ticket.slot as usize].sent_at
    }

    /// When to call [`Ring::overdue`] at the latest.
    pub(super) fn due(&self) -> Time {
        self.due
    }

    /// Sets when the connection of `ticket`, which must be open, is due.
    pub(super) fn postpone(&mut self, ticket: Ticket, due: Time) {
        self.slots[ticket.slot as usize].due = due;
        self.due = self.due.min(due);
    }

    /// Shortens the patience of each connection to at most `due` of the time when it was sent.
    pub(super) fn hurry(&mut self, due: impl Fn(Time) -> Time) {
        let mut at = self.head;
        while let Some(slot) = self.slots.get_mut(at as usize) {
            slot.due = slot.due.min(due(slot.sent_at));
            if let Item::Conn(_) = slot.item {
                self.due = self.due.min(slot.due);
            }
            at = slot.next;
        }
    }

    /// The connections whose patience has ended and that are not being revoked, oldest first.
    pub(super) fn overdue(&mut self, now: Time) -> Vec<(Ticket, u32)> {
        let mut overdue = Vec::new();
        let mut next = NEVER;
        for (ticket, conn) in self.connections() {
            match self.slots[ticket.slot as usize].due {
                due if due <= now => overdue.push((ticket, conn)),
                due => next = next.min(due),
            }
        }
        self.due = next;
        overdue
    }

    /// Connections in flight that are not being revoked, oldest first.
    pub(super) fn connections(&self) -> impl Iterator<Item = (Ticket, u32)> + '_ {
        self.walk().filter_map(|at| {
            let slot = &self.slots[at as usize];
            match slot.item {
                Item::Conn(conn) if !slot.revoking => {
                    Some((Ticket { slot: at, seq: slot.seq }, conn))
                }
                Item::Conn(_) | Item::Probe | Item::Check | Item::Nothing => None,
            }
        })
    }

    /// Marks this open ticket as being revoked. False if it was marked before.
    pub(super) fn revoke(&mut self, ticket: Ticket) -> bool {
        let slot = &mut self.slots[ticket.slot as usize];
        let first = !std::mem::replace(&mut slot.revoking, true);
        self.revoking += u32::from(first);
        first
    }

    /// Marks every open ticket as being revoked, and calls `revoke` for each that was not marked
    /// before, oldest first.
    pub(super) fn revoke_all(&mut self, mut revoke: impl FnMut(Ticket)) {
        let mut at = self.head;
        while let Some(slot) = self.slots.get_mut(at as usize) {
            if !slot.revoking {
                slot.revoking = true;
                self.revoking += 1;
                revoke(Ticket { slot: at, seq: slot.seq });
            }
            at = slot.next;
        }
    }

    /// The event loop has seen the effect with `ticket`.
    pub(super) fn offered(&mut self, ticket: Ticket) {
        if let Some(slot) = self.slots.get_mut(ticket.slot as usize)
            && slot.seq == ticket.seq
        {
            slot.offered = true;
        }
    }

    /// Every open ticket that the event loop has seen, oldest first. Those it has not seen are the
    /// newest.
    pub(super) fn offered_tickets(&self) -> impl Iterator<Item = Ticket> + '_ {
        self.tickets().take_while(|ticket| self.slots[ticket.slot as usize].offered)
    }

    /// Every open ticket, oldest first.
    pub(super) fn tickets(&self) -> impl Iterator<Item = Ticket> + '_ {
        self.walk().map(|at| Ticket { slot: at, seq: self.slots[at as usize].seq })
    }

    fn walk(&self) -> impl Iterator<Item = u32> + '_ {
        let some = |at: u32| (at != NONE).then_some(at);
        std::iter::successors(some(self.head), move |&at| some(self.slots[at as usize].next))
    }

    /// Recounts everything; panics on a difference.
    pub(super) fn check(&self) {
        let (mut len, mut conns, mut revoking, mut last) = (0, 0, 0, 0);
        for at in self.walk() {
            let slot = &self.slots[at as usize];
            assert!(slot.item != Item::Nothing, "a free slot is in the list");
            assert!(slot.seq > last, "sequence numbers only grow");
            last = slot.seq;
            len += 1;
            conns += u32::from(matches!(slot.item, Item::Conn(_)));
            revoking += u32::from(slot.revoking);
            let watched = matches!(slot.item, Item::Conn(_)) && !slot.revoking;
            assert!(!watched || self.due <= slot.due, "nothing is due earlier than known");
        }
        assert_eq!((len, conns, revoking), (self.len, self.conns, self.revoking));
        assert!(len - conns <= 2, "at most one probe and one ready check");
        assert!(len <= self.limit, "no more tickets than slots");
        assert_eq!(len as usize + self.free.len(), self.slots.len());
    }
}
