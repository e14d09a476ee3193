//! The scoreboard: about one page of memory that a worker shares with the dispatcher.
//!
//! This module owns the layout and the mapping. [`slot`] defines the slot words, [`gauge`] the
//! gauges; the two sides define the counters. The memory is a sealed memfd of fixed size, so
//! neither side can make the other fault. The worker can write any value anywhere at any time. So
//! the dispatcher keeps its own record (the slots in use and their sequence numbers) and only
//! compares.
//!
//! Layout, native-endian (both processes run on the same machine), offsets in bytes:
//!
//! ```text
//!   0  u64 magic      8  u32 version    12  u32 slots    16  u32 gauges
//!  64  u32 want       dispatcher sets bits, worker clears the one it answers
//! 128  u64 finished   worker: connections closed since its process started; only grows
//! 136  u32 idle       worker: 1 more than its threads in `accept`; 0 if not reported
//! 140  u32 turnaround worker: 1 more than the usual µs of a thread outside `accept`; 0 if unknown
//! 192  u32 named      worker: gauges that have a name, from the first on; only grows
//! 256  u64 × 2 slots  the ring, for each slot: u64 word, see `slot`; u64 take time
//!   …  64 × gauges    from the next multiple of 64: u64 time, u64 value, 48 bytes name; see
//! `gauge`
//! ```
//!
//! An older dispatcher leaves the number of gauges at 0: the scoreboard has none. An older worker
//! does not map the gauges.

pub mod gauge;
pub mod slot;

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use self::gauge::{GAUGES, GaugeName, MAX_GAUGE_NAME, MAX_GAUGES, NoGaugeName, Reading};
use crate::sys::{self, Mapping};

const MAGIC: u64 = u64::from_le_bytes(*b"DSPBOARD");
const VERSION: u32 = 2;
const OFFSET_VERSION: usize = 8;
const OFFSET_SLOTS: usize = 12;
const OFFSET_GAUGES: usize = 16;
const OFFSET_WANT: usize = 64;
const OFFSET_FINISHED: usize = 128;
const OFFSET_IDLE: usize = 136;
const OFFSET_TURNAROUND: usize = 140;
const OFFSET_NAMED: usize = 192;
const OFFSET_RING: usize = 256;

/// The word of a slot and its take time share a cache line.
const SLOT_LEN: usize = 16;
const OFFSET_SLOT_TIME: usize = 8;

/// Each gauge has its own cache line.
const GAUGE_LEN: usize = 64;
const OFFSET_GAUGE_VALUE: usize = 8;
const OFFSET_GAUGE_NAME: usize = 16;

/// The largest number of slots in a scoreboard.
pub const MAX_SLOTS: u32 = 65_536;

/// A mapped scoreboard. Dropping it unmaps the memory.
///
/// ```
/// use dispatch_protocol::scoreboard::{Scoreboard, slot};
///
/// # fn main() -> Result<(), dispatch_protocol::scoreboard::ScoreboardError> {
/// // The dispatcher makes the scoreboard for a worker that has closed 5 connections so far.
/// let (dispatcher, fd) = Scoreboard::create(256, 5)?;
/// // The worker maps the descriptor that came with its welcome: the same memory.
/// let worker = Scoreboard::open(fd, 256)?;
/// assert_eq!(worker.slots(), 256);
///
/// if let (Some(ours), Some(theirs)) = (dispatcher.slot(0), worker.slot(0)) {
///     slot::offer(ours, 1);
///     assert!(slot::take(theirs, 1));
///     assert_eq!(slot::state(ours, 1), slot::SlotState::Taken);
/// }
/// assert!(worker.slot(256).is_none());
///
/// slot::arm(dispatcher.want(), slot::want::ROOM);
/// worker.raise_finished(6);
/// assert!(slot::must_ring(worker.want(), slot::want::ROOM));
/// assert_eq!(dispatcher.finished(), 6);
/// worker.raise_finished(3);
/// assert_eq!(dispatcher.finished(), 6, "the count never decreases");
/// # Ok(())
/// # }
/// ```
pub struct Scoreboard {
    map: Mapping,
    slots: u32,
    gauges: u32,
}

impl fmt::Debug for Scoreboard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scoreboard")
            .field("slots", &self.slots)
            .field("finished", &self.finished())
            .finish_non_exhaustive()
    }
}

/// Why a descriptor is not a scoreboard, or why no scoreboard could be made.
///
/// ```
/// use dispatch_protocol::scoreboard::{Scoreboard, ScoreboardError};
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
    /// The size of the memory can still change, or the descriptor is not a memfd.
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
    OFFSET_RING + SLOT_LEN * slots as usize
}

fn size_with_gauges(slots: u32, gauges: u32) -> usize {
    match gauges {
        0 => size(slots),
        _ => size(slots).next_multiple_of(GAUGE_LEN) + GAUGE_LEN * gauges as usize,
    }
}

impl Scoreboard {
    /// Dispatcher: makes a sealed scoreboard with `slots` free slots, the count `finished` that the
    /// worker reported, and [`GAUGES`] unnamed gauges.
    ///
    /// # Errors
    /// [`ScoreboardError::Malformed`] for 0 slots or more than [`MAX_SLOTS`];
    /// [`ScoreboardError::Io`] if a system call fails.
    pub fn create(slots: u32, finished: u64) -> Result<(Scoreboard, OwnedFd), ScoreboardError> {
        if slots == 0 || slots > MAX_SLOTS {
            return Err(ScoreboardError::Malformed("number of slots"));
        }
        let len = size_with_gauges(slots, GAUGES);
        let fd = sys::sealed_memfd(c"dispatcher-scoreboard", len)?;
        let map = Mapping::shared(fd.as_fd(), len)?;
        let board = Scoreboard { map, slots, gauges: GAUGES };
        board.map.u64(0).store(MAGIC, Ordering::Relaxed);
        board.map.u32(OFFSET_VERSION).store(VERSION, Ordering::Relaxed);
        board.map.u32(OFFSET_SLOTS).store(slots, Ordering::Relaxed);
        board.map.u32(OFFSET_GAUGES).store(GAUGES, Ordering::Relaxed);
        board.finished_word().store(finished, Ordering::Release);
        Ok((board, fd))
    }

    /// Worker: maps the scoreboard that came with a welcome for `slots` slots.
    ///
    /// # Errors
    /// [`ScoreboardError::NotSealed`] if the size can still change or the descriptor is not a
    /// memfd; [`ScoreboardError::Malformed`] if the memory is not a scoreboard with that number of
    /// slots; [`ScoreboardError::Io`] if the mapping fails.
    pub fn open(fd: OwnedFd, slots: u32) -> Result<Scoreboard, ScoreboardError> {
        if slots == 0 || slots > MAX_SLOTS {
            return Err(ScoreboardError::Malformed("number of slots"));
        }
        if !sys::is_sealed(fd.as_fd())? {
            return Err(ScoreboardError::NotSealed);
        }
        let len = sys::file_size(fd.as_fd())?;
        if len < size(slots) as u64 {
            return Err(ScoreboardError::Malformed("size"));
        }
        let map = Mapping::shared(fd.as_fd(), size(slots))?;
        let mut board = Scoreboard { map, slots, gauges: 0 };
        if board.map.u64(0).load(Ordering::Relaxed) != MAGIC {
            return Err(ScoreboardError::Malformed("magic"));
        }
        if board.map.u32(OFFSET_VERSION).load(Ordering::Relaxed) != VERSION {
            return Err(ScoreboardError::Malformed("version"));
        }
        if board.map.u32(OFFSET_SLOTS).load(Ordering::Relaxed) != slots {
            return Err(ScoreboardError::Malformed("number of slots"));
        }
        let gauges = board.map.u32(OFFSET_GAUGES).load(Ordering::Relaxed);
        if gauges > 0 {
            let whole = size_with_gauges(slots, gauges.min(MAX_GAUGES));
            if gauges > MAX_GAUGES || len < whole as u64 {
                return Err(ScoreboardError::Malformed("number of gauges"));
            }
            board = Scoreboard { map: Mapping::shared(fd.as_fd(), whole)?, slots, gauges };
        }
        Ok(board)
    }

    /// The number of slots. Not read from the shared memory.
    #[inline]
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// The word of a slot; `None` if the scoreboard has no such slot.
    #[inline]
    pub fn slot(&self, slot: u32) -> Option<&AtomicU64> {
        (slot < self.slots).then(|| self.map.u64(OFFSET_RING + SLOT_LEN * slot as usize))
    }

    fn taken_word(&self, slot: u32) -> Option<&AtomicU64> {
        let at = OFFSET_RING + SLOT_LEN * slot as usize + OFFSET_SLOT_TIME;
        (slot < self.slots).then(|| self.map.u64(at))
    }

    /// Worker: stores the take time of a slot, immediately before the take. Nanoseconds of
    /// `CLOCK_REALTIME`, which is the same in every time namespace.
    #[inline]
    pub fn stamp(&self, slot: u32, realtime_ns: u64) {
        if let Some(word) = self.taken_word(slot) {
            word.store(realtime_ns, Ordering::Relaxed);
        }
    }

    /// Dispatcher: the take time that the worker stored for a slot in state TAKEN; 0 if it stored
    /// none.
    #[inline]
    pub fn stamped(&self, slot: u32) -> u64 {
        self.taken_word(slot).map_or(0, |word| word.load(Ordering::Relaxed))
    }

    /// Worker: publishes the number of its threads that wait in `accept` (`None`: not reported) and
    /// the usual time such a thread spends outside `accept` (`None`: not known). A thread leaves
    /// the count before it takes a slot.
    #[inline]
    pub fn set_idle_threads(&self, idle: Option<u32>, turnaround: Option<Duration>) {
        let micros = |away: Duration| u32::try_from(away.as_micros()).unwrap_or(u32::MAX);
        let away = turnaround.map_or(0, |away| micros(away).saturating_add(1));
        let idle = idle.map_or(0, |idle| idle.saturating_add(1));
        self.map.u32(OFFSET_TURNAROUND).store(away, Ordering::Relaxed);
        self.map.u32(OFFSET_IDLE).store(idle, Ordering::Release);
    }

    /// Dispatcher: the number of the worker's threads that wait in `accept`, and the usual time
    /// that such a thread spends outside it. `None` if the worker does not report it. Read it after
    /// the slots: then a thread that has taken a slot is no longer counted.
    #[inline]
    pub fn idle_threads(&self) -> Option<(u32, Option<Duration>)> {
        let idle = self.map.u32(OFFSET_IDLE).load(Ordering::Acquire).checked_sub(1)?;
        let away = self.map.u32(OFFSET_TURNAROUND).load(Ordering::Relaxed).checked_sub(1);
        Some((idle, away.map(|us| Duration::from_micros(us.into()))))
    }

    /// The word in which the dispatcher asks workers to ring the doorbell; see [`slot::arm`] and
    /// [`slot::must_ring`].
    #[inline]
    pub fn want(&self) -> &AtomicU32 {
        self.map.u32(OFFSET_WANT)
    }

    #[inline]
    fn finished_word(&self) -> &AtomicU64 {
        self.map.u64(OFFSET_FINISHED)
    }

    /// The worker's cumulative count of closed connections, read from the shared memory.
    ///
    /// Read it before the slots: then every connection in the count also appears as taken.
    #[inline]
    pub fn finished(&self) -> u64 {
        self.finished_word().load(Ordering::Acquire)
    }

    /// Worker: raises `finished` to at least `count`. It never decreases.
    pub fn raise_finished(&self, count: u64) {
        self.finished_word().fetch_max(count, Ordering::AcqRel);
    }

    /// The number of gauges; 0 with an older dispatcher. Not read from the shared memory.
    #[inline]
    pub fn gauges(&self) -> u32 {
        self.gauges
    }

    /// The number of gauges with a name, counted from the first; at most
    /// [`gauges`](Scoreboard::gauges). In a correct worker the number only grows and a name never
    /// changes, so each name need be read only once.
    #[inline]
    pub fn named_gauges(&self) -> u32 {
        self.map.u32(OFFSET_NAMED).load(Ordering::Acquire).min(self.gauges)
    }

    fn gauge_offset(&self, gauge: u32) -> Option<usize> {
        let first = size(self.slots).next_multiple_of(GAUGE_LEN);
        (gauge < self.gauges).then(|| first + GAUGE_LEN * gauge as usize)
    }

    /// Worker: names the next gauge and returns its index; `None` if every gauge has a name. One
    /// thread at a time.
    pub fn name_gauge(&self, name: &GaugeName) -> Option<u32> {
        let gauge = self.named_gauges();
        let start = self.gauge_offset(gauge)? + OFFSET_GAUGE_NAME;
        for (word, bytes) in name.padded().as_chunks().0.iter().enumerate() {
            self.map.u64(start + 8 * word).store(u64::from_ne_bytes(*bytes), Ordering::Relaxed);
        }
        // The name is complete before the count includes it.
        self.map.u32(OFFSET_NAMED).store(gauge + 1, Ordering::Release);
        Some(gauge)
    }

    /// The name of a gauge; `None` if the scoreboard has no such gauge.
    ///
    /// # Errors
    /// [`NoGaugeName`] if the bytes are not a valid name.
    pub fn gauge_name(&self, gauge: u32) -> Option<Result<GaugeName, NoGaugeName>> {
        let start = self.gauge_offset(gauge)? + OFFSET_GAUGE_NAME;
        // The name is copied first, because the worker may change it at any time.
        let mut bytes = [0; MAX_GAUGE_NAME];
        for (word, bytes) in bytes.as_chunks_mut().0.iter_mut().enumerate() {
            *bytes = self.map.u64(start + 8 * word).load(Ordering::Relaxed).to_ne_bytes();
        }
        Some(GaugeName::from_padded(bytes))
    }

    /// Worker: sets a gauge. Does nothing if the scoreboard has no such gauge.
    #[inline]
    pub fn set_gauge(&self, gauge: u32, reading: Reading) {
        if let Some(at) = self.gauge_offset(gauge) {
            gauge::write(self.map.u64(at + OFFSET_GAUGE_VALUE), self.map.u64(at), reading);
        }
    }

    /// The value of a gauge; `None` if it was never set or does not exist.
    #[inline]
    pub fn gauge(&self, gauge: u32) -> Option<Reading> {
        let at = self.gauge_offset(gauge)?;
        gauge::read(self.map.u64(at + OFFSET_GAUGE_VALUE), self.map.u64(at))
    }
}

#[cfg(test)]
mod tests;
