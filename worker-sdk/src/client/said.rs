//! Log lines that wait until no lock is held.
//!
//! The application's logger may call the worker (a structured log with the worker's id in every line), so it must never
//! run under a lock of ours. Whatever is said under a lock is kept here, and is passed on by the next [`Said::flush`] after
//! the lock is released.

use std::io::Write;
use std::mem;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use log::Level;

/// What the lines' target is, whichever module they are from.
const TARGET: &str = "worker_sdk";

#[derive(Debug, Default)]
pub(crate) struct Said {
    any: AtomicBool,
    lines: Mutex<Vec<Line>>,
}

#[derive(Debug)]
struct Line {
    level: Level,
    text: String,
    /// Goes to standard error when no logger is installed.
    important: bool,
}

impl Said {
    /// Keeps a line for the next flush.
    pub(super) fn say(&self, level: Level, text: impl FnOnce() -> String) {
        // `log_enabled!` would ask the application's logger, here, under the lock.
        if level <= log::max_level() {
            self.keep(Line { level, text: text(), important: false });
        }
    }

    /// The same for a line that a program without a logger must show, too.
    pub(super) fn say_to_all(&self, level: Level, text: impl FnOnce() -> String) {
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
        let said = Said::default();
        said.say(Level::Error, || unreachable!("no logger would show it"));
        assert!(said.is_empty());
        said.say_to_all(Level::Warn, || "a line of the test, on standard error".to_owned());
        assert!(!said.is_empty());
        said.flush();
        assert!(said.is_empty());
    }
}
