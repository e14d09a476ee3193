//! Presence: who holds an id, what is registered, and reports of changes.

use dispatch_protocol::relay::{
    Change, FromDirectory, GroupSize, Id, MAX_PAGE, Place, ToDirectory, Wish,
};

use super::{MemberIndex, Registry};

/// Most slots that one page looks at, so that a page of a sparse registry delays no others.
const LOOKED_AT: u32 = 16_384;

impl Registry {
    fn place_of(&self, number: u32) -> Option<Place> {
        let slot = self.slots.get(number)?;
        let (id, member) = (slot.id.clone()?, self.member(slot.member)?);
        let host = self.hosts.get(usize::from(member.host))?.name.clone();
        Some(Place { id, worker: member.worker.clone(), host, stamp: slot.stamp })
    }

    pub(super) fn who(&mut self, namespace: u16, from: MemberIndex, request: u64, id: &Id) {
        let slots = self.slots.find(namespace, id);
        let places = slots.into_iter().filter_map(|slot| self.place_of(slot)).take(MAX_PAGE);
        let places = places.collect();
        self.send(from, FromDirectory::Places { request, places, next: 0 });
    }

    /// A page can have no entries and a next page. An id that is registered throughout is in
    /// exactly one page.
    pub(super) fn online(&mut self, namespace: u16, from: MemberIndex, request: u64, cursor: u64) {
        let start = u32::try_from(cursor).unwrap_or(u32::MAX);
        let end = self.slots.end();
        let mut places = Vec::new();
        let mut number = start;
        while number < end && number - start < LOOKED_AT && places.len() < MAX_PAGE {
            if self.slots.get(number).is_some_and(|slot| slot.namespace == namespace) {
                places.extend(self.place_of(number));
            }
            number += 1;
        }
        let next = if number < end { u64::from(number) } else { 0 };
        self.send(from, FromDirectory::Places { request, places, next });
    }

    pub(super) fn group_sizes(
        &mut self,
        namespace: u16,
        from: MemberIndex,
        request: u64,
        after: &[u8],
    ) {
        let groups = &self.namespaces[usize::from(namespace)].groups;
        let later = groups
            .iter()
            .filter(|(name, group)| name.as_bytes() > after && !group.members.is_empty());
        let mut sizes: Vec<GroupSize> = later
            .map(|(name, group)| GroupSize {
                group: name.clone(),
                members: group.members.len() as u32,
            })
            .collect();
        sizes.sort_unstable_by(|a, b| a.group.cmp(&b.group));
        sizes.truncate(MAX_PAGE);
        self.send(from, FromDirectory::GroupSizes { request, groups: sizes });
    }

    pub(super) fn watch(&mut self, from: MemberIndex, id: Id, group: bool) {
        let Some(member) = self.member(from) else { return };
        let (namespace, user) = (member.namespace, member.user);
        if member.watched.contains(&(id.clone(), group)) {
            return;
        }
        let watched = if member.watched.len() >= self.limits.watches_per_member {
            Err("this member has max_watches_per_member watches")
        } else if self.users.of(user).watches >= self.limits.watches_per_user {
            Err("the user has max_watches_per_user watches")
        } else if self.users.sum(|usage| usage.watches) >= self.limits.watches {
            Err("the directory has max_watches watches")
        } else if group {
            self.group(namespace, &id, user).map(|found| found.watchers.push(from))
        } else {
            let watches = &mut self.namespaces[usize::from(namespace)].watches;
            watches.entry(id.clone()).or_default().push(from);
            Ok(())
        };
        if let Err(reason) = watched {
            let wish = if group { Wish::WatchGroup } else { Wish::Watch };
            return self.decline(from, wish, id, 0, reason);
        }
        self.users.change(user, |usage| usage.watches += 1);
        if let Some(member) = self.member_mut(from) {
            member.watched.insert((id, group));
        }
    }

    pub(super) fn end_watch(&mut self, index: MemberIndex, namespace: u16, id: &Id, group: bool) {
        let user = self.user_of(index);
        self.users.change(user, |usage| usage.watches -= 1);
        if group {
            return self.unwatch_group(index, namespace, id);
        }
        let Some(space) = self.namespaces.get_mut(usize::from(namespace)) else { return };
        let Some(watchers) = space.watches.get_mut(id) else { return };
        watchers.retain(|watcher| *watcher != index);
        if watchers.is_empty() {
            space.watches.remove(id);
        }
    }

    pub(super) fn report(&mut self, namespace: u16, id: &Id, change: Change) {
        let Some(space) = self.namespaces.get(usize::from(namespace)) else { return };
        for watcher in space.watches.get(id).cloned().unwrap_or_default() {
            self.send(watcher, FromDirectory::Changed { id: id.clone(), group: false, change });
        }
    }

    pub(super) fn report_group(&mut self, namespace: u16, name: &Id, change: Change) {
        let Some(space) = self.namespaces.get(usize::from(namespace)) else { return };
        let watchers = space.groups.get(name).map(|group| group.watchers.clone());
        for watcher in watchers.unwrap_or_default() {
            self.send(watcher, FromDirectory::Changed { id: name.clone(), group: true, change });
        }
    }
}

/// Whether a record only asks, which an observer may.
pub(super) fn only_asks(record: &ToDirectory) -> bool {
    match record {
        ToDirectory::Who { .. }
        | ToDirectory::Online { .. }
        | ToDirectory::Groups { .. }
        | ToDirectory::Stats { .. } => true,
        ToDirectory::Hello { .. }
        | ToDirectory::Register { .. }
        | ToDirectory::Unregister { .. }
        | ToDirectory::Lookup { .. }
        | ToDirectory::Connect { .. }
        | ToDirectory::Join { .. }
        | ToDirectory::Leave { .. }
        | ToDirectory::Subscribe { .. }
        | ToDirectory::Unsubscribe { .. }
        | ToDirectory::Watch { .. }
        | ToDirectory::Unwatch { .. } => false,
    }
}
