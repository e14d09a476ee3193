//! Links to other members: asked for, received, used and lost.

use std::sync::Arc;

use dispatch_protocol::relay::ToDirectory;
use dispatch_protocol::relay::frame::{self, Frame, Status, flag};
use dispatch_protocol::wire::WireError;

use super::peer::{FrameError, Peer, Way};
use super::{Engine, Outbound, Verdict, What};
use crate::relay::message::ReplyTo;

/// A member that sends this much more than it may without reading its answers loses its link.
const SLACK: usize = 4 * 1024 * 1024;

/// Members whose last link is remembered, besides those with a link.
const MAX_LAST_LINKS: usize = 65_536;

/// Between two requests for a link to one member, in milliseconds.
const ASK_AGAIN: u64 = 250;

impl Engine {
    /// Sends to another member. If there is no room the message has its verdict at once, so
    /// [`settle`](Engine::settle) must follow.
    pub(super) fn transmit(
        &mut self,
        now: u64,
        (host, member): (u64, u64),
        flags: u8,
        key: u64,
        to: &[u8],
        message: Outbound,
    ) {
        if !self.peers.contains_key(&member) {
            let way = if host == self.host { Way::Asked } else { Way::Gateway(host) };
            let mut peer = Peer::new(way, self.epoch(now), self.max_message);
            if way == Way::Asked {
                peer.ask_at = now.saturating_add(ASK_AGAIN);
                self.ask_link(member);
            }
            self.peers.insert(member, peer);
        }
        let Some(peer) = self.peers.get_mut(&member) else { return };
        match peer.push(&self.settings, flags, key, to, message) {
            Ok(()) => self.dirty.push(member),
            Err(refused) => self.verdicts.push_back(refused),
        }
    }

    /// Asks the directory for a link.
    pub(super) fn ask_link(&mut self, member: u64) {
        let after = self.last_links.get(&member).copied().unwrap_or(0);
        self.tell(&ToDirectory::Connect { member, after });
    }

    /// Asks again for links that have not come, as long as a message waits for them.
    pub(super) fn ask_links_again(&mut self, now: u64) {
        let late = |(member, peer): (&u64, &Peer)| {
            (peer.way == Way::Asked && peer.ask_at <= now).then_some((*member, peer.waits()))
        };
        let late: Vec<(u64, bool)> = self.peers.iter().filter_map(late).collect();
        for (member, waits) in late {
            if !waits {
                // The next message asks.
                self.link_down(now, member);
            } else if let Some(peer) = self.peers.get_mut(&member) {
                peer.ask_at = now.saturating_add(ASK_AGAIN);
                self.ask_link(member);
            }
        }
    }

    /// A link has come whose descriptor this process could not take.
    pub(crate) fn link_missed(&mut self, now: u64, member: u64, number: u64) {
        self.remember_link(member, number);
        if let Some(peer) = self.peers.get_mut(&member) {
            peer.ask_at = now.saturating_add(ASK_AGAIN);
        }
    }

    /// The directory gives no link now. The messages wait, and it is asked again.
    pub(super) fn no_link(&mut self, now: u64, member: u64, reason: &str) {
        let Some(peer) = self.peers.get_mut(&member) else { return };
        if peer.way == Way::Asked {
            log::warn!("event=relay_no_link reason={reason:?}");
            peer.ask_at = now.saturating_add(ASK_AGAIN);
        }
    }

    fn remember_link(&mut self, member: u64, number: u64) {
        if self.last_links.len() >= MAX_LAST_LINKS {
            let peers = &self.peers;
            self.last_links.retain(|member, _| peers.contains_key(member));
        }
        self.last_links.insert(member, number);
    }

    /// A link has come. It replaces one before, whose last messages are not read any more.
    pub(crate) fn link_up(
        &mut self,
        now: u64,
        member: u64,
        number: u64,
        max_message: usize,
    ) -> u64 {
        self.remember_link(member, number);
        match self.peers.get_mut(&member) {
            // What an earlier directory allowed may be longer than what the other member accepts.
            Some(peer) if peer.way == Way::Asked && !peer.exceeds(max_message) => {
                peer.way = Way::Socket;
                peer.max_message = max_message;
                self.dirty.push(member);
                peer.generation
            }
            _ => {
                let peer = Peer::new(Way::Socket, self.epoch(now), max_message);
                let generation = peer.generation;
                let old = self.peers.insert(member, peer);
                self.ended(now, member, old);
                generation
            }
        }
    }

    /// The link to a member has gone.
    pub(crate) fn link_down(&mut self, now: u64, member: u64) {
        let old = self.peers.remove(&member);
        self.ended(now, member, old);
    }

    fn ended(&mut self, now: u64, member: u64, old: Option<Peer>) {
        let Some(peer) = old else { return };
        peer.end(&mut self.verdicts);
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
                    // A delivery in this process is one of three; nothing else says that it
                    // arrived.
                    Verdict::NotHere | Verdict::Lost | Verdict::Unsent | Verdict::TooLong => {
                        peer.note(sequence, Status::NotHere);
                    }
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
                    self.check_run(member, first, count)?;
                    for sequence in (first..).take(count as usize) {
                        self.answer(now, member, sequence, status.into())?;
                    }
                }
            }
            Frame::Spread { sequence, delivered, full } => {
                self.answer(now, member, sequence, Verdict::Spread(delivered, full))?;
            }
            Frame::Reply { sequence, reply } => self.replied(member, sequence, reply),
            Frame::Forward { .. } | Frame::Unreachable { .. } => {
                return Err(FrameError::Wire(WireError::Invalid("frame of a directory")));
            }
        }
        Ok(())
    }

    /// A run of answers must be for messages that wait for one, before anything is done for it.
    fn check_run(&self, member: u64, first: u64, count: u32) -> Result<(), FrameError> {
        let unanswered = self.peers.get(&member).map_or(0, Peer::unanswered);
        let whole = (1..=unanswered).contains(&(count as usize));
        if whole && first.checked_add(u64::from(count)).is_some() {
            Ok(())
        } else {
            Err(FrameError::Answer)
        }
    }

    fn answer(
        &mut self,
        now: u64,
        member: u64,
        sequence: u64,
        verdict: Verdict,
    ) -> Result<(), FrameError> {
        let Some(peer) = self.peers.get_mut(&member) else { return Err(FrameError::Answer) };
        let Some(message) = peer.answered(sequence)? else { return Ok(()) };
        if verdict == Verdict::Delivered && !matches!(message.what, What::Part { .. }) {
            if let What::Id { id, .. } = &message.what {
                self.route_answered(&id.clone());
            }
            self.delivered(now, message.done, member, sequence);
            return Ok(());
        }
        self.verdicts.push_back((message, verdict));
        self.settle(now);
        Ok(())
    }

    /// The end of a batch of frames: answers become bytes to send.
    pub(crate) fn end_batch(&mut self, member: u64) {
        if let Some(peer) = self.peers.get_mut(&member)
            && peer.push_answers()
        {
            self.dirty.push(member);
        }
    }
}
