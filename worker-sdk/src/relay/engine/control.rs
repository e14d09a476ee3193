//! The connection to the directory: what is registered, joined and watched, and what it answers.

use std::sync::Arc;

use dispatch_protocol::relay::{Change, FromDirectory, Id, MAX_PAGE, ToDirectory, Wish, readable};

use super::peer::Way;
use super::{
    CONTROL_BYTES, Engine, Fired, GroupSize, Local, LocalMembership, MAX_QUESTIONS, Question,
    Request, page,
};
use crate::relay::message::Message;
use crate::relay::queue::{Ended, Queue};
use crate::relay::slot::Slot;
use crate::relay::{Error, Page, PresenceEvent};

impl Engine {
    /// The directory has let this member in: says again everything that lasts.
    pub(crate) fn welcomed(&mut self, now: u64, host: u64, max_message: usize, gateway: bool) {
        self.connected = true;
        let again = self.host != 0;
        self.host = host;
        self.max_message = max_message;
        self.clear_records();
        // The new directory has given no links yet.
        self.last_links.clear();
        // The gateway's link is new.
        self.gateway_down(now);
        self.gateway = gateway;
        self.requests.retain(|_, request| !matches!(request, Request::Register { .. }));
        let registrations: Vec<(Id, u64, u32)> = self
            .local
            .iter()
            .flat_map(|(id, all)| all.iter().map(|one| (id.clone(), one.stamp, one.key)))
            .collect();
        for (id, stamp, key) in registrations {
            self.tell_register(id, stamp, key);
        }
        let memberships: Vec<(Id, u32, u16)> = self
            .memberships
            .iter()
            .flat_map(|(group, all)| all.iter().map(|one| (group.clone(), one.key, one.weight)))
            .collect();
        for (group, key, weight) in memberships {
            self.tell(&ToDirectory::Join { group, key, weight });
        }
        self.subscribe_again();
        let watches: Vec<(Id, bool)> = self.watches.keys().cloned().collect();
        for (id, group) in watches {
            self.tell(&ToDirectory::Watch { id: id.clone(), group });
            if again {
                self.changed(&id, group, Change::Missed);
            }
        }
        self.ask_again();
        let asked =
            |(member, peer): (&u64, &super::Peer)| (peer.way == Way::Asked).then_some(*member);
        let members: Vec<u64> = self.peers.iter().filter_map(asked).collect();
        members.into_iter().for_each(|member| self.ask_link(member));
        self.control_limit = self.control_bytes + CONTROL_BYTES;
    }

    /// The directory has gone. Links to members of this host continue.
    pub(crate) fn directory_lost(&mut self, now: u64) {
        self.connected = false;
        self.clear_records();
        self.gateway_down(now);
        let numbers: Vec<u64> = self.questions.keys().copied().collect();
        numbers.into_iter().for_each(|number| self.fail_question(number));
    }

    pub(crate) fn is_connected(&self) -> bool {
        self.connected
    }

    /// Ends everything.
    pub(crate) fn close(&mut self, now: u64) {
        self.closed = true;
        self.directory_lost(now);
        let members: Vec<u64> = self.peers.keys().copied().collect();
        members.into_iter().for_each(|member| self.link_down(now, member));
        self.tick(u64::MAX);
        for local in self.local.drain().flat_map(|(_, all)| all) {
            local.queue.end(Ended::Closed);
            if let Some(slot) = local.done {
                self.fired.push(Fired::Registered(slot, Err(Error::Closed)));
            }
        }
        for one in self.memberships.drain().flat_map(|(_, all)| all) {
            one.queue.end(Ended::Closed);
        }
        for (_, queue) in self.watches.drain().flat_map(|(_, all)| all) {
            queue.end(Ended::Closed);
        }
    }

    /// Registers an id; returns the key by which [`unregister`](Engine::unregister) ends it.
    pub(crate) fn register(
        &mut self,
        id: &Id,
        queue: Arc<Queue<Message>>,
        done: Arc<Slot<Result<u64, Error>>>,
    ) -> u32 {
        let key = self.key();
        if self.closed {
            self.fired.push(Fired::Registered(done, Err(Error::Closed)));
            return key;
        }
        let local = Local { stamp: 0, queue, key, done: Some(done) };
        self.local.entry(id.clone()).or_default().push(local);
        self.tell_register(id.clone(), 0, key);
        key
    }

    fn tell_register(&mut self, id: Id, stamp: u64, key: u32) {
        let request = self.number();
        if self.connected {
            self.requests.insert(request, Request::Register { id: id.clone(), key });
        }
        self.tell(&ToDirectory::Register { request, id, stamp, key });
    }

    pub(crate) fn unregister(&mut self, id: &Id, key: u32) {
        if let Some(local) = self.take_local(id, |local| local.key == key) {
            local.queue.end(Ended::Closed);
            if local.stamp != 0 {
                self.tell(&ToDirectory::Unregister { id: id.clone(), stamp: local.stamp });
            }
        }
    }

    fn take_local(&mut self, id: &Id, is: impl Fn(&Local) -> bool) -> Option<Local> {
        let all = self.local.get_mut(id)?;
        let index = all.iter().position(is)?;
        let local = all.swap_remove(index);
        if all.is_empty() {
            self.local.remove(id);
        }
        Some(local)
    }

    /// Joins a group; returns the key of the membership.
    pub(crate) fn join(&mut self, group: &Id, weight: u16, queue: Arc<Queue<Message>>) -> u32 {
        let key = self.key();
        if self.closed {
            queue.end(Ended::Closed);
            return key;
        }
        self.memberships.entry(group.clone()).or_default().push(LocalMembership {
            key,
            weight,
            queue,
        });
        self.tell(&ToDirectory::Join { group: group.clone(), key, weight });
        key
    }

    pub(crate) fn leave(&mut self, group: &Id, key: u32) {
        let Some(all) = self.memberships.get_mut(group) else { return };
        let Some(index) = all.iter().position(|one| one.key == key) else { return };
        all.swap_remove(index).queue.end(Ended::Closed);
        if all.is_empty() {
            self.memberships.remove(group);
        }
        self.tell(&ToDirectory::Leave { group: group.clone(), key });
    }

    pub(crate) fn watch(&mut self, id: &Id, group: bool, queue: Arc<Queue<PresenceEvent>>) -> u64 {
        let serial = self.number();
        if self.closed {
            queue.end(Ended::Closed);
            return serial;
        }
        let all = self.watches.entry((id.clone(), group)).or_default();
        all.push((serial, queue));
        if all.len() == 1 {
            self.tell(&ToDirectory::Watch { id: id.clone(), group });
        }
        serial
    }

    pub(crate) fn unwatch(&mut self, id: &Id, group: bool, serial: u64) {
        let key = (id.clone(), group);
        let Some(all) = self.watches.get_mut(&key) else { return };
        all.retain(|(one, _)| *one != serial);
        if all.is_empty() {
            self.watches.remove(&key);
            self.tell(&ToDirectory::Unwatch { id: key.0, group });
        }
    }

    fn may_ask(&self) -> Result<(), Error> {
        if !self.connected {
            return Err(Error::DirectoryAbsent);
        }
        if self.questions.len() >= MAX_QUESTIONS {
            return Err(Error::Backpressure);
        }
        Ok(())
    }

    /// Asks for places; `None` as id asks for a page of all.
    pub(crate) fn places(
        &mut self,
        now: u64,
        id: Option<Id>,
        cursor: u64,
        slot: Arc<Slot<Result<Page, Error>>>,
    ) {
        if let Err(error) = self.may_ask() {
            return self.fired.push(Fired::Places(slot, Err(error)));
        }
        let request = self.number();
        let deadline = now.saturating_add(self.settings.timeout);
        self.questions.insert(request, Question::Places { slot, deadline });
        match id {
            Some(id) => self.tell(&ToDirectory::Who { request, id }),
            None => self.tell(&ToDirectory::Online { request, cursor }),
        }
    }

    /// Asks for a page of groups.
    pub(crate) fn group_sizes(
        &mut self,
        now: u64,
        after: &[u8],
        slot: Arc<Slot<Result<Vec<GroupSize>, Error>>>,
    ) {
        if let Err(error) = self.may_ask() {
            return self.fired.push(Fired::Groups(slot, Err(error)));
        }
        let request = self.number();
        let deadline = now.saturating_add(self.settings.timeout);
        self.questions.insert(request, Question::Groups { slot, deadline });
        self.tell(&ToDirectory::Groups { request, after: after.to_vec() });
    }

    /// A record of the directory, without those that bring descriptors.
    pub(crate) fn directory_record(&mut self, now: u64, record: FromDirectory) {
        match record {
            FromDirectory::Registered { request, stamp } => {
                let Some(Request::Register { id, key }) = self.requests.remove(&request) else {
                    return;
                };
                let all = self.local.get_mut(&id);
                match all.and_then(|all| all.iter_mut().find(|local| local.key == key)) {
                    Some(local) => {
                        local.stamp = stamp;
                        let done = local.done.take();
                        self.fired.extend(done.map(|done| Fired::Registered(done, Ok(stamp))));
                    }
                    // It has ended meanwhile.
                    None => self.tell(&ToDirectory::Unregister { id, stamp }),
                }
            }
            FromDirectory::NotAccepted { request, reason } => {
                let reason = readable(&reason);
                let Some(Request::Register { id, key }) = self.requests.remove(&request) else {
                    return;
                };
                if let Some(local) = self.take_local(&id, |local| local.key == key) {
                    local.queue.end(Ended::NotAccepted);
                    let error = Err(Error::NotAccepted(reason));
                    self.fired.extend(local.done.map(|done| Fired::Registered(done, error)));
                }
            }
            FromDirectory::Declined { wish, id, key, reason } => {
                self.declined(now, wish, &id, key, &readable(&reason));
            }
            FromDirectory::NoLink { member, reason } => {
                self.no_link(now, member, &readable(&reason));
            }
            FromDirectory::Superseded { id, stamp } => {
                if let Some(local) = self.take_local(&id, |local| local.stamp == stamp) {
                    local.queue.end(Ended::Superseded);
                }
            }
            FromDirectory::Found { request, places } => {
                if let Some(Request::Lookup { id }) = self.requests.remove(&request) {
                    self.found(now, &id, places);
                }
            }
            FromDirectory::NoMember { member } => {
                if self.peers.get(&member).is_some_and(|peer| peer.way == Way::Asked) {
                    self.last_links.remove(&member);
                    self.link_down(now, member);
                }
            }
            FromDirectory::Memberships { group, reset, complete, added, removed } => {
                self.memberships(now, &group, (reset, complete), added, &removed);
            }
            FromDirectory::Places { request, places, next } => {
                if let Some(Question::Places { slot, .. }) = self.questions.remove(&request) {
                    self.fired.push(Fired::Places(slot, Ok(page(places, next))));
                }
            }
            FromDirectory::GroupSizes { request, groups } => {
                if let Some(Question::Groups { slot, .. }) = self.questions.remove(&request) {
                    debug_assert!(groups.len() <= MAX_PAGE);
                    self.fired.push(Fired::Groups(slot, Ok(groups)));
                }
            }
            FromDirectory::Changed { change: Change::Missed, .. } => {
                // Of anything that is watched.
                let watches: Vec<(Id, bool)> = self.watches.keys().cloned().collect();
                for (id, group) in watches {
                    self.changed(&id, group, Change::Missed);
                }
            }
            FromDirectory::Changed { id, group, change } => self.changed(&id, group, change),
            // Those with descriptors are handled where these are, and hello was answered.
            FromDirectory::Welcome { .. }
            | FromDirectory::Refused { .. }
            | FromDirectory::Link { .. }
            | FromDirectory::Counts { .. } => {}
        }
    }

    /// What the directory does not accept ends, so that the application sees it and may ask again.
    fn declined(&mut self, now: u64, wish: Wish, id: &Id, key: u32, reason: &str) {
        log::warn!("event=relay_not_accepted reason={reason:?}");
        match wish {
            Wish::Join => {
                let Some(all) = self.memberships.get_mut(id) else { return };
                let Some(index) = all.iter().position(|one| one.key == key) else { return };
                all.swap_remove(index).queue.end(Ended::NotAccepted);
                if all.is_empty() {
                    self.memberships.remove(id);
                }
            }
            Wish::Subscribe => self.subscription_declined(now, id),
            Wish::Watch | Wish::WatchGroup => {
                let key = (id.clone(), wish == Wish::WatchGroup);
                for (_, queue) in self.watches.remove(&key).unwrap_or_default() {
                    queue.end(Ended::NotAccepted);
                }
            }
        }
    }

    fn changed(&mut self, id: &Id, group: bool, change: Change) {
        let Some(watches) = self.watches.get(&(id.clone(), group)) else { return };
        for (_, queue) in watches {
            let event = PresenceEvent { id: id.clone(), group, change };
            if queue.push(event).is_err() {
                queue.set_missed();
            }
            self.fired.push(Fired::WakePresence(Arc::clone(queue)));
        }
    }
}
