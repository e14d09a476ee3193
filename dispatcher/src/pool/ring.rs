//! A worker's tickets: which slot of its scoreboard holds what.
//!
//! Owns slots and sequence numbers. It is the dispatcher's own truth; the words in the scoreboard are only
//! compared with it. Slots are made as they are needed. One that is freed rests until [`SPARE_SLOTS`] others are free:
//! the closers write RELEASED into it meanwhile, and the worker must find it there when it closes the connection.

use std::collections::VecDeque;

use super::types::{Ticket, Time};

/// Slots of a scoreboard beyond `max_untaken`: so many connections go to a worker before a slot is used again.
pub const SPARE_SLOTS: u32 = 128;

const NONE: u32 = u32::MAX;

/// What a ticket is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Item {
    /// Nothing: the slot is free.
    Nothing,
    /// The connection with this index.
    Conn(u32),
    /// A probe.
    Probe,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    seq: u64,
    item: Item,
    sent_at: Time,
    /// The shell has seen the effect, so the scoreboard says SENT or later. Before, the slot's word means nothing.
    offered: bool,
    /// An outcome of [`super::Effect::Revoke`] is awaited.
    revoking: bool,
    prev: u32,
    next: u32,
}

/// The tickets of one worker, oldest first.
#[derive(Debug)]
pub(super) struct Ring {
    slots: Vec<Slot>,
    /// The longest free first.
    free: VecDeque<u32>,
    limit: u32,
    seq: u64,
    head: u32,
    tail: u32,
    len: u32,
    conns: u32,
    revoking: u32,
}

impl Ring {
    pub(super) fn new(limit: u32) -> Ring {
        Ring {
            slots: Vec::new(),
            free: VecDeque::new(),
            limit,
            seq: 0,
            head: NONE,
            tail: NONE,
            len: 0,
            conns: 0,
            revoking: 0,
        }
    }

    /// Tickets out.
    pub(super) fn len(&self) -> u32 {
        self.len
    }

    /// Tickets out that are connections.
    pub(super) fn conns(&self) -> u32 {
        self.conns
    }

    /// Tickets that are being revoked.
    pub(super) fn revoking(&self) -> u32 {
        self.revoking
    }

    pub(super) fn has_room(&self) -> bool {
        self.len < self.limit
    }

    /// A ticket for `item`. The caller has checked [`Ring::has_room`].
    pub(super) fn issue(&mut self, now: Time, item: Item) -> Ticket {
        debug_assert!(self.has_room() && item != Item::Nothing);
        self.seq += 1;
        let slot = Slot {
            seq: self.seq,
            item,
            sent_at: now,
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
        self.conns += u32::from(matches!(item, Item::Conn(_)));
        Ticket { slot: at, seq: self.seq }
    }

    /// What `ticket` is for, if it is still out.
    pub(super) fn item(&self, ticket: Ticket) -> Option<Item> {
        self.slots
            .get(ticket.slot as usize)
            .filter(|slot| slot.seq == ticket.seq && slot.item != Item::Nothing)
            .map(|slot| slot.item)
    }

    /// Frees the slot of `ticket`, which is out.
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
    }

    /// Marks every ticket as being revoked, and calls `revoke` for each that was not yet, oldest first.
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

    /// When the oldest connection was sent. A probe may be older, but there is at most one.
    pub(super) fn oldest(&self) -> Option<Time> {
        self.walk()
            .map(|at| &self.slots[at as usize])
            .find(|slot| matches!(slot.item, Item::Conn(_)))
            .map(|slot| slot.sent_at)
    }

    /// The shell has seen the effect that `ticket` came with.
    pub(super) fn offered(&mut self, ticket: Ticket) {
        if let Some(slot) = self.slots.get_mut(ticket.slot as usize)
            && slot.seq == ticket.seq
        {
            slot.offered = true;
        }
    }

    /// Every ticket the shell has seen, oldest first. Those it has not are the newest.
    pub(super) fn offered_tickets(&self) -> impl Iterator<Item = Ticket> + '_ {
        self.tickets().take_while(|ticket| self.slots[ticket.slot as usize].offered)
    }

    /// Every ticket out, oldest first.
    pub(super) fn tickets(&self) -> impl Iterator<Item = Ticket> + '_ {
        self.walk().map(|at| Ticket { slot: at, seq: self.slots[at as usize].seq })
    }

    fn walk(&self) -> impl Iterator<Item = u32> + '_ {
        let some = |at: u32| (at != NONE).then_some(at);
        std::iter::successors(some(self.head), move |&at| some(self.slots[at as usize].next))
    }

    /// Recounts everything; panics if it differs.
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
        }
        assert_eq!((len, conns, revoking), (self.len, self.conns, self.revoking));
        assert!(len - conns <= 1, "at most one probe");
        assert!(len <= self.limit, "no more tickets than slots");
        assert_eq!(len as usize + self.free.len(), self.slots.len());
    }
}
