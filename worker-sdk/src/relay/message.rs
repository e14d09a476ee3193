//! A received message.

use std::fmt;
use std::sync::{Arc, Weak};

use super::io::Shared;

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

    /// Replies to a request; of anything else the bytes are dropped. A reply is not acknowledged: if
    /// the way back is lost, the requester learns it by its timeout.
    pub fn reply(mut self, bytes: impl AsRef<[u8]>) {
        self.answer(Some(bytes.as_ref().into()));
    }

    pub(super) fn forget_request(mut self) {
        self.reply_to = None;
    }

    fn answer(&mut self, payload: Option<Arc<[u8]>>) {
        if let (Some(to), Some(relay)) = (self.reply_to.take(), self.relay.upgrade()) {
            relay.reply(&to, payload);
        }
    }
}

impl Drop for Message {
    fn drop(&mut self) {
        self.answer(None);
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
