//! One other member: numbered messages out, what became of them, and answers to its messages.

use std::collections::VecDeque;

use dispatch_protocol::relay::frame::{self, Reply, Status};
use dispatch_protocol::wire::WireError;

use super::{Outbound, Settings, Verdict};

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
    /// The largest message, in bytes; the other member has the same bound.
    pub(super) max_message: usize,
    /// When the directory is asked again for a link that has not come.
    pub(super) ask_at: u64,
    /// Distinguishes links to the same member; later ones are larger, also those of a later
    /// process.
    pub(super) generation: u64,
    /// The other member's generation, if frames are forwarded; 0 until it is known.
    pub(super) other: u64,
    /// Whether it is in the list of those with frames for the gateway.
    pub(super) listed: bool,
    /// Bytes to send, from `head` on.
    pub(super) out: Vec<u8>,
    head: usize,
    /// Bytes that have left this process.
    sent: u64,
    in_flight: VecDeque<InFlight>,
    /// The sequence of the first in flight: the next one that the other member answers.
    first: u64,
    /// Messages without an outcome, and their bytes.
    open: usize,
    open_bytes: usize,
    /// What the other member has not been told yet.
    answers: Vec<(u64, u32, Status)>,
    /// The sequence of its next message.
    pub(super) expected: u64,
}

/// Why a link is closed.
#[derive(Debug)]
pub(crate) enum FrameError {
    Wire(WireError),
    Sequence,
    Answer,
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
            FrameError::Answer => f.write_str("an answer is for no message that waits for one"),
            FrameError::DoesNotRead => f.write_str("it does not read its answers"),
        }
    }
}

impl Peer {
    pub(super) fn new(way: Way, generation: u64, max_message: usize) -> Peer {
        Peer {
            way,
            max_message,
            ask_at: 0,
            generation,
            other: 0,
            listed: false,
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

    /// Whether messages wait for an outcome.
    pub(super) fn waits(&self) -> bool {
        self.open > 0
    }

    /// Whether this is the peer of that link.
    pub(crate) fn is(&self, generation: u64) -> bool {
        self.generation == generation
    }

    /// The longest frame that it may send.
    pub(crate) fn longest_frame(&self) -> usize {
        frame::longest(self.max_message)
    }

    /// Whether a message in flight exceeds a bound.
    pub(super) fn exceeds(&self, max_message: usize) -> bool {
        let mut messages = self.in_flight.iter().filter_map(|entry| entry.message.as_ref());
        messages.any(|message| message.payload.len() > max_message)
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

    /// Appends a message to the bytes to send.
    ///
    /// # Errors
    /// The message again, with the reason, if it is too long or there is no room.
    pub(super) fn push(
        &mut self,
        limits: &Settings,
        flags: u8,
        key: u64,
        to: &[u8],
        message: Outbound,
    ) -> Result<(), (Outbound, Verdict)> {
        if message.payload.len() > self.max_message {
            return Err((message, Verdict::TooLong));
        }
        let size = message.size();
        let full = |used: usize| used > 0 && used + size > limits.link_bytes;
        // Messages that have an outcome count, too, until the other member has answered.
        if self.in_flight.len() >= limits.window
            || full(self.unsent().len())
            || full(self.open_bytes)
        {
            return Err((message, Verdict::Full));
        }
        let sequence = self.first + self.in_flight.len() as u64;
        frame::data(&mut self.out, flags, sequence, key, to, &message.payload);
        let end = self.sent + self.unsent().len() as u64;
        self.open += 1;
        self.open_bytes += size;
        self.in_flight.push_back(InFlight { message: Some(message), end });
        Ok(())
    }

    /// False if there is no room. The reply is not longer than `max_message`.
    pub(super) fn push_reply(&mut self, limit: usize, sequence: u64, reply: Reply<'_>) -> bool {
        let size = match reply {
            Reply::Payload(payload) => payload.len(),
            Reply::None | Reply::TooLong => 0,
        };
        let size = size + frame::MAX_OVERHEAD;
        let unsent = self.unsent().len();
        if unsent > 0 && unsent + size > limit {
            return false;
        }
        frame::reply(&mut self.out, sequence, reply);
        true
    }

    fn closed(&mut self, message: Option<Outbound>) -> Option<Outbound> {
        if let Some(message) = &message {
            self.open -= 1;
            self.open_bytes -= message.size();
        }
        message
    }

    /// The other member has answered the message with this sequence, which must be the next one:
    /// each is answered once, in their order, so the work for an answer is bounded by what was
    /// sent. Returns the message unless it has an outcome already.
    pub(super) fn answered(&mut self, sequence: u64) -> Result<Option<Outbound>, FrameError> {
        if sequence != self.first {
            return Err(FrameError::Answer);
        }
        let Some(entry) = self.in_flight.pop_front() else { return Err(FrameError::Answer) };
        self.first += 1;
        Ok(self.closed(entry.message))
    }

    /// Messages that the other member has not answered.
    pub(super) fn unanswered(&self) -> usize {
        self.in_flight.len()
    }

    /// Takes the messages that have waited too long.
    pub(super) fn expire(&mut self, now: u64, verdicts: &mut VecDeque<(Outbound, Verdict)>) {
        for index in 0..self.in_flight.len() {
            let Some(message) = &self.in_flight[index].message else { continue };
            if message.deadline > now {
                break;
            }
            let message = self.in_flight[index].message.take();
            verdicts.extend(self.closed(message).map(|message| (message, Verdict::Lost)));
        }
    }

    /// What became of the messages when the link has gone. What has not left whole cannot have been
    /// received.
    pub(super) fn end(self, verdicts: &mut VecDeque<(Outbound, Verdict)>) {
        for entry in self.in_flight {
            let verdict = if entry.end <= self.sent { Verdict::Lost } else { Verdict::Unsent };
            verdicts.extend(entry.message.map(|message| (message, verdict)));
        }
    }

    pub(super) fn note(&mut self, sequence: u64, status: Status) {
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
