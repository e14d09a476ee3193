//! refused: the negative answer to a hello. The control connection closes after it.

use super::codec::{MAX_TEXT, Reader, WireError, header, once, put_tlv, short_text, text_of};
use super::{MAX_CONTROL_RECORD, kind, tlv};

/// The reason, for programs. Unknown codes decode as [`RefusedCode::Other`].
///
/// ```
/// use dispatch_protocol::wire::RefusedCode;
///
/// // A worker retries after a transient refusal and reports any other.
/// assert!(RefusedCode::Stopping.is_transient());
/// assert!(!RefusedCode::NotAllowed.is_transient());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RefusedCode {
    /// The dispatcher speaks another version.
    Version,
    /// The dispatcher has no pool of this name.
    UnknownPool,
    /// The user of the worker may not join this pool.
    NotAllowed,
    /// The pool has its maximum number of workers.
    TooManyWorkers,
    /// The dispatcher is stopping.
    Stopping,
    /// The hello was not well-formed.
    Malformed,
    /// The dispatcher lacks a resource; the worker may try again.
    Resources,
    /// The code of a later version.
    Other(u16),
}

impl RefusedCode {
    fn to_wire(self) -> u16 {
        match self {
            RefusedCode::Version => 1,
            RefusedCode::UnknownPool => 2,
            RefusedCode::NotAllowed => 3,
            RefusedCode::TooManyWorkers => 4,
            RefusedCode::Stopping => 5,
            RefusedCode::Malformed => 6,
            RefusedCode::Resources => 7,
            RefusedCode::Other(code) => code,
        }
    }

    fn from_wire(code: u16) -> RefusedCode {
        match code {
            1 => RefusedCode::Version,
            2 => RefusedCode::UnknownPool,
            3 => RefusedCode::NotAllowed,
            4 => RefusedCode::TooManyWorkers,
            5 => RefusedCode::Stopping,
            6 => RefusedCode::Malformed,
            7 => RefusedCode::Resources,
            code => RefusedCode::Other(code),
        }
    }

    /// Whether the same hello may be accepted later without a change of any configuration.
    pub fn is_transient(self) -> bool {
        match self {
            RefusedCode::TooManyWorkers | RefusedCode::Stopping | RefusedCode::Resources => true,
            RefusedCode::Version
            | RefusedCode::UnknownPool
            | RefusedCode::NotAllowed
            | RefusedCode::Malformed
            | RefusedCode::Other(_) => false,
        }
    }
}

/// The worker has not joined, and the reason.
///
/// ```
/// use dispatch_protocol::wire::{Control, Refused, RefusedCode};
///
/// let refused = Refused {
///     code: RefusedCode::UnknownPool,
///     reason: "no pool web".to_owned(),
///     key: Some("pool.web".to_owned()),
/// };
/// let mut record = Vec::new();
/// refused.encode(&mut record);
/// assert_eq!(Control::decode(&record), Ok(Control::Refused(refused)));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// The reason, for programs.
    pub code: RefusedCode,
    /// The reason and the remedy for people, one sentence. Cut at 1,024 bytes.
    pub reason: String,
    /// The configuration key that decides, if there is one, such as `pool.web.allow_users`. Cut at
    /// 1,024 bytes.
    pub key: Option<String>,
}

impl Refused {
    /// Appends the record's bytes to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        const _: () = assert!(8 + 2 * (4 + MAX_TEXT) <= MAX_CONTROL_RECORD);
        header(out, kind::REFUSED);
        out.extend_from_slice(&self.code.to_wire().to_le_bytes());
        out.extend_from_slice(&[0, 0]);
        put_tlv(out, tlv::REASON, text_of(&self.reason));
        if let Some(key) = &self.key {
            put_tlv(out, tlv::KEY, text_of(key));
        }
    }

    pub(super) fn decode_body(reader: &mut Reader<'_>) -> Result<Refused, WireError> {
        let code = RefusedCode::from_wire(reader.u16("code")?);
        reader.reserved16("refused")?;
        let (mut reason, mut key) = (None, None);
        while let Some((kind, value)) = reader.tlv()? {
            match kind {
                tlv::REASON => once(&mut reason, short_text(value), "reason")?,
                tlv::KEY => once(&mut key, short_text(value), "key")?,
                _ => {}
            }
        }
        Ok(Refused { code, reason: reason.ok_or(WireError::Missing("reason"))?, key })
    }
}
