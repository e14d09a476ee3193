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
//! it. Nothing is stored: a message without a recipient is **not found**. **Backpressure** means
//! that a queue is full and no process has the message. **Lost** means that it is unknown, because
//! the other process, or the way to it, ended at the wrong moment. A message arrives at most once,
//! and the messages of one relay to one id arrive in their order.
//!
//! One thread of the process (`relay`) receives. Connect after forking: in a forked child every
//! call on the parent's relay fails ([`Outcome::Forked`], [`Error::Forked`]), and dropping its
//! handles does nothing.

mod config;
mod engine;
mod handles;
mod io;
mod message;
mod queue;
mod results;
mod slot;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

pub use self::config::RelayConfig;
pub use self::engine::{Options, Pick, Stats};
pub use self::handles::{Connecting, Incoming, Membership, Registering, Registration, Watch};
pub use self::message::Message;
pub use self::queue::{Ended, Receive};
pub use self::results::{
    Error, Outcome, Page, Place, PresenceEvent, Published, ReplyError, RequestError,
};
pub use self::slot::Pending;
pub use dispatch_protocol::relay::{Change, GroupSize, Id, MAX_ID};

use self::engine::Done;
use self::io::{Forked, Shared};
use self::queue::Queue;
use self::slot::Slot;

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
///         let _ = job.reply(b"done");
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

    fn queue<T: queue::Weigh>(&self) -> Arc<Queue<T>> {
        let shared = self.shared();
        Arc::new(Queue::new(shared.config.queue, Arc::clone(&shared.budget)))
    }

    /// Registers an id: messages to it come to the registration from now on. If it is registered
    /// elsewhere, the newest registration receives and the other one ends, or all receive, as the
    /// directory is configured.
    ///
    /// Without a directory the result waits until it returns.
    ///
    /// # Errors
    /// [`Error::NotAccepted`] if a limit of the directory is reached, [`Error::Closed`],
    /// [`Error::Forked`].
    pub fn register(&self, id: &Id) -> Registering {
        let queue = self.queue();
        let (slot, done) = Slot::new();
        let forked = Arc::clone(&slot);
        let key = {
            let queue = Arc::clone(&queue);
            self.shared().with(|engine, _| engine.register(id, queue, slot))
        };
        let key = key.unwrap_or_else(|Forked| {
            queue.end(Ended::Forked);
            forked.set(Err(Error::Forked));
            0
        });
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

    /// Sends to an id without waiting for the outcome, which is only counted
    /// ([`stats`](Relay::stats)): a message for which there is no room is dropped.
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
        self.start(done, bytes, |engine, now, payload, done| {
            engine.send_to_id(now, id, payload, done);
        });
    }

    fn start(
        &self,
        done: Done,
        bytes: &[u8],
        send: impl FnOnce(&mut engine::Engine, u64, Arc<[u8]>, Done),
    ) {
        let forked = done.clone();
        let started = self.shared().with(|engine, now| {
            if engine.is_too_long(bytes.len()) {
                return engine.refuse(done);
            }
            send(engine, now, bytes.into(), done);
        });
        if let Err(Forked) = started {
            forked.set_forked();
        }
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
        let key = key.unwrap_or_else(|Forked| {
            queue.end(Ended::Forked);
            0
        });
        Membership { relay: self.clone(), group: group.clone(), key, queue }
    }

    /// Sends to all members of a group, the own ones included; to none if it is longer than
    /// `max_message`. A member whose queue is full does not
    /// get it, and delays no other.
    pub fn publish(&self, group: &Id, bytes: impl AsRef<[u8]>) -> Pending<Published> {
        let (slot, pending) = Slot::new();
        let bytes = bytes.as_ref();
        let forked = Arc::clone(&slot);
        let unknown = Published { unknown: true, ..Published::default() };
        let started = self.shared().with(|engine, now| {
            if engine.is_too_long(bytes.len()) {
                return engine.fired.push(engine::Fired::Publish(slot, unknown));
            }
            engine.publish(now, group, bytes.into(), Some(slot));
        });
        if let Err(Forked) = started {
            forked.set(unknown);
        }
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
        self.start(done, bytes, |engine, now, payload, done| {
            engine.send_any(now, group, payload, options, done);
        });
    }

    /// Asks the directory.
    fn ask<T>(
        &self,
        question: impl FnOnce(&mut engine::Engine, u64, Arc<Slot<Result<T, Error>>>),
    ) -> Pending<Result<T, Error>> {
        let (slot, pending) = Slot::new();
        let forked = Arc::clone(&slot);
        let asked = self.shared().with(|engine, now| question(engine, now, slot));
        if let Err(Forked) = asked {
            forked.set(Err(Error::Forked));
        }
        pending
    }

    /// Where an id is registered: at most 64 places, none if it is not.
    ///
    /// # Errors
    /// [`Error::DirectoryAbsent`], [`Error::Backpressure`], [`Error::Forked`].
    pub fn who(&self, id: &Id) -> Pending<Result<Page, Error>> {
        self.ask(|engine, now, slot| engine.places(now, Some(id.clone()), 0, slot))
    }

    /// A page of the registered ids of the namespace: begin with 0, and go on with
    /// [`Page::next`] until that is 0. An id that is registered all the time is in exactly one
    /// page.
    ///
    /// # Errors
    /// [`Error::DirectoryAbsent`], [`Error::Backpressure`], [`Error::Forked`].
    pub fn online(&self, cursor: u64) -> Pending<Result<Page, Error>> {
        self.ask(|engine, now, slot| engine.places(now, None, cursor, slot))
    }

    /// A page of groups with their sizes, in the order of their names, after this one (empty at the
    /// start); fewer than 64 at the end.
    ///
    /// # Errors
    /// [`Error::DirectoryAbsent`], [`Error::Backpressure`], [`Error::Forked`].
    pub fn groups(&self, after: &[u8]) -> Pending<Result<Vec<GroupSize>, Error>> {
        self.ask(|engine, now, slot| engine.group_sizes(now, after, slot))
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
        let serial = serial.unwrap_or_else(|Forked| {
            queue.end(Ended::Forked);
            0
        });
        Watch { relay: self.clone(), id: id.clone(), group, serial, queue }
    }

    /// Whether the directory is there now.
    pub fn is_joined(&self) -> bool {
        self.shared().with(|engine, _| engine.is_connected()).unwrap_or(false)
    }

    /// The numbers of this relay. Every message that was sent is in exactly one of `delivered`,
    /// `not_found`, `backpressure` and `lost`, as soon as it has an outcome.
    pub fn stats(&self) -> Stats {
        self.shared().with(|engine, _| engine.stats()).unwrap_or_default()
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
