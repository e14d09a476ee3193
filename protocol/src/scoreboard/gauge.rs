//! Gauges: named numbers that a worker shows and a dispatcher may score by.
//!
//! Owns a gauge's words, the order in which they are written and read, and what a name may be. Knows nothing of what a
//! number means. The functions work on anything that is a [`Word`], like those of [`slot`](super::slot).
//!
//! A gauge is a value and the time of its last write. There is no lock around the two: the worker reads the clock, stores
//! the value, then raises the time; the dispatcher loads the time, then the value. So **the time that is read is never
//! later than the moment in which the value that is read was stored**, however many threads write and wherever they
//! are interrupted: whoever sees a time sees the value stored before it, or one stored later still. A reader in between may
//! find a value newer than its time says. That value is good, and counts as a little older than it is. What can't happen
//! is the opposite, an old value that passes for a fresh one.
//!
//! ```
//! use std::sync::atomic::AtomicU64;
//! use dispatch_protocol::scoreboard::gauge::{self, Reading};
//!
//! let (value, time) = (AtomicU64::new(0), AtomicU64::new(0)); // In real life, those of a scoreboard.
//! assert_eq!(gauge::read(&value, &time), None, "never set");
//!
//! let reading = Reading { value: 0.25, at: 7_000_000_000 };
//! gauge::write(&value, &time, reading);
//! assert_eq!(gauge::read(&value, &time), Some(reading));
//! ```

use std::fmt;
use std::sync::atomic::Ordering;

use super::slot::Word;

/// Gauges of a scoreboard that a dispatcher of this version makes: the eight with fixed names, and 16 more. With the
/// usual 256 slots everything fits into two pages of memory.
pub const GAUGES: u32 = 24;

/// Most gauges that a scoreboard may have, in any version.
pub const MAX_GAUGES: u32 = 1024;

/// Longest name of a gauge, in bytes.
pub const MAX_GAUGE_NAME: usize = 48;

/// Names with a fixed meaning. The SDK can measure the first four by itself; the others are the application's to set.
pub mod names {
    /// The part of the machine's processor time in use, over all its processors and since the last sample: 0 to 1.
    pub const SYSTEM_CPU: &str = "system_cpu";
    /// Memory that the machine has available, in MiB (2²⁰ bytes).
    pub const FREE_MEMORY: &str = "free_memory";
    /// Processor time of the worker's process for each second since the last sample: 1 is one processor, always busy.
    pub const PROCESS_CPU: &str = "process_cpu";
    /// Memory of the worker's process that is in RAM, in MiB (2²⁰ bytes).
    pub const PROCESS_RSS: &str = "process_rss";
    /// How long requests wait in the application before somebody works on them, in seconds.
    pub const QUEUE_WAIT: &str = "queue_wait";
    /// Sessions, all of them.
    pub const SESSIONS: &str = "sessions";
    /// Sessions of nobody in particular: not logged in.
    pub const ANONYMOUS_SESSIONS: &str = "anonymous_sessions";
    /// Jobs that wait for their time.
    pub const SCHEDULED_JOBS: &str = "scheduled_jobs";

    /// All of them.
    pub const ALL: [&str; 8] = [
        SYSTEM_CPU,
        FREE_MEMORY,
        PROCESS_CPU,
        PROCESS_RSS,
        QUEUE_WAIT,
        SESSIONS,
        ANONYMOUS_SESSIONS,
        SCHEDULED_JOBS,
    ];
}

/// What a gauge said, and when. See the [example](self).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reading {
    /// As the worker wrote it: it may be anything a floating-point number can be.
    pub value: f64,
    /// Nanoseconds of `CLOCK_REALTIME`, which no time namespace shifts, by the worker's word; never 0.
    pub at: u64,
}

/// Worker: sets a gauge. `at` was read from the clock before; it is at least 1. [Example](self).
pub fn write(value: &impl Word<u64>, time: &impl Word<u64>, reading: Reading) {
    value.store(reading.value.to_bits(), Ordering::Release);
    // It never goes back: of two threads the one that read the clock first may come last.
    let mut known = time.load(Ordering::Relaxed);
    while known < reading.at && !time.swap_if(known, reading.at) {
        known = time.load(Ordering::Relaxed);
    }
}

/// Dispatcher: what a gauge says; `None` if it was never set. [Example](self).
pub fn read(value: &impl Word<u64>, time: &impl Word<u64>) -> Option<Reading> {
    // The time first: see the module's description.
    let at = time.load(Ordering::Acquire);
    let value = f64::from_bits(value.load(Ordering::Acquire));
    (at > 0).then_some(Reading { value, at })
}

/// The name of a gauge: 1 to [`MAX_GAUGE_NAME`] letters and digits of ASCII, and `_`, `-`, `.` among them.
///
/// ```
/// use dispatch_protocol::scoreboard::gauge::GaugeName;
///
/// let name: GaugeName = "queue_wait".parse()?;
/// assert_eq!(name.as_str(), "queue_wait");
/// assert!("two words".parse::<GaugeName>().is_err() && "".parse::<GaugeName>().is_err());
/// # Ok::<(), dispatch_protocol::scoreboard::gauge::NoGaugeName>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GaugeName {
    /// Zeros after the name.
    bytes: [u8; MAX_GAUGE_NAME],
}

/// A text that names no gauge. See [`GaugeName`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoGaugeName;

impl fmt::Display for NoGaugeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a gauge's name is 1 to {MAX_GAUGE_NAME} ASCII letters, digits, `_`, `-` and `.`")
    }
}

impl std::error::Error for NoGaugeName {}

impl GaugeName {
    pub(super) fn from_padded(bytes: [u8; MAX_GAUGE_NAME]) -> Result<GaugeName, NoGaugeName> {
        let len = bytes.iter().position(|&byte| byte == 0).unwrap_or(MAX_GAUGE_NAME);
        let (name, rest) = bytes.split_at(len);
        let good = |&byte: &u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
        if len > 0 && name.iter().all(good) && rest.iter().all(|&byte| byte == 0) {
            Ok(GaugeName { bytes })
        } else {
            Err(NoGaugeName)
        }
    }

    pub(super) fn padded(&self) -> &[u8; MAX_GAUGE_NAME] {
        &self.bytes
    }

    /// The name itself.
    pub fn as_str(&self) -> &str {
        let len = self.bytes.iter().position(|&byte| byte == 0).unwrap_or(MAX_GAUGE_NAME);
        // It is ASCII: whoever made it has made sure of that.
        str::from_utf8(&self.bytes[..len]).unwrap_or_default()
    }
}

impl std::str::FromStr for GaugeName {
    type Err = NoGaugeName;

    /// # Errors
    /// [`NoGaugeName`] for anything else.
    fn from_str(text: &str) -> Result<GaugeName, NoGaugeName> {
        let mut bytes = [0; MAX_GAUGE_NAME];
        bytes.get_mut(..text.len()).ok_or(NoGaugeName)?.copy_from_slice(text.as_bytes());
        // A zero within the text would be taken for its end.
        if text.contains('\0') { Err(NoGaugeName) } else { GaugeName::from_padded(bytes) }
    }
}

impl fmt::Display for GaugeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for GaugeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.as_str())
    }
}

#[cfg(test)]
mod tests;
