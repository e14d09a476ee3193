//! What operations end with: results to set when the engine is unlocked, and numbers.

use std::sync::Arc;

use dispatch_protocol::relay::GroupSize;

use crate::relay::message::Message;
use crate::relay::queue::Queue;
use crate::relay::slot::Slot;
use crate::relay::{Error, Outcome, Page, PresenceEvent, Published, RequestError};

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
    /// Replies that were dropped, because they were too long, or the link to the requester was full
    /// or gone.
    pub replies_dropped: u64,
    /// Groups whose members are known now, because something was sent to them.
    pub groups: u64,
    /// Links to other members that exist now.
    pub links: u64,
}

/// What waits for the outcome of a message.
#[derive(Clone)]
pub(crate) enum Done {
    /// Nothing: it is only counted.
    Counted,
    Send(Arc<Slot<Outcome>>),
    /// The reply, and how long it may take from the delivery on.
    Request(Arc<Slot<Result<Arc<[u8]>, RequestError>>>, u64),
}

impl Done {
    /// This process is a fork: nothing was begun.
    pub(crate) fn set_forked(self) {
        match self {
            Done::Counted => {}
            Done::Send(slot) => slot.set(Outcome::Forked),
            Done::Request(slot, _) => slot.set(Err(RequestError::Forked)),
        }
    }
}

/// A result to set when the engine is unlocked.
pub(crate) enum Fired {
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
    pub(crate) fn fire(self) {
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
