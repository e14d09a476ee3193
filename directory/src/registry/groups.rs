//! Groups: memberships, and the members that are kept informed of them because they send to them.

use dispatch_protocol::relay::{Change, FromDirectory, Id, MAX_PAGE, Membership, Shared};

use super::{MemberIndex, Registry};

/// A group exists while it has a membership, a subscriber or a watcher.
#[derive(Debug, Default)]
pub(super) struct Group {
    /// Member, key and weight.
    pub(super) members: Vec<(MemberIndex, u32, u16)>,
    pub(super) subscribers: Vec<MemberIndex>,
    pub(super) watchers: Vec<MemberIndex>,
}

impl Group {
    fn is_unused(&self) -> bool {
        self.members.is_empty() && self.subscribers.is_empty() && self.watchers.is_empty()
    }
}

impl Registry {
    /// The group, made if there is room.
    pub(super) fn group(&mut self, namespace: u16, group: &Id) -> Option<&mut Group> {
        let most = self.limits.groups;
        let groups = &mut self.namespaces.get_mut(usize::from(namespace))?.groups;
        if groups.len() >= most && !groups.contains_key(group) {
            return None;
        }
        Some(groups.entry(group.clone()).or_default())
    }

    /// Changes a group that exists, and removes it if nothing is left of it.
    fn with_group(&mut self, namespace: u16, name: &Id, change: impl FnOnce(&mut Group)) {
        let Some(space) = self.namespaces.get_mut(usize::from(namespace)) else { return };
        let Some(group) = space.groups.get_mut(name) else { return };
        change(group);
        if group.is_unused() {
            space.groups.remove(name);
        }
    }

    pub(super) fn join(&mut self, from: MemberIndex, group: Id, key: u32, weight: u16) {
        let Some(member) = self.member(from) else { return };
        let (namespace, number) = (member.namespace, member.number);
        if key == 0 {
            return self.refuse(from, 0, "a membership's key is not 0");
        }
        if member.joined.len() >= self.limits.groups_per_member {
            return self.refuse(from, 0, "this member has max_groups_per_member memberships");
        }
        if !self.add_membership(from, &group, key, weight) {
            return self.refuse(from, 0, "the namespace has max_groups groups");
        }
        let namespace = self.namespaces[usize::from(namespace)].name.clone();
        self.share(Shared::Joined { namespace, member: number, group, key, weight });
    }

    /// Enters a membership of a member of any host; false if there is no room for the group.
    pub(super) fn add_membership(
        &mut self,
        index: MemberIndex,
        name: &Id,
        key: u32,
        weight: u16,
    ) -> bool {
        let Some(member) = self.member(index) else { return true };
        let namespace = member.namespace;
        let Some(group) = self.group(namespace, name) else { return false };
        let known = group.members.iter_mut().find(|entry| (entry.0, entry.1) == (index, key));
        if let Some(known) = known {
            known.2 = weight;
        } else {
            group.members.push((index, key, weight));
        }
        if let Some(member) = self.members.get_mut(index as usize).and_then(Option::as_mut) {
            member.joined.insert((name.clone(), key));
        }
        let added = self.membership(index, key, weight).into_iter().collect();
        self.publish(namespace, name, added, Vec::new());
        self.report_group(namespace, name, Change::Came);
        true
    }

    /// Ends a membership that its member no longer lists.
    pub(super) fn end_membership(
        &mut self,
        index: MemberIndex,
        namespace: u16,
        name: &Id,
        key: u32,
    ) {
        let removed: Vec<_> = self.membership(index, key, 0).into_iter().collect();
        let local = self.member(index).filter(|member| member.host == 0).map(|m| m.number);
        self.publish(namespace, name, Vec::new(), removed);
        self.report_group(namespace, name, Change::Went);
        self.with_group(namespace, name, |group| {
            group.members.retain(|entry| (entry.0, entry.1) != (index, key));
        });
        if let (Some(member), Some(space)) = (local, self.namespaces.get(usize::from(namespace))) {
            let (namespace, group) = (space.name.clone(), name.clone());
            self.share(Shared::Left { namespace, member, group, key });
        }
    }

    fn publish(
        &mut self,
        namespace: u16,
        name: &Id,
        added: Vec<Membership>,
        removed: Vec<Membership>,
    ) {
        let Some(space) = self.namespaces.get(usize::from(namespace)) else { return };
        let Some(group) = space.groups.get(name) else { return };
        for subscriber in group.subscribers.clone() {
            let record = FromDirectory::Memberships {
                group: name.clone(),
                reset: false,
                complete: true,
                added: added.clone(),
                removed: removed.clone(),
            };
            self.send(subscriber, record);
        }
    }

    pub(super) fn subscribe(&mut self, from: MemberIndex, name: Id) {
        let Some(member) = self.member(from) else { return };
        let namespace = member.namespace;
        if member.subscribed.len() >= self.limits.groups_per_member {
            return self.refuse(from, 0, "this member knows max_groups_per_member groups");
        }
        let Some(group) = self.group(namespace, &name) else {
            return self.refuse(from, 0, "the namespace has max_groups groups");
        };
        if !group.subscribers.contains(&from) {
            group.subscribers.push(from);
        }
        let entries = group.members.clone();
        if let Some(member) = self.members.get_mut(from as usize).and_then(Option::as_mut) {
            member.subscribed.insert(name.clone());
        }
        let of = |&(member, key, weight): &(_, _, _)| self.membership(member, key, weight);
        let all: Vec<Membership> = entries.iter().filter_map(of).collect();
        let pages = all.len().div_ceil(MAX_PAGE).max(1);
        for page in 0..pages {
            let entries = all.iter().skip(page * MAX_PAGE).take(MAX_PAGE);
            let record = FromDirectory::Memberships {
                group: name.clone(),
                reset: page == 0,
                complete: page + 1 == pages,
                added: entries.cloned().collect(),
                removed: Vec::new(),
            };
            self.send(from, record);
        }
    }

    pub(super) fn unsubscribe(&mut self, index: MemberIndex, namespace: u16, name: &Id) {
        self.with_group(namespace, name, |group| group.subscribers.retain(|one| *one != index));
    }

    pub(super) fn unwatch_group(&mut self, index: MemberIndex, namespace: u16, name: &Id) {
        self.with_group(namespace, name, |group| group.watchers.retain(|one| *one != index));
    }
}
