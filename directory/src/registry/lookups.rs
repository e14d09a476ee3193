//! Look-ups of ids. One whose answer may change in a moment waits, but never longer than a grace.

use dispatch_protocol::relay::{FromDirectory, Id, Location};

use super::{Grace, MemberIndex, Now, Receives, Registry};

/// How long a look-up waits at least for the end of a registration that its member has seen end, in
/// milliseconds. That end is on its way already.
const END_ON_ITS_WAY: u64 = 50;

/// A look-up that waits for a slot.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wait {
    member: MemberIndex,
    request: u64,
    /// The newest registration that the member has known, and whether that has ended.
    known: (u64, bool),
    /// When it is answered in any case, and a number of its own.
    until: u64,
    serial: u64,
}

impl Registry {
    pub(super) fn look_up(
        &mut self,
        now: Now,
        from: MemberIndex,
        request: u64,
        id: &Id,
        known: (u64, bool),
    ) {
        let Some(member) = self.member(from) else { return };
        let (namespace, waits, user) = (member.namespace, member.lookups, member.user);
        self.totals.lookups += 1;
        let mut slots = self.slots.find(namespace, id);
        if slots.is_empty() && now.steady < self.settling {
            // Whatever registers again takes this slot, because no stamp is lower.
            if let Some(slot) = self.add_slot(namespace, id) {
                let grace = Grace { end: self.settling, slot, stamp: 0, user };
                if self.begin_grace(grace) {
                    slots.push(slot);
                } else {
                    self.slots.remove(slot);
                }
            }
        }
        let places = self.later(namespace, &slots, known);
        let room = waits < self.limits.lookups_per_member
            && self.users.of(user).lookups < self.limits.lookups_per_user
            && self.overdue.len() < self.limits.lookups;
        match slots.first() {
            // It has ended a moment ago, or its end is on its way here, so the client may be on its
            // way to another worker.
            Some(&slot) if places.is_empty() && room => {
                self.totals.waited += 1;
                self.next_wait += 1;
                let until = now.steady + self.limits.grace.max(END_ON_ITS_WAY);
                let serial = self.next_wait;
                let wait = Wait { member: from, request, known, until, serial };
                self.waiting.entry(slot).or_default().push(wait);
                self.overdue.insert((until, serial, slot));
                if let Some(member) = self.member_mut(from) {
                    member.lookups += 1;
                }
                self.users.change(user, |usage| usage.lookups += 1);
            }
            _ => {
                self.totals.found += u64::from(!places.is_empty());
                self.send(from, FromDirectory::Found { request, places });
            }
        }
    }

    /// The registrations that are an answer for a member that has known one.
    fn later(&self, namespace: u16, slots: &[u32], (newest, ended): (u64, bool)) -> Vec<Location> {
        let all = self.namespaces[usize::from(namespace)].receives == Receives::All;
        let mut places = self.locations(slots);
        places.retain(|place| match place.stamp == newest {
            true => !ended,
            false => all || place.stamp > newest,
        });
        places
    }

    /// Answers look-ups that waited for the id, which `member` has registered now.
    pub(super) fn answer_waiting(&mut self, member: MemberIndex, id: &Id) {
        let Some(namespace) = self.member(member).map(|member| member.namespace) else { return };
        let slots = self.slots.find(namespace, id);
        for slot in &slots {
            for wait in self.waiting.remove(slot).unwrap_or_default() {
                let places = self.later(namespace, &slots, wait.known);
                if places.is_empty() {
                    // An older one than it has known; the newer one may register again.
                    self.waiting.entry(*slot).or_default().push(wait);
                    continue;
                }
                self.end_wait(*slot, &wait);
                self.totals.found += 1;
                self.send(wait.member, FromDirectory::Found { request: wait.request, places });
            }
        }
    }

    /// Answers look-ups that have waited long enough, with what is there: a registration that the
    /// member believes to have ended, and that has not, has only been out of its reach.
    pub(super) fn answer_overdue(&mut self, now: Now) {
        while let Some(&(_, serial, slot)) =
            self.overdue.first().filter(|(until, ..)| *until <= now.steady)
        {
            self.overdue.pop_first();
            let Some(waiting) = self.waiting.get_mut(&slot) else { continue };
            let Some(index) = waiting.iter().position(|wait| wait.serial == serial) else {
                continue;
            };
            let wait = waiting.swap_remove(index);
            if waiting.is_empty() {
                self.waiting.remove(&slot);
            }
            self.end_wait(slot, &wait);
            self.totals.overdue += 1;
            let of = self.slots.get(slot).and_then(|slot| Some((slot.namespace, slot.id.clone()?)));
            let places = of.map(|(namespace, id)| {
                let slots = self.slots.find(namespace, &id);
                self.later(namespace, &slots, (wait.known.0, false))
            });
            let places = places.unwrap_or_default();
            self.send(wait.member, FromDirectory::Found { request: wait.request, places });
        }
    }

    /// Frees a slot without a member; look-ups that waited for it find nothing.
    pub(super) fn forget(&mut self, number: u32) {
        self.slots.remove(number);
        for wait in self.waiting.remove(&number).unwrap_or_default() {
            self.end_wait(number, &wait);
            let (to, request) = (wait.member, wait.request);
            self.send(to, FromDirectory::Found { request, places: Vec::new() });
        }
    }

    /// Forgets the look-ups of a member that leaves.
    pub(super) fn end_waits_of(&mut self, index: MemberIndex) {
        let mut ended = Vec::new();
        self.waiting.retain(|slot, waiting| {
            waiting.retain(|wait| {
                let own = wait.member == index;
                if own {
                    ended.push((*slot, *wait));
                }
                !own
            });
            !waiting.is_empty()
        });
        ended.iter().for_each(|(slot, wait)| self.end_wait(*slot, wait));
    }

    fn end_wait(&mut self, slot: u32, wait: &Wait) {
        self.overdue.remove(&(wait.until, wait.serial, slot));
        let user = self.user_of(wait.member);
        if let Some(member) = self.member_mut(wait.member) {
            member.lookups = member.lookups.saturating_sub(1);
            self.users.change(user, |usage| usage.lookups = usage.lookups.saturating_sub(1));
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
