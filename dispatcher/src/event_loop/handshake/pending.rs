//! Control connections without an answer yet.

use std::collections::HashMap;
use std::os::fd::OwnedFd;

use super::super::control::Peer;
use super::super::token::Key;
use dispatcher_core::Time;

/// One such connection.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) serial: u64,
    pub(super) socket: OwnedFd,
    pub(super) peer: Peer,
    /// The deadline for its hello; `None` once the hello has come and the hot thread decides.
    pub(super) deadline: Option<Time>,
    /// The pool that its hello names; empty before.
    pub(super) pool: String,
    /// Its process, once the hello has come.
    pub(super) process: Option<OwnedFd>,
}

/// All such connections.
#[derive(Debug, Default)]
pub(super) struct Table {
    places: Vec<Option<Pending>>,
    serial: u64,
    len: usize,
}

impl Table {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn insert(&mut self, socket: OwnedFd, peer: Peer, deadline: Time) -> Key {
        self.serial += 1;
        self.len += 1;
        let serial = self.serial;
        let pending = Some(Pending {
            serial,
            socket,
            peer,
            deadline: Some(deadline),
            pool: String::new(),
            process: None,
        });
        let index = match self.places.iter().position(Option::is_none) {
            Some(index) => {
                self.places[index] = pending;
                index
            }
            None => {
                self.places.push(pending);
                self.places.len() - 1
            }
        };
        Key { index: index as u32, serial }
    }

    pub(super) fn get(&mut self, key: Key) -> Option<&mut Pending> {
        let pending = self.places.get_mut(key.index as usize)?.as_mut()?;
        key.is(pending.serial).then_some(pending)
    }

    pub(super) fn take(&mut self, key: Key) -> Option<Pending> {
        let place = self.places.get_mut(key.index as usize)?;
        let taken = place.take_if(|pending| key.is(pending.serial))?;
        self.len -= 1;
        Some(taken)
    }

    pub(super) fn count_of(&self, uid: u32) -> usize {
        self.iter().filter(|(_, pending)| pending.peer.uid == uid).count()
    }

    /// The earliest deadline.
    pub(super) fn deadline(&self) -> Option<Time> {
        self.iter().filter_map(|(_, pending)| pending.deadline).min()
    }

    /// A connection whose deadline has passed.
    pub(super) fn late(&self, now: Time) -> Option<Key> {
        let mut late =
            self.iter().filter(|(_, pending)| pending.deadline.is_some_and(|d| d <= now));
        late.next().map(|(key, _)| key)
    }

    /// The connection that has waited longest of the user with the most; `None` if that user is
    /// `uid`, or has no more connections than `uid`.
    pub(super) fn victim(&self, uid: u32) -> Option<Key> {
        let mut counts: HashMap<u32, usize> = HashMap::new();
        for (_, pending) in self.iter().filter(|(_, pending)| pending.deadline.is_some()) {
            *counts.entry(pending.peer.uid).or_default() += 1;
        }
        let (&most, &count) = counts.iter().max_by_key(|(_, count)| **count)?;
        if most == uid || count <= self.count_of(uid) {
            return None;
        }
        let theirs = self.iter().filter(|(_, pending)| pending.peer.uid == most);
        let waiting = theirs.filter_map(|(key, pending)| Some((pending.deadline?, key)));
        waiting.min_by_key(|(deadline, _)| *deadline).map(|(_, key)| key)
    }

    pub(super) fn drain(&mut self) -> impl Iterator<Item = Pending> + '_ {
        self.len = 0;
        self.places.drain(..).flatten()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (Key, &Pending)> {
        (0..).zip(&self.places).filter_map(|(index, place)| {
            let pending = place.as_ref()?;
            Some((Key { index, serial: pending.serial }, pending))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn insert(table: &mut Table, uid: u32, deadline: u64) -> Key {
        let socket = std::fs::File::open("/dev/null").expect("it is there").into();
        table.insert(socket, Peer { pid: 1, uid, gids: Vec::new() }, Time(deadline))
    }

    #[test]
    fn when_all_places_are_taken_the_user_with_the_most_makes_room() {
        let mut table = Table::default();
        let first = insert(&mut table, 1, 10);
        for deadline in 11..20 {
            insert(&mut table, 1, deadline);
        }
        let other = insert(&mut table, 2, 5);
        assert_eq!(table.victim(3), Some(first));
        assert_eq!(table.victim(1), None, "it has the most itself");
        // A connection with a hello is about to be answered.
        table.get(first).expect("it is there").deadline = None;
        assert_ne!(table.victim(3), Some(first));
        assert_eq!(table.late(Time(5)), Some(other));
        assert!(table.take(other).is_some() && table.take(other).is_none());
        assert_eq!((table.len(), table.count_of(1), table.deadline()), (10, 10, Some(Time(11))));
    }
}
