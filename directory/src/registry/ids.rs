//! Registrations of ids: the newest wins or all receive; the grace after an end.

use dispatch_protocol::relay::{Change, FromDirectory, Id, Shared};

use super::hlc::Hlc;
use super::slots::NONE;
use super::{Grace, MemberIndex, Now, Receives, Registry};

/// What became of a registration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Placed {
    /// It is there.
    There,
    /// A later one is there, so this one has ended.
    Late,
    /// A limit is reached.
    Full(&'static str),
}

impl Registry {
    pub(super) fn register(
        &mut self,
        now: Now,
        from: MemberIndex,
        request: u64,
        id: &Id,
        (stamp, key): (u64, u32),
    ) {
        let (stamp, clock) = match stamp {
            0 => self.next_stamp(now, from, id),
            // One of an earlier directory. It orders the registrations of this id, and does not
            // move the clock of all.
            _ if Hlc::is_near(stamp, now.wall, self.limits.drift) => (stamp, false),
            _ => {
                self.totals.stamps_ahead += 1;
                self.next_stamp(now, from, id)
            }
        };
        match self.place(from, id, stamp, key) {
            Placed::There => {
                self.totals.registered += 1;
                // Before the look-ups that wait for it are answered, so the member knows it when
                // the first message arrives.
                self.send(from, FromDirectory::Registered { request, stamp });
                self.answer_waiting(from, id);
                let Some(member) = self.member(from) else { return };
                let namespace = self.namespaces[usize::from(member.namespace)].name.clone();
                let (member, id) = (member.number, id.clone());
                self.share(Shared::Registered { namespace, member, id, stamp, clock, key });
            }
            Placed::Late => {
                self.send(from, FromDirectory::Registered { request, stamp });
                self.send(from, FromDirectory::Superseded { id: id.clone(), stamp });
            }
            Placed::Full(reason) => self.refuse(from, request, reason),
        }
    }

    /// A stamp for a new registration of an id, later than all of this id, and whether it is of the
    /// clock.
    fn next_stamp(&mut self, now: Now, member: MemberIndex, id: &Id) -> (u64, bool) {
        let stamp = self.hlc.stamp(now.wall);
        let namespace = self.member(member).map_or(0, |member| member.namespace);
        let slots = self.slots.find(namespace, id);
        let newest = slots.iter().filter_map(|&slot| Some(self.slots.get(slot)?.stamp)).max();
        match newest {
            Some(newest) if newest >= stamp => (newest.saturating_add(1), false),
            _ => (stamp, true),
        }
    }

    /// Enters a registration of a member of any host.
    pub(super) fn place(&mut self, member: MemberIndex, id: &Id, stamp: u64, key: u32) -> Placed {
        let Some(owner) = self.member(member) else { return Placed::Late };
        let (namespace, host) = (owner.namespace, self.host_of(owner));
        let full = if owner.ids >= self.limits.ids_per_member {
            Some("this member has max_ids_per_member ids")
        } else if self.users.of(owner.user).ids >= self.limits.ids_per_user {
            Some("the user has max_ids_per_user ids")
        } else {
            None
        };
        let found = self.slots.find(namespace, id);
        let all = self.namespaces[usize::from(namespace)].receives == Receives::All;
        // The same registration again.
        let same = |&number: &u32| {
            self.slots.get(number).is_some_and(|slot| slot.member == member && slot.stamp == stamp)
        };
        if found.iter().any(same) {
            return Placed::There;
        }
        if let Some(full) = full {
            return Placed::Full(full);
        }
        let live = |&number: &u32| self.slots.get(number).is_some_and(|slot| slot.member != NONE);
        let was_live = found.iter().any(live);
        let slot = if all {
            let ended = found.iter().copied().find(|number| !live(number));
            match ended {
                Some(slot) => slot,
                None if found.len() >= self.limits.registrations_per_id => {
                    return Placed::Full("the id has max_registrations_per_id registrations");
                }
                None => match self.add_slot(namespace, id) {
                    Some(slot) => slot,
                    None => return Placed::Full("the directory has max_ids ids"),
                },
            }
        } else if let Some(&slot) = found.first() {
            if self.order_of(slot) > (stamp, host) {
                return Placed::Late;
            }
            self.supersede(slot);
            slot
        } else {
            match self.add_slot(namespace, id) {
                Some(slot) => slot,
                None => return Placed::Full("the directory has max_ids ids"),
            }
        };
        self.attach(slot, member, stamp, key);
        let change = match (was_live, all) {
            (false, _) => Some(Change::Came),
            (true, false) => Some(Change::Moved),
            (true, true) => None,
        };
        if let Some(change) = change {
            self.report(namespace, id, change);
        }
        Placed::There
    }

    pub(super) fn add_slot(&mut self, namespace: u16, id: &Id) -> Option<u32> {
        (self.slots.len() < self.limits.ids).then(|| self.slots.add(namespace, id))
    }

    /// What a later registration must exceed.
    fn order_of(&self, slot: u32) -> (u64, u64) {
        let Some(slot) = self.slots.get(slot) else { return (0, 0) };
        let host = self.member(slot.member).map_or(0, |member| self.host_of(member));
        (slot.stamp, host)
    }

    /// Ends a registration because a later one takes its slot.
    fn supersede(&mut self, slot: u32) {
        let Some(found) = self.slots.get(slot).filter(|found| found.member != NONE) else { return };
        let (member, stamp) = (found.member, found.stamp);
        let Some(id) = found.id.clone() else { return };
        self.detach(slot);
        self.totals.superseded += 1;
        self.send(member, FromDirectory::Superseded { id, stamp });
    }

    fn attach(&mut self, number: u32, index: MemberIndex, stamp: u64, key: u32) {
        let Some(member) = self.member_mut(index) else { return };
        let next = std::mem::replace(&mut member.first, number);
        member.ids += 1;
        let user = member.user;
        self.users.change(user, |usage| usage.ids += 1);
        if let Some(next) = self.slots.get_mut(next) {
            next.previous = number;
        }
        if let Some(slot) = self.slots.get_mut(number) {
            (slot.member, slot.stamp, slot.key) = (index, stamp, key);
            (slot.next, slot.previous) = (next, NONE);
        }
    }

    /// Takes a slot from its member's list.
    fn detach(&mut self, number: u32) {
        let Some(slot) = self.slots.get_mut(number) else { return };
        let (member, next, previous) = (slot.member, slot.next, slot.previous);
        (slot.member, slot.next, slot.previous) = (NONE, NONE, NONE);
        if let Some(next) = self.slots.get_mut(next) {
            next.previous = previous;
        }
        if let Some(previous) = self.slots.get_mut(previous) {
            previous.next = next;
        }
        let user = self.user_of(member);
        if let Some(member) = self.member_mut(member) {
            member.ids -= 1;
            if member.first == number {
                member.first = next;
            }
            self.users.change(user, |usage| usage.ids -= 1);
        }
    }

    pub(super) fn unregister(&mut self, now: Now, from: MemberIndex, id: &Id, stamp: u64) {
        let Some(member) = self.member(from) else { return };
        let slots = self.slots.find(member.namespace, id);
        let own = |&number: &u32| {
            self.slots.get(number).is_some_and(|slot| slot.member == from && slot.stamp == stamp)
        };
        if let Some(slot) = slots.into_iter().find(own) {
            self.end_registration(now, slot);
        }
    }

    /// Remembers the slot of an ended registration for a while; false if that is too many. The
    /// bound: with more ends than ids in a grace, the memory of the latest is given up.
    pub(super) fn begin_grace(&mut self, grace: Grace) -> bool {
        let of_user = self.users.of(grace.user).graces;
        if self.graces.len() >= self.limits.ids || of_user >= self.limits.ids_per_user {
            return false;
        }
        self.users.change(grace.user, |usage| usage.graces += 1);
        self.graces.push_back(grace);
        true
    }

    /// Ends a registration; its grace begins if the id has no other.
    pub(super) fn end_registration(&mut self, now: Now, number: u32) {
        let Some(slot) = self.slots.get(number) else { return };
        let (namespace, stamp, member) = (slot.namespace, slot.stamp, slot.member);
        let Some(id) = slot.id.clone() else { return };
        let local = self.member(member).filter(|member| member.host == 0).map(|m| m.number);
        let user = self.user_of(member);
        self.detach(number);
        let others = self.slots.find(namespace, &id).len() > 1;
        if !others {
            self.report(namespace, &id, Change::Went);
        }
        let end = now.steady + self.limits.grace;
        let grace = Grace { end, slot: number, stamp, user };
        if others || self.limits.grace == 0 || !self.begin_grace(grace) {
            self.forget(number);
        }
        if let Some(member) = local {
            let namespace = self.namespaces[usize::from(namespace)].name.clone();
            self.share(Shared::Unregistered { namespace, member, id, stamp });
        }
    }
}
