//! Other hosts: their members, registrations and memberships, and snapshots of the own ones.
//!
//! Each directory tells the others every change of its own host. One that has missed a message asks
//! for a snapshot: a list of everything, after which what it did not name is removed.

use std::collections::HashSet;

use dispatch_protocol::relay::{Id, Name, Shared, host_number};

use super::hlc::Hlc;
use super::ids::Placed;
use super::slots::NONE;
use super::{Host, MemberIndex, Now, Registry};

/// Most other hosts.
pub const MAX_HOSTS: usize = 255;

/// What a snapshot under way has named.
#[derive(Debug, Default)]
pub(super) struct Confirmed {
    members: HashSet<MemberIndex>,
    slots: HashSet<u32>,
    memberships: HashSet<(MemberIndex, Id, u32)>,
}

impl Registry {
    /// The index of another host, which may be new; `None` if it has the own host's number, or
    /// there are 255 others.
    pub fn remote_host(&mut self, name: &Name) -> Option<u16> {
        let number = host_number(name);
        match self.hosts.iter().position(|host| host.number == number) {
            Some(0) => None,
            Some(index) => u16::try_from(index).ok(),
            None if self.hosts.len() <= MAX_HOSTS => {
                self.hosts.push(Host { number, name: name.clone() });
                u16::try_from(self.hosts.len() - 1).ok()
            }
            None => None,
        }
    }

    /// A record of another host's directory about its own members. False if a limit left it out.
    pub fn apply(&mut self, now: Now, host: u16, record: Shared) -> bool {
        match record {
            Shared::Member { namespace, member, worker } => {
                let Some(space) = self.namespace_index(&namespace) else { return true };
                let index = match self.remote_member(space, host, member) {
                    Some(index) => index,
                    None => match self.add_member(space, (host, None, false), member, worker) {
                        Ok(index) => index,
                        Err(_) => return false,
                    },
                };
                if let Some(confirmed) = self.confirmed.get_mut(&host) {
                    confirmed.members.insert(index);
                }
                true
            }
            Shared::Gone { namespace, member } => {
                let space = self.namespace_index(&namespace);
                if let Some(index) = space.and_then(|s| self.remote_member(s, host, member)) {
                    self.leave(now, index);
                }
                true
            }
            Shared::Registered { namespace, member, id, stamp, clock, key } => {
                let space = self.namespace_index(&namespace);
                let Some(index) = space.and_then(|s| self.remote_member(s, host, member)) else {
                    return space.is_none();
                };
                let near = if clock {
                    self.hlc.observe(stamp, now.wall, self.limits.drift)
                } else {
                    Hlc::is_near(stamp, now.wall, self.limits.drift)
                };
                if !near {
                    self.totals.stamps_ahead += 1;
                    return false;
                }
                match self.place(index, &id, stamp, key) {
                    Placed::There => {
                        let namespace = space.unwrap_or_default();
                        let slots = self.slots.find(namespace, &id);
                        if let Some(confirmed) = self.confirmed.get_mut(&host) {
                            confirmed.slots.extend(slots);
                        }
                        self.answer_waiting(index, &id);
                        true
                    }
                    Placed::Late => true,
                    Placed::Full(_) => false,
                }
            }
            Shared::Unregistered { namespace, member, id, stamp } => {
                let space = self.namespace_index(&namespace);
                if let Some(index) = space.and_then(|s| self.remote_member(s, host, member)) {
                    self.unregister(now, index, &id, stamp);
                }
                true
            }
            Shared::Joined { namespace, member, group, key, weight } => {
                let space = self.namespace_index(&namespace);
                match space.and_then(|s| self.remote_member(s, host, member)) {
                    Some(index) => {
                        if let Some(confirmed) = self.confirmed.get_mut(&host) {
                            confirmed.memberships.insert((index, group.clone(), key));
                        }
                        self.add_membership(index, &group, key, weight).is_ok()
                    }
                    None => space.is_none(),
                }
            }
            Shared::Left { namespace, member, group, key } => {
                let Some(space) = self.namespace_index(&namespace) else { return true };
                let Some(index) = self.remote_member(space, host, member) else { return true };
                let entry = (group, key);
                let member = self.member_mut(index);
                if member.is_some_and(|member| member.joined.remove(&entry)) {
                    self.end_membership(index, space, &entry.0, key);
                }
                true
            }
            Shared::Host { .. }
            | Shared::SnapshotBegin { .. }
            | Shared::SnapshotEnd { .. }
            | Shared::AskSnapshot { .. }
            | Shared::Leaving { .. } => true,
        }
    }

    /// A snapshot of another host begins.
    pub fn begin_snapshot(&mut self, host: u16) {
        self.confirmed.insert(host, Confirmed::default());
    }

    /// A snapshot has ended: what it did not name is removed.
    pub fn end_snapshot(&mut self, now: Now, host: u16) {
        let Some(confirmed) = self.confirmed.remove(&host) else { return };
        for index in self.members_of(host) {
            if !confirmed.members.contains(&index) {
                self.leave(now, index);
                continue;
            }
            let Some(member) = self.member(index) else { continue };
            let namespace = member.namespace;
            let mut ended = Vec::new();
            let mut next = member.first;
            while let Some(slot) = self.slots.get(next) {
                if !confirmed.slots.contains(&next) {
                    ended.push(next);
                }
                next = slot.next;
            }
            let unconfirmed = |(group, key): &&(Id, u32)| {
                !confirmed.memberships.contains(&(index, group.clone(), *key))
            };
            let left: Vec<_> = member.joined.iter().filter(unconfirmed).cloned().collect();
            ended.into_iter().for_each(|slot| self.end_registration(now, slot));
            for entry in left {
                if let Some(member) = self.member_mut(index) {
                    member.joined.remove(&entry);
                }
                self.end_membership(index, namespace, &entry.0, entry.1);
            }
        }
    }

    /// Removes everything of another host, which has left or was away too long.
    pub fn forget_host(&mut self, now: Now, host: u16) {
        for index in self.members_of(host) {
            self.leave(now, index);
        }
    }

    /// All members, registrations and memberships of the own host.
    pub fn snapshot(&self) -> Vec<Shared> {
        let mut records = Vec::new();
        let own = self.members.iter().flatten();
        for member in own.filter(|member| member.host == 0 && !member.observes) {
            let Some(space) = self.namespaces.get(usize::from(member.namespace)) else { continue };
            let (namespace, number) = (space.name.clone(), member.number);
            let worker = member.worker.clone();
            records.push(Shared::Member { namespace: namespace.clone(), member: number, worker });
            let mut next = member.first;
            while next != NONE {
                let Some(slot) = self.slots.get(next) else { break };
                next = slot.next;
                let Some(id) = slot.id.clone() else { break };
                let (namespace, stamp, key) = (namespace.clone(), slot.stamp, slot.key);
                let member = number;
                // Of which clock it is does not matter: updates move the clock.
                let clock = false;
                records.push(Shared::Registered { namespace, member, id, stamp, clock, key });
            }
            for (group, key) in &member.joined {
                let of = |entry: &&(MemberIndex, u32, u16)| {
                    entry.1 == *key && self.member(entry.0).is_some_and(|m| m.number == number)
                };
                let entry = space.groups.get(group).and_then(|g| g.members.iter().find(of));
                let Some(&(_, key, weight)) = entry else { continue };
                let (namespace, group) = (namespace.clone(), group.clone());
                records.push(Shared::Joined { namespace, member: number, group, key, weight });
            }
        }
        records
    }

    /// The member of this host with this number, in any namespace that has one.
    pub fn local_member(&self, namespace: u16, number: u64) -> Option<MemberIndex> {
        let index = *self.namespaces.get(usize::from(namespace))?.members.get(&number)?;
        self.member(index).filter(|member| member.host == 0).map(|_| index)
    }

    /// The namespace of a member.
    pub fn namespace_of(&self, index: MemberIndex) -> Option<u16> {
        self.member(index).map(|member| member.namespace)
    }

    /// The number that a member has chosen.
    pub fn number_of(&self, index: MemberIndex) -> Option<u64> {
        self.member(index).map(|member| member.number)
    }

    /// The index of the namespace with this name.
    pub fn namespace_index(&self, name: &Name) -> Option<u16> {
        let index = self.namespaces.iter().position(|space| space.name == *name)?;
        u16::try_from(index).ok()
    }

    fn remote_member(&self, namespace: u16, host: u16, number: u64) -> Option<MemberIndex> {
        let index = *self.namespaces.get(usize::from(namespace))?.members.get(&number)?;
        self.member(index).filter(|member| member.host == host).map(|_| index)
    }

    fn members_of(&self, host: u16) -> Vec<MemberIndex> {
        let of_host = |(index, member): (usize, &Option<super::Member>)| {
            member.as_ref().filter(|member| member.host == host).map(|_| index as u32)
        };
        self.members.iter().enumerate().filter_map(of_host).collect()
    }
}
