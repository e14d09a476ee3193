//! drain: the dispatcher gives this worker no more connections until it says otherwise.

use std::time::Duration;

use super::codec::{Reader, WireError, header, once, put_tlv};
use super::{kind, tlv};

/// No more connections after this record; what came before is still yours to take. Only for workers whose hello had
/// [`Features::DRAIN`](super::Features::DRAIN).
///
/// It may come again, with another deadline: the last one counts. A reader that has heard it already does nothing new.
///
/// ```
/// use std::time::Duration;
/// use dispatch_protocol::wire::{Channel, Drain};
///
/// let left = Some(Duration::from_secs(10));
/// let drain = Drain { deadline_ns: 30_000_000_000, left };
/// let mut record = Vec::new();
/// drain.encode(&mut record);
/// assert_eq!(Channel::decode(&record), Ok(Channel::Drain(drain)));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drain {
    /// When the worker shall end what it still has: nanoseconds of `CLOCK_MONOTONIC`; 0 for never.
    pub deadline_ns: u64,
    /// The same as the time that was left when the record was sent: what counts, if it is there. A worker in a time
    /// namespace of its own has another `CLOCK_MONOTONIC`. `None` with a deadline comes from an older dispatcher.
    pub left: Option<Duration>,
}

impl Drain {
    /// Appends the record's bytes to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        header(out, kind::DRAIN);
        out.extend_from_slice(&self.deadline_ns.to_le_bytes());
        if let Some(left) = self.left {
            let left = u64::try_from(left.as_nanos()).unwrap_or(u64::MAX);
            put_tlv(out, tlv::TIME_LEFT, &left.to_le_bytes());
        }
    }

    pub(super) fn decode_body(reader: &mut Reader<'_>) -> Result<Drain, WireError> {
        let deadline_ns = reader.u64("deadline")?;
        let mut left = None;
        while let Some((kind, value)) = reader.tlv()? {
            if kind == tlv::TIME_LEFT {
                let value = value.try_into().map_err(|_| WireError::Invalid("time left"))?;
                once(&mut left, Duration::from_nanos(u64::from_le_bytes(value)), "time left")?;
            }
        }
        Ok(Drain { deadline_ns, left })
    }
}
