//! Gauges: named numbers that a worker publishes and that a dispatcher may use to score the worker.
//!
//! This module owns the words of a gauge, the order in which they are written and read, and the
//! rules for names. It does not interpret the numbers. The functions accept any [`Word`], as those
//! of [`slot`](super::slot) do.
//!
//! A gauge is a value and the time of its last write, without a lock. The worker reads the clock,
//! stores the value, then raises the time. The dispatcher loads the time, then the value. So **the
//! time read is never later than the moment at which the value read was stored**, for any number of
//! writers and any interruption. A reader between the two stores sees a value newer than its time;
//! the value is correct and counts as slightly older than it is. An old value never appears with a
//! new time.
//!
//! ```
//! use std::sync::atomic::AtomicU64;
//! use dispatch_protocol::scoreboard::gauge::{self, Reading};
//!
//! let (value, time) = (AtomicU64::new(0), AtomicU64::new(0)); // A scoreboard has such words.
//! assert_eq!(gauge::read(&value, &time), None, "never set");
//!
//! let reading = Reading { value: 0.25, at: 7_000_000_000 };
//! gauge::write(&value, &time, reading);
//! assert_eq!(gauge::read(&value, &time), Some(reading));
//! ```

use std::fmt;
use std::sync::atomic::Ordering;

use super::slot::Word;

/// Gauges of a scoreboard made by a dispatcher of this version: the eight with fixed names and 16
/// more. With the usual 256 slots the scoreboard fits into two pages of memory.
pub const GAUGES: u32 = 24;

/// The largest number of gauges in a scoreboard of any version.
pub const MAX_GAUGES: u32 = 1024;

/// The longest name of a gauge, in bytes.
pub const MAX_GAUGE_NAME: usize = 48;

/// Names with a fixed meaning. The SDK can measure the first four; the application sets the others.
pub mod names {
    /// Share of the machine's processor time in use since the last sample, over all processors: 0
    /// to 1.
    pub const SYSTEM_CPU: &str = "system_cpu";
    /// Memory available on the machine, in MiB (2²⁰ bytes).
    pub const FREE_MEMORY: &str = "free_memory";
    /// Processor time of the worker's process per second since the last sample: 1 is one busy
    /// processor.
    pub const PROCESS_CPU: &str = "process_cpu";
    /// Resident memory of the worker's process, in MiB (2²⁰ bytes).
    pub const PROCESS_RSS: &str = "process_rss";
    /// Time that requests wait in the application before processing starts, in seconds.
    pub const QUEUE_WAIT: &str = "queue_wait";
    /// All sessions.
    pub const SESSIONS: &str = "sessions";
    /// Sessions without a login.
    pub const ANONYMOUS_SESSIONS: &str = "anonymous_sessions";
    /// Jobs scheduled for a later time.
    pub const SCHEDULED_JOBS: &str = "scheduled_jobs";

    /// All fixed names.
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

/// The value of a gauge and its time. See the [example](self).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reading {
    /// The value as the worker wrote it: any floating-point number.
    pub value: f64,
    /// Nanoseconds of `CLOCK_REALTIME` (the same in every time namespace), as the worker wrote
    /// them; never 0.
    pub at: u64,
}

/// Worker: sets a gauge. The caller has read `at` from the clock before the call; `at` is at least
/// 1. [Example](self).
pub fn write(value: &impl Word<u64>, time: &impl Word<u64>, reading: Reading) {
    value.store(reading.value.to_bits(), Ordering::Release);
    // The time never decreases: of two threads, the one that read the clock first may store last.
    let mut known = time.load(Ordering::Relaxed);
    while known < reading.at && !time.swap_if(known, reading.at) {
        known = time.load(Ordering::Relaxed);
    }
}

/// Dispatcher: reads a gauge; `None` if the gauge was never set. [Example](self).
pub fn read(value: &impl Word<u64>, time: &impl Word<u64>) -> Option<Reading> {
    // The time is read first; the module documentation has the reason.
    let at = time.load(Ordering::Acquire);
    let value = f64::from_bits(value.load(Ordering::Acquire));
    (at > 0).then_some(Reading { value, at })
}

/// The name of a gauge: 1 to [`MAX_GAUGE_NAME`] characters out of ASCII letters, digits, `_`, `-`
/// and `.`.
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
    /// The name, filled up with zeros.
    bytes: [u8; MAX_GAUGE_NAME],
}

/// A text that is not the name of a gauge. See [`GaugeName`].
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

    /// The name as text.
    pub fn as_str(&self) -> &str {
        let len = self.bytes.iter().position(|&byte| byte == 0).unwrap_or(MAX_GAUGE_NAME);
        // The constructors accept ASCII only.
        str::from_utf8(&self.bytes[..len]).unwrap_or_default()
    }
}

impl std::str::FromStr for GaugeName {
    type Err = NoGaugeName;

    /// # Errors
    /// [`NoGaugeName`] if the text is not a valid name.
    fn from_str(text: &str) -> Result<GaugeName, NoGaugeName> {
        let mut bytes = [0; MAX_GAUGE_NAME];
        bytes.get_mut(..text.len()).ok_or(NoGaugeName)?.copy_from_slice(text.as_bytes());
        // A zero byte would end the name.
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
