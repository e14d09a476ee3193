//! Lines out of the pieces of a stream, and the bounds of one process.

use std::time::{Duration, Instant};

use dispatch_protocol::wire::is_hidden;

/// Most bytes of a line in the log, escape sequences included; the rest is cut off. The line of the
/// log has room for the other values.
pub(super) const MAX_LINE: usize = 3_584;

/// Most bytes that are read of one process in one [`PERIOD`]; then the process may have to wait for
/// the rest of the period. More would only take processor time from others: the log takes much
/// less.
pub(super) const BUDGET: usize = 512 * 1024;
pub(super) const PERIOD: Duration = Duration::from_millis(100);

/// So many lines in a second are few: the log takes them also while other processes fill its queue.
const FEW: u32 = 20;

/// How often lost lines are reported.
pub(super) const REPORT: Duration = Duration::from_secs(1);

/// The bytes read in this period.
pub(super) struct Pace {
    pub(super) since: Instant,
    pub(super) bytes: usize,
}

impl Pace {
    /// How long to pause after reading so many bytes, if the budget is used up.
    pub(super) fn rest(&mut self, count: usize, now: Instant) -> Option<Duration> {
        let gone = now.saturating_duration_since(self.since);
        if gone >= PERIOD {
            (self.since, self.bytes) = (now, 0);
        }
        self.bytes += count;
        (self.bytes >= BUDGET).then(|| PERIOD.saturating_sub(gone)).filter(|rest| !rest.is_zero())
    }
}

/// The text with at most `most` bytes in the log, and the number of bytes cut off. `…` at its end
/// shows a cut, here or before.
pub(super) fn shortened(text: &str, most: usize, is_cut: bool) -> (String, u64) {
    let mark = '…'.len_utf8();
    let plain = |c: char| !matches!(c, '"' | '\\') && !is_hidden(c);
    if text.len() + mark <= most && text.chars().all(plain) {
        return (if is_cut { format!("{text}…") } else { text.to_owned() }, 0);
    }
    let mut shown = 0;
    let end = text.char_indices().find_map(|(at, c)| {
        shown += match c {
            '"' | '\\' | '\n' | '\t' => 2,
            // `\u{10ffff}`
            c if is_hidden(c) => 10,
            c => c.len_utf8(),
        };
        (shown + mark > most).then_some(at)
    });
    let end = end.unwrap_or(text.len());
    let cut = (text.len() - end) as u64;
    let mark = if is_cut || cut > 0 { "…" } else { "" };
    (format!("{}{mark}", &text[..end]), cut)
}

/// Puts pieces of a stream together to lines.
#[derive(Default)]
pub(super) struct Lines {
    /// The start of a line whose end was not read yet.
    begun: Vec<u8>,
    /// The bytes after `begun` that are cut off.
    cut: u64,
}

impl Lines {
    pub(super) fn feed(&mut self, bytes: &[u8], mut line: impl FnMut(&[u8], u64)) {
        for piece in bytes.split_inclusive(|&byte| byte == b'\n') {
            let (text, whole) = match piece.strip_suffix(b"\n") {
                Some(text) => (text, true),
                None => (piece, false),
            };
            if whole && self.begun.is_empty() && text.len() <= MAX_LINE {
                line(text, 0);
                continue;
            }
            let taken = text.len().min(MAX_LINE - self.begun.len());
            self.begun.extend_from_slice(&text[..taken]);
            self.cut += (text.len() - taken) as u64;
            if whole {
                line(&self.begun, self.cut);
                self.begun.clear();
                self.cut = 0;
            }
        }
    }

    pub(super) fn end(&mut self, mut line: impl FnMut(&[u8], u64)) {
        if !self.begun.is_empty() {
            line(&self.begun, self.cut);
            *self = Lines::default();
        }
    }
}

/// Limits the lines of one process in each second, and counts what was lost.
#[derive(Debug)]
pub(super) struct LineLimit {
    rate: u32,
    since: Instant,
    lines: u32,
    lost: u64,
    /// When the next report is due.
    pub(super) due: Option<Instant>,
}

impl LineLimit {
    pub(super) fn new(rate: u32, now: Instant) -> LineLimit {
        LineLimit { rate, since: now, lines: 0, lost: 0, due: None }
    }

    pub(super) fn allow(&mut self, now: Instant) -> bool {
        if now.saturating_duration_since(self.since) >= Duration::from_secs(1) {
            (self.since, self.lines) = (now, 0);
        }
        self.lines = self.lines.saturating_add(1);
        self.lines <= self.rate
    }

    /// Whether the process has written more in this second than most processes do.
    pub(super) fn many(&self) -> bool {
        self.lines > FEW
    }

    pub(super) fn lost(&mut self, now: Instant) {
        self.lost += 1;
        self.due.get_or_insert(now + REPORT);
    }

    /// The lost lines since the last report, if one is due.
    pub(super) fn report(&mut self, now: Instant) -> Option<u64> {
        self.due.take_if(|due| *due <= now)?;
        Some(std::mem::take(&mut self.lost))
    }
}
