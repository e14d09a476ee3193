//! drain: the dispatcher gives this worker no more connections until it says otherwise.

use super::codec::{Reader, WireError, header};
use super::kind;

/// No more connections after this record; what came before is still yours to take. Only for workers whose hello had
/// [`Features::DRAIN`](super::Features::DRAIN).
///
/// It may come again, with another deadline: the last one counts. A reader that has heard it already does nothing new.
///
/// ```
/// use worker_sdk::wire::{Channel, Drain};
///
/// let drain = Drain { deadline_ns: 30_000_000_000 };
/// let mut record = Vec::new();
/// drain.encode(&mut record);
/// assert_eq!(Channel::decode(&record), Ok(Channel::Drain(drain)));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drain {
    /// When the worker shall end what it still has: nanoseconds of `CLOCK_MONOTONIC`; 0 for never.
    pub deadline_ns: u64,
}

impl Drain {
    /// Appends the record's bytes to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        header(out, kind::DRAIN);
        out.extend_from_slice(&self.deadline_ns.to_le_bytes());
    }

    pub(super) fn decode_body(reader: &mut Reader<'_>) -> Result<Drain, WireError> {
        let deadline_ns = reader.u64("deadline")?;
        reader.skip_tlvs()?;
        Ok(Drain { deadline_ns })
    }
}
