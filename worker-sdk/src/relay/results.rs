//! What operations of the relay end with: outcomes, errors, places of ids, and reports of changes.

use std::fmt;
use std::path::PathBuf;

use dispatch_protocol::relay::{Change, Id};

use super::queue::Weigh;
use super::slot::Orphan;

/// What became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[must_use = "a message that was not delivered has to be dealt with, if only by counting it"]
pub enum Outcome {
    /// It is in the recipient's queue.
    Delivered,
    /// The recipient is not registered anywhere; no process has the message.
    NotFound,
    /// A queue on the way is full; no process has the message. It can be sent again, or dropped.
    Backpressure,
    /// Unknown: the recipient's process or the way to it was lost, or the answer took longer than
    /// the timeout.
    Lost,
    /// It is longer than the directory's `max_message`; it was not sent, and is not counted.
    TooLong,
    /// This process is a fork of the one that has the relay; it was not sent, and is not counted.
    Forked,
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
    /// The members of the group are not known, because the directory did not tell them in time or a
    /// limit is reached, or this process is a fork; no process has the message.
    pub unknown: bool,
}

/// Why a request has no reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RequestError {
    /// The recipient is not registered, or the group has no member.
    NotFound,
    /// A queue is full; no process has the request.
    Backpressure,
    /// Unknown, as [`Outcome::Lost`].
    Lost,
    /// It is longer than the directory's `max_message`.
    TooLong,
    /// It was delivered, and the recipient dropped it without a reply.
    NoReply,
    /// It was delivered, and the recipient's reply was longer than `max_message`.
    ReplyTooLong,
    /// This process is a fork of the one that has the relay; it was not sent.
    Forked,
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
            RequestError::ReplyTooLong => "the reply is longer than max_message",
            RequestError::Forked => FORKED,
            RequestError::TimedOut => "the reply took too long",
        })
    }
}

impl std::error::Error for RequestError {}

const FORKED: &str = "this process is a fork of the one that has the relay; connect after forking";

/// Why a reply was not sent. The link to the requester goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ReplyError {
    /// It is longer than the largest message. The requester is told:
    /// [`RequestError::ReplyTooLong`].
    TooLong {
        /// Bytes of the reply.
        len: usize,
        /// Bytes of the largest message.
        max: usize,
    },
    /// The message is no request, so no process waits for a reply.
    NotARequest,
    /// The queue to the requester's process is full. The requester learns it by its timeout.
    Backpressure,
    /// The requester's process or the way to it was lost, or the relay was closed.
    Lost,
    /// This process is a fork of the one that has the relay.
    Forked,
}

impl fmt::Display for ReplyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ReplyError::TooLong { len, max } => {
                write!(f, "the reply has {len} bytes, max_message allows {max}")
            }
            ReplyError::NotARequest => f.write_str("the message is no request"),
            ReplyError::Backpressure => f.write_str("the queue to the requester is full"),
            ReplyError::Lost => f.write_str("the requester or the way to it was lost"),
            ReplyError::Forked => f.write_str(FORKED),
        }
    }
}

impl std::error::Error for ReplyError {}

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
    /// Too many questions wait for the directory's answer.
    Backpressure,
    /// This process is a fork of the one that has the relay.
    Forked,
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
            Error::Backpressure => f.write_str("too many questions wait for the directory"),
            Error::Forked => f.write_str(FORKED),
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

impl Weigh for PresenceEvent {
    fn weight(&self) -> usize {
        self.id.as_bytes().len() + size_of::<PresenceEvent>()
    }
}

impl Orphan for Outcome {
    fn forked() -> Self {
        Outcome::Forked
    }
}

impl Orphan for Published {
    fn forked() -> Self {
        Published { unknown: true, ..Published::default() }
    }
}

impl<T> Orphan for Result<T, Error> {
    fn forked() -> Self {
        Err(Error::Forked)
    }
}

impl<T> Orphan for Result<T, RequestError> {
    fn forked() -> Self {
        Err(RequestError::Forked)
    }
}
