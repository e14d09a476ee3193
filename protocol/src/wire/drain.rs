//! drain: the dispatcher sends this worker no more connections until a resume.

use std::time::Duration;

use super::codec::{Reader, WireError, header, once, put_tlv};
use super::{kind, tlv};

/// No connections follow this record; the worker may still take earlier ones. Only for workers with
/// [`Features::DRAIN`](super::Features::DRAIN) in their hello.
///
/// The dispatcher may send it again with another deadline; the last one counts.
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
    /// When the worker must end its remaining connections: nanoseconds of `CLOCK_MONOTONIC`; 0 for
    /// never.
    pub deadline_ns: u64,
    /// The time left until the deadline when the record was sent. If present, it counts instead of
    /// `deadline_ns`: a worker in another time namespace has another `CLOCK_MONOTONIC`. `None` with
    /// a deadline comes from an older dispatcher.
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
