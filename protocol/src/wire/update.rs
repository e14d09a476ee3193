//! update: the worker changes its weight, its maximum, or whether it accepts connections.

use super::codec::{Reader, WireError, header};
use super::kind;

/// New values for settings of the hello. Only if both sides have
/// [`Features::UPDATE`](super::Features::UPDATE).
///
/// ```
/// use dispatch_protocol::wire::{Control, Update};
///
/// let update = Control::Update(Update { weight: 2, paused: false, max_connections: 500 });
/// let mut record = Vec::new();
/// update.encode(&mut record);
/// assert_eq!(Control::decode(&record), Ok(update));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Update {
    /// Share of the load relative to the pool's other workers, from 1.
    pub weight: u16,
    /// The worker accepts no connections for now: untaken ones go to other workers, and the
    /// dispatcher sends none.
    pub paused: bool,
    /// The largest number of connections at once, from 1.
    pub max_connections: u32,
}

const PAUSED: u16 = 1;

impl Update {
    /// Appends the record's bytes to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        header(out, kind::UPDATE);
        out.extend_from_slice(&self.weight.to_le_bytes());
        let flags = if self.paused { PAUSED } else { 0 };
        out.extend_from_slice(&flags.to_le_bytes());
        out.extend_from_slice(&self.max_connections.to_le_bytes());
    }

    pub(super) fn decode_body(reader: &mut Reader<'_>) -> Result<Update, WireError> {
        let weight = reader.u16("weight")?;
        let flags = reader.u16("flags")?;
        let max_connections = reader.u32("max_connections")?;
        reader.skip_tlvs()?;
        if weight == 0 {
            return Err(WireError::Invalid("weight"));
        }
        if max_connections == 0 {
            return Err(WireError::Invalid("max_connections"));
        }
        Ok(Update { weight, paused: flags & PAUSED != 0, max_connections })
    }
}
