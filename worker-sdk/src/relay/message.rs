//! A received message.

use std::fmt;
use std::sync::{Arc, Weak};

use super::ReplyError;
use super::io::Shared;
use super::queue::Weigh;

/// Where the reply to a request goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ReplyTo {
    pub(super) member: u64,
    /// The link on which the request came; its successor would not know the sequence.
    pub(super) generation: u64,
    pub(super) sequence: u64,
}

/// A message in the application's queue.
///
/// If it is a request, dropping it without [`reply`](Message::reply) tells the requester that there
/// will be none.
pub struct Message {
    payload: Arc<[u8]>,
    reply_to: Option<ReplyTo>,
    /// Set when the application receives it.
    pub(super) relay: Weak<Shared>,
}

impl Message {
    pub(super) fn new(payload: Arc<[u8]>, reply_to: Option<ReplyTo>) -> Message {
        Message { payload, reply_to, relay: Weak::new() }
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.payload
    }

    /// The bytes, shared with other recipients of the same message in this process.
    pub fn shared_bytes(&self) -> Arc<[u8]> {
        Arc::clone(&self.payload)
    }

    /// Whether the sender waits for a reply.
    pub fn is_request(&self) -> bool {
        self.reply_to.is_some()
    }

    /// Replies to a request. A reply is not acknowledged: if the way back is lost later, the
    /// requester learns it by its timeout.
    ///
    /// # Errors
    /// [`ReplyError`]: the reply was not sent. One that is longer than `max_message` is reported to
    /// the requester.
    pub fn reply(mut self, bytes: impl AsRef<[u8]>) -> Result<(), ReplyError> {
        self.answer(Some(bytes.as_ref()))
    }

    pub(super) fn forget_request(mut self) {
        self.reply_to = None;
    }

    fn answer(&mut self, payload: Option<&[u8]>) -> Result<(), ReplyError> {
        let to = self.reply_to.take().ok_or(ReplyError::NotARequest)?;
        self.relay.upgrade().ok_or(ReplyError::Lost)?.reply(&to, payload)
    }
}

impl Drop for Message {
    fn drop(&mut self) {
        // Nothing can be done about a word that does not reach the requester.
        let _ = self.answer(None);
    }
}

/// Bytes besides the payload that one message takes.
const OVERHEAD: usize = size_of::<Message>() + 16;

impl Weigh for Message {
    fn weight(&self) -> usize {
        self.payload.len() + OVERHEAD
    }
}

impl AsRef<[u8]> for Message {
    fn as_ref(&self) -> &[u8] {
        &self.payload
    }
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Message")
            .field("bytes", &self.payload.len())
            .field("is_request", &self.is_request())
            .finish_non_exhaustive()
    }
}
