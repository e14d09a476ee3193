//! What a proxy in front of the dispatcher said about a connection.

use std::iter::FusedIterator;

use dispatch_protocol::wire::ProxyHeader;

use crate::PeerAddr;

/// What a proxy said about a connection, in the header of the PROXY protocol before its first byte.
/// The dispatcher has read the header: the connection begins with the byte after it. See
/// [`Connection::proxy`](crate::Connection::proxy).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proxy {
    address: PeerAddr,
    local: bool,
    tlvs: Box<[u8]>,
}

impl Proxy {
    /// The type of the TLV with the host name that the client asked for (`PP2_TYPE_AUTHORITY`).
    pub const AUTHORITY: u8 = 0x02;
    /// The type of the TLV with the proxy's own id of the connection (`PP2_TYPE_UNIQUE_ID`).
    pub const UNIQUE_ID: u8 = 0x05;
    /// The type of the TLV with what TLS between client and proxy used (`PP2_TYPE_SSL`).
    pub const SSL: u8 = 0x20;
    /// The type of the TLV with the connection id of Private Service Connect (Google Cloud).
    pub const GCP: u8 = 0xe0;
    /// The type of the TLV with the id of a VPC endpoint (Amazon Web Services): a byte 1, then the
    /// id.
    pub const AWS: u8 = 0xea;
    /// The type of the TLV with the id of a private endpoint (Azure): a byte 1, then a u32.
    pub const AZURE: u8 = 0xee;

    /// The address that the proxy connected from.
    pub fn address(&self) -> PeerAddr {
        self.address
    }

    /// Whether the proxy named no client, because it connected for itself, for example to see
    /// whether the service lives, or because it does not know its client. Then
    /// [`peer_addr`](crate::Connection::peer_addr) is the address of the proxy.
    pub fn is_local(&self) -> bool {
        self.local
    }

    /// The TLVs of a version 2 header, in order, as the proxy sent them. Whole ones of the first
    /// 512 bytes; headers that long are refused unless `proxy_max_header` allows them.
    ///
    /// ```no_run
    /// # use worker_sdk::Proxy;
    /// # fn log(proxy: &Proxy) {
    /// for (kind, value) in proxy.tlvs() {
    ///     println!("{kind:#04x}: {} bytes", value.len());
    /// }
    /// let endpoint = proxy.tlv(Proxy::AWS).and_then(|value| value.strip_prefix(&[1]));
    /// # let _ = endpoint;
    /// # }
    /// ```
    pub fn tlvs(&self) -> Tlvs<'_> {
        Tlvs { rest: &self.tlvs }
    }

    /// The value of the first TLV of this type.
    pub fn tlv(&self, kind: u8) -> Option<&[u8]> {
        self.tlvs().find(|(of, _)| *of == kind).map(|(_, value)| value)
    }

    /// The host name that the client asked for, usually that of TLS (SNI), if the proxy has sent
    /// one and it is UTF-8.
    pub fn authority(&self) -> Option<&str> {
        std::str::from_utf8(self.tlv(Proxy::AUTHORITY)?).ok()
    }
}

impl From<ProxyHeader> for Proxy {
    fn from(header: ProxyHeader) -> Proxy {
        let ProxyHeader { address, local, tlvs } = header;
        Proxy { address: address.into(), local, tlvs: tlvs.into() }
    }
}

/// The TLVs of a [`Proxy`]: their types and values.
#[derive(Clone, Debug)]
pub struct Tlvs<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Tlvs<'a> {
    type Item = (u8, &'a [u8]);

    fn next(&mut self) -> Option<(u8, &'a [u8])> {
        let (&[kind, high, low], rest) = self.rest.split_first_chunk()?;
        let len = usize::from(u16::from_be_bytes([high, low]));
        let (value, rest) = rest.split_at_checked(len)?;
        self.rest = rest;
        Some((kind, value))
    }
}

impl FusedIterator for Tlvs<'_> {}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxy(tlvs: &[u8]) -> Proxy {
        let address = dispatch_protocol::ClientAddr::Unix;
        Proxy::from(ProxyHeader { address, local: false, tlvs: tlvs.to_vec() })
    }

    #[test]
    fn tlvs_are_found_by_type_in_order() {
        let it = proxy(b"\x05\0\x02id\x02\0\x03a.b\x04\0\0\xea\0\x03\x01ab\x02\0\x01c");
        let all: Vec<(u8, &[u8])> = it.tlvs().collect();
        let expected: [(u8, &[u8]); 5] =
            [(5, b"id"), (2, b"a.b"), (4, b""), (0xea, b"\x01ab"), (2, b"c")];
        assert_eq!(all, expected);
        assert_eq!(it.authority(), Some("a.b"));
        assert_eq!(it.tlv(Proxy::UNIQUE_ID), Some(&b"id"[..]));
        assert_eq!(it.tlv(Proxy::AZURE), None);
        assert_eq!(proxy(b"\x02\0\x01\xff").authority(), None, "not UTF-8");
    }

    #[test]
    fn bytes_that_are_no_tlvs_end_the_iteration() {
        for bytes in [&b""[..], b"\x02", b"\x02\0", b"\x02\0\x01", b"\x02\xff\xffabc"] {
            assert_eq!(proxy(bytes).tlvs().count(), 0, "{bytes:?}");
        }
        assert_eq!(proxy(b"\x02\0\x01a\x02\0\x02b").tlvs().count(), 1);
    }
}
