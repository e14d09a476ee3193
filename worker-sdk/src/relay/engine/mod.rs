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
mod ends;
#[cfg(test)]
mod faults;
mod gateway;
mod groups;
mod peer;
mod peers;
mod routes;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use dispatch_protocol::relay::frame::{MAX_OVERHEAD, Reply, Status};
use dispatch_protocol::relay::{GroupSize, Id, Place, ToDirectory};

pub use ends::Stats;
pub(super) use ends::{Done, Fired};
pub use groups::{Options, Pick};
use peer::Peer;

use super::message::{Message, ReplyTo};
use super::queue::Queue;
use super::slot::Slot;
use super::{Error, Outcome, Page, PresenceEvent, ReplyError, RequestError};
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
    /// Bytes that wait for the look-up of one recipient, and in all.
    pub(super) recipient_bytes: usize,
    pub(super) waiting_bytes: usize,
    /// Recipients whose place is remembered.
    pub(super) routes: usize,
    /// Requests that wait for a reply.
    pub(super) requests: usize,
    /// How long a group is remembered to which nothing is sent.
    pub(super) group_ttl: u64,
    /// How long an answer may take.
    pub(super) timeout: u64,
}

/// Bytes of records for a directory that does not read, besides what it is told when it returns;
/// with more the connection to it is given up.
const CONTROL_BYTES: usize = 16 * 1024 * 1024;

/// Questions that wait for the directory.
const MAX_QUESTIONS: usize = 16_384;

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

impl Outbound {
    /// What it takes of the limits in bytes.
    fn size(&self) -> usize {
        self.payload.len() + MAX_OVERHEAD
    }
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
    control: VecDeque<Vec<u8>>,
    /// Their bytes, and how many may wait.
    control_bytes: usize,
    control_limit: usize,
    next_number: u64,
    /// The wall clock at the steady clock's 0, and the last epoch. Microseconds.
    wall: u64,
    epoch: u64,
    next_key: u32,
    requests: HashMap<u64, Request>,
    questions: HashMap<u64, Question>,
    local: HashMap<Id, Vec<Local>>,
    memberships: HashMap<Id, Vec<LocalMembership>>,
    routes: HashMap<Id, Route>,
    waiting_bytes: usize,
    views: HashMap<Id, View>,
    /// When groups that are not used any more are looked for again.
    sweep_views_at: u64,
    fans: HashMap<u64, Fan>,
    pub(super) peers: HashMap<u64, Peer>,
    /// By member: the number of the last link to it.
    last_links: HashMap<u64, u64>,
    /// Members of other hosts whose epoch cannot be followed: host, member, epoch, and the epoch
    /// that its next one must exceed.
    resets: Vec<(u64, u64, u64, u64)>,
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
    /// No process has received it, and the recipient is not where it was looked for.
    NotHere,
    /// No process has received it, because the way was lost before it had left whole. The recipient
    /// may still be there.
    Unsent,
    /// No process has received it, because a queue is full.
    Full,
    /// No process has received it: it is longer than the other member accepts.
    TooLong,
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
    /// `own` is a random number, not 0; `wall` the wall clock at the steady clock's 0, in
    /// microseconds since 1970.
    pub(super) fn new(settings: Settings, own: u64, wall: u64) -> Engine {
        Engine {
            settings,
            own,
            host: 0,
            max_message: 0,
            connected: false,
            gateway: false,
            control: VecDeque::new(),
            control_bytes: 0,
            control_limit: CONTROL_BYTES,
            next_number: 1,
            wall,
            epoch: 0,
            // A later process with the same member number must not repeat them.
            next_key: (wall / 1000) as u32,
            requests: HashMap::new(),
            questions: HashMap::new(),
            local: HashMap::new(),
            memberships: HashMap::new(),
            routes: HashMap::new(),
            waiting_bytes: 0,
            views: HashMap::new(),
            sweep_views_at: 0,
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
            || self.peers.values().any(|peer| peer.waits() || peer.way == peer::Way::Asked)
    }

    /// When something must be looked at that has no hurry.
    pub(super) fn sweep_at(&self) -> Option<u64> {
        (!self.views.is_empty()).then_some(self.sweep_views_at)
    }

    pub(super) fn stats(&self) -> Stats {
        Stats { groups: self.views.len() as u64, ..self.stats }
    }

    fn wall_at(&self, now: u64) -> u64 {
        self.wall.saturating_add(now.saturating_mul(1000))
    }

    /// The number of a new exchange with a member: larger than all before, also those of an earlier
    /// process, because it follows the wall clock.
    fn epoch(&mut self, now: u64) -> u64 {
        self.epoch = self.epoch.saturating_add(1).max(self.wall_at(now));
        self.epoch
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
            self.control_bytes += bytes.len();
            self.control.push_back(bytes);
        }
    }

    /// The next record for the directory.
    pub(super) fn record(&self) -> Option<&[u8]> {
        self.control.front().map(Vec::as_slice)
    }

    /// It has left this process.
    pub(super) fn record_sent(&mut self) {
        if let Some(record) = self.control.pop_front() {
            self.control_bytes -= record.len();
        }
    }

    fn clear_records(&mut self) {
        self.control.clear();
        self.control_bytes = 0;
    }

    /// Whether the directory has not read for so long that its connection must be given up; it is
    /// told everything again when it returns.
    pub(super) fn has_too_many_records(&self) -> bool {
        self.control_bytes > self.control_limit
    }

    /// Ends a message.
    fn finish(&mut self, done: Done, outcome: Outcome) {
        match outcome {
            Outcome::Delivered => self.stats.delivered += 1,
            Outcome::NotFound => self.stats.not_found += 1,
            Outcome::Backpressure => self.stats.backpressure += 1,
            Outcome::Lost => self.stats.lost += 1,
            Outcome::TooLong | Outcome::Forked => {}
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
                    Outcome::Forked => RequestError::Forked,
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

    fn replied(&mut self, member: u64, sequence: u64, reply: Reply<'_>) {
        if let Some(awaited) = self.replies.remove(&(member, sequence)) {
            let result = match reply {
                Reply::Payload(payload) => Ok(Arc::from(payload)),
                Reply::None => Err(RequestError::NoReply),
                Reply::TooLong => Err(RequestError::ReplyTooLong),
            };
            self.fired.push(Fired::Request(awaited.slot, result));
        }
    }

    /// Whether one more request may wait for its reply.
    fn has_room_for(&self, done: &Done) -> bool {
        !matches!(done, Done::Request(..)) || self.replies.len() < self.settings.requests
    }

    /// The application's reply to a message of a member; `None` if it gives none. A reply that is
    /// too long is replaced by a word that says so.
    pub(super) fn reply(&mut self, to: &ReplyTo, payload: Option<&[u8]>) -> Result<(), ReplyError> {
        let own = to.member == self.own;
        let peer = self.peers.get_mut(&to.member).filter(|peer| peer.is(to.generation));
        let max = match &peer {
            _ if own => self.max_message,
            Some(peer) => peer.max_message,
            None => {
                self.stats.replies_dropped += 1;
                return Err(ReplyError::Lost);
            }
        };
        let len = payload.map_or(0, <[u8]>::len);
        let (reply, mut result) = match payload {
            None => (Reply::None, Ok(())),
            Some(_) if len > max => (Reply::TooLong, Err(ReplyError::TooLong { len, max })),
            Some(payload) => (Reply::Payload(payload), Ok(())),
        };
        if own {
            self.replied(self.own, to.sequence, reply);
        } else if peer.is_some_and(|p| p.push_reply(self.settings.link_bytes, to.sequence, reply)) {
            self.dirty.push(to.member);
        } else {
            result = result.and(Err(ReplyError::Backpressure));
        }
        self.stats.replies_dropped += u64::from(result.is_err());
        result
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

    /// Ends a message that the other member does not accept. As one that is too long for the own
    /// directory it is not counted.
    fn too_long(&mut self, done: Done) {
        self.stats.sent = self.stats.sent.saturating_sub(1);
        self.finish(done, Outcome::TooLong);
    }

    /// Ends what has waited too long, and asks again for what has not come.
    pub(super) fn tick(&mut self, now: u64) {
        let members: Vec<u64> = self.peers.keys().copied().collect();
        for member in members {
            if let Some(peer) = self.peers.get_mut(&member) {
                peer.expire(now, &mut self.verdicts);
            }
        }
        self.ask_links_again(now);
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
