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
//! frame is answered once, in any order. A reader that meets a frame it cannot decode closes the
//! link: a stream has no place at which to begin again.

use crate::wire::WireError;

/// Most bytes of a frame besides its payload.
pub const MAX_OVERHEAD: usize = 4 + 2 + 8 + 8 + 1 + super::MAX_ID + 4 + 2 + 32;

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
        /// The answer; `None` if the application gave none.
        payload: Option<&'a [u8]>,
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
                let payload = (flags & flag::NO_REPLY == 0).then_some(rest);
                Ok(Frame::Reply { sequence, payload })
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

/// Appends a reply; `None` if the application gave none.
pub fn reply(out: &mut Vec<u8>, sequence: u64, payload: Option<&[u8]>) {
    let flags = if payload.is_none() { flag::NO_REPLY } else { 0 };
    let payload = payload.unwrap_or_default();
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
