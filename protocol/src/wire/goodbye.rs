//! goodbye: the worker takes nothing more; what it has not taken goes elsewhere.

use super::codec::{Reader, WireError, header};
use super::kind;

/// Send me nothing more. The control connection stays open until the last connection is closed,
/// so that they are counted to the end.
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
