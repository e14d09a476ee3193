//! Log lines that wait until no lock is held.
//!
//! The application's logger may call the worker (a structured log with the worker's id in every line), so it must never
//! run under a lock of ours. Whatever is said under a lock is kept here, and is passed on by the next [`LogQueue::flush`] after
//! the lock is released.
//!
//! Lines that can repeat without an end have a limit: see [`RateLimited`].

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

/// What the lines' target is, whichever module they are from.
const TARGET: &str = "worker_sdk";

/// A line of a [`RateLimited`] kind is logged once in this time.
const INTERVAL: Duration = Duration::from_secs(10);

/// Kinds of lines that a lasting condition, such as the limit of open files, or an application that tries again and again
/// would repeat. Each is logged once in ten seconds, with the number of those that were left out.
#[derive(Clone, Copy, Debug)]
pub(crate) enum RateLimited {
    /// Connections arrived without their descriptors.
    NotArrived,
    /// A worker without a dispatcher cannot accept.
    Accept,
    /// A connection keeps its blocking mode.
    Mode,
    /// Something about the descriptor that event loops wait for.
    Waiting,
    /// The dispatcher was not told of a change.
    Update,
    /// axum is given no connection.
    Axum,
}

const KINDS: usize = RateLimited::Axum as usize + 1;

#[derive(Clone, Copy, Debug, Default)]
struct Limit {
    until: Option<Instant>,
    left_out: u64,
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
    /// Goes to standard error when no logger is installed.
    important: bool,
}

impl LogQueue {
    /// Keeps a line for the next flush.
    pub(super) fn push(&self, level: Level, text: impl FnOnce() -> String) {
        // `log_enabled!` would ask the application's logger, here, under the lock.
        if level <= log::max_level() {
            self.keep(Line { level, text: text(), important: false });
        }
    }

    /// The same for a line of which there may be too many.
    pub(crate) fn push_limited(
        &self,
        kind: RateLimited,
        level: Level,
        text: impl FnOnce() -> String,
    ) {
        if level > log::max_level() {
            return;
        }
        let left_out = {
            let mut limits = self.limits.lock().unwrap_or_else(PoisonError::into_inner);
            let limit = &mut limits[kind as usize];
            let now = Instant::now();
            if limit.until.is_some_and(|until| now < until) {
                limit.left_out += 1;
                return;
            }
            limit.until = now.checked_add(INTERVAL);
            mem::take(&mut limit.left_out)
        };
        let mut text = text();
        match left_out {
            0 => {}
            1 => text.push_str("; one line like this was left out before it"),
            more => text.push_str(&format!("; {more} lines like this were left out before it")),
        }
        self.keep(Line { level, text, important: false });
    }

    /// The same for a line that a program without a logger must show, too.
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

    /// Passes the lines to the logger. Only for callers that hold no lock.
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
                // A closed standard error is no reason to panic, as `eprintln!` would.
                let _ = writeln!(std::io::stderr(), "{text}");
            } else {
                log::log!(target: TARGET, level, "{text}");
            }
        }
    }
}

/// Logs at once, with the target of all lines. Only for callers that hold no lock.
pub(crate) fn log_now(level: Level, line: fmt::Arguments<'_>) {
    log::log!(target: TARGET, level, "{line}");
}

/// Text of another process for a line of the log: what cannot be seen, or would begin another line, is escaped.
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

/// The same for a path.
pub(super) fn readable_path(path: &Path) -> String {
    readable(&path.to_string_lossy()).into_owned()
}

/// `1 connection`, `2 connections`.
pub(super) fn connections(count: usize) -> String {
    if count == 1 { "1 connection".to_owned() } else { format!("{count} connections") }
}

/// Whether the program has installed no logger. The one that `log` has until then carries no data; a logger that was
/// installed, and then switched off, nearly always does.
fn no_logger() -> bool {
    log::max_level() == log::LevelFilter::Off && size_of_val(log::logger()) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_has_no_logger_and_important_lines_are_kept_for_standard_error() {
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

    /// Not a test of its own: the level is the whole process's.
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
        assert_eq!(lines()[2], "cannot; 2 lines like this were left out before it");
        log::set_max_level(log::LevelFilter::Off);
    }

    #[test]
    fn text_of_others_stays_on_its_line() {
        assert_eq!(readable("no pool größe"), "no pool größe");
        assert_eq!(readable("no\nWARN \u{202e}pool"), "no\\nWARN \\u{202e}pool");
        assert_eq!(readable_path(Path::new("/run/a\tb")), "/run/a\\tb");
    }
}
