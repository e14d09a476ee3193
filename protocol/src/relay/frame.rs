//! The frames of a link, a byte stream between two members or between a member and its directory.
//!
//! ```text
//! length u32 (of what follows) | kind u8 | flags u8 | body
//! ```
//!
//! | kind | body |
//! |---|---|
//! | data | sequence u64, key u64, length u8 and bytes of the id or group, payload |
//! | answers | entries: first sequence u64, count u32, [`Status`] u8 |
//! | spread | sequence u64, delivered u32, full u32: the answer for all memberships of a group |
//! | reply | sequence u64 of the request, payload |
//! | forward | host u64, member u64, epoch u64, other epoch u64, frames: to or from a member of another host |
//! | unreachable | host u64, member u64: nothing more is known of what was forwarded there |
//!
//! Sequences count up from 1 in each direction of a link, one for each data frame, and every data
//! frame is answered once, in the order of the sequences. A reader that meets a frame it cannot
//! decode, or one longer than [`longest`] allows, closes the link: a stream has no place at which
//! to begin again. On a link to the directory [`longest_forward`] is the bound.

use crate::wire::WireError;

/// Most bytes of a frame besides its payload.
pub const MAX_OVERHEAD: usize = 4 + 2 + 8 + 8 + 1 + super::MAX_ID + 4 + 2 + 32;

/// The shortest bound of a frame: answers and spreads must fit, whatever `max_message` is.
const MIN_FRAME: usize = 64 * 1024;

/// Most bytes of whole frames in one forward, unless a single one is longer.
pub const MAX_FORWARD: usize = 256 * 1024;

/// Bytes of a forward before its frames.
const FORWARD_HEAD: usize = 4 + 2 + 4 * 8;

/// The longest frame between two members whose largest message has `max_message` bytes.
pub const fn longest(max_message: usize) -> usize {
    let payload = if max_message > MIN_FRAME { max_message } else { MIN_FRAME };
    payload.saturating_add(MAX_OVERHEAD)
}

/// The longest frame between a member and its directory.
pub const fn longest_forward(max_message: usize) -> usize {
    let one = longest(max_message);
    (if one > MAX_FORWARD { one } else { MAX_FORWARD }).saturating_add(FORWARD_HEAD)
}

/// The number of bytes of whole frames at the start of `frames` that one forward has: at most
/// [`MAX_FORWARD`], or one frame; 0 if there is no whole one.
pub fn forwarded_at_once(frames: &[u8]) -> usize {
    let mut end = 0;
    while let Some(len) = frames.get(end..).and_then(Frame::len_of) {
        let next = end.saturating_add(len);
        if next > frames.len() || (end > 0 && next > MAX_FORWARD) {
            break;
        }
        end = next;
    }
    end
}

/// The longest message in `frames`, in bytes; `None` if these are not whole frames of a member.
pub fn longest_message(frames: &[u8]) -> Option<usize> {
    let (mut rest, mut longest) = (frames, 0);
    while !rest.is_empty() {
        let (one, after) = rest.split_at_checked(Frame::len_of(rest)?)?;
        rest = after;
        longest = longest.max(match Frame::decode(one).ok()? {
            Frame::Data { payload, .. } => payload.len(),
            Frame::Reply { reply: Reply::Payload(payload), .. } => payload.len(),
            Frame::Reply { .. } | Frame::Answers(_) | Frame::Spread { .. } => 0,
            Frame::Forward { .. } | Frame::Unreachable { .. } => return None,
        });
    }
    Some(longest)
}

/// Flags of a data frame.
pub mod flag {
    /// The sender waits for a reply.
    pub const REQUEST: u8 = 1;
    /// The destination is a group. The key is that of a membership; 0 means every membership of the
    /// receiving member.
    pub const GROUP: u8 = 2;
    /// Of a forward: the sender could not follow the other epoch, which therefore ends.
    pub const RESET: u8 = 1;
    /// Of a reply: the application has dropped the request without a reply.
    pub const NO_REPLY: u8 = 1;
    /// Of a reply: it was longer than the largest message, and is not here.
    pub const TOO_LONG: u8 = 2;
}

/// What became of a message at the receiving member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Status {
    /// It is in the application's queue.
    Delivered,
    /// The registration or membership is not here; no process has received the message.
    NotHere,
    /// The application's queue is full; no process has received the message.
    Full,
}

/// What an application has answered to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply<'a> {
    /// These bytes.
    Payload(&'a [u8]),
    /// Nothing: it has dropped the request.
    None,
    /// Something longer than the largest message.
    TooLong,
}

/// A decoded frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame<'a> {
    /// A message.
    Data {
        /// [`flag`]s.
        flags: u8,
        /// Its number in this direction of the link.
        sequence: u64,
        /// The receiving member's key of the registration or membership.
        key: u64,
        /// The id or group, at most [`MAX_ID`](super::MAX_ID) bytes.
        to: &'a [u8],
        /// The message.
        payload: &'a [u8],
    },
    /// What became of messages.
    Answers(Answers<'a>),
    /// What became of a message to all memberships of a group.
    Spread {
        /// The message.
        sequence: u64,
        /// Memberships that have it in their queues.
        delivered: u32,
        /// Memberships whose queue was full.
        full: u32,
    },
    /// The answer of an application to a request.
    Reply {
        /// The request.
        sequence: u64,
        /// The answer, or why there is none.
        reply: Reply<'a>,
    },
    /// Frames to or from a member of another host; only on a link to the directory.
    Forward {
        /// The other host.
        host: u64,
        /// The other member.
        member: u64,
        /// The sender's number of this exchange; its sequences begin at 1 with each. Later ones are
        /// larger.
        epoch: u64,
        /// The epoch of the receiver to which the frames belong; 0 if the sender knows none.
        other: u64,
        /// Whether the receiver's epoch `other` ends.
        reset: bool,
        /// Whole frames, without another forward.
        frames: &'a [u8],
    },
    /// A member of another host cannot be reached; only from the directory.
    Unreachable {
        /// The other host.
        host: u64,
        /// The other member.
        member: u64,
    },
}

const DATA: u8 = 1;
const ANSWERS: u8 = 2;
const SPREAD: u8 = 3;
const REPLY: u8 = 4;
const FORWARD: u8 = 5;
const UNREACHABLE: u8 = 6;

/// Bytes of one entry of [`Answers`].
const ENTRY: usize = 13;

/// The entries of an answers frame: first sequence, count, status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answers<'a>(&'a [u8]);

impl Iterator for Answers<'_> {
    type Item = (u64, u32, Status);

    fn next(&mut self) -> Option<Self::Item> {
        let (entry, rest) = self.0.split_first_chunk::<ENTRY>()?;
        self.0 = rest;
        let (first, rest) = entry.split_first_chunk::<8>()?;
        let (count, rest) = rest.split_first_chunk::<4>()?;
        let status = match rest {
            [0] => Status::Delivered,
            [2] => Status::Full,
            // Decoding has refused other values.
            _ => Status::NotHere,
        };
        Some((u64::from_le_bytes(*first), u32::from_le_bytes(*count), status))
    }
}

fn chunk<const N: usize>(bytes: &mut &[u8], field: &'static str) -> Result<[u8; N], WireError> {
    let (head, rest) = bytes.split_first_chunk::<N>().ok_or(WireError::TooShort(field))?;
    *bytes = rest;
    Ok(*head)
}

impl Frame<'_> {
    /// The number of bytes of the frame at the start of `stream`, with its length field; `None` if
    /// even that is not there yet.
    pub fn len_of(stream: &[u8]) -> Option<usize> {
        let (len, _) = stream.split_first_chunk::<4>()?;
        Some(4 + u32::from_le_bytes(*len) as usize)
    }

    /// Decodes one whole frame, of the length that [`len_of`](Frame::len_of) gives.
    ///
    /// # Errors
    /// [`WireError`] if the bytes are not exactly one well-formed frame.
    pub fn decode(frame: &[u8]) -> Result<Frame<'_>, WireError> {
        let mut rest = frame;
        if u32::from_le_bytes(chunk(&mut rest, "frame length")?) as usize != rest.len() {
            return Err(WireError::Invalid("frame length"));
        }
        let [kind, flags] = chunk(&mut rest, "frame kind")?;
        match kind {
            DATA => {
                let sequence = u64::from_le_bytes(chunk(&mut rest, "sequence")?);
                let key = u64::from_le_bytes(chunk(&mut rest, "key")?);
                let [len] = chunk(&mut rest, "destination")?;
                let (to, payload) = rest
                    .split_at_checked(usize::from(len))
                    .ok_or(WireError::TooShort("destination"))?;
                if !(1..=super::MAX_ID).contains(&to.len()) {
                    return Err(WireError::Invalid("destination"));
                }
                Ok(Frame::Data { flags, sequence, key, to, payload })
            }
            ANSWERS => {
                let whole = rest.len().is_multiple_of(ENTRY);
                if !whole || rest.chunks(ENTRY).any(|entry| entry[ENTRY - 1] > 2) {
                    return Err(WireError::Invalid("answers"));
                }
                Ok(Frame::Answers(Answers(rest)))
            }
            SPREAD => {
                let sequence = u64::from_le_bytes(chunk(&mut rest, "sequence")?);
                let delivered = u32::from_le_bytes(chunk(&mut rest, "delivered")?);
                let full = u32::from_le_bytes(chunk(&mut rest, "full")?);
                end(rest).map(|()| Frame::Spread { sequence, delivered, full })
            }
            REPLY => {
                let sequence = u64::from_le_bytes(chunk(&mut rest, "sequence")?);
                let reply = match flags & (flag::NO_REPLY | flag::TOO_LONG) {
                    0 => Reply::Payload(rest),
                    flag::NO_REPLY => end(rest).map(|()| Reply::None)?,
                    flag::TOO_LONG => end(rest).map(|()| Reply::TooLong)?,
                    _ => return Err(WireError::Invalid("flags of a reply")),
                };
                Ok(Frame::Reply { sequence, reply })
            }
            FORWARD => {
                let host = u64::from_le_bytes(chunk(&mut rest, "host")?);
                let member = u64::from_le_bytes(chunk(&mut rest, "member")?);
                let epoch = u64::from_le_bytes(chunk(&mut rest, "epoch")?);
                let other = u64::from_le_bytes(chunk(&mut rest, "other epoch")?);
                let reset = flags & flag::RESET != 0;
                Ok(Frame::Forward { host, member, epoch, other, reset, frames: rest })
            }
            UNREACHABLE => {
                let host = u64::from_le_bytes(chunk(&mut rest, "host")?);
                let member = u64::from_le_bytes(chunk(&mut rest, "member")?);
                end(rest).map(|()| Frame::Unreachable { host, member })
            }
            other => Err(WireError::UnknownKind(u16::from(other))),
        }
    }
}

fn end(rest: &[u8]) -> Result<(), WireError> {
    if rest.is_empty() { Ok(()) } else { Err(WireError::Invalid("end of frame")) }
}

/// Appends length, kind and flags; `body` is the number of bytes that follow.
fn head(out: &mut Vec<u8>, kind: u8, flags: u8, body: usize) {
    let len = u32::try_from(body + 2).unwrap_or(u32::MAX);
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(&[kind, flags]);
}

/// Appends a data frame. `to` has at most [`MAX_ID`](super::MAX_ID) bytes.
pub fn data(out: &mut Vec<u8>, flags: u8, sequence: u64, key: u64, to: &[u8], payload: &[u8]) {
    let to = &to[..to.len().min(super::MAX_ID)];
    out.reserve(payload.len() + MAX_OVERHEAD);
    head(out, DATA, flags, 8 + 8 + 1 + to.len() + payload.len());
    out.extend_from_slice(&sequence.to_le_bytes());
    out.extend_from_slice(&key.to_le_bytes());
    out.push(to.len() as u8);
    out.extend_from_slice(to);
    out.extend_from_slice(payload);
}

/// Appends answers: runs of sequences with the same status.
pub fn answers(out: &mut Vec<u8>, runs: &[(u64, u32, Status)]) {
    head(out, ANSWERS, 0, runs.len() * ENTRY);
    for (first, count, status) in runs {
        out.extend_from_slice(&first.to_le_bytes());
        out.extend_from_slice(&count.to_le_bytes());
        out.push(match status {
            Status::Delivered => 0,
            Status::NotHere => 1,
            Status::Full => 2,
        });
    }
}

/// Appends the answer for a message to all memberships of a group.
pub fn spread(out: &mut Vec<u8>, sequence: u64, delivered: u32, full: u32) {
    head(out, SPREAD, 0, 16);
    out.extend_from_slice(&sequence.to_le_bytes());
    out.extend_from_slice(&delivered.to_le_bytes());
    out.extend_from_slice(&full.to_le_bytes());
}

/// Appends a reply.
pub fn reply(out: &mut Vec<u8>, sequence: u64, reply: Reply<'_>) {
    let (flags, payload) = match reply {
        Reply::Payload(payload) => (0, payload),
        Reply::None => (flag::NO_REPLY, &[][..]),
        Reply::TooLong => (flag::TOO_LONG, &[][..]),
    };
    head(out, REPLY, flags, 8 + payload.len());
    out.extend_from_slice(&sequence.to_le_bytes());
    out.extend_from_slice(payload);
}

/// Appends a forward.
pub fn forward(
    out: &mut Vec<u8>,
    host: u64,
    member: u64,
    (epoch, other): (u64, u64),
    reset: bool,
    frames: &[u8],
) {
    head(out, FORWARD, if reset { flag::RESET } else { 0 }, 32 + frames.len());
    for number in [host, member, epoch, other] {
        out.extend_from_slice(&number.to_le_bytes());
    }
    out.extend_from_slice(frames);
}

/// Appends the notice that a member of another host cannot be reached.
pub fn unreachable(out: &mut Vec<u8>, host: u64, member: u64) {
    head(out, UNREACHABLE, 0, 16);
    out.extend_from_slice(&host.to_le_bytes());
    out.extend_from_slice(&member.to_le_bytes());
}
