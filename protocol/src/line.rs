//! The line protocol: what servers of the acl framework speak, and what to use from a language
//! without an SDK. `docs/MIGRATE_FROM_ACL.md` describes it.
//!
//! A worker connects to a `SOCK_STREAM` socket and writes a line about once a second:
//!
//! ```text
//! count=3&used=17&pid=4711&type=chat&max_threads=8&curr_threads=4&busy_threads=1&qlen=0\r\n
//! ```
//!
//! Only `count`, its live connections, is required; unknown keys are ignored. The dispatcher sends
//! one descriptor per message, with the client's address as text.
//!
//! This module owns both formats and their limits. It never allocates more than one line, however a
//! peer cuts the lines.

use std::fmt;
use std::io::Write;

use crate::wire::{ClientAddr, is_hidden};

#[cfg(test)]
mod tests;

/// Longest line in bytes, without its end. The lines of acl have at most 256.
pub const MAX_LINE: usize = 1024;

/// Longest text with a descriptor, in bytes: acl reads no more.
pub const MAX_ADDRESS: usize = 255;

/// Longest `type`, in bytes.
pub const MAX_TYPE: usize = 64;

/// What a worker reports. Keys that its line did not have are `None`, or empty.
///
/// ```
/// use dispatch_protocol::line::{Lines, Report};
///
/// let mut lines = Lines::default();
/// let mut input: &[u8] = b"count=2&type=chat%20room\r\ncount=";
/// let report = lines.next(&mut input).unwrap().unwrap();
/// assert_eq!((report.count, report.kind.as_str(), report.used), (2, "chat room", None));
/// assert!(lines.next(&mut input).is_none(), "the second line has not ended");
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Live connections.
    pub count: u64,
    /// Connections served since its start.
    pub used: Option<u64>,
    /// The process id that it claims. `SO_PEERCRED` tells the true one.
    pub pid: Option<u64>,
    /// Selects the pool, if the configuration maps it; at most [`MAX_TYPE`] bytes.
    pub kind: String,
    /// Most threads.
    pub max_threads: Option<u64>,
    /// Threads now.
    pub curr_threads: Option<u64>,
    /// Of these, busy ones.
    pub busy_threads: Option<u64>,
    /// Connections that wait for a thread.
    pub qlen: Option<u64>,
}

/// Why a line is not a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LineError {
    /// It has more than [`MAX_LINE`] bytes.
    TooLong,
    /// It has no `count`.
    NoCount,
    /// The value of this key is not a number from 0 to 2⁶⁴ − 1.
    NotANumber(&'static str),
    /// The type is not UTF-8, has control characters, or more than [`MAX_TYPE`] bytes.
    BadType,
    /// A `%` without two hexadecimal digits, in a key that is known.
    BadEscape(&'static str),
}

impl fmt::Display for LineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LineError::TooLong => write!(f, "line longer than {MAX_LINE} bytes"),
            LineError::NoCount => f.write_str("line without `count`"),
            LineError::NotANumber(key) => write!(f, "`{key}` is not a number"),
            LineError::BadType => write!(
                f,
                "`type` is not UTF-8 text of at most {MAX_TYPE} bytes without control characters"
            ),
            LineError::BadEscape(key) => {
                write!(f, "`{key}` has a `%` that two hexadecimal digits do not follow")
            }
        }
    }
}

impl std::error::Error for LineError {}

/// Cuts a stream into lines and reads each as a [`Report`].
///
/// A line ends with LF; a CR before it belongs to the end. Empty lines are ignored. After an error
/// the stream has no meaning any more: the caller ends it.
#[derive(Clone, Debug, Default)]
pub struct Lines {
    /// The beginning of a line that has not ended, at most [`MAX_LINE`] bytes.
    begun: Vec<u8>,
}

impl Lines {
    /// The next report. Takes the bytes of its line off `input`; `None` once `input` is empty.
    pub fn next(&mut self, input: &mut &[u8]) -> Option<Result<Report, LineError>> {
        loop {
            let Some(end) = input.iter().position(|&byte| byte == b'\n') else {
                let rest = std::mem::take(input);
                // One byte more, for a CR.
                if self.begun.len() + rest.len() > MAX_LINE + 1 {
                    return Some(Err(LineError::TooLong));
                }
                self.begun.extend_from_slice(rest);
                return None;
            };
            let (part, rest) = input.split_at(end);
            *input = rest.get(1..).unwrap_or_default();
            if self.begun.len() + part.len() > MAX_LINE + 1 {
                return Some(Err(LineError::TooLong));
            }
            let report = if self.begun.is_empty() {
                read_line(part)
            } else {
                self.begun.extend_from_slice(part);
                let report = read_line(&self.begun);
                self.begun.clear();
                report
            };
            if report.is_some() {
                return report;
            }
        }
    }

    /// Bytes of a line that has not ended.
    pub fn pending(&self) -> usize {
        self.begun.len()
    }
}

/// Reads one line without its LF; `None` for an empty one.
fn read_line(line: &[u8]) -> Option<Result<Report, LineError>> {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    match line.len() {
        0 => None,
        1..=MAX_LINE => Some(report_of(line)),
        _ => Some(Err(LineError::TooLong)),
    }
}

fn report_of(line: &[u8]) -> Result<Report, LineError> {
    let mut report = Report::default();
    let (mut count, mut kind) = (None, None);
    for pair in line.split(|&byte| byte == b'&') {
        let (key, value) = match pair.iter().position(|&byte| byte == b'=') {
            Some(at) => (&pair[..at], &pair[at + 1..]),
            None => (pair, &b""[..]),
        };
        let mut name = Vec::new();
        if decode(key, &mut name).is_err() {
            // It is none of the known keys.
            continue;
        }
        // The first of several pairs with the same key counts.
        match name.as_slice() {
            b"count" => set(&mut count, "count", value)?,
            b"used" => set(&mut report.used, "used", value)?,
            b"pid" => set(&mut report.pid, "pid", value)?,
            b"max_threads" => set(&mut report.max_threads, "max_threads", value)?,
            b"curr_threads" => set(&mut report.curr_threads, "curr_threads", value)?,
            b"busy_threads" => set(&mut report.busy_threads, "busy_threads", value)?,
            b"qlen" => set(&mut report.qlen, "qlen", value)?,
            b"type" if kind.is_none() => kind = Some(type_of(value)?),
            _ => {}
        }
    }
    report.count = count.ok_or(LineError::NoCount)?;
    report.kind = kind.unwrap_or_default();
    Ok(report)
}

/// Reads a number, unless the key has one already. An empty value counts as missing. acl counts
/// with signed numbers; a negative one means none.
fn set(place: &mut Option<u64>, key: &'static str, value: &[u8]) -> Result<(), LineError> {
    let mut text = Vec::new();
    decode(value, &mut text).map_err(|()| LineError::BadEscape(key))?;
    if text.is_empty() || place.is_some() {
        return Ok(());
    }
    let negative = text.first() == Some(&b'-');
    let digits = if negative { &text[1..] } else { &text[..] };
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return Err(LineError::NotANumber(key));
    }
    let add = |sum: u64, digit: &u8| sum.checked_mul(10)?.checked_add(u64::from(digit - b'0'));
    let number = digits.iter().try_fold(0, add).ok_or(LineError::NotANumber(key))?;
    *place = Some(if negative { 0 } else { number });
    Ok(())
}

fn type_of(value: &[u8]) -> Result<String, LineError> {
    let mut bytes = Vec::new();
    decode(value, &mut bytes).map_err(|()| LineError::BadEscape("type"))?;
    let text = String::from_utf8(bytes).map_err(|_| LineError::BadType)?;
    if text.len() > MAX_TYPE || text.chars().any(is_hidden) {
        return Err(LineError::BadType);
    }
    Ok(text)
}

/// Decodes the URL encoding of forms: `%41`, and `+` for a space.
fn decode(coded: &[u8], out: &mut Vec<u8>) -> Result<(), ()> {
    let mut rest = coded;
    while let Some((&first, after)) = rest.split_first() {
        rest = after;
        out.push(match first {
            b'+' => b' ',
            b'%' => {
                let (digits, after) = rest.split_at_checked(2).ok_or(())?;
                rest = after;
                let digit = |byte: u8| char::from(byte).to_digit(16).ok_or(());
                (digit(digits[0])? * 16 + digit(digits[1])?) as u8
            }
            byte => byte,
        });
    }
    Ok(())
}

impl Report {
    /// Appends the line to `out`, with CR and LF.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let numbers = [
            ("count", Some(self.count)),
            ("used", self.used),
            ("pid", self.pid),
            ("max_threads", self.max_threads),
            ("curr_threads", self.curr_threads),
            ("busy_threads", self.busy_threads),
            ("qlen", self.qlen),
        ];
        let start = out.len();
        for (key, value) in numbers.into_iter().filter_map(|(key, value)| Some((key, value?))) {
            if out.len() > start {
                out.push(b'&');
            }
            // Writing to memory cannot fail.
            let _ = write!(out, "{key}={value}");
        }
        if !self.kind.is_empty() {
            out.extend_from_slice(b"&type=");
            for byte in self.kind.bytes() {
                match byte {
                    b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => out.push(byte),
                    other => _ = write!(out, "%{other:02X}"),
                }
            }
        }
        out.extend_from_slice(b"\r\n");
    }
}

/// The text that comes with a descriptor.
#[derive(Clone, Copy, Debug)]
pub struct AddressText {
    bytes: [u8; MAX_ADDRESS],
    len: usize,
}

impl AddressText {
    /// The text of a client's address: `192.0.2.1:4711`, `[2001:db8::1]:4711`, or `unix`.
    pub fn new(client: &ClientAddr) -> AddressText {
        let mut bytes = [0; MAX_ADDRESS];
        let mut rest = &mut bytes[..];
        // The longest address has 58 bytes.
        let _ = write!(rest, "{client}");
        let len = MAX_ADDRESS - rest.len();
        AddressText { bytes, len }
    }

    /// 1 to [`MAX_ADDRESS`] bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}
