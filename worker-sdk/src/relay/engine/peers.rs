//! Links to other members: numbered messages out, answers in, and the reverse.

use std::collections::VecDeque;
use std::sync::Arc;

use dispatch_protocol::relay::ToDirectory;
use dispatch_protocol::relay::frame::{self, Frame, Status, flag};
use dispatch_protocol::wire::WireError;

use super::{Engine, Outbound, Verdict, What};
use crate::relay::message::ReplyTo;

/// A member that sends this much more than it may without reading its answers loses its link.
const SLACK: usize = 4 * 1024 * 1024;

/// Members whose last link is remembered, besides those with a link.
const MAX_LAST_LINKS: usize = 65_536;

/// Resets that wait to be sent; one that is not sent is asked for again.
const MAX_RESETS: usize = 1024;

/// How a member is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// The directory was asked for a link.
    Asked,
    /// A socket of the same host.
    Socket,
    /// Through the directory: a member of another host, and the number of that.
    Gateway(u64),
}

struct InFlight {
    /// `None` if it has an outcome.
    message: Option<Outbound>,
    /// The number of the byte after its frame.
    end: u64,
}

/// Another member, as long as there is a link or one is asked for.
pub(crate) struct Peer {
    pub(super) way: Way,
    /// Distinguishes links to the same member; later ones are larger.
    pub(super) generation: u64,
    /// The other member's generation, if frames are forwarded; 0 until it is known.
    other: u64,
    /// Bytes to send, from `head` on.
    out: Vec<u8>,
    head: usize,
    /// Bytes that have left this process.
    sent: u64,
    in_flight: VecDeque<InFlight>,
    /// The sequence of the first in flight.
    first: u64,
    /// Messages without an outcome, and their bytes.
    open: usize,
    open_bytes: usize,
    /// What the other member has not been told yet.
    answers: Vec<(u64, u32, Status)>,
    /// The sequence of its next message.
    expected: u64,
}

/// Why a link is closed.
#[derive(Debug)]
pub(crate) enum FrameError {
    Wire(WireError),
    Sequence,
    DoesNotRead,
}

impl From<WireError> for FrameError {
    fn from(error: WireError) -> Self {
        FrameError::Wire(error)
    }
}

impl std::fmt::Display for FrameError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            FrameError::Wire(error) => error.fmt(f),
            FrameError::Sequence => f.write_str("a sequence number is wrong"),
            FrameError::DoesNotRead => f.write_str("it does not read its answers"),
        }
    }
}

impl Peer {
    pub(super) fn new(way: Way, generation: u64) -> Peer {
        Peer {
            way,
            generation,
            other: 0,
            out: Vec::new(),
            head: 0,
            sent: 0,
            in_flight: VecDeque::new(),
            first: 1,
            open: 0,
            open_bytes: 0,
            answers: Vec::new(),
            expected: 1,
        }
    }

    pub(super) fn waits(&self) -> bool {
        self.open > 0
    }

    /// Whether this is the peer of that link.
    pub(crate) fn is(&self, generation: u64) -> bool {
        self.generation == generation
    }

    /// Bytes to send.
    pub(crate) fn unsent(&self) -> &[u8] {
        &self.out[self.head..]
    }

    /// So many bytes have left this process.
    pub(crate) fn advance(&mut self, count: usize) {
        self.head += count;
        self.sent += count as u64;
        if self.head == self.out.len() {
            self.out.clear();
            self.head = 0;
            // A large message should not keep its memory.
            self.out.shrink_to(64 * 1024);
        } else if self.head > self.out.len() / 2 {
            // At most one byte is moved for each that was sent.
            self.out.drain(..self.head);
            self.head = 0;
        }
    }

    /// The message again if there is no room.
    fn push(
        &mut self,
        limits: &super::Settings,
        flags: u8,
        key: u64,
        to: &[u8],
        message: Outbound,
    ) -> Result<u64, Outbound> {
        let size = message.payload.len() + frame::MAX_OVERHEAD;
        let full = |used: usize| used > 0 && used + size > limits.link_bytes;
        // Messages that have an outcome count, too, until the other member has answered.
        if self.in_flight.len() >= limits.window
            || full(self.unsent().len())
            || full(self.open_bytes)
        {
            return Err(message);
        }
        let sequence = self.first + self.in_flight.len() as u64;
        frame::data(&mut self.out, flags, sequence, key, to, &message.payload);
        let end = self.sent + self.unsent().len() as u64;
        self.open += 1;
        self.open_bytes += size;
        self.in_flight.push_back(InFlight { message: Some(message), end });
        Ok(sequence)
    }

    pub(super) fn push_reply(&mut self, limit: usize, sequence: u64, reply: Option<&[u8]>) -> bool {
        let size = reply.map_or(0, <[u8]>::len) + frame::MAX_OVERHEAD;
        let unsent = self.unsent().len();
        if unsent > 0 && unsent + size > limit {
            return false;
        }
        frame::reply(&mut self.out, sequence, reply);
        true
    }

    /// The message with this sequence has an outcome.
    fn answered(&mut self, sequence: u64) -> Option<Outbound> {
        let index = usize::try_from(sequence.checked_sub(self.first)?).ok()?;
        let message = self.in_flight.get_mut(index)?.message.take();
        if let Some(message) = &message {
            self.open -= 1;
            self.open_bytes -= message.payload.len() + frame::MAX_OVERHEAD;
        }
        message
    }

    /// Forgets messages at the front that the other member has answered.
    fn forget(&mut self, answered: u64) {
        // Answers come in the order of the messages, so everything up to this one is answered.
        while self.first <= answered {
            let Some(front) = self.in_flight.front() else { break };
            if front.message.is_some() {
                break;
            }
            self.in_flight.pop_front();
            self.first += 1;
        }
    }

    pub(super) fn expire(&mut self, now: u64, verdicts: &mut VecDeque<(Outbound, Verdict)>) {
        for index in 0..self.in_flight.len() {
            let Some(message) = &self.in_flight[index].message else { continue };
            if message.deadline > now {
                break;
            }
            let sequence = self.first + index as u64;
            if let Some(message) = self.answered(sequence) {
                verdicts.push_back((message, Verdict::Lost));
            }
        }
    }

    fn note(&mut self, sequence: u64, status: Status) {
        match self.answers.last_mut() {
            Some((first, count, last))
                if *last == status && *first + u64::from(*count) == sequence =>
            {
                *count += 1;
            }
            _ => self.answers.push((sequence, 1, status)),
        }
    }

    /// Appends what was noted to the bytes to send; false if there was nothing.
    pub(super) fn push_answers(&mut self) -> bool {
        if self.answers.is_empty() {
            return false;
        }
        for runs in self.answers.chunks(1024) {
            frame::answers(&mut self.out, runs);
        }
        self.answers.clear();
        true
    }
}

impl Engine {
    /// Sends to another member; the message again if there is no room.
    pub(super) fn transmit(
        &mut self,
        host: u64,
        member: u64,
        flags: u8,
        key: u64,
        to: &[u8],
        message: Outbound,
    ) -> Result<u64, Outbound> {
        if !self.peers.contains_key(&member) {
            let way = if host == self.host { Way::Asked } else { Way::Gateway(host) };
            if way == Way::Asked {
                let after = self.last_links.get(&member).copied().unwrap_or(0);
                self.tell(&ToDirectory::Connect { member, after });
            }
            let generation = self.number();
            self.peers.insert(member, Peer::new(way, generation));
        }
        let Some(peer) = self.peers.get_mut(&member) else { return Err(message) };
        let sequence = peer.push(&self.settings, flags, key, to, message)?;
        self.dirty.push(member);
        Ok(sequence)
    }

    /// A link has come. It replaces one before, whose last messages are not read any more.
    pub(crate) fn link_up(&mut self, now: u64, member: u64, number: u64) -> u64 {
        if self.last_links.len() >= MAX_LAST_LINKS {
            let peers = &self.peers;
            self.last_links.retain(|member, _| peers.contains_key(member));
        }
        self.last_links.insert(member, number);
        match self.peers.get_mut(&member) {
            Some(peer) if peer.way == Way::Asked => {
                peer.way = Way::Socket;
                self.dirty.push(member);
                peer.generation
            }
            _ => {
                self.link_down(now, member);
                let generation = self.number();
                self.peers.insert(member, Peer::new(Way::Socket, generation));
                generation
            }
        }
    }

    /// The link to a member has gone.
    pub(crate) fn link_down(&mut self, now: u64, member: u64) {
        let Some(peer) = self.peers.remove(&member) else { return };
        for entry in peer.in_flight {
            if let Some(message) = entry.message {
                // What has not left whole cannot have been received.
                let whole = entry.end <= peer.sent;
                let verdict = if whole { Verdict::Lost } else { Verdict::NotHere };
                self.verdicts.push_back((message, verdict));
            }
        }
        let awaited: Vec<_> = self.replies.keys().filter(|key| key.0 == member).copied().collect();
        for key in awaited {
            if let Some(awaited) = self.replies.remove(&key) {
                let lost = Err(crate::relay::RequestError::Lost);
                self.fired.push(super::Fired::Request(awaited.slot, lost));
            }
        }
        self.settle(now);
    }

    /// Whether this link is the current one.
    pub(crate) fn has_link(&self, member: u64, generation: u64) -> bool {
        self.peers.get(&member).is_some_and(|peer| peer.generation == generation)
    }

    /// A frame of another member.
    ///
    /// # Errors
    /// The link must be closed.
    pub(crate) fn frame(&mut self, now: u64, member: u64, frame: &[u8]) -> Result<(), FrameError> {
        match Frame::decode(frame)? {
            Frame::Data { flags, sequence, key, to, payload } => {
                let own_limit = self.settings.link_bytes + SLACK;
                let Some(peer) = self.peers.get_mut(&member) else { return Ok(()) };
                if sequence != peer.expected {
                    return Err(FrameError::Sequence);
                }
                if peer.unsent().len() > own_limit {
                    return Err(FrameError::DoesNotRead);
                }
                peer.expected += 1;
                let generation = peer.generation;
                let reply_to = (flags & flag::REQUEST != 0).then_some(ReplyTo {
                    member,
                    generation,
                    sequence,
                });
                let group = flags & flag::GROUP != 0;
                let verdict = self.deliver(group, to, key, Arc::from(payload), reply_to);
                let Some(peer) = self.peers.get_mut(&member) else { return Ok(()) };
                match verdict {
                    Verdict::Delivered => peer.note(sequence, Status::Delivered),
                    Verdict::Full => peer.note(sequence, Status::Full),
                    Verdict::NotHere | Verdict::Lost => peer.note(sequence, Status::NotHere),
                    Verdict::Spread(delivered, full) => {
                        // Answers stay in the order of the messages.
                        peer.push_answers();
                        frame::spread(&mut peer.out, sequence, delivered, full);
                    }
                }
                self.dirty.push(member);
            }
            Frame::Answers(answers) => {
                for (first, count, status) in answers {
                    let end = first.checked_add(u64::from(count)).ok_or(FrameError::Sequence)?;
                    self.check_sequence(member, end)?;
                    for sequence in first..end {
                        self.answer(now, member, sequence, status.into());
                    }
                }
            }
            Frame::Spread { sequence, delivered, full } => {
                self.check_sequence(member, sequence.saturating_add(1))?;
                self.answer(now, member, sequence, Verdict::Spread(delivered, full));
            }
            Frame::Reply { sequence, payload } => self.replied(member, sequence, payload),
            Frame::Forward { .. } | Frame::Unreachable { .. } => {
                return Err(FrameError::Wire(WireError::Invalid("frame of a directory")));
            }
        }
        Ok(())
    }

    /// An answer must be for a message that was sent. This bounds the loop over a run, too.
    fn check_sequence(&self, member: u64, end: u64) -> Result<(), FrameError> {
        let Some(peer) = self.peers.get(&member) else { return Err(FrameError::Sequence) };
        let sent = peer.first + peer.in_flight.len() as u64;
        if end <= sent { Ok(()) } else { Err(FrameError::Sequence) }
    }

    fn answer(&mut self, now: u64, member: u64, sequence: u64, verdict: Verdict) {
        let Some(peer) = self.peers.get_mut(&member) else { return };
        let message = peer.answered(sequence);
        peer.forget(sequence);
        let Some(message) = message else { return };
        if verdict == Verdict::Delivered && !matches!(message.what, What::Part { .. }) {
            if let What::Id { id, .. } = &message.what {
                self.route_answered(&id.clone());
            }
            self.delivered(now, message.done, member, sequence);
            return;
        }
        self.verdicts.push_back((message, verdict));
        self.settle(now);
    }

    /// The end of a batch of frames: answers become bytes to send.
    pub(crate) fn end_batch(&mut self, member: u64) {
        if let Some(peer) = self.peers.get_mut(&member)
            && peer.push_answers()
        {
            self.dirty.push(member);
        }
    }

    /// A frame of the directory's link, with frames of members of other hosts.
    ///
    /// # Errors
    /// The link must be closed.
    pub(crate) fn gateway_frame(&mut self, now: u64, frame: &[u8]) -> Result<(), FrameError> {
        match Frame::decode(frame)? {
            Frame::Forward { host, member, epoch, other, reset, frames } => {
                self.forwarded(now, host, member, (epoch, other), reset, frames)
            }
            Frame::Unreachable { member, .. } => {
                self.link_down(now, member);
                Ok(())
            }
            Frame::Data { .. } | Frame::Answers(_) | Frame::Spread { .. } | Frame::Reply { .. } => {
                Err(FrameError::Wire(WireError::Invalid("frame of a member")))
            }
        }
    }

    fn forwarded(
        &mut self,
        now: u64,
        host: u64,
        member: u64,
        (epoch, other): (u64, u64),
        reset: bool,
        frames: &[u8],
    ) -> Result<(), FrameError> {
        let own = self.peers.get(&member).map_or(0, |peer| peer.generation);
        if reset {
            if other == own {
                self.link_down(now, member);
            }
            return Ok(());
        }
        // The other member has begun again, or has been gone: what it had not answered is lost.
        let known = self.peers.get(&member).map_or(0, |peer| peer.other);
        if epoch < known {
            return Ok(());
        }
        if known != 0 && epoch > known {
            self.link_down(now, member);
        }
        // It answers messages that this side has given up.
        if other != 0 && self.peers.get(&member).is_none_or(|peer| peer.generation != other) {
            self.ask_reset(host, member, epoch);
            return Ok(());
        }
        if !self.peers.contains_key(&member) {
            let generation = self.number();
            self.peers.insert(member, Peer::new(Way::Gateway(host), generation));
        }
        if let Some(peer) = self.peers.get_mut(&member) {
            peer.other = epoch;
        }
        let mut rest = frames;
        while !rest.is_empty() {
            let len = Frame::len_of(rest).unwrap_or(usize::MAX);
            let Some((one, after)) = rest.split_at_checked(len) else {
                return Err(FrameError::Wire(WireError::TooShort("forwarded frame")));
            };
            rest = after;
            // A wrong frame ends what was with that member, not the directory's link. One that was
            // lost on the way shows as a wrong sequence.
            if self.frame(now, member, one).is_err() {
                self.link_down(now, member);
                self.ask_reset(host, member, epoch);
                break;
            }
        }
        self.end_batch(member);
        Ok(())
    }

    fn ask_reset(&mut self, host: u64, member: u64, other: u64) {
        if self.resets.len() < MAX_RESETS {
            self.resets.push((host, member, other));
        }
    }

    /// Moves resets for members of other hosts into `out`.
    pub(crate) fn take_resets(&mut self, out: &mut Vec<u8>) {
        for (host, member, other) in self.resets.drain(..) {
            frame::forward(out, host, member, (0, other), true, &[]);
        }
    }

    /// Moves what waits for members of other hosts into `out`, as long as that has room.
    pub(crate) fn take_forwards(&mut self, member: u64, out: &mut Vec<u8>, most: usize) -> bool {
        let Some(peer) = self.peers.get_mut(&member) else { return true };
        let Way::Gateway(host) = peer.way else { return true };
        if out.len() > most {
            return peer.unsent().is_empty();
        }
        // Whole frames: what is there was pushed whole.
        let unsent = peer.unsent().len();
        if unsent > 0 {
            let epochs = (peer.generation, peer.other);
            frame::forward(out, host, member, epochs, false, peer.unsent());
            peer.advance(unsent);
        }
        true
    }

    /// Whether a member is reached through the directory.
    pub(crate) fn is_forwarded(&self, member: u64) -> bool {
        self.peers.get(&member).is_some_and(|peer| matches!(peer.way, Way::Gateway(_)))
    }

    /// All members of other hosts are out of reach, because the directory's link has gone.
    pub(super) fn gateway_down(&mut self, now: u64) {
        let forwarded =
            |(member, peer): (&u64, &Peer)| matches!(peer.way, Way::Gateway(_)).then_some(*member);
        let members: Vec<u64> = self.peers.iter().filter_map(forwarded).collect();
        members.into_iter().for_each(|member| self.link_down(now, member));
    }
}
