//! Reads and writes the fixed fields and TLVs of a record. Independent of the kind of record.

use std::fmt;

use super::{MAX_NAME, is_hidden};

/// Why a record was not accepted.
///
/// ```
/// use dispatch_protocol::wire::{Control, WireError};
///
/// let error = Control::decode(&[200, 0, 0, 0]).unwrap_err();
/// assert_eq!(error, WireError::UnknownKind(200));
/// assert_eq!(error.to_string(), "unknown record kind 200");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum WireError {
    /// The record ends before the field named.
    TooShort(&'static str),
    /// The record is longer than its socket allows.
    TooLong {
        /// Bytes received.
        len: usize,
        /// Bytes allowed.
        max: usize,
    },
    /// This kind of record does not belong on this socket.
    UnknownKind(u16),
    /// A reserved field is not zero.
    Reserved(&'static str),
    /// A field has an invalid value.
    Invalid(&'static str),
    /// A TLV that the record needs is missing.
    Missing(&'static str),
    /// A TLV that may appear once appears twice.
    Repeated(&'static str),
}

impl fmt::Display for WireError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WireError::TooShort(field) => write!(f, "record ends before {field}"),
            WireError::TooLong { len, max } => {
                write!(f, "record of {len} bytes, at most {max} are allowed")
            }
            WireError::UnknownKind(kind) => write!(f, "unknown record kind {kind}"),
            WireError::Reserved(field) => write!(f, "reserved field {field} is not zero"),
            WireError::Invalid(field) => write!(f, "invalid {field}"),
            WireError::Missing(field) => write!(f, "no {field}"),
            WireError::Repeated(field) => write!(f, "{field} given twice"),
        }
    }
}

impl std::error::Error for WireError {}

/// Takes fields from the front of a record.
pub(super) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) fn new(record: &'a [u8]) -> Self {
        Reader { rest: record }
    }

    fn take<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], WireError> {
        let (head, rest) = self.rest.split_first_chunk::<N>().ok_or(WireError::TooShort(field))?;
        self.rest = rest;
        Ok(*head)
    }

    pub(super) fn u16(&mut self, field: &'static str) -> Result<u16, WireError> {
        self.take(field).map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self, field: &'static str) -> Result<u32, WireError> {
        self.take(field).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, field: &'static str) -> Result<u64, WireError> {
        self.take(field).map(u64::from_le_bytes)
    }

    /// What is left.
    pub(super) fn rest(&self) -> &'a [u8] {
        self.rest
    }

    pub(super) fn bytes16(&mut self, field: &'static str) -> Result<[u8; 16], WireError> {
        self.take(field)
    }

    pub(super) fn reserved16(&mut self, field: &'static str) -> Result<(), WireError> {
        if self.u16(field)? == 0 { Ok(()) } else { Err(WireError::Reserved(field)) }
    }

    pub(super) fn reserved32(&mut self, field: &'static str) -> Result<(), WireError> {
        if self.u32(field)? == 0 { Ok(()) } else { Err(WireError::Reserved(field)) }
    }

    /// The record's kind and its reserved field: the start of every record.
    pub(super) fn kind(&mut self) -> Result<u16, WireError> {
        let kind = self.u16("kind")?;
        self.reserved16("header")?;
        Ok(kind)
    }

    /// The next TLV, or `None` at the end of the record.
    pub(super) fn tlv(&mut self) -> Result<Option<(u16, &'a [u8])>, WireError> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let kind = self.u16("TLV type")?;
        let len = usize::from(self.u16("TLV length")?);
        let (value, rest) =
            self.rest.split_at_checked(len).ok_or(WireError::TooShort("end of TLV"))?;
        self.rest = rest;
        Ok(Some((kind, value)))
    }

    /// Skips every remaining TLV, for records without a known TLV.
    pub(super) fn skip_tlvs(&mut self) -> Result<(), WireError> {
        while self.tlv()?.is_some() {}
        Ok(())
    }
}

pub(super) fn header(out: &mut Vec<u8>, kind: u16) {
    out.extend_from_slice(&kind.to_le_bytes());
    out.extend_from_slice(&[0, 0]);
}

/// Appends a TLV. A value that is too long for a TLV is cut.
pub(super) fn put_tlv(out: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let len = u16::try_from(value.len()).unwrap_or(u16::MAX);
    out.extend_from_slice(&kind.to_le_bytes());
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(&value[..usize::from(len)]);
}

/// Begins a TLV of this length; the caller appends the value.
pub(super) fn put_tlv_header(out: &mut Vec<u8>, kind: u16, len: usize) {
    out.extend_from_slice(&kind.to_le_bytes());
    out.extend_from_slice(&u16::try_from(len).unwrap_or(u16::MAX).to_le_bytes());
}

/// Appends a TLV whose value consists of pieces, without a copy.
pub(super) fn put_tlv_of<const N: usize>(
    out: &mut Vec<u8>,
    kind: u16,
    pieces: impl ExactSizeIterator<Item = [u8; N]>,
) {
    let len = u16::try_from(N * pieces.len()).unwrap_or(u16::MAX);
    out.extend_from_slice(&kind.to_le_bytes());
    out.extend_from_slice(&len.to_le_bytes());
    pieces.for_each(|piece| out.extend_from_slice(&piece));
}

/// Names are 1 to [`MAX_NAME`] bytes of printable UTF-8 without spaces, because they appear in
/// logs, metrics and commands.
pub(super) fn name(value: &[u8], field: &'static str) -> Result<String, WireError> {
    let text = str::from_utf8(value).map_err(|_| WireError::Invalid(field))?;
    if is_name(text) { Ok(text.to_owned()) } else { Err(WireError::Invalid(field)) }
}

/// Whether `text` can name a pool, worker or listener: 1 to [`MAX_NAME`] bytes without hidden
/// characters ([`is_hidden`]) and white space.
///
/// ```
/// use dispatch_protocol::wire::is_name;
///
/// assert!(is_name("web-1"));
/// assert!(!is_name("two words") && !is_name("") && !is_name("web\u{200b}"));
/// ```
pub fn is_name(text: &str) -> bool {
    (1..=MAX_NAME).contains(&text.len()) && !text.chars().any(|c| c.is_whitespace() || is_hidden(c))
}

/// Free text for people. Hidden characters become spaces, so that the text cannot forge a log line.
fn text(value: &[u8]) -> String {
    String::from_utf8_lossy(value).chars().map(|c| if is_hidden(c) { ' ' } else { c }).collect()
}

/// The longest text for people, in bytes.
pub(super) const MAX_TEXT: usize = 1024;

/// Text from the wire, cut to the length that this side would send.
pub(super) fn short_text(value: &[u8]) -> String {
    let mut text = text(value);
    text.truncate(text_of(&text).len());
    text
}

/// At most [`MAX_TEXT`] bytes, cut between two characters.
pub(super) fn text_of(text: &str) -> &[u8] {
    let end = (0..=MAX_TEXT.min(text.len())).rev().find(|&i| text.is_char_boundary(i));
    &text.as_bytes()[..end.unwrap_or(0)]
}

/// Stores a TLV that may appear once.
pub(super) fn once<T>(
    place: &mut Option<T>,
    value: T,
    field: &'static str,
) -> Result<(), WireError> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(WireError::Repeated(field)),
    }
}
