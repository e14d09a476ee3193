//! Links between two members of this host: which members may have one, and how often.

use dispatch_protocol::relay::{FromDirectory, text};

use super::{Effect, MemberIndex, Now, Registry};

/// How long a link that a member has not received is taken to be on its way, in milliseconds.
const ON_ITS_WAY: u64 = 5000;

/// Between two links of one pair, in milliseconds. A member that asks more often would fill the
/// queue of the other one with descriptors.
const INTERVAL: u64 = 100;

/// The last link of a pair.
#[derive(Clone, Copy, Debug)]
pub(super) struct Link {
    number: u64,
    /// When it was made, on the steady clock.
    made: u64,
    /// The user whose member asked for the first one.
    payer: Option<u32>,
}

impl Registry {
    pub(super) fn connect(&mut self, now: Now, from: MemberIndex, number: u64, after: u64) {
        let Some(member) = self.member(from) else { return };
        let (own, user) = (member.number, member.user);
        let last = member.links.get(&number).copied();
        // A member can only have received what was given.
        if after > last.map_or(self.hlc.last(), |link| link.number) {
            return self.cut(from, "it names a link that does not exist");
        }
        let space = &self.namespaces[usize::from(member.namespace)];
        let other = space.members.get(&number).copied();
        let other = other.filter(|&other| self.member(other).is_some_and(|m| m.can_link()));
        let Some(other) = other.filter(|&other| other != from) else {
            return self.send(from, FromDirectory::NoMember { member: number });
        };
        let payer = match last {
            // Both have asked at the same time, and the link is on its way.
            Some(link) if link.number > after && now.steady < link.made + ON_ITS_WAY => return,
            Some(link) if now.steady < link.made + INTERVAL => {
                return self.no_link(from, number, "a link to this member was made a moment ago");
            }
            Some(link) => link.payer,
            None if self.users.of(user).links >= self.limits.links_per_user => {
                return self.no_link(from, number, "the user has max_links_per_user links");
            }
            None if self.users.sum(|usage| usage.links) >= self.limits.links => {
                return self.no_link(from, number, "the directory has max_links links");
            }
            None => {
                self.users.change(user, |usage| usage.links += 1);
                user
            }
        };
        self.totals.links += 1;
        let link = Link { number: self.hlc.stamp(now.wall), made: now.steady, payer };
        for (index, number) in [(from, number), (other, own)] {
            if let Some(member) = self.member_mut(index) {
                member.links.insert(number, link);
            }
        }
        self.effects.push_back(Effect::Link(from, other, link.number));
    }

    /// The link that `from` has asked for could not be made.
    pub fn link_failed(&mut self, from: MemberIndex, other: MemberIndex, reason: &str) {
        let numbers = (self.number_of(from), self.number_of(other));
        let (Some(own), Some(number)) = numbers else { return };
        if let Some(other) = self.member_mut(other) {
            other.links.remove(&own);
        }
        let link = self.member_mut(from).and_then(|member| member.links.remove(&number));
        if let Some(link) = link {
            self.users.change(link.payer, |usage| usage.links -= 1);
        }
        self.no_link(from, number, reason);
    }

    fn no_link(&mut self, to: MemberIndex, member: u64, reason: &str) {
        self.totals.not_accepted += 1;
        self.send(to, FromDirectory::NoLink { member, reason: text(reason) });
    }

    /// Forgets the links of a member that leaves.
    pub(super) fn end_links(&mut self, index: MemberIndex) {
        let Some(member) = self.member_mut(index) else { return };
        let links = std::mem::take(&mut member.links);
        let (namespace, own) = (usize::from(member.namespace), member.number);
        for (number, link) in links {
            self.users.change(link.payer, |usage| usage.links -= 1);
            let space = self.namespaces.get(namespace);
            let other = space.and_then(|space| space.members.get(&number)).copied();
            if let Some(other) = other.and_then(|other| self.member_mut(other)) {
                other.links.remove(&own);
            }
        }
    }
}
