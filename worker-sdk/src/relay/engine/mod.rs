//! The relay of one process as a state machine: routes, links, groups, deadlines.
//!
//! It is pure: calls of the application, records of the directory, frames of links and the time go
//! in; bytes to send, results to set and queues to wake come out. It opens no socket and reads no
//! clock. Times are milliseconds on a steady clock.
//!
//! Guarantees:
//!
//! - **At most once.** A message is handed to a second place only if the first one has said that it
//!   did not receive it, or the message had not left this process whole.
//! - **In order.** Messages of this process to one id arrive in the order of their sends. While one
//!   of them looks for its recipient again, later ones wait behind it. A registration is addressed
//!   by a key that is used once, so what was meant for an old registration cannot reach a new one between two
//!   messages.
//! - **Accounted for.** Each message ends with exactly one outcome.
//! - **Bounded.** Each queue has a limit of messages and of bytes; what exceeds it is refused at
//!   once.

mod control;
mod groups;
mod peers;
mod routes;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use dispatch_protocol::relay::frame::Status;
use dispatch_protocol::relay::{GroupSize, Id, Place, ToDirectory};

pub use groups::{Options, Pick};
pub(super) use peers::Peer;

use super::message::{Message, ReplyTo};
use super::queue::Queue;
use super::slot::Slot;
use super::{Error, Outcome, Page, PresenceEvent, Published, RequestError};
use groups::{Fan, View};
use routes::Route;

/// The bounds of one relay.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    /// Messages that wait for an answer, for each link.
    pub(super) window: usize,
    /// Bytes that wait to be sent, and bytes that wait for an answer, for each link.
    pub(super) link_bytes: usize,
    /// Messages that wait for a look-up, for each recipient.
    pub(super) waiting: usize,
    /// Bytes that wait for look-ups, in all.
    pub(super) waiting_bytes: usize,
    /// Recipients whose place is remembered.
    pub(super) routes: usize,
    /// How long an answer may take.
    pub(super) timeout: u64,
}

/// Cumulative numbers of one relay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Messages of this process to one recipient (`send`, `post`, `send_any`, `request`).
    pub sent: u64,
    /// Of these: in the recipient's queue.
    pub delivered: u64,
    /// Of these: without a recipient.
    pub not_found: u64,
    /// Of these: refused because a queue was full.
    pub backpressure: u64,
    /// Of these: unknown, because the recipient's process or the way to it was lost.
    pub lost: u64,
    /// Calls of `publish`.
    pub published: u64,
    /// Messages put into queues of this process.
    pub received: u64,
    /// Messages refused because a queue of this process was full.
    pub refused: u64,
    /// Look-ups at the directory.
    pub lookups: u64,
    /// Replies that were dropped, because the link to the requester was full or gone.
    pub replies_dropped: u64,
    /// Links to other members that exist now.
    pub links: u64,
}

/// What waits for the outcome of a message.
#[derive(Clone)]
pub(super) enum Done {
    /// Nothing: it is only counted.
    Counted,
    Send(Arc<Slot<Outcome>>),
    /// The reply, and how long it may take from the delivery on.
    Request(Arc<Slot<Result<Arc<[u8]>, RequestError>>>, u64),
}

/// A result to set when the engine is unlocked.
pub(super) enum Fired {
    Send(Arc<Slot<Outcome>>, Outcome),
    Request(Arc<Slot<Result<Arc<[u8]>, RequestError>>>, Result<Arc<[u8]>, RequestError>),
    Publish(Arc<Slot<Published>>, Published),
    Places(Arc<Slot<Result<Page, Error>>>, Result<Page, Error>),
    Groups(Arc<Slot<Result<Vec<GroupSize>, Error>>>, Result<Vec<GroupSize>, Error>),
    Registered(Arc<Slot<Result<u64, Error>>>, Result<u64, Error>),
    Wake(Arc<Queue<Message>>),
    WakePresence(Arc<Queue<PresenceEvent>>),
}

impl Fired {
    pub(super) fn fire(self) {
        match self {
            Fired::Send(slot, value) => slot.set(value),
            Fired::Request(slot, value) => slot.set(value),
            Fired::Publish(slot, value) => slot.set(value),
            Fired::Places(slot, value) => slot.set(value),
            Fired::Groups(slot, value) => slot.set(value),
            Fired::Registered(slot, value) => slot.set(value),
            Fired::Wake(queue) => queue.wake(),
            Fired::WakePresence(queue) => queue.wake(),
        }
    }
}

/// Where a message is going.
enum What {
    Id {
        id: Id,
        /// Whether it was looked up again after it was not found where it should have been.
        again: bool,
    },
    /// One of several: to a registration of an id, or to all memberships at one member.
    Part { fan: u64, memberships: u32, id: Option<Id> },
    /// One member of a group.
    Any(Box<groups::AnyOne>),
}

/// A message on its way out.
pub(super) struct Outbound {
    payload: Arc<[u8]>,
    what: What,
    done: Done,
    deadline: u64,
}

/// A registration of this process.
struct Local {
    /// 0 until the directory has accepted it.
    stamp: u64,
    queue: Arc<Queue<Message>>,
    /// Messages are addressed to it; it is used once.
    key: u32,
    done: Option<Arc<Slot<Result<u64, Error>>>>,
}

/// A membership of this process.
struct LocalMembership {
    key: u32,
    weight: u16,
    queue: Arc<Queue<Message>>,
}

/// A watch of this process: its number, and where its events go.
type LocalWatch = (u64, Arc<Queue<PresenceEvent>>);

/// A request to the directory that has not been answered.
enum Request {
    Register { id: Id, key: u32 },
    Lookup { id: Id },
}

/// A question of the application to the directory.
enum Question {
    Places { slot: Arc<Slot<Result<Page, Error>>>, deadline: u64 },
    Groups { slot: Arc<Slot<Result<Vec<GroupSize>, Error>>>, deadline: u64 },
}

/// A reply that is awaited.
struct AwaitedReply {
    slot: Arc<Slot<Result<Arc<[u8]>, RequestError>>>,
    deadline: u64,
}

/// See the module.
pub(super) struct Engine {
    settings: Settings,
    /// The number of this member.
    own: u64,
    /// The number of the own host; 0 before the first welcome.
    host: u64,
    /// The largest message that the directory allows; `None` before the first welcome.
    pub(super) max_message: usize,
    connected: bool,
    gateway: bool,
    /// Records for the directory.
    pub(super) control: VecDeque<Vec<u8>>,
    next_number: u64,
    next_key: u32,
    requests: HashMap<u64, Request>,
    questions: HashMap<u64, Question>,
    local: HashMap<Id, Vec<Local>>,
    memberships: HashMap<Id, Vec<LocalMembership>>,
    routes: HashMap<Id, Route>,
    waiting_bytes: usize,
    views: HashMap<Id, View>,
    fans: HashMap<u64, Fan>,
    pub(super) peers: HashMap<u64, Peer>,
    /// By member: the number of the last link to it.
    last_links: HashMap<u64, u64>,
    /// Members of other hosts whose epoch cannot be followed: host, member, epoch.
    resets: Vec<(u64, u64, u64)>,
    /// Members whose links have bytes to send.
    pub(super) dirty: Vec<u64>,
    replies: HashMap<(u64, u64), AwaitedReply>,
    watches: HashMap<(Id, bool), Vec<LocalWatch>>,
    pub(super) fired: Vec<Fired>,
    /// Outcomes that still have to be acted on; a queue, so that no call nests in another.
    verdicts: VecDeque<(Outbound, Verdict)>,
    pub(super) stats: Stats,
    random: u64,
    /// Whether the relay was closed.
    closed: bool,
}

/// What is known of a message at one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Delivered,
    /// Nobody has received it, and the recipient is not where it was looked for.
    NotHere,
    /// Nobody has received it, because a queue is full.
    Full,
    /// For all memberships at one member.
    Spread(u32, u32),
    Lost,
}

impl From<Status> for Verdict {
    fn from(status: Status) -> Verdict {
        match status {
            Status::Delivered => Verdict::Delivered,
            Status::NotHere => Verdict::NotHere,
            Status::Full => Verdict::Full,
        }
    }
}

impl Engine {
    /// `own` is a random number, not 0.
    pub(super) fn new(settings: Settings, own: u64) -> Engine {
        Engine {
            settings,
            own,
            host: 0,
            max_message: 0,
            connected: false,
            gateway: false,
            control: VecDeque::new(),
            next_number: 1,
            next_key: 0,
            requests: HashMap::new(),
            questions: HashMap::new(),
            local: HashMap::new(),
            memberships: HashMap::new(),
            routes: HashMap::new(),
            waiting_bytes: 0,
            views: HashMap::new(),
            fans: HashMap::new(),
            peers: HashMap::new(),
            last_links: HashMap::new(),
            resets: Vec::new(),
            dirty: Vec::new(),
            replies: HashMap::new(),
            watches: HashMap::new(),
            fired: Vec::new(),
            verdicts: VecDeque::new(),
            stats: Stats::default(),
            random: own | 1,
            closed: false,
        }
    }

    /// Whether something has a deadline.
    pub(super) fn has_deadlines(&self) -> bool {
        !self.replies.is_empty()
            || !self.questions.is_empty()
            || self.waiting_bytes > 0
            || self.peers.values().any(Peer::waits)
    }

    pub(crate) fn own_number(&self) -> u64 {
        self.own
    }

    pub(crate) fn is_too_long(&self, len: usize) -> bool {
        len > self.max_message
    }

    /// Ends a message that was not begun.
    pub(crate) fn refuse(&mut self, done: Done) {
        self.finish(done, Outcome::TooLong);
    }

    fn number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }

    /// Keys repeat after four thousand million registrations and memberships. 0 means all.
    fn key(&mut self) -> u32 {
        self.next_key = self.next_key.wrapping_add(1).max(1);
        self.next_key
    }

    /// xorshift64: no secret, and no reason to be one.
    fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    /// Sends to the directory, if it is there; everything that lasts is said again at the welcome.
    fn tell(&mut self, record: &ToDirectory) {
        if self.connected {
            let mut bytes = Vec::new();
            record.encode(&mut bytes);
            self.control.push_back(bytes);
        }
    }

    /// Ends a message.
    fn finish(&mut self, done: Done, outcome: Outcome) {
        match outcome {
            Outcome::Delivered => self.stats.delivered += 1,
            Outcome::NotFound => self.stats.not_found += 1,
            Outcome::Backpressure => self.stats.backpressure += 1,
            Outcome::Lost => self.stats.lost += 1,
            Outcome::TooLong => {}
        }
        match done {
            Done::Counted => {}
            Done::Send(slot) => self.fired.push(Fired::Send(slot, outcome)),
            Done::Request(slot, _) => {
                let error = match outcome {
                    // Delivered requests do not end here.
                    Outcome::Delivered | Outcome::Lost => RequestError::Lost,
                    Outcome::NotFound => RequestError::NotFound,
                    Outcome::Backpressure => RequestError::Backpressure,
                    Outcome::TooLong => RequestError::TooLong,
                };
                self.fired.push(Fired::Request(slot, Err(error)));
            }
        }
    }

    /// A message was delivered; a request now waits for its reply.
    fn delivered(&mut self, now: u64, done: Done, member: u64, sequence: u64) {
        if let Done::Request(slot, timeout) = done {
            self.stats.delivered += 1;
            let deadline = now.saturating_add(timeout);
            self.replies.insert((member, sequence), AwaitedReply { slot, deadline });
        } else {
            self.finish(done, Outcome::Delivered);
        }
    }

    /// A reply, or `None` if the application gave none.
    fn replied(&mut self, member: u64, sequence: u64, payload: Option<&[u8]>) {
        if let Some(awaited) = self.replies.remove(&(member, sequence)) {
            let result = payload.map(Arc::from).ok_or(RequestError::NoReply);
            self.fired.push(Fired::Request(awaited.slot, result));
        }
    }

    /// The application's reply to a message of a member.
    pub(super) fn reply(&mut self, to: &ReplyTo, payload: Option<Arc<[u8]>>) {
        if to.member == self.own {
            return self.replied(self.own, to.sequence, payload.as_deref());
        }
        let limit = self.settings.link_bytes;
        let sent = self
            .peers
            .get_mut(&to.member)
            .filter(|peer| peer.generation == to.generation)
            .is_some_and(|peer| peer.push_reply(limit, to.sequence, payload.as_deref()));
        if sent {
            self.dirty.push(to.member);
        } else {
            self.stats.replies_dropped += 1;
        }
    }

    /// Puts a message into the queues of this process.
    fn deliver(
        &mut self,
        group: bool,
        to: &[u8],
        key: u64,
        payload: Arc<[u8]>,
        mut reply_to: Option<ReplyTo>,
    ) -> Verdict {
        if !group {
            let all = self.local.get(to);
            let found = all.and_then(|all| all.iter().find(|one| u64::from(one.key) == key));
            let Some(queue) = found.map(|one| Arc::clone(&one.queue)) else {
                return Verdict::NotHere;
            };
            return self.put(queue, Message::new(payload, reply_to));
        }
        let Some(all) = self.memberships.get(to) else { return Verdict::NotHere };
        if key != 0 {
            let found = all.iter().find(|one| u64::from(one.key) == key);
            let Some(queue) = found.map(|one| Arc::clone(&one.queue)) else {
                return Verdict::NotHere;
            };
            return self.put(queue, Message::new(payload, reply_to));
        }
        let queues: Vec<_> = all.iter().map(|one| Arc::clone(&one.queue)).collect();
        let (mut delivered, mut full) = (0, 0);
        for queue in queues {
            match self.put(queue, Message::new(Arc::clone(&payload), reply_to.take())) {
                Verdict::Delivered => delivered += 1,
                _ => full += 1,
            }
        }
        Verdict::Spread(delivered, full)
    }

    fn put(&mut self, queue: Arc<Queue<Message>>, message: Message) -> Verdict {
        match queue.push(message) {
            Ok(()) => {
                self.stats.received += 1;
                self.fired.push(Fired::Wake(queue));
                Verdict::Delivered
            }
            Err(message) => {
                // The sender is told, so it does not wait for a reply.
                message.forget_request();
                if queue.ended().is_some() {
                    return Verdict::NotHere;
                }
                self.stats.refused += 1;
                Verdict::Full
            }
        }
    }

    /// Acts on what became of messages.
    fn settle(&mut self, now: u64) {
        while let Some((message, verdict)) = self.verdicts.pop_front() {
            match message.what {
                What::Id { .. } => self.settle_id(message, verdict),
                What::Part { .. } => self.settle_part(message, verdict),
                What::Any(_) => self.settle_any(now, message, verdict),
            }
        }
    }

    /// Ends what has waited too long.
    pub(super) fn tick(&mut self, now: u64) {
        let members: Vec<u64> = self.peers.keys().copied().collect();
        for member in members {
            if let Some(peer) = self.peers.get_mut(&member) {
                peer.expire(now, &mut self.verdicts);
            }
        }
        self.expire_routes(now);
        self.expire_views(now);
        let late = |deadline: u64| deadline <= now;
        let expired: Vec<_> =
            self.replies.iter().filter(|(_, r)| late(r.deadline)).map(|(key, _)| *key).collect();
        for key in expired {
            if let Some(awaited) = self.replies.remove(&key) {
                self.fired.push(Fired::Request(awaited.slot, Err(RequestError::TimedOut)));
            }
        }
        let of = |question: &Question| match question {
            Question::Places { deadline, .. } | Question::Groups { deadline, .. } => {
                late(*deadline)
            }
        };
        let expired: Vec<_> =
            self.questions.iter().filter(|(_, q)| of(q)).map(|(number, _)| *number).collect();
        expired.into_iter().for_each(|number| self.fail_question(number));
        self.settle(now);
    }

    fn fail_question(&mut self, number: u64) {
        let error = Error::DirectoryAbsent;
        match self.questions.remove(&number) {
            Some(Question::Places { slot, .. }) => self.fired.push(Fired::Places(slot, Err(error))),
            Some(Question::Groups { slot, .. }) => self.fired.push(Fired::Groups(slot, Err(error))),
            None => {}
        }
    }
}

/// A page of places, for the answers of the directory.
pub(super) fn page(places: Vec<Place>, next: u64) -> Page {
    Page { places: places.into_iter().map(Into::into).collect(), next }
}
