//! Members of other hosts: frames that the directory forwards, in exchanges that have epochs.
//!
//! An epoch follows the wall clock, so that of a later process of the same member is larger, and
//! what arrives late of an earlier one is recognized. A member whose epoch is behind, because its
//! clock was set back, is told the epoch that it must exceed.

use dispatch_protocol::relay::frame::{self, Frame};
use dispatch_protocol::wire::WireError;

use super::Engine;
use super::peer::{FrameError, Peer, Way};

/// Resets that wait to be sent; one that is not sent is asked for again.
const MAX_RESETS: usize = 1024;

/// How far an epoch may be ahead of the own clock, in microseconds: one hour.
const AHEAD: u64 = 3_600_000_000;

impl Engine {
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
        // Nothing may make the own epochs run ahead of the time, here or at the other member.
        if epoch > self.wall_at(now).saturating_add(AHEAD) {
            log::warn!("event=relay_epoch_ahead");
            self.link_down(now, member);
            return Ok(());
        }
        let own = self.peers.get(&member).map_or(0, |peer| peer.generation);
        if reset {
            // The next epoch exceeds the one that the other member has seen.
            self.epoch = self.epoch.max(epoch);
            if other == own {
                self.link_down(now, member);
            }
            return Ok(());
        }
        let known = self.peers.get(&member).map_or(0, |peer| peer.other);
        if epoch < known {
            // Late frames of an earlier epoch, or a member whose clock was set back.
            self.ask_reset(host, member, epoch, known);
            return Ok(());
        }
        // The other member has begun again, or has been gone: what it had not answered is lost.
        if known != 0 && epoch > known {
            self.link_down(now, member);
        }
        // It answers messages that this side has given up.
        if other != 0 && self.peers.get(&member).is_none_or(|peer| peer.generation != other) {
            self.ask_reset(host, member, epoch, 0);
            return Ok(());
        }
        if !self.peers.contains_key(&member) {
            let peer = Peer::new(Way::Gateway(host), self.epoch(now), self.max_message);
            self.peers.insert(member, peer);
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
                self.ask_reset(host, member, epoch, 0);
                break;
            }
        }
        self.end_batch(member);
        Ok(())
    }

    /// `known` is the epoch that the other member must exceed; 0 if that is the case anyhow.
    fn ask_reset(&mut self, host: u64, member: u64, other: u64, known: u64) {
        if self.resets.len() < MAX_RESETS {
            self.resets.push((host, member, other, known));
        }
    }

    /// Moves resets for members of other hosts into `out`.
    pub(crate) fn take_resets(&mut self, out: &mut Vec<u8>) {
        for (host, member, other, known) in self.resets.drain(..) {
            frame::forward(out, host, member, (known, other), true, &[]);
        }
    }

    /// Enters a member in the list of those with frames for the gateway.
    pub(crate) fn list_forward(&mut self, member: u64, list: &mut Vec<u64>) {
        if let Some(peer) = self.peers.get_mut(&member)
            && !std::mem::replace(&mut peer.listed, true)
        {
            list.push(member);
        }
    }

    /// Moves what waits for members of other hosts into `out`, as long as that has room; false if
    /// something is left. One forward is never longer than both ends allow.
    pub(crate) fn take_forwards(&mut self, member: u64, out: &mut Vec<u8>, most: usize) -> bool {
        let Some(peer) = self.peers.get_mut(&member) else { return true };
        let Way::Gateway(host) = peer.way else { return true };
        while out.len() <= most {
            // Whole frames: what is there was pushed whole.
            let part = frame::forwarded_at_once(peer.unsent());
            if part == 0 {
                peer.listed = false;
                return true;
            }
            let epochs = (peer.generation, peer.other);
            frame::forward(out, host, member, epochs, false, &peer.unsent()[..part]);
            peer.advance(part);
        }
        let all = peer.unsent().is_empty();
        peer.listed = !all;
        all
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
