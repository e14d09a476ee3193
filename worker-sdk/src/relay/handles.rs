//! The handles that the application keeps: registrations, memberships and watches, and the futures
//! that give them. Dropping one ends what it stands for.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use dispatch_protocol::relay::Id;

use super::io::Shared;
use super::queue::{Ended, Queue, Receive};
use super::{Error, Message, Pending, PresenceEvent, Relay};

/// A [`Relay`] that is joining: `.await` it or [`wait`](Connecting::wait).
#[must_use = "the relay is closed if it is dropped"]
pub struct Connecting {
    pub(super) relay: Option<Relay>,
    pub(super) joined: Pending<Result<(), Error>>,
}

impl Connecting {
    /// Blocks until the directory has answered.
    ///
    /// # Errors
    /// See [`Relay::connect`].
    pub fn wait(self) -> Result<Relay, Error> {
        self.joined.wait()?;
        self.relay.ok_or(Error::Closed)
    }
}

impl Future for Connecting {
    type Output = Result<Relay, Error>;

    fn poll(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Self::Output> {
        let joined = std::pin::Pin::new(&mut self.joined).poll(context);
        joined.map(|joined| joined.and_then(|()| self.relay.take().ok_or(Error::Closed)))
    }
}

impl fmt::Debug for Connecting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Connecting(..)")
    }
}

/// A [`Registration`] that the directory has not accepted yet: `.await` it or
/// [`wait`](Registering::wait).
#[must_use = "the registration ends if it is dropped"]
#[derive(Debug)]
pub struct Registering {
    pub(super) registration: Option<Registration>,
    pub(super) done: Pending<Result<u64, Error>>,
}

impl Registering {
    /// Blocks until the directory has answered.
    ///
    /// # Errors
    /// See [`Relay::register`].
    pub fn wait(self) -> Result<Registration, Error> {
        let stamp = self.done.wait()?;
        let mut registration = self.registration.ok_or(Error::Closed)?;
        registration.stamp = stamp;
        Ok(registration)
    }
}

impl Future for Registering {
    type Output = Result<Registration, Error>;

    fn poll(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Self::Output> {
        let done = std::pin::Pin::new(&mut self.done).poll(context);
        done.map(|done| {
            let stamp = done?;
            let mut registration = self.registration.take().ok_or(Error::Closed)?;
            registration.stamp = stamp;
            Ok(registration)
        })
    }
}

/// An id of this process. Keep it as long as the client's connection: dropping it ends the
/// registration.
pub struct Registration {
    pub(super) relay: Relay,
    pub(super) id: Id,
    pub(super) stamp: u64,
    pub(super) key: u32,
    pub(super) queue: Arc<Queue<Message>>,
}

/// A membership of a group. Dropping it leaves.
pub struct Membership {
    pub(super) relay: Relay,
    pub(super) group: Id,
    pub(super) key: u32,
    pub(super) queue: Arc<Queue<Message>>,
}

/// Reports of changes. Dropping it ends them.
pub struct Watch {
    pub(super) relay: Relay,
    pub(super) id: Id,
    pub(super) group: bool,
    pub(super) serial: u64,
    pub(super) queue: Arc<Queue<PresenceEvent>>,
}

/// What a registration and a membership have in common: a queue of messages.
macro_rules! receives {
    ($($type:ident)+) => { $(
        impl $type {
            /// The next message; `None` after the end.
            pub fn recv(&self) -> Incoming<'_> {
                Incoming { receive: self.queue.receive(), relay: self.relay.shared() }
            }

            /// The next message, if one is there.
            pub fn try_recv(&self) -> Option<Message> {
                self.queue.try_take().map(|message| own(message, self.relay.shared()))
            }

            /// Why nothing more comes; `None` while more may come. Messages that have arrived
            /// before can still be received.
            pub fn ended(&self) -> Option<Ended> {
                self.queue.ended()
            }
        }
    )+ };
}

receives! { Registration Membership }

impl Registration {
    /// The id.
    pub fn id(&self) -> &Id {
        &self.id
    }

    /// The directory's number of the registration. Of two registrations of an id, the later one has
    /// the larger number, whatever directory and host.
    pub fn stamp(&self) -> u64 {
        self.stamp
    }

    /// Ends the registration; what has arrived before can still be received.
    pub fn close(&self) {
        // In a fork it has no effect.
        let _ = self.relay.shared().with(|engine, _| engine.unregister(&self.id, self.key));
    }
}

impl Membership {
    /// The group.
    pub fn group(&self) -> &Id {
        &self.group
    }

    /// Leaves the group; what has arrived before can still be received.
    pub fn leave(&self) {
        // In a fork it has no effect.
        let _ = self.relay.shared().with(|engine, _| engine.leave(&self.group, self.key));
    }
}

impl Watch {
    /// The next change; `None` after the end.
    pub fn recv(&self) -> Receive<'_, PresenceEvent> {
        self.queue.receive()
    }

    /// The next change, if one is there.
    pub fn try_recv(&self) -> Option<PresenceEvent> {
        self.queue.try_take()
    }

    /// Why nothing more comes; `None` while more may come.
    pub fn ended(&self) -> Option<Ended> {
        self.queue.ended()
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.close();
        // Requests that the application will not receive are answered.
        while self.try_recv().is_some() {}
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.leave();
        // Requests that the application will not receive are answered.
        while self.try_recv().is_some() {}
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let (group, serial) = (self.group, self.serial);
        // In a fork it has no effect.
        let _ = self.relay.shared().with(|engine, _| engine.unwatch(&self.id, group, serial));
    }
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registration").field("id", &self.id).finish_non_exhaustive()
    }
}

impl fmt::Debug for Membership {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Membership").field("group", &self.group).finish_non_exhaustive()
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").field("id", &self.id).finish_non_exhaustive()
    }
}

/// A message can reply through its relay from when the application has it.
fn own(mut message: Message, relay: &Arc<Shared>) -> Message {
    message.relay = Arc::downgrade(relay);
    message
}

/// The next message: `.await` it in a task, or [`wait`](Incoming::wait) in a thread.
#[must_use = "nothing is received without `wait` or `.await`"]
pub struct Incoming<'a> {
    receive: Receive<'a, Message>,
    relay: &'a Arc<Shared>,
}

impl Incoming<'_> {
    /// Blocks until there is a message; `None` after the end.
    pub fn wait(self) -> Option<Message> {
        self.receive.wait().map(|message| own(message, self.relay))
    }

    /// Blocks no longer than this; `None` then, too.
    pub fn wait_for(self, time: Duration) -> Option<Message> {
        self.receive.wait_for(time).map(|message| own(message, self.relay))
    }
}

impl Future for Incoming<'_> {
    type Output = Option<Message>;

    fn poll(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Self::Output> {
        let received = std::pin::Pin::new(&mut self.receive).poll(context);
        received.map(|message| message.map(|message| own(message, self.relay)))
    }
}

impl fmt::Debug for Incoming<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Incoming(..)")
    }
}
