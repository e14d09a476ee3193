//! The records of the relay: between a member and its directory, and between two members.
//!
//! A *member* is a worker's connection to the directory, in one namespace. The directory knows
//! which member has registered an id and which have joined a group, and gives two members a link, a
//! stream socket pair, over which messages travel without it.
//!
//! [`ToDirectory`] and [`FromDirectory`] are records of a `SOCK_SEQPACKET` socket, one message
//! each. [`frame`] has the frames of a link. [`ticket`] has the proof that a process belongs to a
//! pool. All integers are little-endian. This module owns bytes, bounds and errors; it knows no
//! sockets, processes or time. Decoding is exact: bytes that are left over are an error.
//!
//! ```
//! use dispatch_protocol::relay::{FromDirectory, Id, ToDirectory};
//!
//! let lookup = ToDirectory::Lookup { request: 7, id: Id::new(b"alice")?, newest: 0, ended: false };
//! let mut record = Vec::new();
//! lookup.encode(&mut record);
//! assert_eq!(ToDirectory::decode(&record)?, lookup);
//! # Ok::<(), dispatch_protocol::wire::WireError>(())
//! ```

mod field;
pub mod frame;
mod names;
pub mod ticket;

pub use names::{Id, Name};

use crate::wire::WireError;
use field::{Field, Reader};

/// The version of these records; [`ToDirectory::Hello`] carries it.
pub const VERSION: u16 = 1;

/// The longest id of a client or name of a group, in bytes.
pub const MAX_ID: usize = 128;

/// The longest record between a member and its directory, in bytes.
pub const MAX_RECORD: usize = 32_768;

/// The longest text for people, in bytes.
pub const MAX_TEXT: usize = 1024;

/// Most entries of a page in an answer. A full page of the largest entries fits in a record.
pub const MAX_PAGE: usize = 64;

/// Declares a structure that is a field of records.
macro_rules! fields {
    ($($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)+ })+) => { $(
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub struct $name { $($(#[$field_doc])* pub $field: $type,)+ }

        impl Field for $name {
            fn put(&self, out: &mut Vec<u8>) {
                $(self.$field.put(out);)+
            }

            fn take(reader: &mut Reader<'_>) -> Result<Self, WireError> {
                Ok($name { $($field: Field::take(reader)?,)+ })
            }
        }
    )+ };
}

/// Declares the records of one direction: kind, name, fields in the order of their bytes.
macro_rules! records {
    ($(#[$doc:meta])* $enum:ident {
        $($(#[$kind_doc:meta])* $kind:literal = $name:ident {
            $($(#[$field_doc:meta])* $field:ident: $type:ty,)*
        })+
    }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub enum $enum {
            $($(#[$kind_doc])* $name { $($(#[$field_doc])* $field: $type,)* },)+
        }

        impl $enum {
            /// Appends the record's bytes to `out`.
            pub fn encode(&self, out: &mut Vec<u8>) {
                match self {
                    $($enum::$name { $($field,)* } => {
                        let kind: u16 = $kind;
                        kind.put(out);
                        $($field.put(out);)*
                    })+
                }
            }

            /// Decodes one record.
            ///
            /// # Errors
            /// [`WireError`] if the bytes are not exactly one well-formed record.
            pub fn decode(record: &[u8]) -> Result<Self, WireError> {
                if record.len() > MAX_RECORD {
                    return Err(WireError::TooLong { len: record.len(), max: MAX_RECORD });
                }
                let mut reader = Reader::new(record);
                let decoded = match u16::take(&mut reader)? {
                    $($kind => $enum::$name { $($field: Field::take(&mut reader)?,)* },)+
                    other => return Err(WireError::UnknownKind(other)),
                };
                reader.end()?;
                Ok(decoded)
            }
        }
    };
}

fields! {
    /// Where an id is registered.
    Location {
        /// The host's number: [`host_number`] of its name.
        host: u64,
        /// The member.
        member: u64,
        /// The registration. A later one of the same id has a larger stamp.
        stamp: u64,
        /// The member's own number of the registration, to which messages are addressed.
        key: u32,
    }

    /// One membership of a group. A member can have several.
    Membership {
        /// The host's number.
        host: u64,
        /// The member.
        member: u64,
        /// Distinguishes the memberships of one member in one group; not 0.
        key: u32,
        /// The share of `send_any` relative to the others; 0 is none.
        weight: u16,
    }

    /// Where an id is registered, for people.
    Place {
        /// The id.
        id: Id,
        /// The name of the worker.
        worker: Name,
        /// The name of the host.
        host: Name,
        /// The registration.
        stamp: u64,
    }

    /// A group with the number of its memberships.
    GroupSize {
        /// The group.
        group: Id,
        /// Memberships.
        members: u32,
    }

    /// A number of the directory, for people and for monitoring.
    Count {
        /// Its name.
        name: Name,
        /// Its value.
        value: u64,
    }
}

/// What happened to a watched id, or to the memberships of a watched group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The id is registered now, or the group has another membership.
    Came,
    /// The id is registered nowhere, or the group has a membership less.
    Went,
    /// Another registration has replaced the one before.
    Moved,
    /// Changes were not reported, because this member read them too slowly: ask again.
    Missed,
}

/// What a member can ask for that is answered only if it is not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// A membership of a group.
    Join,
    /// The memberships of a group.
    Subscribe,
    /// The changes of an id.
    Watch,
    /// The changes of a group.
    WatchGroup,
}

records! {
    /// A record of a member to its directory.
    ToDirectory {
        /// The first record.
        1 = Hello {
            /// [`VERSION`].
            version: u16,
            /// The namespace to enter.
            namespace: Name,
            /// A random number that the member has chosen and keeps when it connects again. 0: an
            /// observer, which may only ask: who, online, groups and stats.
            member: u64,
            /// The worker's name, for people.
            worker: Name,
            /// The ticket from the dispatcher's welcome; empty for none.
            ticket: Vec<u8>,
        }
        /// The member receives messages for `id`.
        2 = Register {
            /// For the answer.
            request: u64,
            /// The id.
            id: Id,
            /// 0 for a new registration; the stamp of one that an earlier directory has accepted.
            stamp: u64,
            /// The member's own number of the registration, which it uses once. The member knows it
            /// before the answer, so the first message finds it.
            key: u32,
        }
        /// The registration has ended.
        3 = Unregister {
            /// The id.
            id: Id,
            /// The registration.
            stamp: u64,
        }
        /// Asks where `id` is registered. While its grace runs the answer waits, one grace at most.
        4 = Lookup {
            /// For the answer.
            request: u64,
            /// The id.
            id: Id,
            /// The newest registration that the member has known; 0 for none. A directory that has
            /// just started may know only earlier ones, and does not answer with them.
            newest: u64,
            /// Whether that registration has refused a message, so it has ended. The directory may
            /// not know it yet, and answers with later ones, or, where all receive, with all
            /// others.
            ended: bool,
        }
        /// Asks for a link to a member of the same host.
        5 = Connect {
            /// The other member.
            member: u64,
            /// The number of the last link to it that this member has received on this connection;
            /// 0 for none. A number that the directory has not given costs the member its
            /// connection.
            after: u64,
        }
        /// The member receives messages for a group.
        6 = Join {
            /// The group.
            group: Id,
            /// See [`Membership::key`].
            key: u32,
            /// See [`Membership::weight`].
            weight: u16,
        }
        /// The membership has ended.
        7 = Leave {
            /// The group.
            group: Id,
            /// The membership.
            key: u32,
        }
        /// Asks for the memberships of a group now and for their changes from then on.
        8 = Subscribe {
            /// The group.
            group: Id,
        }
        /// Asks where an id is registered, for people; the answer does not wait.
        9 = Who {
            /// For the answer.
            request: u64,
            /// The id.
            id: Id,
        }
        /// Asks for a page of registered ids.
        10 = Online {
            /// For the answer.
            request: u64,
            /// 0, or where the page before ended.
            cursor: u64,
        }
        /// Asks for a page of groups.
        11 = Groups {
            /// For the answer.
            request: u64,
            /// Groups after this one; empty at the start.
            after: Vec<u8>,
        }
        /// Asks for the changes of an id, or of a group.
        12 = Watch {
            /// The id or group.
            id: Id,
            /// Whether it is a group.
            group: bool,
        }
        /// No changes of it any more.
        13 = Unwatch {
            /// The id or group.
            id: Id,
            /// Whether it is a group.
            group: bool,
        }
        /// Asks for the directory's numbers.
        14 = Stats {
            /// For the answer.
            request: u64,
        }
        /// No memberships of the group any more.
        15 = Unsubscribe {
            /// The group.
            group: Id,
        }
    }
}

records! {
    /// A record of a directory to a member.
    FromDirectory {
        /// The answer to hello, with one descriptor (the link to the directory, for messages to
        /// other hosts) if `gateway` is true.
        1 = Welcome {
            /// The directory's version.
            version: u16,
            /// The number of its host.
            host: u64,
            /// The largest message, in bytes.
            max_message: u32,
            /// Whether a link to the directory came with this record.
            gateway: bool,
        }
        /// The member is not let in; the directory closes the connection.
        2 = Refused {
            /// Whether a later attempt may succeed.
            transient: bool,
            /// One sentence for people, UTF-8.
            reason: Vec<u8>,
        }
        /// A registration was accepted.
        3 = Registered {
            /// Of the request.
            request: u64,
            /// The registration.
            stamp: u64,
        }
        /// A registration was not accepted.
        4 = NotAccepted {
            /// Of the request.
            request: u64,
            /// One sentence for people, UTF-8.
            reason: Vec<u8>,
        }
        /// A later registration has replaced this one.
        5 = Superseded {
            /// The id.
            id: Id,
            /// The registration that has ended.
            stamp: u64,
        }
        /// Where an id is; nowhere if `places` is empty.
        6 = Found {
            /// Of the request.
            request: u64,
            /// The registrations.
            places: Vec<Location>,
        }
        /// A link to another member, with one descriptor. It replaces an earlier one.
        7 = Link {
            /// The other member.
            member: u64,
            /// The number of the link; later ones are larger.
            number: u64,
            /// The largest message on this link, in bytes, the same for both ends.
            max_message: u32,
        }
        /// There is no such member any more.
        8 = NoMember {
            /// The member that was asked for.
            member: u64,
        }
        /// Memberships of a group that was subscribed to.
        9 = Memberships {
            /// The group.
            group: Id,
            /// Whether everything known before is void.
            reset: bool,
            /// Whether this is the end of a list that began with `reset`.
            complete: bool,
            /// New ones.
            added: Vec<Membership>,
            /// Ended ones.
            removed: Vec<Membership>,
        }
        /// The answer to who and online.
        10 = Places {
            /// Of the request.
            request: u64,
            /// The registrations.
            places: Vec<Place>,
            /// Where the next page begins; 0 at the end.
            next: u64,
        }
        /// The answer to groups; fewer than [`MAX_PAGE`] at the end.
        11 = GroupSizes {
            /// Of the request.
            request: u64,
            /// The groups in the order of their names.
            groups: Vec<GroupSize>,
        }
        /// A watched id or group has changed.
        12 = Changed {
            /// The id or group.
            id: Id,
            /// Whether it is a group.
            group: bool,
            /// What happened.
            change: Change,
        }
        /// The answer to stats.
        13 = Counts {
            /// Of the request.
            request: u64,
            /// The numbers.
            counts: Vec<Count>,
        }
        /// There is no link now, because a limit is reached; the member may ask again later.
        14 = NoLink {
            /// The member that was asked for.
            member: u64,
            /// One sentence for people, UTF-8.
            reason: Vec<u8>,
        }
        /// A join, subscription or watch was not accepted; the member may ask again later.
        15 = Declined {
            /// What was asked for.
            wish: Wish,
            /// The id or group.
            id: Id,
            /// The membership; 0 for the others.
            key: u32,
            /// One sentence for people, UTF-8.
            reason: Vec<u8>,
        }
    }
}

records! {
    /// A record between the directories of several hosts. One message carries several, each after
    /// its length (u16).
    Shared {
        /// The sender is there; the first record of every message.
        1 = Host {
            /// [`VERSION`].
            version: u16,
            /// The name of the host.
            host: Name,
            /// A random number of this run of the directory.
            run: u64,
            /// The number of the message: one more than that before, from 1. Messages to one host
            /// have the number of the last message to all.
            sequence: u64,
            /// The sender's wall clock in milliseconds.
            wall: u64,
            /// The largest message that its members accept, in bytes.
            max_message: u32,
        }
        /// What follows, up to `SnapshotEnd`, is everything; what is not in it does not exist.
        2 = SnapshotBegin {
            /// The number of the snapshot.
            serial: u64,
        }
        /// See `SnapshotBegin`.
        3 = SnapshotEnd {
            /// The number of the snapshot.
            serial: u64,
        }
        /// Asks a host for a snapshot.
        4 = AskSnapshot {
            /// The host that is asked.
            host: u64,
        }
        /// A member of the sender's host.
        5 = Member {
            /// Its namespace.
            namespace: Name,
            /// The member.
            member: u64,
            /// Its worker.
            worker: Name,
        }
        /// The member has left, with its registrations and memberships.
        6 = Gone {
            /// Its namespace.
            namespace: Name,
            /// The member.
            member: u64,
        }
        /// A registration.
        7 = Registered {
            /// Its namespace.
            namespace: Name,
            /// The member.
            member: u64,
            /// The id.
            id: Id,
            /// The registration.
            stamp: u64,
            /// Whether the stamp is of the sender's clock, not one that a member has brought.
            clock: bool,
            /// See [`Location::key`].
            key: u32,
        }
        /// The registration has ended.
        8 = Unregistered {
            /// Its namespace.
            namespace: Name,
            /// The member.
            member: u64,
            /// The id.
            id: Id,
            /// The registration.
            stamp: u64,
        }
        /// A membership.
        9 = Joined {
            /// Its namespace.
            namespace: Name,
            /// The member.
            member: u64,
            /// The group.
            group: Id,
            /// The membership.
            key: u32,
            /// Its weight.
            weight: u16,
        }
        /// The membership has ended.
        10 = Left {
            /// Its namespace.
            namespace: Name,
            /// The member.
            member: u64,
            /// The group.
            group: Id,
            /// The membership.
            key: u32,
        }
        /// The directory ends in an orderly way.
        11 = Leaving {
            /// The run that ends.
            run: u64,
        }
    }
}

impl FromDirectory {
    /// The number of descriptors that come with this record; any other number is an error.
    pub fn fds(&self) -> usize {
        match self {
            FromDirectory::Welcome { gateway, .. } => usize::from(*gateway),
            FromDirectory::Link { .. } => 1,
            _ => 0,
        }
    }
}

/// The number of the host with this name. It stays the same, so directories need not agree on one.
pub fn host_number(name: &Name) -> u64 {
    // FNV-1a, 64 bits. Names are chosen by the operator; two equal numbers are reported at start.
    name.as_str().bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// At most [`MAX_TEXT`] bytes of text for people.
pub fn text(text: &str) -> Vec<u8> {
    let end = (0..=MAX_TEXT.min(text.len())).rev().find(|&end| text.is_char_boundary(end));
    text.as_bytes()[..end.unwrap_or(0)].to_vec()
}

/// Text of a record, without hidden characters, so that it cannot forge a log line.
pub fn readable(bytes: &[u8]) -> String {
    let hide = |c| if crate::wire::is_hidden(c) { ' ' } else { c };
    String::from_utf8_lossy(bytes).chars().map(hide).collect()
}

#[cfg(test)]
mod tests;
