//! The part of a handoff about a proxy: what the header of the PROXY protocol said about one
//! connection. Only handoffs with such connections have it.

use super::ClientAddr;
use super::codec::{Reader, WireError, put_tlv_header};
use super::handoff::{ADDRESS_LEN, put_address, take_address};
use super::tlv;

/// The most bytes of the header's own TLVs that a handoff carries for one connection.
pub const MAX_PROXY_TLVS: usize = 512;

/// The most bytes that all of these parts of one handoff may have: the room for TLVs in a record,
/// less the numbers of a full handoff.
pub const MAX_PROXY_HEADERS: usize = 4096 - 4 - 8 * super::MAX_FDS_PER_RECORD;

/// Flag: the proxy itself connected.
const LOCAL: u16 = 1;

/// What a proxy said about a connection, in the header of the PROXY protocol before its first byte.
///
/// ```
/// use dispatch_protocol::ClientAddr;
/// use dispatch_protocol::wire::ProxyHeader;
///
/// let header = ProxyHeader {
///     address: ClientAddr::Inet(([10, 0, 0, 5], 41_000).into()),
///     local: false,
///     tlvs: vec![0x02, 0, 3, b'a', b'.', b'b'], // Type, length (big-endian), value.
/// };
/// let mut part = Vec::new();
/// header.encode(0, &mut part); // Of the first connection.
/// assert_eq!(part.len(), header.encoded_len());
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProxyHeader {
    /// The address that the proxy connected from.
    pub address: ClientAddr,
    /// The proxy itself connected, for example to see whether the service lives, or it does not
    /// know its client: the connection has the address of the proxy.
    pub local: bool,
    /// The TLVs of a version 2 header as they came, whole ones, at most [`MAX_PROXY_TLVS`] bytes:
    /// type u8, length u16 in big-endian order, value.
    pub tlvs: Vec<u8>,
}

impl ProxyHeader {
    /// The bytes that [`encode`](ProxyHeader::encode) appends.
    pub fn encoded_len(&self) -> usize {
        4 + 4 + ADDRESS_LEN + self.tlvs.len().min(MAX_PROXY_TLVS)
    }

    /// Appends this part to a handoff, after its entries; `entry` is the index of the connection.
    pub fn encode(&self, entry: u16, out: &mut Vec<u8>) {
        let tlvs = self.tlvs.get(..MAX_PROXY_TLVS).unwrap_or(&self.tlvs);
        put_tlv_header(out, tlv::PROXY_HEADER, 4 + ADDRESS_LEN + tlvs.len());
        out.extend_from_slice(&entry.to_le_bytes());
        out.extend_from_slice(&if self.local { LOCAL } else { 0 }.to_le_bytes());
        put_address(out, &self.address);
        out.extend_from_slice(tlvs);
    }

    /// The value of the TLV: the index of the connection, and the header.
    pub(super) fn decode(value: &[u8]) -> Result<(u16, ProxyHeader), WireError> {
        let mut reader = Reader::new(value);
        let entry = reader.u16("connection of a proxy header")?;
        let local = reader.u16("flags of a proxy header")? & LOCAL != 0;
        let address = take_address(&mut reader)?;
        let tlvs = reader.rest();
        if tlvs.len() > MAX_PROXY_TLVS {
            return Err(WireError::Invalid("length of a proxy header"));
        }
        Ok((entry, ProxyHeader { address, local, tlvs: tlvs.to_vec() }))
    }
}
