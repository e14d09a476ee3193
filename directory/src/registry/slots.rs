//! The registrations: a slot each, found by namespace and id.
//!
//! Slots lie in chunks that never move, so growth copies nothing, and a slot's number can be a
//! cursor. The table has only the numbers of slots. Together with an id of 16 bytes a slot takes
//! about 110 bytes (`docs/RELAY.md` has the measured figure).

use std::hash::{BuildHasher, RandomState};

use dispatch_protocol::relay::Id;
use hashbrown::HashTable;

/// No slot, or no member.
pub(super) const NONE: u32 = u32::MAX;

/// Slots in a chunk.
const CHUNK: usize = 4096;

/// One registration, or the memory of one that has ended a moment ago.
#[derive(Debug)]
pub(super) struct Slot {
    /// `None` in a free slot.
    pub(super) id: Option<Id>,
    pub(super) stamp: u64,
    /// The index of the member; [`NONE`] if the registration has ended and its grace runs.
    pub(super) member: u32,
    /// The next free slot, or the next and previous registration of the member.
    pub(super) next: u32,
    pub(super) previous: u32,
    hash: u32,
    pub(super) key: u32,
    pub(super) namespace: u16,
}

/// All slots.
#[derive(Debug)]
pub(super) struct Slots {
    chunks: Vec<Vec<Slot>>,
    free: u32,
    table: HashTable<u32>,
    hasher: RandomState,
}

impl Slots {
    pub(super) fn new() -> Slots {
        Slots {
            chunks: Vec::new(),
            free: NONE,
            table: HashTable::new(),
            hasher: RandomState::new(),
        }
    }

    /// Slots in use.
    pub(super) fn len(&self) -> usize {
        self.table.len()
    }

    /// The number after that of the last slot, free or not.
    pub(super) fn end(&self) -> u32 {
        let full = self.chunks.len().saturating_sub(1) * CHUNK;
        (full + self.chunks.last().map_or(0, Vec::len)) as u32
    }

    pub(super) fn get(&self, number: u32) -> Option<&Slot> {
        self.chunks.get(number as usize / CHUNK)?.get(number as usize % CHUNK)
    }

    pub(super) fn get_mut(&mut self, number: u32) -> Option<&mut Slot> {
        self.chunks.get_mut(number as usize / CHUNK)?.get_mut(number as usize % CHUNK)
    }

    fn hash(&self, namespace: u16, id: &[u8]) -> u64 {
        self.hasher.hash_one((namespace, id))
    }

    /// The slots of an id: one, or several if all registrations receive.
    pub(super) fn find(&self, namespace: u16, id: &Id) -> Vec<u32> {
        let hash = self.hash(namespace, id.as_bytes());
        let of_id = |number: &u32| {
            self.get(*number)
                .is_some_and(|slot| slot.namespace == namespace && slot.id.as_ref() == Some(id))
        };
        self.table.iter_hash(spread(hash as u32)).copied().filter(of_id).collect()
    }

    /// A new slot without a member.
    pub(super) fn add(&mut self, namespace: u16, id: &Id) -> u32 {
        let hash = self.hash(namespace, id.as_bytes()) as u32;
        let slot = Slot {
            id: Some(id.clone()),
            stamp: 0,
            member: NONE,
            next: NONE,
            previous: NONE,
            hash,
            key: 0,
            namespace,
        };
        let number = self.free;
        let number = if let Some(place) = self.get_mut(number) {
            let next = std::mem::replace(place, slot).next;
            self.free = next;
            number
        } else {
            if self.chunks.last().is_none_or(|chunk| chunk.len() == CHUNK) {
                self.chunks.push(Vec::with_capacity(CHUNK));
            }
            let number = self.end();
            if let Some(chunk) = self.chunks.last_mut() {
                chunk.push(slot);
            }
            number
        };
        let chunks = &self.chunks;
        // The hash is in the slot, so that growth need not read the ids.
        let rehash = |number: &u32| {
            let slot =
                chunks.get(*number as usize / CHUNK).and_then(|c| c.get(*number as usize % CHUNK));
            spread(slot.map_or(0, |slot| slot.hash))
        };
        self.table.insert_unique(spread(hash), number, rehash);
        number
    }

    /// Frees a slot that belongs to no member.
    pub(super) fn remove(&mut self, number: u32) {
        let free = self.free;
        let Some(slot) = self.get_mut(number) else { return };
        debug_assert_eq!(slot.member, NONE, "a slot of a member");
        let hash = slot.hash;
        slot.id = None;
        slot.next = free;
        self.free = number;
        if let Ok(entry) = self.table.find_entry(spread(hash), |other| *other == number) {
            entry.remove();
        }
    }
}

/// The table uses the highest bits as well as the lowest.
fn spread(hash: u32) -> u64 {
    u64::from(hash).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}
