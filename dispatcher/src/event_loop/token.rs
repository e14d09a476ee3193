//! The source of a poll event, packed into a token. A token holds a serial number that is not
//! reused, so a late event for a removed object is ignored.

use mio::Token;

use dispatcher_core::{ConnId, WorkerId};

/// The source of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// SIGTERM and the other handled signals.
    Signals,
    /// The side thread or another thread has sent something.
    Waker,
    /// The dispatch socket: workers connect.
    Dispatch,
    /// A listener, by its position.
    Listener(usize),
    /// A control connection that has not said hello.
    Pending(Key),
    /// A worker's control connection.
    Control(Key),
    /// A worker's process has ended.
    Process(Key),
    /// The client of a queued connection did something; it matters only if it has gone, or if its
    /// first bytes are awaited.
    Queued(Key),
    /// A worker of the line protocol has read something.
    LineRoom(Key),
    /// A worker took or closed a connection; the scan at the beginning of the turn sees it.
    Doorbell(Key),
}

/// Index and serial number of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Key {
    pub(super) index: u32,
    pub(super) serial: u64,
}

// A token must hold both; the README states this requirement.
const _: () = assert!(usize::BITS == 64, "the dispatcher needs a 64-bit machine");

/// Enough to distinguish objects that recently had the same index: an event is handled in the turn
/// in which it comes.
const SERIAL_BITS: u32 = 29;

/// Every descriptor has a number below 2³¹, so no table has more entries.
const INDEX_BITS: u32 = 31;
const SERIAL_MASK: u64 = (1 << SERIAL_BITS) - 1;
const INDEX_MASK: u64 = (1 << INDEX_BITS) - 1;

impl Key {
    /// Whether this key, whose serial a token may have truncated, names `serial`.
    pub(super) fn is(self, serial: u64) -> bool {
        self.serial & SERIAL_MASK == serial & SERIAL_MASK
    }
}

impl From<WorkerId> for Key {
    fn from(id: WorkerId) -> Key {
        Key { index: id.index, serial: id.serial }
    }
}

impl From<ConnId> for Key {
    fn from(id: ConnId) -> Key {
        Key { index: id.index, serial: id.serial }
    }
}

impl Source {
    pub(super) fn token(self) -> Token {
        let (kind, index, serial) = match self {
            Source::Signals => (0, 0, 0),
            Source::Waker => (1, 0, 0),
            Source::Dispatch => (2, 0, 0),
            Source::Doorbell(key) => (3, key.index, key.serial),
            Source::Listener(position) => (4, position as u32, 0),
            Source::Pending(key) => (5, key.index, key.serial),
            Source::Control(key) => (6, key.index, key.serial),
            Source::Process(key) => (7, key.index, key.serial),
            Source::Queued(key) => (8, key.index, key.serial),
            Source::LineRoom(key) => (9, key.index, key.serial),
        };
        let bits = kind << (SERIAL_BITS + INDEX_BITS)
            | (u64::from(index) & INDEX_MASK) << SERIAL_BITS
            | (serial & SERIAL_MASK);
        Token(bits as usize)
    }

    pub(super) fn of(token: Token) -> Option<Source> {
        let bits = token.0 as u64;
        let serial = bits & SERIAL_MASK;
        let index = (bits >> SERIAL_BITS & INDEX_MASK) as u32;
        let key = Key { index, serial };
        Some(match bits >> (SERIAL_BITS + INDEX_BITS) {
            0 => Source::Signals,
            1 => Source::Waker,
            2 => Source::Dispatch,
            3 => Source::Doorbell(key),
            4 => Source::Listener(index as usize),
            5 => Source::Pending(key),
            6 => Source::Control(key),
            7 => Source::Process(key),
            8 => Source::Queued(key),
            9 => Source::LineRoom(key),
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_source_survives_its_token() {
        let key = Key { index: (1 << INDEX_BITS) - 1, serial: SERIAL_MASK };
        for source in [
            Source::Signals,
            Source::Waker,
            Source::Dispatch,
            Source::Doorbell(key),
            Source::Listener(7),
            Source::Pending(key),
            Source::Control(Key { index: 3, serial: 9 }),
            Source::Process(key),
            Source::Queued(key),
            Source::LineRoom(key),
        ] {
            assert_eq!(Source::of(source.token()), Some(source));
        }
        assert_eq!(Source::of(Token(usize::MAX)), None);
    }

    #[test]
    fn a_key_matches_a_serial_that_does_not_fit() {
        let serial = (5 << SERIAL_BITS) + 77;
        let Some(Source::Control(key)) =
            Source::of(Source::Control(Key { index: 0, serial }).token())
        else {
            panic!("not a control token")
        };
        assert!(key.is(serial));
        assert!(!key.is(serial + 1));
    }
    #[test]
    fn an_index_beyond_a_million_is_not_taken_for_another() {
        for index in [(1 << 20) - 1, 1 << 20, (1 << 20) + 1, (1 << 28) + 5, (1 << 31) - 1] {
            let queued = Source::Queued(Key { index, serial: 77 });
            assert_eq!(Source::of(queued.token()), Some(queued));
        }
    }
}
