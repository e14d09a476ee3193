//! The registry: who holds which id, which members a group has, who wants to know of changes.
//!
//! It is pure: records and time go in, [`Effect`]s come out. It opens no socket, reads no clock and
//! writes no log. Everything in it is bounded by [`Limits`]; what exceeds a limit is not accepted
//! and the requester is told why. Namespaces never see each other: every look-up, group, watch and
//! link is in the namespace of the member that asks.
//!
//! Ids are ordered by a hybrid logical clock and then by the host's number, so that two directories
//! that have seen the same registrations agree, in whatever order they arrived.

mod groups;
mod hlc;
mod ids;
#[cfg(test)]
mod limit_tests;
mod links;
mod lookups;
mod presence;
mod remote;
mod slots;
#[cfg(test)]
mod tests;
mod usage;

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};

use dispatch_protocol::relay::{
    Count, FromDirectory, Id, Membership, Name, Shared, ToDirectory, Wish, host_number, text,
};

use groups::Group;
use hlc::Hlc;
use links::Link;
use lookups::Wait;
use slots::{NONE, Slots};
use usage::Users;

/// The time, twice: the wall clock for stamps, a steady clock for waits. Milliseconds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Now {
    /// Since 1970.
    pub wall: u64,
    /// Since any moment.
    pub steady: u64,
}

/// Bounds. `docs/RELAY.md` has the defaults.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Registered ids of all namespaces, those of other hosts included.
    pub ids: usize,
    /// Ids of one user's members; ended ones whose grace runs as many again.
    pub ids_per_user: usize,
    /// Ids of one member.
    pub ids_per_member: u32,
    /// Registrations of one id, where all receive.
    pub registrations_per_id: usize,
    /// Members of all namespaces, those of other hosts included.
    pub members: usize,
    /// Members of one user.
    pub members_per_user: usize,
    /// Groups of one namespace.
    pub groups: usize,
    /// Groups that exist because of one user.
    pub groups_per_user: usize,
    /// Memberships of one member, and groups that it sends to.
    pub groups_per_member: usize,
    /// Memberships of all members, and groups that they send to.
    pub memberships: usize,
    /// Of these: of one user.
    pub memberships_per_user: usize,
    /// Ids and groups that one member watches.
    pub watches_per_member: usize,
    /// Those of all members of this host.
    pub watches: usize,
    /// Those of one user's members.
    pub watches_per_user: usize,
    /// Look-ups of one member that wait for the end of a grace period.
    pub lookups_per_member: usize,
    /// Those of all members.
    pub lookups: usize,
    /// Those of one user's members.
    pub lookups_per_user: usize,
    /// Links between members that are there.
    pub links: usize,
    /// Of these: links that one user's members have asked for.
    pub links_per_user: usize,
    /// How long after the end of a registration a look-up waits for the next one. Milliseconds.
    pub grace: u64,
    /// How far a stamp of another directory may be ahead of the own clock. Milliseconds.
    pub drift: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            ids: 2_000_000,
            ids_per_user: 1_000_000,
            ids_per_member: 1_000_000,
            registrations_per_id: 16,
            members: 4096,
            members_per_user: 1024,
            groups: 65_536,
            groups_per_user: 32_768,
            groups_per_member: 65_536,
            memberships: 2_000_000,
            memberships_per_user: 1_000_000,
            watches_per_member: 65_536,
            watches: 1_000_000,
            watches_per_user: 500_000,
            lookups_per_member: 4096,
            lookups: 262_144,
            lookups_per_user: 65_536,
            links: 524_288,
            links_per_user: 131_072,
            grace: 2000,
            drift: 60_000,
        }
    }
}

/// Who receives if an id is registered more than once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Receives {
    /// The newest registration; the one before ends.
    #[default]
    Newest,
    /// All registrations.
    All,
}

/// A member, by its place in the registry. Places are reused.
pub type MemberIndex = u32;

/// Members that only ask; others do not take their places.
const MAX_OBSERVERS: usize = 64;

/// What the caller must do, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Send a record to a member.
    Send(MemberIndex, FromDirectory),
    /// Give two members a link with this number; the first one has asked.
    Link(MemberIndex, MemberIndex, u64),
    /// End the connection of a member that breaks the protocol, and say why in the log.
    Cut(MemberIndex, &'static str),
    /// Tell the other directories.
    Share(Shared),
}

/// Cumulative numbers.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Totals {
    registered: u64,
    superseded: u64,
    lookups: u64,
    found: u64,
    waited: u64,
    overdue: u64,
    stamps_ahead: u64,
    links: u64,
    not_accepted: u64,
}

#[derive(Debug)]
struct Namespace {
    name: Name,
    receives: Receives,
    /// By number.
    members: HashMap<u64, MemberIndex>,
    groups: HashMap<Id, Group>,
    /// Members that watch an id.
    watches: HashMap<Id, Vec<MemberIndex>>,
}

/// A directory's host; index 0 is the own one.
#[derive(Debug)]
struct Host {
    number: u64,
    name: Name,
}

#[derive(Debug)]
struct Member {
    number: u64,
    worker: Name,
    namespace: u16,
    /// An index into `hosts`.
    host: u16,
    /// Of a member of this host.
    user: Option<u32>,
    /// Whether it only asks.
    observes: bool,
    /// The first of its registrations.
    first: u32,
    ids: u32,
    joined: HashSet<(Id, u32)>,
    subscribed: HashSet<Id>,
    /// Ids and groups (true).
    watched: HashSet<(Id, bool)>,
    /// Look-ups that wait.
    lookups: usize,
    /// By the number of the other member.
    links: HashMap<u64, Link>,
}

impl Member {
    fn can_link(&self) -> bool {
        self.host == 0 && !self.observes
    }
}

/// An ended registration, or an id that was asked for while members register again.
#[derive(Clone, Copy, Debug)]
struct Grace {
    /// On the steady clock.
    end: u64,
    slot: u32,
    stamp: u64,
    /// Whose it was.
    user: Option<u32>,
}

/// A wish to enter a namespace.
#[derive(Clone, Debug)]
pub struct Entry {
    /// An index into the namespaces.
    pub namespace: u16,
    /// The number that the member has chosen; not 0.
    pub number: u64,
    /// The worker's name.
    pub worker: Name,
    /// The user of its process.
    pub user: u32,
    /// Whether it only asks. Others do not see it.
    pub observes: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Registry {
    limits: Limits,
    hlc: Hlc,
    hosts: Vec<Host>,
    namespaces: Vec<Namespace>,
    members: Vec<Option<Member>>,
    /// Indexes of members that have left.
    vacant: Vec<MemberIndex>,
    slots: Slots,
    users: Users,
    observers: usize,
    /// Ended registrations whose grace runs, in the order of their ends.
    graces: VecDeque<Grace>,
    /// Look-ups that wait for a slot.
    waiting: HashMap<u32, Vec<Wait>>,
    /// When each of them is answered in any case: time, serial, slot.
    overdue: BTreeSet<(u64, u64, u32)>,
    next_wait: u64,
    /// Until then members of an earlier directory may not have registered again. Steady clock.
    settling: u64,
    /// Snapshots under way, by host.
    confirmed: HashMap<u16, remote::Confirmed>,
    /// Whether other hosts are told.
    shares: bool,
    effects: VecDeque<Effect>,
    totals: Totals,
}

impl Registry {
    /// An empty registry. `shares` is whether changes are reported for other hosts.
    pub fn new(
        host: Name,
        namespaces: impl IntoIterator<Item = (Name, Receives)>,
        limits: Limits,
        shares: bool,
    ) -> Registry {
        let namespace = |(name, receives)| Namespace {
            name,
            receives,
            members: HashMap::new(),
            groups: HashMap::new(),
            watches: HashMap::new(),
        };
        Registry {
            limits,
            hlc: Hlc::default(),
            hosts: vec![Host { number: host_number(&host), name: host }],
            namespaces: namespaces.into_iter().map(namespace).collect(),
            members: Vec::new(),
            vacant: Vec::new(),
            slots: Slots::new(),
            users: Users::default(),
            observers: 0,
            graces: VecDeque::new(),
            waiting: HashMap::new(),
            overdue: BTreeSet::new(),
            next_wait: 0,
            settling: 0,
            confirmed: HashMap::new(),
            shares,
            effects: VecDeque::new(),
            totals: Totals::default(),
        }
    }

    /// The number of the own host.
    pub fn host(&self) -> u64 {
        self.hosts.first().map_or(0, |host| host.number)
    }

    /// For one grace from now on, look-ups of unknown ids wait: an earlier directory may have ended
    /// a moment ago, and its members register again.
    pub fn settle(&mut self, now: Now) {
        self.settling = now.steady + self.limits.grace;
    }

    /// The next thing to do. Take all of them after each call.
    pub fn effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// A member enters.
    ///
    /// # Errors
    /// A sentence for people, if it cannot.
    pub fn enter(&mut self, entry: Entry) -> Result<MemberIndex, &'static str> {
        let Entry { namespace, number, worker, user, observes } = entry;
        if observes && self.observers >= MAX_OBSERVERS {
            return Err("64 observers ask the directory now; try again");
        }
        if !observes && self.users.of(Some(user)).members >= self.limits.members_per_user {
            return Err("the user has max_members_per_user members");
        }
        let of = (0, Some(user), observes);
        let index = self.add_member(namespace, of, number, worker.clone())?;
        if observes {
            self.observers += 1;
            return Ok(index);
        }
        self.users.change(Some(user), |usage| usage.members += 1);
        if let Some(namespace) = self.namespaces.get(usize::from(namespace)) {
            let namespace = namespace.name.clone();
            self.share(Shared::Member { namespace, member: number, worker });
        }
        Ok(index)
    }

    fn member_count(&self) -> usize {
        self.members.len() - self.vacant.len() - self.observers
    }

    fn add_member(
        &mut self,
        namespace: u16,
        (host, user, observes): (u16, Option<u32>, bool),
        number: u64,
        worker: Name,
    ) -> Result<MemberIndex, &'static str> {
        if !observes && self.member_count() >= self.limits.members {
            return Err("the directory has max_members members");
        }
        let Some(space) = self.namespaces.get_mut(usize::from(namespace)) else {
            return Err("there is no such namespace");
        };
        if number == 0 || space.members.contains_key(&number) {
            return Err("another member has this number; it is chosen at random, so try again");
        }
        let member = Member {
            number,
            worker,
            namespace,
            host,
            user,
            observes,
            first: NONE,
            ids: 0,
            joined: HashSet::new(),
            subscribed: HashSet::new(),
            watched: HashSet::new(),
            lookups: 0,
            links: HashMap::new(),
        };
        let index = match self.vacant.pop() {
            Some(index) => index,
            None => {
                self.members.push(None);
                (self.members.len() - 1) as u32
            }
        };
        self.members[index as usize] = Some(member);
        space.members.insert(number, index);
        Ok(index)
    }

    /// A member leaves: its registrations and memberships end now.
    pub fn leave(&mut self, now: Now, index: MemberIndex) {
        while let Some(first) = self.member(index).map(|m| m.first).filter(|&first| first != NONE) {
            self.end_registration(now, first);
        }
        let Some(member) = self.member_mut(index) else { return };
        let joined = std::mem::take(&mut member.joined);
        let subscribed = std::mem::take(&mut member.subscribed);
        let watched = std::mem::take(&mut member.watched);
        let (namespace, number, waits) = (member.namespace, member.number, member.lookups > 0);
        let (local, user, observes) = (member.host == 0, member.user, member.observes);
        for (group, key) in joined {
            self.end_membership(index, namespace, &group, key);
        }
        for group in subscribed {
            self.unsubscribe(index, namespace, &group);
        }
        for (id, group) in watched {
            self.end_watch(index, namespace, &id, group);
        }
        if waits {
            self.end_waits_of(index);
        }
        self.end_links(index);
        self.members[index as usize] = None;
        self.vacant.push(index);
        let Some(space) = self.namespaces.get_mut(usize::from(namespace)) else { return };
        space.members.remove(&number);
        if observes {
            self.observers -= 1;
        } else if local {
            self.users.change(user, |usage| usage.members -= 1);
            let namespace = space.name.clone();
            self.share(Shared::Gone { namespace, member: number });
        }
    }

    /// A member's record. Hello is not among them: [`enter`](Registry::enter) is what it leads to.
    pub fn handle(&mut self, now: Now, from: MemberIndex, record: ToDirectory) {
        let Some(member) = self.member(from) else { return };
        let namespace = member.namespace;
        if member.observes && !presence::only_asks(&record) {
            return self.cut(from, "an observer may only ask");
        }
        match record {
            ToDirectory::Hello { .. } => self.cut(from, "hello was said before"),
            ToDirectory::Register { request, id, stamp, key } => {
                self.register(now, from, request, &id, (stamp, key));
            }
            ToDirectory::Unregister { id, stamp } => self.unregister(now, from, &id, stamp),
            ToDirectory::Lookup { request, id, newest, ended } => {
                self.look_up(now, from, request, &id, (newest, ended));
            }
            ToDirectory::Connect { member, after } => self.connect(now, from, member, after),
            ToDirectory::Join { group, key, weight } => self.join(from, group, key, weight),
            ToDirectory::Leave { group, key } => {
                let key_of = (group, key);
                let member = self.member_mut(from);
                if member.is_some_and(|member| member.joined.remove(&key_of)) {
                    self.end_membership(from, namespace, &key_of.0, key);
                }
            }
            ToDirectory::Subscribe { group } => self.subscribe(from, group),
            ToDirectory::Unsubscribe { group } => {
                let member = self.member_mut(from);
                if member.is_some_and(|member| member.subscribed.remove(&group)) {
                    self.unsubscribe(from, namespace, &group);
                }
            }
            ToDirectory::Who { request, id } => self.who(namespace, from, request, &id),
            ToDirectory::Online { request, cursor } => {
                self.online(namespace, from, request, cursor);
            }
            ToDirectory::Groups { request, after } => {
                self.group_sizes(namespace, from, request, &after);
            }
            ToDirectory::Watch { id, group } => self.watch(from, id, group),
            ToDirectory::Unwatch { id, group } => {
                let key = (id, group);
                let member = self.member_mut(from);
                if member.is_some_and(|member| member.watched.remove(&key)) {
                    self.end_watch(from, namespace, &key.0, group);
                }
            }
            ToDirectory::Stats { request } => {
                let counts = self.counts();
                self.send(from, FromDirectory::Counts { request, counts });
            }
        }
    }

    /// Ends grace periods, and answers look-ups that have waited long enough. Returns when the next
    /// one ends, on the steady clock.
    pub fn tick(&mut self, now: Now) -> Option<u64> {
        while let Some(&grace) = self.graces.front().filter(|grace| grace.end <= now.steady) {
            self.graces.pop_front();
            self.users.change(grace.user, |usage| usage.graces -= 1);
            // Otherwise a later registration has the slot.
            let ended = |slot: &slots::Slot| slot.member == NONE && slot.stamp == grace.stamp;
            if self.slots.get(grace.slot).is_some_and(ended) {
                self.forget(grace.slot);
            }
        }
        self.answer_overdue(now);
        let grace = self.graces.front().map(|grace| grace.end);
        let overdue = self.overdue.first().map(|wait| wait.0);
        grace.into_iter().chain(overdue).min()
    }

    /// The directory's numbers: state first, then what has happened since the start.
    pub fn counts(&self) -> Vec<Count> {
        let groups: usize = self.namespaces.iter().map(|space| space.groups.len()).sum();
        let waiting: usize = self.waiting.values().map(Vec::len).sum();
        let users = &self.users;
        let ids = self.members.iter().flatten().map(|member| u64::from(member.ids)).sum();
        let totals = &self.totals;
        let numbers = [
            ("ids", ids),
            ("ids_in_grace", (self.slots.len() as u64).saturating_sub(ids)),
            ("members", self.member_count() as u64),
            ("hosts", self.hosts.len() as u64),
            ("groups", groups as u64),
            ("memberships", users.sum(|usage| usage.memberships) as u64),
            ("watches", users.sum(|usage| usage.watches) as u64),
            ("linked_pairs", users.sum(|usage| usage.links) as u64),
            ("lookups_waiting", waiting as u64),
            ("registered_total", totals.registered),
            ("superseded_total", totals.superseded),
            ("lookups_total", totals.lookups),
            ("lookups_found_total", totals.found),
            ("lookups_waited_total", totals.waited),
            ("lookups_overdue_total", totals.overdue),
            ("stamps_ahead_total", totals.stamps_ahead),
            ("links_total", totals.links),
            ("not_accepted_total", totals.not_accepted),
        ];
        let count = |(name, value)| Some(Count { name: Name::new(name).ok()?, value });
        numbers.into_iter().filter_map(count).collect()
    }

    fn member(&self, index: MemberIndex) -> Option<&Member> {
        self.members.get(index as usize)?.as_ref()
    }

    fn member_mut(&mut self, index: MemberIndex) -> Option<&mut Member> {
        self.members.get_mut(index as usize)?.as_mut()
    }

    /// The user of a member; `None` for one of another host.
    fn user_of(&self, index: MemberIndex) -> Option<u32> {
        self.member(index)?.user
    }

    /// The number of a member's host.
    fn host_of(&self, member: &Member) -> u64 {
        self.hosts.get(usize::from(member.host)).map_or(0, |host| host.number)
    }

    fn membership(&self, index: MemberIndex, key: u32, weight: u16) -> Option<Membership> {
        let member = self.member(index)?;
        Some(Membership { host: self.host_of(member), member: member.number, key, weight })
    }

    /// Sends to a member of this host; the directories of other hosts serve theirs.
    fn send(&mut self, to: MemberIndex, record: FromDirectory) {
        if self.member(to).is_some_and(|member| member.host == 0) {
            self.effects.push_back(Effect::Send(to, record));
        }
    }

    fn cut(&mut self, member: MemberIndex, reason: &'static str) {
        self.effects.push_back(Effect::Cut(member, reason));
    }

    fn decline(&mut self, to: MemberIndex, wish: Wish, id: Id, key: u32, reason: &str) {
        self.totals.not_accepted += 1;
        self.send(to, FromDirectory::Declined { wish, id, key, reason: text(reason) });
    }

    fn refuse(&mut self, to: MemberIndex, request: u64, reason: &str) {
        self.totals.not_accepted += 1;
        self.send(to, FromDirectory::NotAccepted { request, reason: text(reason) });
    }

    fn share(&mut self, record: Shared) {
        if self.shares {
            self.effects.push_back(Effect::Share(record));
        }
    }
}
