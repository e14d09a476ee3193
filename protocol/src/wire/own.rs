//! own: from the next connection on, the client known by this key comes to me.

use super::codec::{Reader, WireError, header, once, put_tlv};
use super::{kind, tlv};

/// Longest key that can be claimed, in bytes.
pub const MAX_KEY: usize = 4000;

/// The worker claims a key: the id it has just given a client, say. For pools with affinity, once both sides have
/// [`Features::OWN`](super::Features::OWN).
///
/// ```
/// use dispatch_protocol::wire::{Control, Own};
///
/// let own = Own::new(b"6f1d29").expect("neither empty nor long");
/// let mut record = Vec::new();
/// own.encode(&mut record);
/// assert_eq!(Control::decode(&record), Ok(Control::Own(own)));
/// assert_eq!(Own::new(b""), None);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Own {
    key: Vec<u8>,
}

impl Own {
    /// A claim of `key`, as the client will send it, decoded; `None` if it is empty or longer than [`MAX_KEY`].
    pub fn new(key: &[u8]) -> Option<Own> {
        (1..=MAX_KEY).contains(&key.len()).then(|| Own { key: key.to_vec() })
    }

    /// 1 to [`MAX_KEY`] bytes.
    pub fn key(&self) -> &[u8] {
        &self.key
    }

    /// Appends the record's bytes to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        header(out, kind::OWN);
        put_tlv(out, tlv::CLIENT_KEY, &self.key);
    }

    pub(super) fn decode_body(reader: &mut Reader<'_>) -> Result<Own, WireError> {
        let mut own = None;
        while let Some((kind, value)) = reader.tlv()? {
            if kind == tlv::CLIENT_KEY {
                let key = Own::new(value).ok_or(WireError::Invalid("client key"))?;
                once(&mut own, key, "client key")?;
            }
        }
        own.ok_or(WireError::Missing("client key"))
    }
}
