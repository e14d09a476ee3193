//! Registrations of ids: the newest wins or all receive; look-ups, and the grace after an end.

use dispatch_protocol::relay::{Change, FromDirectory, Id, Location, Shared};

use super::slots::NONE;
use super::{MemberIndex, Now, Receives, Registry};

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
        let stamp = match stamp {
            0 => self.hlc.stamp(now.wall),
            // One of an earlier directory.
            _ if self.hlc.observe(stamp, now.wall, self.limits.drift) => stamp,
            _ => {
                let reason =
                    "the registration is of the future; are the clocks of the hosts right?";
                return self.refuse(from, request, reason);
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
                self.share(Shared::Registered { namespace, member, id, stamp, key });
            }
            Placed::Late => {
                self.send(from, FromDirectory::Registered { request, stamp });
                self.send(from, FromDirectory::Superseded { id: id.clone(), stamp });
            }
            Placed::Full(reason) => self.refuse(from, request, reason),
        }
    }

    /// Enters a registration of a member of any host.
    pub(super) fn place(&mut self, member: MemberIndex, id: &Id, stamp: u64, key: u32) -> Placed {
        let Some(owner) = self.member(member) else { return Placed::Late };
        let (namespace, host) = (owner.namespace, self.host_of(owner));
        if owner.ids >= self.limits.ids_per_member {
            return Placed::Full("this member has max_ids_per_member ids");
        }
        let found = self.slots.find(namespace, id);
        let all = self.namespaces[usize::from(namespace)].receives == Receives::All;
        // The same registration again.
        let same = |&number: &u32| {
            self.slots.get(number).is_some_and(|slot| slot.member == member && slot.stamp == stamp)
        };
        if found.iter().any(same) {
            return Placed::There;
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

    fn add_slot(&mut self, namespace: u16, id: &Id) -> Option<u32> {
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
        let Some(member) = self.members.get_mut(index as usize).and_then(Option::as_mut) else {
            return;
        };
        let next = std::mem::replace(&mut member.first, number);
        member.ids += 1;
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
        if let Some(member) = self.members.get_mut(member as usize).and_then(Option::as_mut) {
            member.ids -= 1;
            if member.first == number {
                member.first = next;
            }
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

    /// Ends a registration; its grace begins if the id has no other.
    pub(super) fn end_registration(&mut self, now: Now, number: u32) {
        let Some(slot) = self.slots.get(number) else { return };
        let (namespace, stamp, member) = (slot.namespace, slot.stamp, slot.member);
        let Some(id) = slot.id.clone() else { return };
        let local = self.member(member).filter(|member| member.host == 0).map(|m| m.number);
        self.detach(number);
        let others = self.slots.find(namespace, &id).len() > 1;
        if !others {
            self.report(namespace, &id, Change::Went);
        }
        // The bound: with more ends than ids in a grace, the memory of the latest is given up.
        if others || self.limits.grace == 0 || self.graces.len() >= self.limits.ids {
            self.forget(number);
        } else {
            self.graces.push_back((now.steady + self.limits.grace, number, stamp));
        }
        if let Some(member) = local {
            let namespace = self.namespaces[usize::from(namespace)].name.clone();
            self.share(Shared::Unregistered { namespace, member, id, stamp });
        }
    }

    /// Frees a slot without a member; look-ups that waited for it find nothing.
    pub(super) fn forget(&mut self, number: u32) {
        self.slots.remove(number);
        for (member, request) in self.waiting.remove(&number).unwrap_or_default() {
            self.end_wait(member);
            self.send(member, FromDirectory::Found { request, places: Vec::new() });
        }
    }

    fn end_wait(&mut self, index: MemberIndex) {
        if let Some(member) = self.members.get_mut(index as usize).and_then(Option::as_mut) {
            member.lookups = member.lookups.saturating_sub(1);
        }
    }

    pub(super) fn look_up(
        &mut self,
        now: Now,
        from: MemberIndex,
        request: u64,
        id: &Id,
        stale: u64,
    ) {
        let Some(member) = self.member(from) else { return };
        let (namespace, waits) = (member.namespace, member.lookups);
        self.totals.lookups += 1;
        let mut slots = self.slots.find(namespace, id);
        if slots.is_empty() && now.steady < self.settling {
            // Whatever registers again takes this slot, because no stamp is lower.
            if let Some(slot) = self.add_slot(namespace, id) {
                self.graces.push_back((self.settling, slot, 0));
                slots.push(slot);
            }
        }
        let mut places = self.locations(&slots);
        let all = self.namespaces[usize::from(namespace)].receives == Receives::All;
        places.retain(|place| if all { place.stamp != stale } else { place.stamp > stale });
        match slots.first() {
            // It has ended a moment ago, or its end is on its way here, so the client may be on its
            // way to another worker.
            Some(&slot) if places.is_empty() && waits < self.limits.lookups_per_member => {
                self.totals.waited += 1;
                self.waiting.entry(slot).or_default().push((from, request));
                if let Some(member) = self.members.get_mut(from as usize).and_then(Option::as_mut) {
                    member.lookups += 1;
                }
            }
            _ => {
                self.totals.found += u64::from(!places.is_empty());
                self.send(from, FromDirectory::Found { request, places });
            }
        }
    }

    /// Answers look-ups that waited for the id, which `member` has registered now.
    pub(super) fn answer_waiting(&mut self, member: MemberIndex, id: &Id) {
        let Some(namespace) = self.member(member).map(|member| member.namespace) else { return };
        let slots = self.slots.find(namespace, id);
        let places = self.locations(&slots);
        for slot in slots {
            for (member, request) in self.waiting.remove(&slot).unwrap_or_default() {
                self.end_wait(member);
                self.totals.found += 1;
                self.send(member, FromDirectory::Found { request, places: places.clone() });
            }
        }
    }

    fn locations(&self, slots: &[u32]) -> Vec<Location> {
        let location = |&number: &u32| {
            let slot = self.slots.get(number)?;
            let member = self.member(slot.member)?;
            let host = self.host_of(member);
            Some(Location { host, member: member.number, stamp: slot.stamp, key: slot.key })
        };
        slots.iter().filter_map(location).collect()
    }
}
