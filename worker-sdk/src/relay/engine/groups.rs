//! Groups: to all memberships, or to one of them; and messages with several recipients.

use std::collections::HashMap;
use std::collections::VecDeque;
use std::sync::Arc;

use dispatch_protocol::relay::frame::flag;
use dispatch_protocol::relay::{Id, Membership, ToDirectory};

use super::{Done, Engine, Fired, Outbound, Verdict, What};
use crate::relay::message::ReplyTo;
use crate::relay::slot::Slot;
use crate::relay::{Outcome, Published};
use dispatch_protocol::relay::frame::MAX_OVERHEAD;

/// Most members that one message is offered to.
const MAX_TRIES: usize = 64;

/// How one member of a group is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Pick {
    /// Each in turn.
    #[default]
    RoundRobin,
    /// Any, all equally likely.
    Random,
    /// Any, as likely as its weight says.
    Weighted,
}

/// How [`send_any`](crate::relay::Relay::send_any) chooses.
///
/// ```
/// use worker_sdk::relay::{Options, Pick};
///
/// let options = Options::new().pick(Pick::Weighted).prefer_local(true);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    pick: Pick,
    sticky: bool,
    prefer_local: bool,
}

impl Options {
    /// Round-robin over all members.
    pub fn new() -> Options {
        Options::default()
    }

    /// The rule.
    pub fn pick(self, pick: Pick) -> Options {
        Options { pick, ..self }
    }

    /// The same member for every message of this relay, as long as it is in the group; a weight of
    /// 0 is kept out, and others do not count.
    pub fn sticky(self, sticky: bool) -> Options {
        Options { sticky, ..self }
    }

    /// Members on the same host first.
    pub fn prefer_local(self, prefer_local: bool) -> Options {
        Options { prefer_local, ..self }
    }
}

/// A message to one member of a group.
pub(super) struct AnyOne {
    group: Id,
    options: Options,
    /// Memberships that did not receive it.
    tried: Vec<(u64, u32)>,
    /// Whether one of them was full.
    full: bool,
    /// Whether the way to one of them was lost before it had left.
    unsent: bool,
}

/// What waits for the memberships of a group.
pub(super) enum GroupOperation {
    Publish { payload: Arc<[u8]>, slot: Option<Arc<Slot<Published>>>, deadline: u64 },
    Any(Outbound),
}

impl GroupOperation {
    fn deadline(&self) -> u64 {
        match self {
            GroupOperation::Publish { deadline, .. } => *deadline,
            GroupOperation::Any(message) => message.deadline,
        }
    }

    fn size(&self) -> usize {
        match self {
            GroupOperation::Publish { payload, .. } => payload.len() + MAX_OVERHEAD,
            GroupOperation::Any(message) => message.size(),
        }
    }
}

/// What is known of a group.
#[derive(Default)]
pub(super) struct View {
    /// Whether a list has begun since the group was subscribed to; what the directory has sent
    /// before belongs to an earlier subscription.
    begun: bool,
    /// Whether the list is complete.
    complete: bool,
    members: Vec<Membership>,
    /// The next turn of round-robin.
    turn: usize,
    waiting: VecDeque<GroupOperation>,
    /// The bytes of these.
    bytes: usize,
    /// When something was sent to it last.
    used: u64,
}

/// Whose outcome several parts make.
pub(super) enum Kind {
    Publish(Option<Arc<Slot<Published>>>),
    /// All registrations of an id.
    All(Done),
}

/// A message with several recipients.
pub(super) struct Fan {
    kind: Kind,
    parts: u32,
    so_far: Published,
}

impl Fan {
    pub(super) fn new(kind: Kind, parts: u32) -> Fan {
        Fan { kind, parts, so_far: Published::default() }
    }
}

impl Engine {
    pub(crate) fn publish(
        &mut self,
        now: u64,
        group: &Id,
        payload: Arc<[u8]>,
        slot: Option<Arc<Slot<Published>>>,
    ) {
        self.stats.published += 1;
        let deadline = now.saturating_add(self.settings.timeout);
        let operation = GroupOperation::Publish { payload, slot, deadline };
        self.operate(now, group, operation);
    }

    pub(crate) fn send_any(
        &mut self,
        now: u64,
        group: &Id,
        payload: Arc<[u8]>,
        options: Options,
        done: Done,
    ) {
        self.stats.sent += 1;
        let deadline = now.saturating_add(self.settings.timeout);
        let any =
            AnyOne { group: group.clone(), options, tried: Vec::new(), full: false, unsent: false };
        let message = Outbound { payload, what: What::Any(Box::new(any)), done, deadline };
        self.operate(now, group, GroupOperation::Any(message));
    }

    fn operate(&mut self, now: u64, group: &Id, operation: GroupOperation) {
        if self.closed {
            return self.give_up(operation, Outcome::Lost);
        }
        if let GroupOperation::Any(message) = &operation
            && !self.has_room_for(&message.done)
        {
            return self.give_up(operation, Outcome::Backpressure);
        }
        match self.views.get_mut(group) {
            Some(view) if view.complete => {
                view.used = now;
                self.carry_out(now, group, operation);
            }
            found => {
                let new = found.is_none();
                if new && self.views.len() >= self.settings.routes {
                    self.forget_views(now, self.settings.timeout);
                }
                if new && self.views.len() >= self.settings.routes {
                    return self.give_up(operation, Outcome::Backpressure);
                }
                self.wait_for_view(now, group, operation);
                if new {
                    if self.sweep_views_at <= now {
                        self.sweep_views_at = now.saturating_add(self.settings.group_ttl / 4);
                    }
                    self.tell(&ToDirectory::Subscribe { group: group.clone() });
                }
            }
        }
        self.settle(now);
    }

    fn wait_for_view(&mut self, now: u64, group: &Id, operation: GroupOperation) {
        let size = operation.size();
        let fits = |used: usize, most: usize| used == 0 || used + size <= most;
        let limits = &self.settings;
        let view = self.views.entry(group.clone()).or_default();
        view.used = now;
        if view.waiting.len() < limits.waiting
            && fits(view.bytes, limits.recipient_bytes)
            && fits(self.waiting_bytes, limits.waiting_bytes)
        {
            self.waiting_bytes += size;
            view.bytes += size;
            view.waiting.push_back(operation);
        } else {
            self.give_up(operation, Outcome::Backpressure);
        }
    }

    /// Forgets groups to which nothing was sent for so long, and tells the directory.
    fn forget_views(&mut self, now: u64, unused: u64) {
        let idle = |(group, view): (&Id, &View)| {
            let idle = view.waiting.is_empty() && view.used.saturating_add(unused) <= now;
            idle.then(|| group.clone())
        };
        let forgotten: Vec<Id> = self.views.iter().filter_map(idle).collect();
        for group in forgotten {
            self.views.remove(&group);
            self.tell(&ToDirectory::Unsubscribe { group });
        }
    }

    /// The directory does not tell the members of a group. The next message asks again.
    pub(super) fn subscription_declined(&mut self, now: u64, group: &Id) {
        let Some(view) = self.views.remove(group) else { return };
        self.waiting_bytes -= view.bytes;
        for operation in view.waiting {
            self.give_up(operation, Outcome::Backpressure);
        }
        self.settle(now);
    }

    fn give_up(&mut self, operation: GroupOperation, outcome: Outcome) {
        match operation {
            GroupOperation::Any(message) => self.finish(message.done, outcome),
            GroupOperation::Publish { slot, .. } => {
                // No member is known, so none is counted.
                let published = Published { unknown: true, ..Published::default() };
                self.fired.extend(slot.map(|slot| Fired::Publish(slot, published)));
            }
        }
    }

    fn carry_out(&mut self, now: u64, group: &Id, operation: GroupOperation) {
        match operation {
            GroupOperation::Any(message) => self.try_one(now, message),
            GroupOperation::Publish { payload, slot, deadline } => {
                self.spread(now, group, payload, slot, deadline);
            }
        }
        self.settle(now);
    }

    /// One message to each member process; it serves all its memberships.
    fn spread(
        &mut self,
        now: u64,
        group: &Id,
        payload: Arc<[u8]>,
        slot: Option<Arc<Slot<Published>>>,
        deadline: u64,
    ) {
        let Some(view) = self.views.get(group) else { return };
        let mut members: HashMap<(u64, u64), u32> = HashMap::new();
        for one in &view.members {
            *members.entry((one.host, one.member)).or_default() += 1;
        }
        if members.is_empty() {
            let published = Published::default();
            return self.fired.extend(slot.map(|slot| Fired::Publish(slot, published)));
        }
        let fan = self.number();
        self.fans.insert(fan, Fan::new(Kind::Publish(slot), members.len() as u32));
        for ((host, member), memberships) in members {
            let part = Outbound {
                payload: Arc::clone(&payload),
                what: What::Part { fan, memberships, id: None },
                done: Done::Counted,
                deadline,
            };
            if member == self.own {
                let verdict = self.deliver(true, group.as_bytes(), 0, Arc::clone(&payload), None);
                self.verdicts.push_back((part, verdict));
                continue;
            }
            self.transmit(now, (host, member), flag::GROUP, 0, group.as_bytes(), part);
        }
    }

    pub(super) fn settle_part(&mut self, message: Outbound, verdict: Verdict) {
        let What::Part { fan, memberships, id } = message.what else { return };
        let Some(entry) = self.fans.get_mut(&fan) else { return };
        let so_far = &mut entry.so_far;
        match verdict {
            Verdict::Delivered => so_far.delivered = so_far.delivered.saturating_add(memberships),
            // Another process has counted: any number is possible.
            Verdict::Spread(delivered, full) => {
                so_far.delivered = so_far.delivered.saturating_add(delivered);
                so_far.dropped = so_far.dropped.saturating_add(full);
            }
            Verdict::Full | Verdict::TooLong => {
                so_far.dropped = so_far.dropped.saturating_add(memberships);
            }
            Verdict::Lost | Verdict::Unsent => {
                so_far.lost = so_far.lost.saturating_add(memberships);
            }
            // It has left a moment ago.
            Verdict::NotHere => {}
        }
        entry.parts -= 1;
        let ended = if entry.parts == 0 { self.fans.remove(&fan) } else { None };
        if matches!(verdict, Verdict::NotHere | Verdict::Unsent | Verdict::Lost)
            && let Some(id) = id
        {
            self.distrust(&id);
        }
        let Some(Fan { kind, so_far, .. }) = ended else { return };
        match kind {
            Kind::Publish(slot) => {
                self.fired.extend(slot.map(|slot| Fired::Publish(slot, so_far)));
            }
            Kind::All(done) => {
                let outcome = match so_far {
                    Published { delivered: 1.., .. } => Outcome::Delivered,
                    Published { dropped: 1.., .. } => Outcome::Backpressure,
                    Published { lost: 1.., .. } => Outcome::Lost,
                    Published { .. } => Outcome::NotFound,
                };
                self.finish(done, outcome);
            }
        }
    }

    /// Offers a message to the next member of its group.
    fn try_one(&mut self, now: u64, mut message: Outbound) {
        let What::Any(any) = &mut message.what else { return };
        let Some(chosen) = self.choose(any) else {
            let What::Any(any) = &message.what else { return };
            let outcome = match **any {
                AnyOne { full: true, .. } => Outcome::Backpressure,
                AnyOne { unsent: true, .. } => Outcome::Lost,
                AnyOne { .. } => Outcome::NotFound,
            };
            return self.finish(message.done, outcome);
        };
        any.tried.push((chosen.member, chosen.key));
        let group = any.group.clone();
        let request = matches!(message.done, Done::Request(..));
        let key = u64::from(chosen.key);
        if chosen.member == self.own {
            let sequence = self.number();
            let reply = request.then_some(ReplyTo { member: self.own, generation: 0, sequence });
            let payload = Arc::clone(&message.payload);
            let verdict = self.deliver(true, group.as_bytes(), key, payload, reply);
            if verdict == Verdict::Delivered {
                let own = self.own;
                return self.delivered(now, message.done, own, sequence);
            }
            return self.verdicts.push_back((message, verdict));
        }
        let flags = flag::GROUP | if request { flag::REQUEST } else { 0 };
        let (host, member) = (chosen.host, chosen.member);
        self.transmit(now, (host, member), flags, key, group.as_bytes(), message);
    }

    pub(super) fn settle_any(&mut self, now: u64, mut message: Outbound, verdict: Verdict) {
        let What::Any(any) = &mut message.what else { return };
        match verdict {
            Verdict::Delivered | Verdict::Spread(..) => {
                self.finish(message.done, Outcome::Delivered);
            }
            Verdict::Lost => self.finish(message.done, Outcome::Lost),
            Verdict::Full => {
                any.full = true;
                self.try_one(now, message);
            }
            Verdict::NotHere => self.try_one(now, message),
            Verdict::Unsent => {
                // The member may still be there: once it may be chosen again.
                if !std::mem::replace(&mut any.unsent, true) {
                    any.tried.pop();
                }
                self.try_one(now, message);
            }
            Verdict::TooLong => self.too_long(message.done),
        }
    }

    fn choose(&mut self, any: &AnyOne) -> Option<Membership> {
        if any.tried.len() >= MAX_TRIES {
            return None;
        }
        let random = self.random();
        let (own, own_host) = (self.own, self.host);
        let view = self.views.get_mut(&any.group)?;
        let may = |one: &&Membership| one.weight > 0 && !any.tried.contains(&(one.member, one.key));
        let near = any.options.prefer_local
            && view.members.iter().filter(may).any(|one| one.host == own_host);
        let may = |one: &&Membership| may(one) && (!near || one.host == own_host);
        if any.options.sticky {
            // The highest hash with the sender: a member that leaves moves only its own senders.
            let score = |one: &&Membership| mix(own ^ mix(one.member ^ u64::from(one.key)));
            return view.members.iter().filter(may).max_by_key(score).cloned();
        }
        match any.options.pick {
            Pick::RoundRobin => {
                let count = view.members.len();
                let start = view.turn;
                let turn = (0..count)
                    .map(|n| (start + n) % count)
                    .find(|&index| view.members.get(index).is_some_and(|one| may(&one)))?;
                view.turn = turn + 1;
                view.members.get(turn).cloned()
            }
            Pick::Random => {
                let count = view.members.iter().filter(may).count() as u64;
                let index = random.checked_rem(count)?;
                view.members.iter().filter(may).nth(index as usize).cloned()
            }
            Pick::Weighted => {
                let all = view.members.iter().filter(may).map(|one| u64::from(one.weight)).sum();
                let mut left = random.checked_rem(all)?;
                let reached = |one: &&Membership| match left.checked_sub(u64::from(one.weight)) {
                    Some(rest) => {
                        left = rest;
                        false
                    }
                    None => true,
                };
                view.members.iter().filter(may).find(reached).cloned()
            }
        }
    }

    /// The directory's word on the memberships of a group.
    pub(super) fn memberships(
        &mut self,
        now: u64,
        group: &Id,
        (reset, complete): (bool, bool),
        added: Vec<Membership>,
        removed: &[Membership],
    ) {
        let Some(view) = self.views.get_mut(group) else { return };
        if reset {
            view.members.clear();
            view.complete = false;
            view.begun = true;
        }
        if !view.begun {
            return;
        }
        let same = |a: &Membership, b: &Membership| (a.member, a.key) == (b.member, b.key);
        view.members.retain(|one| !removed.iter().chain(&added).any(|other| same(one, other)));
        view.members.extend(added);
        if !complete {
            return;
        }
        view.complete = true;
        view.bytes = 0;
        for operation in std::mem::take(&mut view.waiting) {
            self.waiting_bytes -= operation.size();
            self.carry_out(now, group, operation);
        }
    }

    pub(super) fn expire_views(&mut self, now: u64) {
        if now >= self.sweep_views_at {
            self.sweep_views_at = now.saturating_add(self.settings.group_ttl / 4).max(1);
            self.forget_views(now, self.settings.group_ttl);
        }
        if self.waiting_bytes == 0 {
            return;
        }
        let mut expired = Vec::new();
        for view in self.views.values_mut() {
            while view.waiting.front().is_some_and(|one| one.deadline() <= now) {
                let operation = view.waiting.pop_front();
                view.bytes -= operation.as_ref().map_or(0, GroupOperation::size);
                expired.extend(operation);
            }
        }
        for operation in expired {
            self.waiting_bytes -= operation.size();
            self.give_up(operation, Outcome::Lost);
        }
    }

    /// Asks a new directory for every group that is known. Until it has answered, the memberships
    /// that were known are used.
    pub(super) fn subscribe_again(&mut self) {
        let groups: Vec<Id> = self.views.keys().cloned().collect();
        for group in groups {
            self.tell(&ToDirectory::Subscribe { group });
        }
    }
}

/// Spreads the bits of a number (the finalizer of MurmurHash3).
fn mix(mut number: u64) -> u64 {
    number ^= number >> 33;
    number = number.wrapping_mul(0xff51_afd7_ed55_8ccd);
    number ^= number >> 33;
    number = number.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    number ^ (number >> 33)
}
