//! Log lines that wait until no lock is held.
//!
//! The application's logger may call the worker (for example to log the worker's id), so it must
//! never run under a lock of the SDK. Lines are queued under a lock, and the next
//! [`LogQueue::flush`] after its release passes them on.
//!
//! Repeating lines have a rate limit: see [`RateLimited`].

use std::borrow::Cow;
use std::fmt;
use std::io::Write;
use std::mem;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use log::Level;

use dispatch_protocol::wire::is_hidden;

/// The target of all lines, independent of the module.
const TARGET: &str = "worker_sdk";

/// The interval of the rate limit.
const INTERVAL: Duration = Duration::from_secs(10);

/// Kinds of lines that a lasting condition (such as the limit of open files) or a retrying
/// application would repeat. Each kind is logged once in ten seconds, with the number of suppressed
/// lines.
#[derive(Clone, Copy, Debug)]
pub(crate) enum RateLimited {
    /// Connections arrived without their descriptors.
    NotArrived,
    /// A worker without a dispatcher cannot accept.
    Accept,
    /// A connection keeps its blocking mode after an error.
    Mode,
    /// A failed operation on the readiness descriptor.
    Waiting,
    /// The dispatcher did not get a change of the settings.
    Update,
    /// axum gets no connection.
    Axum,
}

const KINDS: usize = RateLimited::Axum as usize + 1;

#[derive(Clone, Copy, Debug, Default)]
struct Limit {
    until: Option<Instant>,
    suppressed: u64,
}

#[derive(Debug, Default)]
pub(crate) struct LogQueue {
    any: AtomicBool,
    lines: Mutex<Vec<Line>>,
    limits: Mutex<[Limit; KINDS]>,
}

#[derive(Debug)]
struct Line {
    level: Level,
    text: String,
    /// Goes to standard error if no logger is installed.
    important: bool,
}

impl LogQueue {
    /// Queues a line for the next flush.
    pub(super) fn push(&self, level: Level, text: impl FnOnce() -> String) {
        // `log_enabled!` would call the application's logger under the lock.
        if level <= log::max_level() {
            self.keep(Line { level, text: text(), important: false });
        }
    }

    /// Queues a line with a rate limit.
    pub(crate) fn push_limited(
        &self,
        kind: RateLimited,
        level: Level,
        text: impl FnOnce() -> String,
    ) {
        if level > log::max_level() {
            return;
        }
        let suppressed = {
            let mut limits = self.limits.lock().unwrap_or_else(PoisonError::into_inner);
            let limit = &mut limits[kind as usize];
            let now = Instant::now();
            if limit.until.is_some_and(|until| now < until) {
                limit.suppressed += 1;
                return;
            }
            limit.until = now.checked_add(INTERVAL);
            mem::take(&mut limit.suppressed)
        };
        let mut text = text();
        match suppressed {
            0 => {}
            1 => text.push_str("; 1 similar line was suppressed before"),
            more => text.push_str(&format!("; {more} similar lines were suppressed before")),
        }
        self.keep(Line { level, text, important: false });
    }

    /// Queues a line that a program without a logger shows, too.
    pub(super) fn push_important(&self, level: Level, text: impl FnOnce() -> String) {
        if level <= log::max_level() || no_logger() {
            self.keep(Line { level, text: text(), important: true });
        }
    }

    fn keep(&self, line: Line) {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).push(line);
        self.any.store(true, Ordering::Release);
    }

    pub(super) fn is_empty(&self) -> bool {
        !self.any.load(Ordering::Acquire)
    }

    /// Passes the lines to the logger. The caller holds no lock.
    pub(crate) fn flush(&self) {
        if self.is_empty() {
            return;
        }
        let lines = {
            let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
            self.any.store(false, Ordering::Release);
            mem::take(&mut *lines)
        };
        for Line { level, text, important } in lines {
            if important && no_logger() {
                // `eprintln!` would panic if standard error is closed.
                let _ = writeln!(std::io::stderr(), "{text}");
            } else {
                log::log!(target: TARGET, level, "{text}");
            }
        }
    }
}

/// Logs immediately, with the common target. The caller holds no lock.
pub(crate) fn log_now(level: Level, line: fmt::Arguments<'_>) {
    log::log!(target: TARGET, level, "{line}");
}

/// Escapes hidden characters and line breaks in the text of another process, for a log line.
pub(super) fn readable(text: &str) -> Cow<'_, str> {
    if !text.chars().any(is_hidden) {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match is_hidden(c) {
            true => escaped.extend(c.escape_default()),
            false => escaped.push(c),
        }
    }
    Cow::Owned(escaped)
}

/// As [`readable`], for a path.
pub(super) fn readable_path(path: &Path) -> String {
    readable(&path.to_string_lossy()).into_owned()
}

/// `1 connection`, `2 connections`.
pub(super) fn connections(count: usize) -> String {
    if count == 1 { "1 connection".to_owned() } else { format!("{count} connections") }
}

/// Whether the program has installed no logger. The default logger of `log` has no data; an
/// installed one that was switched off nearly always has.
fn no_logger() -> bool {
    log::max_level() == log::LevelFilter::Off && size_of_val(log::logger()) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn important_lines_are_kept_without_a_logger() {
        let log_queue = LogQueue::default();
        log_queue.push(Level::Error, || unreachable!("no logger would show it"));
        assert!(log_queue.is_empty());
        log_queue
            .push_important(Level::Warn, || "a line of the test, on standard error".to_owned());
        assert!(!log_queue.is_empty());
        log_queue.flush();
        assert!(log_queue.is_empty());
        repeated_lines_are_limited();
    }

    /// Not a separate test, because the level belongs to the whole process.
    fn repeated_lines_are_limited() {
        log::set_max_level(log::LevelFilter::Warn);
        let log_queue = LogQueue::default();
        let lines =
            || log_queue.lines.lock().unwrap().iter().map(|l| l.text.clone()).collect::<Vec<_>>();
        for _ in 0..3 {
            log_queue.push_limited(RateLimited::Accept, Level::Warn, || "cannot".to_owned());
        }
        log_queue.push_limited(RateLimited::Mode, Level::Warn, || "another".to_owned());
        assert_eq!(lines(), ["cannot", "another"]);
        log_queue.limits.lock().unwrap()[RateLimited::Accept as usize].until = Some(Instant::now());
        log_queue.push_limited(RateLimited::Accept, Level::Warn, || "cannot".to_owned());
        assert_eq!(lines()[2], "cannot; 2 similar lines were suppressed before");
        log::set_max_level(log::LevelFilter::Off);
    }

    #[test]
    fn text_of_others_stays_on_its_line() {
        assert_eq!(readable("no pool größe"), "no pool größe");
        assert_eq!(readable("no\nWARN \u{202e}pool"), "no\\nWARN \\u{202e}pool");
        assert_eq!(readable_path(Path::new("/run/a\tb")), "/run/a\\tb");
    }
}
