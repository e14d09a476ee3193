//! probe: a handoff without a connection. A suspect worker takes it to show that its application
//! takes again.

use super::codec::{Reader, WireError, header};
use super::kind;

/// The worker takes this slot. No file descriptor comes with the record.
///
/// ```
/// use dispatch_protocol::wire::{Channel, Probe};
///
/// let probe = Probe { seq: 9, slot: 9 };
/// let mut record = Vec::new();
/// probe.encode(&mut record);
/// assert_eq!(Channel::decode(&record), Ok(Channel::Probe(probe)));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// The sequence number in the slot.
    pub seq: u64,
    /// The slot to take.
    pub slot: u32,
}

impl Probe {
    /// Appends the record's bytes to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        header(out, kind::PROBE);
        out.extend_from_slice(&self.seq.to_le_bytes());
        out.extend_from_slice(&self.slot.to_le_bytes());
        out.extend_from_slice(&[0, 0, 0, 0]);
    }

    pub(super) fn decode_body(reader: &mut Reader<'_>) -> Result<Probe, WireError> {
        let seq = reader.u64("sequence")?;
        let slot = reader.u32("slot")?;
        reader.reserved32("probe")?;
        reader.skip_tlvs()?;
        Ok(Probe { seq, slot })
    }
}
