//! claim: the worker claims the client with this key, from the client's next connection on.

use super::codec::{Reader, WireError, header, once, put_tlv};
use super::{kind, tlv};

/// The longest key that can be claimed, in bytes.
pub const MAX_KEY: usize = 4000;

/// The worker claims a key, for example the session id that it has just given to a client. For
/// pools with affinity, if both sides have [`Features::CLAIM`](super::Features::CLAIM).
///
/// ```
/// use dispatch_protocol::wire::{Control, Claim};
///
/// let claim = Claim::new(b"6f1d29").expect("neither empty nor long");
/// let mut record = Vec::new();
/// claim.encode(&mut record);
/// assert_eq!(Control::decode(&record), Ok(Control::Claim(claim)));
/// assert_eq!(Claim::new(b""), None);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    key: Vec<u8>,
}

impl Claim {
    /// A claim of `key`, decoded, as the client will send it; `None` if it is empty or longer than
    /// [`MAX_KEY`].
    pub fn new(key: &[u8]) -> Option<Claim> {
        (1..=MAX_KEY).contains(&key.len()).then(|| Claim { key: key.to_vec() })
    }

    /// The key, 1 to [`MAX_KEY`] bytes.
    pub fn key(&self) -> &[u8] {
        &self.key
    }

    /// Appends the record's bytes to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        header(out, kind::CLAIM);
        put_tlv(out, tlv::CLIENT_KEY, &self.key);
    }

    pub(super) fn decode_body(reader: &mut Reader<'_>) -> Result<Claim, WireError> {
        let mut claim = None;
        while let Some((kind, value)) = reader.tlv()? {
            if kind == tlv::CLIENT_KEY {
                let key = Claim::new(value).ok_or(WireError::Invalid("client key"))?;
                once(&mut claim, key, "client key")?;
            }
        }
        claim.ok_or(WireError::Missing("client key"))
    }
}
