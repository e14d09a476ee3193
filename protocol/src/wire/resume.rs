//! resume: a drain has ended.

use super::codec::{Reader, WireError, header};
use super::kind;

/// Connections may follow; a deadline set by [`Drain`](super::Drain) no longer counts.
///
/// ```
/// use dispatch_protocol::wire::{Channel, Resume};
///
/// let mut record = Vec::new();
/// Resume.encode(&mut record);
/// assert_eq!(Channel::decode(&record), Ok(Channel::Resume(Resume)));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resume;

impl Resume {
    /// Appends the record's bytes to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        header(out, kind::RESUME);
    }

    pub(super) fn decode_body(reader: &mut Reader<'_>) -> Result<Resume, WireError> {
        reader.skip_tlvs()?;
        Ok(Resume)
    }
}
