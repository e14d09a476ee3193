//! goodbye: the worker takes no more connections; untaken ones go to other workers.

use super::codec::{Reader, WireError, header};
use super::kind;

/// The dispatcher sends nothing more after this record. The control connection stays open until the
/// worker's last connection is closed, so that every close is counted.
///
/// ```
/// use dispatch_protocol::wire::{Control, Goodbye};
///
/// let mut record = Vec::new();
/// Goodbye.encode(&mut record);
/// assert_eq!(Control::decode(&record), Ok(Control::Goodbye(Goodbye)));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Goodbye;

impl Goodbye {
    /// Appends the record's bytes to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        header(out, kind::GOODBYE);
    }

    pub(super) fn decode_body(reader: &mut Reader<'_>) -> Result<Goodbye, WireError> {
        reader.skip_tlvs()?;
        Ok(Goodbye)
    }
}
