//! The scoreboard: one page or so of memory that a worker and the dispatcher share.
//!
//! Owns the layout and the mapping. What the words mean is in [`claim`]; who counts what is the
//! business of the two sides. The memory is a sealed memfd of fixed size, so neither side can make the
//! other fault; but the worker can write any value anywhere in it at any time, so the dispatcher keeps
//! its own truth (which slots are out, with which sequence numbers) and only compares.
//!
//! Layout, native-endian (both processes run on the same machine), offsets in bytes:
//!
//! ```text
//!   0  u64 magic      8  u32 version    12  u32 slots
//!  64  u32 want       dispatcher sets bits, worker clears the one it answers
//! 128  u64 finished   worker: connections closed since its process started; only grows
//! 192  reserved (zero)
//! 256  u64 × slots    the ring; see `claim`
//! ```

pub mod claim;

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::sys::{self, Mapping};

const MAGIC: u64 = u64::from_le_bytes(*b"DSPBOARD");
const VERSION: u32 = 1;
const OFFSET_VERSION: usize = 8;
const OFFSET_SLOTS: usize = 12;
const OFFSET_WANT: usize = 64;
const OFFSET_FINISHED: usize = 128;
const OFFSET_RING: usize = 256;

/// Most slots a scoreboard may have.
pub const MAX_SLOTS: u32 = 65_536;

/// A mapped scoreboard; unmapped when dropped.
///
/// ```
/// use worker_sdk::scoreboard::{Scoreboard, claim};
///
/// # fn main() -> Result<(), worker_sdk::scoreboard::ScoreboardError> {
/// // The dispatcher makes it, for a worker that has closed 5 connections so far …
/// let (dispatcher, fd) = Scoreboard::create(256, 5)?;
/// // … and the worker maps what came with its welcome: the same memory.
/// let worker = Scoreboard::open(fd, 256)?;
/// assert_eq!(worker.slots(), 256);
///
/// if let (Some(ours), Some(theirs)) = (dispatcher.slot(0), worker.slot(0)) {
///     claim::offer(ours, 1);
///     assert!(claim::claim(theirs, 1));
///     assert_eq!(claim::state(ours, 1), claim::SlotState::Taken);
/// }
/// assert!(worker.slot(256).is_none());
///
/// claim::arm(dispatcher.want(), claim::want::ROOM);
/// worker.raise_finished(6);
/// assert!(claim::must_poke(worker.want(), claim::want::ROOM));
/// assert_eq!(dispatcher.finished(), 6);
/// worker.raise_finished(3);
/// assert_eq!(dispatcher.finished(), 6, "it never goes down");
/// # Ok(())
/// # }
/// ```
pub struct Scoreboard {
    map: Mapping,
    slots: u32,
}

impl fmt::Debug for Scoreboard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scoreboard")
            .field("slots", &self.slots)
            .field("finished", &self.finished())
            .finish_non_exhaustive()
    }
}

/// Why a file descriptor is not a scoreboard, or none could be made.
///
/// ```
/// use worker_sdk::scoreboard::{Scoreboard, ScoreboardError};
///
/// # fn main() -> std::io::Result<()> {
/// let fd = std::fs::File::open("/dev/null")?.into();
/// assert!(matches!(Scoreboard::open(fd, 256), Err(ScoreboardError::NotSealed)));
/// assert!(matches!(Scoreboard::create(0, 0), Err(ScoreboardError::Malformed("number of slots"))));
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[non_exhaustive]
pub enum ScoreboardError {
    /// A system call failed.
    Io(std::io::Error),
    /// The memory can still shrink or grow under its readers, or is no memfd.
    NotSealed,
    /// Wrong size, magic, version or number of slots.
    Malformed(&'static str),
}

impl fmt::Display for ScoreboardError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ScoreboardError::Io(error) => write!(f, "scoreboard: {error}"),
            ScoreboardError::NotSealed => f.write_str("scoreboard is not sealed"),
            ScoreboardError::Malformed(what) => write!(f, "scoreboard has a wrong {what}"),
        }
    }
}

impl std::error::Error for ScoreboardError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            ScoreboardError::Io(error) => Some(error),
            ScoreboardError::NotSealed | ScoreboardError::Malformed(_) => None,
        }
    }
}

impl From<std::io::Error> for ScoreboardError {
    fn from(error: std::io::Error) -> Self {
        ScoreboardError::Io(error)
    }
}

fn size(slots: u32) -> usize {
    OFFSET_RING + 8 * slots as usize
}

impl Scoreboard {
    /// Dispatcher: makes a sealed scoreboard with a ring of `slots`, all free, and `finished` as the worker reported
    /// it.
    ///
    /// # Errors
    /// [`ScoreboardError::Malformed`] for 0 or more than [`MAX_SLOTS`] slots, [`ScoreboardError::Io`] with what
    /// the system calls answer.
    pub fn create(slots: u32, finished: u64) -> Result<(Scoreboard, OwnedFd), ScoreboardError> {
        if slots == 0 || slots > MAX_SLOTS {
            return Err(ScoreboardError::Malformed("number of slots"));
        }
        let fd = sys::sealed_memfd(c"dispatcher-scoreboard", size(slots))?;
        let board = Scoreboard { map: Mapping::shared(fd.as_fd(), size(slots))?, slots };
        board.map.u64(0).store(MAGIC, Ordering::Relaxed);
        board.map.u32(OFFSET_VERSION).store(VERSION, Ordering::Relaxed);
        board.map.u32(OFFSET_SLOTS).store(slots, Ordering::Relaxed);
        board.finished_word().store(finished, Ordering::Release);
        Ok((board, fd))
    }

    /// Worker: maps the scoreboard that came with a welcome which announced `slots`.
    ///
    /// # Errors
    /// [`ScoreboardError::NotSealed`] when the memory can still be resized or is no memfd,
    /// [`ScoreboardError::Malformed`] when it is not a scoreboard of that many slots, [`ScoreboardError::Io`] when it
    /// cannot be mapped.
    pub fn open(fd: OwnedFd, slots: u32) -> Result<Scoreboard, ScoreboardError> {
        if slots == 0 || slots > MAX_SLOTS {
            return Err(ScoreboardError::Malformed("number of slots"));
        }
        if !sys::is_sealed(fd.as_fd())? {
            return Err(ScoreboardError::NotSealed);
        }
        if sys::file_size(fd.as_fd())? < size(slots) as u64 {
            return Err(ScoreboardError::Malformed("size"));
        }
        let board = Scoreboard { map: Mapping::shared(fd.as_fd(), size(slots))?, slots };
        if board.map.u64(0).load(Ordering::Relaxed) != MAGIC {
            return Err(ScoreboardError::Malformed("magic"));
        }
        if board.map.u32(OFFSET_VERSION).load(Ordering::Relaxed) != VERSION {
            return Err(ScoreboardError::Malformed("version"));
        }
        if board.map.u32(OFFSET_SLOTS).load(Ordering::Relaxed) != slots {
            return Err(ScoreboardError::Malformed("number of slots"));
        }
        Ok(board)
    }

    /// Slots in the ring. Not read from the shared memory.
    #[inline]
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// The word of a slot; `None` when there is no such slot.
    #[inline]
    pub fn slot(&self, slot: u32) -> Option<&AtomicU64> {
        (slot < self.slots).then(|| self.map.u64(OFFSET_RING + 8 * slot as usize))
    }

    /// The word by which the dispatcher asks to be poked; see [`claim::arm`] and [`claim::must_poke`].
    #[inline]
    pub fn want(&self) -> &AtomicU32 {
        self.map.u32(OFFSET_WANT)
    }

    #[inline]
    fn finished_word(&self) -> &AtomicU64 {
        self.map.u64(OFFSET_FINISHED)
    }

    /// The worker's cumulative count of closed connections, as it stands in the shared memory.
    ///
    /// Read it before the slots: then every connection it counts is seen as taken.
    #[inline]
    pub fn finished(&self) -> u64 {
        self.finished_word().load(Ordering::Acquire)
    }

    /// Worker: raises `finished` to at least `count`; it never goes down.
    pub fn raise_finished(&self, count: u64) {
        self.finished_word().fetch_max(count, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests;
