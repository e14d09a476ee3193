//! Groups: memberships, and the members that are kept informed of them because they send to them.

use dispatch_protocol::relay::{Change, FromDirectory, Id, MAX_PAGE, Membership, Shared, Wish};

use super::{MemberIndex, Registry};

/// A group exists while it has a membership, a subscriber or a watcher.
#[derive(Debug, Default)]
pub(super) struct Group {
    /// Member, key and weight.
    pub(super) members: Vec<(MemberIndex, u32, u16)>,
    pub(super) subscribers: Vec<MemberIndex>,
    pub(super) watchers: Vec<MemberIndex>,
    /// The user whose group it is in the limits: one with a member in it; `None` for another host.
    user: Option<u32>,
}

impl Group {
    fn is_unused(&self) -> bool {
        self.members.is_empty() && self.subscribers.is_empty() && self.watchers.is_empty()
    }

    fn related(&self) -> impl Iterator<Item = MemberIndex> {
        let members = self.members.iter().map(|entry| entry.0);
        members.chain(self.subscribers.iter().copied()).chain(self.watchers.iter().copied())
    }
}

impl Registry {
    /// The group, made for this user if there is room.
    pub(super) fn group(
        &mut self,
        namespace: u16,
        name: &Id,
        user: Option<u32>,
    ) -> Result<&mut Group, &'static str> {
        let space = self.namespaces.get_mut(usize::from(namespace));
        let groups = &mut space.ok_or("there is no such namespace")?.groups;
        if !groups.contains_key(name) {
            if groups.len() >= self.limits.groups {
                return Err("the namespace has max_groups groups");
            }
            if self.users.of(user).groups >= self.limits.groups_per_user {
                return Err("the user has max_groups_per_user groups");
            }
            self.users.change(user, |usage| usage.groups += 1);
            groups.insert(name.clone(), Group { user, ..Group::default() });
        }
        groups.get_mut(name).ok_or("there is no such group")
    }

    /// Changes a group that exists, and removes it if nothing is left of it. One that its user has
    /// left is counted for another user in it.
    fn with_group(&mut self, namespace: u16, name: &Id, change: impl FnOnce(&mut Group)) {
        let Some(space) = self.namespaces.get_mut(usize::from(namespace)) else { return };
        let Some(group) = space.groups.get_mut(name) else { return };
        change(group);
        let user = group.user;
        if group.is_unused() {
            space.groups.remove(name);
            self.users.change(user, |usage| usage.groups -= 1);
            return;
        }
        let members = &self.members;
        let user_of = |index: MemberIndex| members.get(index as usize)?.as_ref()?.user;
        if user.is_some() && !group.related().any(|index| user_of(index) == user) {
            let next = group.related().next().and_then(user_of);
            group.user = next;
            self.users.change(user, |usage| usage.groups -= 1);
            self.users.change(next, |usage| usage.groups += 1);
        }
    }

    /// Whether a member may have one more membership, or group that it sends to.
    fn has_room_for_membership(&self, user: Option<u32>) -> Result<(), &'static str> {
        if self.users.of(user).memberships >= self.limits.memberships_per_user {
            return Err("the user has max_memberships_per_user memberships");
        }
        if self.users.sum(|usage| usage.memberships) >= self.limits.memberships {
            return Err("the directory has max_memberships memberships");
        }
        Ok(())
    }

    pub(super) fn join(&mut self, from: MemberIndex, group: Id, key: u32, weight: u16) {
        let Some(member) = self.member(from) else { return };
        let (namespace, number, user) = (member.namespace, member.number, member.user);
        let known = member.joined.contains(&(group.clone(), key));
        let room = if key == 0 {
            Err("a membership's key is not 0")
        } else if known {
            Ok(())
        } else if member.joined.len() >= self.limits.groups_per_member {
            Err("this member has max_groups_per_member memberships")
        } else {
            self.has_room_for_membership(user)
        };
        let added = room.and_then(|()| self.add_membership(from, &group, key, weight));
        if let Err(reason) = added {
            return self.decline(from, Wish::Join, group, key, reason);
        }
        let namespace = self.namespaces[usize::from(namespace)].name.clone();
        self.share(Shared::Joined { namespace, member: number, group, key, weight });
    }

    /// Enters a membership of a member of any host.
    ///
    /// # Errors
    /// There is no room for the group; the text names the limit.
    pub(super) fn add_membership(
        &mut self,
        index: MemberIndex,
        name: &Id,
        key: u32,
        weight: u16,
    ) -> Result<(), &'static str> {
        let Some(member) = self.member(index) else { return Ok(()) };
        let (namespace, user) = (member.namespace, member.user);
        let group = self.group(namespace, name, user)?;
        let known = group.members.iter_mut().find(|entry| (entry.0, entry.1) == (index, key));
        if let Some(known) = known {
            known.2 = weight;
        } else {
            group.members.push((index, key, weight));
        }
        let member = self.member_mut(index);
        if member.is_some_and(|member| member.joined.insert((name.clone(), key))) {
            self.users.change(user, |usage| usage.memberships += 1);
        }
        let added = self.membership(index, key, weight).into_iter().collect();
        self.publish(namespace, name, added, Vec::new());
        self.report_group(namespace, name, Change::Came);
        Ok(())
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
        let user = self.user_of(index);
        self.users.change(user, |usage| usage.memberships -= 1);
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
        let (namespace, user) = (member.namespace, member.user);
        let known = member.subscribed.contains(&name);
        let room = if known {
            Ok(())
        } else if member.subscribed.len() >= self.limits.groups_per_member {
            Err("this member knows max_groups_per_member groups")
        } else {
            self.has_room_for_membership(user)
        };
        let entries = room.and_then(|()| {
            let group = self.group(namespace, &name, user)?;
            if !known {
                group.subscribers.push(from);
            }
            Ok(group.members.clone())
        });
        let entries = match entries {
            Ok(entries) => entries,
            Err(reason) => return self.decline(from, Wish::Subscribe, name, 0, reason),
        };
        let member = self.member_mut(from);
        if member.is_some_and(|member| member.subscribed.insert(name.clone())) {
            self.users.change(user, |usage| usage.memberships += 1);
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
        let user = self.user_of(index);
        self.users.change(user, |usage| usage.memberships -= 1);
    }

    pub(super) fn unwatch_group(&mut self, index: MemberIndex, namespace: u16, name: &Id) {
        self.with_group(namespace, name, |group| group.watchers.retain(|one| *one != index));
    }
}
