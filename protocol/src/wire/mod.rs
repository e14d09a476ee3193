//! The records between a worker and the dispatcher, in both directions.
//!
//! This module owns the bytes: the layout of every record, its limits and its errors. It does not
//! know sockets, processes or time. Both peers use it, so each side can read what the other side
//! writes. `docs/PROTOCOL.md` describes the same layouts for workers in other languages and prints
//! the byte vectors of the tests.
//!
//! A record is one message of a `SOCK_SEQPACKET` socket. All integers are little-endian:
//!
//! ```text
//! kind u16 | reserved u16 (0) | fixed body, by kind | TLVs: type u16, length u16, value …
//! ```
//!
//! A reader skips TLVs of an unknown type, so a later version may add some to any record. All else
//! is exact: a record that is too short, has a non-zero reserved field, or ends within a TLV is an
//! error, and so is a wrong number of file descriptors.
//!
//! ```
//! use dispatch_protocol::wire::{Control, Hello};
//!
//! # fn main() -> Result<(), dispatch_protocol::wire::WireError> {
//! let hello = Hello { pool: "web".to_owned(), max_connections: 1000, ..Hello::default() };
//! let mut record = Vec::new();
//! hello.encode(&mut record); // Send it as one message.
//!
//! assert_eq!(Control::decode(&record)?, Control::Hello(hello));
//! # Ok(())
//! # }
//! ```

mod claim;
mod codec;
mod drain;
mod goodbye;
mod handoff;
mod hello;
mod hidden;
mod prefork;
mod probe;
mod proxy_header;
mod refused;
mod resume;
mod update;
mod welcome;

pub use claim::{Claim, MAX_KEY};
pub use codec::{WireError, is_name};
pub use drain::Drain;
pub use goodbye::Goodbye;
pub use handoff::{ClientAddr, ENTRY_LEN, Entry, EntryFlags, Handoff};
pub use hello::{Features, Hello, Token};
pub use hidden::is_hidden;
pub use prefork::{Ended, FORK_FDS, Fork, Forked, NotForked, Prefork};
pub use probe::Probe;
pub use proxy_header::{MAX_PROXY_HEADERS, MAX_PROXY_TLVS, ProxyHeader};
pub use refused::{Refused, RefusedCode};
pub use resume::Resume;
pub use update::Update;
pub use welcome::{Welcome, WelcomeListener};

use codec::Reader;

/// The protocol version of this crate; hello and welcome carry it.
pub const VERSION: u16 = 1;

/// The longest record on the control connection, in bytes. A longer one is refused unread.
pub const MAX_CONTROL_RECORD: usize = 4096;

/// The longest record on the channel, in bytes: a full handoff and 4 KiB of TLVs.
pub const MAX_CHANNEL_RECORD: usize = 4 + 4 + MAX_FDS_PER_RECORD * ENTRY_LEN + 4096;

/// The longest record between the dispatcher and a process that forks workers, in bytes.
pub const MAX_PREFORK_RECORD: usize = 65_536;

/// The largest number of file descriptors in one handoff. The kernel's limit is 253 (`SCM_MAX_FD`).
pub const MAX_FDS_PER_RECORD: usize = 64;

/// The longest name of a pool, worker or listener, in bytes of UTF-8.
pub const MAX_NAME: usize = 64;

/// File descriptors that come with a welcome: channel, scoreboard, doorbell, in this order.
pub const WELCOME_FDS: usize = 3;

/// The first field of every record: its kind.
pub mod kind {
    /// Worker to dispatcher, control connection: the worker's settings and counts.
    pub const HELLO: u16 = 1;
    /// Dispatcher to worker, control connection, with three fds: the worker has joined.
    pub const WELCOME: u16 = 2;
    /// Dispatcher to worker, control connection: the worker has not joined, and the reason.
    pub const REFUSED: u16 = 3;
    /// Worker to dispatcher, control connection: no more connections.
    pub const GOODBYE: u16 = 4;
    /// Worker to dispatcher, control connection: a claim of a client's key.
    pub const CLAIM: u16 = 5;
    /// Worker to dispatcher, control connection: new weight, maximum or pause.
    pub const UPDATE: u16 = 6;
    /// Dispatcher to worker, channel: connections, one fd each.
    pub const HANDOFF: u16 = 16;
    /// Dispatcher to worker, channel, no fd: a slot to take, to show that the application takes.
    pub const PROBE: u16 = 17;
    /// Dispatcher to worker, channel, no fd: no more connections for now.
    pub const DRAIN: u16 = 18;
    /// Dispatcher to worker, channel, no fd: connections may follow again.
    pub const RESUME: u16 = 19;
    /// Dispatcher to parent, with one fd or three: fork a worker.
    pub const FORK: u16 = 32;
    /// Parent to dispatcher: the worker waits at its gate.
    pub const FORKED: u16 = 33;
    /// Parent to dispatcher: there is no worker, and the reason.
    pub const NOT_FORKED: u16 = 34;
    /// Parent to dispatcher: a worker has ended.
    pub const ENDED: u16 = 35;
}

/// The longest address in a hello, in bytes: a host name, a colon and a port.
pub const MAX_ADVERTISE: usize = 259;

/// TLV types. The protocol uses types below 0x8000; the others are free for experiments.
pub mod tlv {
    /// Hello: the pool to join, UTF-8.
    pub const POOL: u16 = 1;
    /// Hello, fork: the worker's name, UTF-8.
    pub const NAME: u16 = 2;
    /// Hello: the token from the environment of a spawned worker, 16 bytes. Fork: the token for it.
    pub const TOKEN: u16 = 3;
    /// Claim: the key, 1 to 4,000 bytes.
    pub const CLIENT_KEY: u16 = 4;
    /// Hello: an address at which clients reach the worker itself, `HOST:PORT`, ASCII.
    pub const ADVERTISE: u16 = 5;
    /// Welcome, repeated: index u16, then the name of the listener, UTF-8.
    pub const LISTENER: u16 = 16;
    /// Welcome, repeated: the name of a gauge that the pool uses for scores.
    pub const GAUGE: u16 = 19;
    /// Drain: the time left, u64 nanoseconds.
    pub const TIME_LEFT: u16 = 20;
    /// Handoff: the dispatcher's number of each connection, u64, in the order of the entries.
    pub const NUMBERS: u16 = 21;
    /// Welcome: the ticket of the relay, at most 85 bytes.
    pub const RELAY_TICKET: u16 = 22;
    /// Handoff, repeated: what a proxy said about one connection. Its index u16, flags u16, the
    /// address of the proxy as in an entry, then the TLVs of the PROXY protocol.
    pub const PROXY_HEADER: u16 = 23;
    /// Refused, not forked: one sentence for people, UTF-8.
    pub const REASON: u16 = 17;
    /// Refused: the configuration key that decides, UTF-8.
    pub const KEY: u16 = 18;
    /// Fork, repeated: an environment variable, `NAME=VALUE`, UTF-8.
    pub const VARIABLE: u16 = 32;
}

/// A record on the control connection, in either direction.
///
/// ```
/// use dispatch_protocol::wire::{Control, Goodbye};
///
/// # fn main() -> Result<(), dispatch_protocol::wire::WireError> {
/// let mut record = Vec::new();
/// Control::Goodbye(Goodbye).encode(&mut record);
/// assert_eq!(record, [4, 0, 0, 0]);
///
/// let received_fds = 0; // The number that `recvmsg` returned with the record.
/// let control = Control::decode(&record)?;
/// assert_eq!(control.fds(), received_fds, "otherwise close them and the connection");
/// match control {
///     Control::Welcome(welcome) => println!("we are worker {}", welcome.worker_id),
///     Control::Refused(refused) => println!("not let in: {}", refused.reason),
///     Control::Hello(hello) => println!("{} wants to join {}", hello.name, hello.pool),
///     Control::Goodbye(_) => println!("a worker leaves"),
///     Control::Claim(claim) => println!("a worker claims {:?}", claim.key()),
///     Control::Update(update) => println!("a worker has weight {} now", update.weight),
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Control {
    /// See [`Hello`].
    Hello(Hello),
    /// See [`Welcome`].
    Welcome(Welcome),
    /// See [`Refused`].
    Refused(Refused),
    /// See [`Goodbye`].
    Goodbye(Goodbye),
    /// See [`Claim`].
    Claim(Claim),
    /// See [`Update`].
    Update(Update),
}

impl Control {
    /// Decodes one control record.
    ///
    /// # Errors
    /// [`WireError`] if the bytes are not exactly one well-formed control record.
    pub fn decode(record: &[u8]) -> Result<Control, WireError> {
        if record.len() > MAX_CONTROL_RECORD {
            return Err(WireError::TooLong { len: record.len(), max: MAX_CONTROL_RECORD });
        }
        let mut reader = Reader::new(record);
        match reader.kind()? {
            kind::HELLO => Hello::decode_body(&mut reader).map(Control::Hello),
            kind::WELCOME => Welcome::decode_body(&mut reader).map(Control::Welcome),
            kind::REFUSED => Refused::decode_body(&mut reader).map(Control::Refused),
            kind::GOODBYE => Goodbye::decode_body(&mut reader).map(Control::Goodbye),
            kind::CLAIM => Claim::decode_body(&mut reader).map(Control::Claim),
            kind::UPDATE => Update::decode_body(&mut reader).map(Control::Update),
            other => Err(WireError::UnknownKind(other)),
        }
    }

    /// The number of file descriptors that must come with this record; any other number is an
    /// error.
    pub fn fds(&self) -> usize {
        match self {
            Control::Welcome(_) => WELCOME_FDS,
            Control::Hello(_)
            | Control::Refused(_)
            | Control::Goodbye(_)
            | Control::Claim(_)
            | Control::Update(_) => 0,
        }
    }

    /// Appends the record's bytes to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Control::Hello(m) => m.encode(out),
            Control::Welcome(m) => m.encode(out),
            Control::Refused(m) => m.encode(out),
            Control::Goodbye(m) => m.encode(out),
            Control::Claim(m) => m.encode(out),
            Control::Update(m) => m.encode(out),
        }
    }
}

/// A record on the channel (dispatcher to worker only).
///
/// ```
/// use dispatch_protocol::wire::{Channel, Probe};
///
/// # fn main() -> Result<(), dispatch_protocol::wire::WireError> {
/// let mut record = Vec::new();
/// Channel::Probe(Probe { seq: 9, slot: 9 }).encode(&mut record);
///
/// let channel = Channel::decode(&record)?;
/// assert_eq!(channel.fds(), 0);
/// match channel {
///     Channel::Handoff(handoff) => println!("{} connections", handoff.entries.len()),
///     Channel::Probe(probe) => println!("claim slot {} when it is its turn", probe.slot),
///     Channel::Drain(_) => println!("nothing more for now"),
///     Channel::Resume(_) => println!("connections again"),
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Channel {
    /// See [`Handoff`].
    Handoff(Handoff),
    /// See [`Probe`].
    Probe(Probe),
    /// See [`Drain`].
    Drain(Drain),
    /// See [`Resume`].
    Resume(Resume),
}

impl Channel {
    /// Decodes one channel record.
    ///
    /// # Errors
    /// [`WireError`] if the bytes are not exactly one well-formed channel record.
    pub fn decode(record: &[u8]) -> Result<Channel, WireError> {
        if record.len() > MAX_CHANNEL_RECORD {
            return Err(WireError::TooLong { len: record.len(), max: MAX_CHANNEL_RECORD });
        }
        let mut reader = Reader::new(record);
        match reader.kind()? {
            kind::HANDOFF => Handoff::decode_body(&mut reader).map(Channel::Handoff),
            kind::PROBE => Probe::decode_body(&mut reader).map(Channel::Probe),
            kind::DRAIN => Drain::decode_body(&mut reader).map(Channel::Drain),
            kind::RESUME => Resume::decode_body(&mut reader).map(Channel::Resume),
            other => Err(WireError::UnknownKind(other)),
        }
    }

    /// The number of file descriptors sent with this record. A receiver at its limit of open files
    /// gets only the first ones; that is not an error of the sender.
    pub fn fds(&self) -> usize {
        match self {
            Channel::Handoff(m) => m.entries.len(),
            Channel::Probe(_) | Channel::Drain(_) | Channel::Resume(_) => 0,
        }
    }

    /// Appends the record's bytes to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Channel::Handoff(m) => m.encode(out),
            Channel::Probe(m) => m.encode(out),
            Channel::Drain(m) => m.encode(out),
            Channel::Resume(m) => m.encode(out),
        }
    }
}

#[cfg(test)]
mod tests;
