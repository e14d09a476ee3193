//! Messages between workers (feature `relay`).
//!
//! Clients of one service are connected to different workers. A worker that serves client 1 reaches
//! the worker that serves client 2 through a [`Relay`]: it registers the ids of its clients, and
//! sends to ids. `dispatch-directory` knows which worker holds which id; the messages themselves
//! travel between the workers directly.
//!
//! Every operation can be awaited in a task of any runtime, or waited for in a thread:
//!
//! ```no_run
//! use worker_sdk::relay::{Id, Outcome, Relay, RelayConfig};
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let relay = Relay::connect(RelayConfig::new().namespace("chat").with_env()).wait()?;
//!     let alice = relay.register(&Id::new("alice")?).wait()?;
//!
//!     // In another worker: `relay.send(&Id::new("alice")?, b"hello").await`.
//!     let outcome = relay.send(&Id::new("alice")?, b"hello").wait();
//!     assert_eq!(outcome, Outcome::Delivered);
//!     if let Some(message) = alice.recv().wait() {
//!         println!("{} bytes for alice", message.bytes().len());
//!     }
//!     Ok(())
//! }
//! ```
//!
//! **Delivered** means: in the queue of the recipient's registration, from which its worker takes
//! it. Nothing is stored: a message without a recipient is **not found**. **Backpressure** means that
//! a queue is full and nobody has the message. **Lost** means that it is unknown, because the other
//! process, or the way to it, ended at the wrong moment. A message arrives at most once, and the
//! messages of one relay to one id arrive in their order.
//!
//! One thread of the process (`relay`) receives. Connect after forking.

mod config;
mod engine;
mod io;
mod message;
mod queue;
mod slot;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

pub use self::config::RelayConfig;
pub use self::engine::{Options, Pick, Stats};
pub use self::message::Message;
pub use self::queue::{Ended, Receive};
pub use self::slot::Pending;
pub use dispatch_protocol::relay::{Change, GroupSize, Id, MAX_ID};

use self::engine::Done;
use self::io::Shared;
use self::queue::Queue;
use self::slot::Slot;

/// What became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[must_use = "a message that was not delivered has to be dealt with, if only by counting it"]
pub enum Outcome {
    /// It is in the recipient's queue.
    Delivered,
    /// The recipient is not registered anywhere; nobody has the message.
    NotFound,
    /// A queue on the way is full; nobody has the message. It can be sent again, or dropped.
    Backpressure,
    /// Unknown: the recipient's process or the way to it was lost, or the answer took longer than
    /// the timeout.
    Lost,
    /// It is longer than the directory's `max_message`; it was not sent, and is not counted.
    TooLong,
}

/// How many memberships of a group received a message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Published {
    /// It is in their queues.
    pub delivered: u32,
    /// Their queues, or the way to them, were full; they do not have it.
    pub dropped: u32,
    /// Unknown, as [`Outcome::Lost`].
    pub lost: u32,
    /// The directory did not tell the members of the group in time; nobody has the message.
    pub unknown: bool,
}

/// Why a request has no reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RequestError {
    /// The recipient is not registered, or the group has no member.
    NotFound,
    /// A queue is full; nobody has the request.
    Backpressure,
    /// Unknown, as [`Outcome::Lost`].
    Lost,
    /// It is longer than the directory's `max_message`.
    TooLong,
    /// It was delivered, and the recipient dropped it without a reply.
    NoReply,
    /// It was delivered, and the reply took too long.
    TimedOut,
}

impl fmt::Display for RequestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            RequestError::NotFound => "the recipient is not registered",
            RequestError::Backpressure => "a queue is full",
            RequestError::Lost => "the recipient or the way to it was lost",
            RequestError::TooLong => "it is longer than max_message",
            RequestError::NoReply => "the recipient gave no reply",
            RequestError::TimedOut => "the reply took too long",
        })
    }
}

impl std::error::Error for RequestError {}

/// Why an operation failed.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// A setting is wrong.
    Config(String),
    /// The directory does not let this process in; the text says which key decides.
    Refused(String),
    /// There was no directory at this socket for `join_timeout`.
    JoinTimeout(PathBuf),
    /// The directory has accepted no registration; the text says which limit is reached.
    NotAccepted(String),
    /// The directory is not there now.
    DirectoryAbsent,
    /// The relay was closed.
    Closed,
    /// A system call failed.
    Io(std::io::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Config(problem) => f.write_str(problem),
            Error::Refused(reason) => write!(f, "the directory refuses this process: {reason}"),
            Error::JoinTimeout(path) => {
                write!(f, "no directory lets this process in at {}", path.display())
            }
            Error::NotAccepted(reason) => write!(f, "not registered: {reason}"),
            Error::DirectoryAbsent => f.write_str("the directory does not answer"),
            Error::Closed => f.write_str("the relay was closed"),
            Error::Io(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for Error {}

/// Where an id is registered, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Place {
    /// The id.
    pub id: Id,
    /// The name of the worker.
    pub worker: String,
    /// The name of its host.
    pub host: String,
}

impl From<dispatch_protocol::relay::Place> for Place {
    fn from(place: dispatch_protocol::relay::Place) -> Place {
        let (worker, host) = (place.worker.to_string(), place.host.to_string());
        Place { id: place.id, worker, host }
    }
}

/// A page of registered ids. It can be empty although others follow.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Page {
    /// The ids.
    pub places: Vec<Place>,
    /// For the next page; 0 at the end.
    pub next: u64,
}

/// A change of a watched id or group.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PresenceEvent {
    /// The id or group.
    pub id: Id,
    /// Whether it is a group.
    pub group: bool,
    /// What happened. After [`Change::Missed`] ask again for what matters.
    pub change: Change,
}

/// Closes the relay when its last handle is dropped.
struct Handle(Arc<Shared>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// This process among those that send each other messages. Clones are handles of the same relay;
/// dropping the last one, registrations and memberships included, closes it.
///
/// ```no_run
/// use std::time::Duration;
/// use worker_sdk::relay::{Id, Options, Relay, RelayConfig};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let relay = Relay::connect(RelayConfig::new()).wait()?;
/// let jobs = Id::new("jobs")?;
/// let membership = relay.join(&jobs);
/// std::thread::spawn(move || {
///     while let Some(job) = membership.recv().wait() {
///         job.reply(b"done");
///     }
/// });
/// let reply = relay.request_any(&jobs, b"resize 7", Duration::from_secs(2), Options::new());
/// println!("{:?}", reply.wait());
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Relay(Arc<Handle>);

impl Relay {
    /// Joins the directory, which the result waits for; it fails after `join_timeout`.
    ///
    /// Afterwards the relay joins again by itself whenever the directory returns. Meanwhile
    /// messages to workers that are known continue.
    ///
    /// # Errors
    /// [`Error::Config`], [`Error::Refused`], [`Error::JoinTimeout`], and [`Error::Io`] if a thread
    /// or descriptor cannot be made.
    pub fn connect(config: RelayConfig) -> Connecting {
        let (slot, joined) = Slot::new();
        let relay = config.check().and_then(|config| io::start(config, slot));
        match relay {
            Ok(shared) => Connecting { relay: Some(Relay(Arc::new(Handle(shared)))), joined },
            Err(error) => Connecting { relay: None, joined: Pending::ready(Err(error)) },
        }
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.0.0
    }

    fn queue<T>(&self) -> Arc<Queue<T>> {
        Arc::new(Queue::new(self.shared().config.queue))
    }

    /// Registers an id: messages to it come to the registration from now on. If it is registered
    /// elsewhere, the newest registration receives and the other one ends, or all receive, as the
    /// directory is configured.
    ///
    /// Without a directory the result waits until it returns.
    ///
    /// # Errors
    /// [`Error::NotAccepted`] if a limit of the directory is reached, [`Error::Closed`].
    pub fn register(&self, id: &Id) -> Registering {
        let queue = self.queue();
        let (slot, done) = Slot::new();
        let key = {
            let queue = Arc::clone(&queue);
            self.shared().with(|engine, _| engine.register(id, queue, slot))
        };
        let registration =
            Registration { relay: self.clone(), id: id.clone(), stamp: 0, key, queue };
        Registering { registration: Some(registration), done }
    }

    /// Sends to an id, and returns what became of it.
    ///
    /// If a queue is full the outcome is [`Outcome::Backpressure`] at once; the caller may wait and
    /// send again. [`post`](Relay::post) drops instead.
    pub fn send(&self, id: &Id, bytes: impl AsRef<[u8]>) -> Pending<Outcome> {
        let (slot, pending) = Slot::new();
        self.start_send(id, bytes.as_ref(), Done::Send(slot));
        pending
    }

    /// Sends to an id without waiting for the outcome, which is only counted ([`stats`](Relay::stats)):
    /// a message for which there is no room is dropped.
    pub fn post(&self, id: &Id, bytes: impl AsRef<[u8]>) {
        self.start_send(id, bytes.as_ref(), Done::Counted);
    }

    /// Sends a request to an id and returns the reply. Of several registrations the newest one gets
    /// it. `timeout` is for the reply, from the delivery on.
    pub fn request(
        &self,
        id: &Id,
        bytes: impl AsRef<[u8]>,
        timeout: Duration,
    ) -> Pending<Result<Arc<[u8]>, RequestError>> {
        let (slot, pending) = Slot::new();
        self.start_send(id, bytes.as_ref(), Done::Request(slot, milliseconds(timeout)));
        pending
    }

    fn start_send(&self, id: &Id, bytes: &[u8], done: Done) {
        self.shared().with(|engine, now| {
            if engine.is_too_long(bytes.len()) {
                return engine.refuse(done);
            }
            engine.send_to_id(now, id, bytes.into(), done);
        });
    }

    /// Joins a group: what is published to it comes to the membership, with weight 1 in
    /// [`send_any`](Relay::send_any). A worker without clients can join, too.
    pub fn join(&self, group: &Id) -> Membership {
        self.join_with_weight(group, 1)
    }

    /// Joins a group with a weight for [`send_any`](Relay::send_any); 0 is never chosen there.
    pub fn join_with_weight(&self, group: &Id, weight: u16) -> Membership {
        let queue = self.queue();
        let key = {
            let queue = Arc::clone(&queue);
            self.shared().with(|engine, _| engine.join(group, weight, queue))
        };
        Membership { relay: self.clone(), group: group.clone(), key, queue }
    }

    /// Sends to all members of a group, the own ones included; to nobody if it is longer than
    /// `max_message`. A member whose queue is full does not
    /// get it, and delays no other.
    pub fn publish(&self, group: &Id, bytes: impl AsRef<[u8]>) -> Pending<Published> {
        let (slot, pending) = Slot::new();
        let bytes = bytes.as_ref();
        self.shared().with(|engine, now| {
            if engine.is_too_long(bytes.len()) {
                let published = Published { unknown: true, ..Published::default() };
                return engine.fired.push(engine::Fired::Publish(slot, published));
            }
            engine.publish(now, group, bytes.into(), Some(slot));
        });
        pending
    }

    /// Sends to one member of a group. If it has left or is full, and so has not received it, the
    /// next one is tried.
    pub fn send_any(
        &self,
        group: &Id,
        bytes: impl AsRef<[u8]>,
        options: Options,
    ) -> Pending<Outcome> {
        let (slot, pending) = Slot::new();
        self.start_send_any(group, bytes.as_ref(), options, Done::Send(slot));
        pending
    }

    /// Sends a request to one member of a group, as [`send_any`](Relay::send_any) chooses it, and
    /// returns the reply. A request that a member has received is not sent to another one.
    pub fn request_any(
        &self,
        group: &Id,
        bytes: impl AsRef<[u8]>,
        timeout: Duration,
        options: Options,
    ) -> Pending<Result<Arc<[u8]>, RequestError>> {
        let (slot, pending) = Slot::new();
        let done = Done::Request(slot, milliseconds(timeout));
        self.start_send_any(group, bytes.as_ref(), options, done);
        pending
    }

    fn start_send_any(&self, group: &Id, bytes: &[u8], options: Options, done: Done) {
        self.shared().with(|engine, now| {
            if engine.is_too_long(bytes.len()) {
                return engine.refuse(done);
            }
            engine.send_any(now, group, bytes.into(), options, done);
        });
    }

    /// Where an id is registered: at most 64 places, none if it is not.
    ///
    /// # Errors
    /// [`Error::DirectoryAbsent`].
    pub fn who(&self, id: &Id) -> Pending<Result<Page, Error>> {
        let (slot, pending) = Slot::new();
        self.shared().with(|engine, now| engine.places(now, Some(id.clone()), 0, slot));
        pending
    }

    /// A page of the registered ids of the namespace: begin with 0, and go on with
    /// [`Page::next`] until that is 0. An id that is registered all the time is in exactly one page.
    ///
    /// # Errors
    /// [`Error::DirectoryAbsent`].
    pub fn online(&self, cursor: u64) -> Pending<Result<Page, Error>> {
        let (slot, pending) = Slot::new();
        self.shared().with(|engine, now| engine.places(now, None, cursor, slot));
        pending
    }

    /// A page of groups with their sizes, in the order of their names, after this one (empty at the
    /// start); fewer than 64 at the end.
    ///
    /// # Errors
    /// [`Error::DirectoryAbsent`].
    pub fn groups(&self, after: &[u8]) -> Pending<Result<Vec<GroupSize>, Error>> {
        let (slot, pending) = Slot::new();
        self.shared().with(|engine, now| engine.group_sizes(now, after, slot));
        pending
    }

    /// The changes of an id from now on: it came, went, or moved to another worker.
    pub fn watch(&self, id: &Id) -> Watch {
        self.start_watch(id, false)
    }

    /// The changes of a group from now on: a member came or went.
    pub fn watch_group(&self, group: &Id) -> Watch {
        self.start_watch(group, true)
    }

    fn start_watch(&self, id: &Id, group: bool) -> Watch {
        let queue = self.queue();
        let serial = {
            let queue = Arc::clone(&queue);
            self.shared().with(|engine, _| engine.watch(id, group, queue))
        };
        Watch { relay: self.clone(), id: id.clone(), group, serial, queue }
    }

    /// Whether the directory is there now.
    pub fn is_joined(&self) -> bool {
        self.shared().with(|engine, _| engine.is_connected())
    }

    /// The numbers of this relay. Every message that was sent is in exactly one of `delivered`,
    /// `not_found`, `backpressure` and `lost`, as soon as it has an outcome.
    pub fn stats(&self) -> Stats {
        self.shared().with(|engine, _| engine.stats)
    }
}

impl fmt::Debug for Relay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Relay")
            .field("socket", &self.shared().config.socket)
            .finish_non_exhaustive()
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// A [`Relay`] that is joining: `.await` it or [`wait`](Connecting::wait).
#[must_use = "the relay is closed if it is dropped"]
pub struct Connecting {
    relay: Option<Relay>,
    joined: Pending<Result<(), Error>>,
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
    registration: Option<Registration>,
    done: Pending<Result<u64, Error>>,
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
    relay: Relay,
    id: Id,
    stamp: u64,
    key: u32,
    queue: Arc<Queue<Message>>,
}

/// A membership of a group. Dropping it leaves.
pub struct Membership {
    relay: Relay,
    group: Id,
    key: u32,
    queue: Arc<Queue<Message>>,
}

/// Reports of changes. Dropping it ends them.
pub struct Watch {
    relay: Relay,
    id: Id,
    group: bool,
    serial: u64,
    queue: Arc<Queue<PresenceEvent>>,
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
        self.relay.shared().with(|engine, _| engine.unregister(&self.id, self.key));
    }
}

impl Membership {
    /// The group.
    pub fn group(&self) -> &Id {
        &self.group
    }

    /// Leaves the group; what has arrived before can still be received.
    pub fn leave(&self) {
        self.relay.shared().with(|engine, _| engine.leave(&self.group, self.key));
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
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.close();
        // Requests that nobody will look at are answered.
        while self.try_recv().is_some() {}
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.leave();
        // Requests that nobody will look at are answered.
        while self.try_recv().is_some() {}
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let (group, serial) = (self.group, self.serial);
        self.relay.shared().with(|engine, _| engine.unwatch(&self.id, group, serial));
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
