//! Headers of the PROXY protocol, versions 1 and 2, as HAProxy's specification has them.
//!
//! The crate `proxy-header` parses lines and addresses. What it leaves open is decided here: when
//! bytes begin like a header, how long one may be, what LOCAL ignores, and whether the checksum of
//! a version 2 header is right. A result other than [`Header::Unknown`] and [`Header::Begun`] stays
//! the same when more bytes are added.

use crc::{CRC_32_ISCSI, Crc};
use dispatch_protocol::ClientAddr;
use dispatch_protocol::wire::MAX_PROXY_TLVS;
use proxy_header::{ParseConfig, Protocol, ProxyHeader};

/// How a header of version 1 begins.
const VERSION_1: &[u8] = b"PROXY ";

/// How a header of version 2 begins.
const VERSION_2: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

/// The longest header of version 1, with the end of its line.
const MAX_VERSION_1: usize = 107;

/// The part of a version 2 header before addresses and TLVs.
const FIXED: usize = 16;

/// The TLV with the checksum of the header.
const CHECKSUM: u8 = 0x03;

/// What the bytes of a connection are, from its beginning.
#[derive(Debug, PartialEq, Eq)]
pub enum Header<'a> {
    /// Too few bytes to know.
    Unknown,
    /// The beginning of a header.
    Begun,
    /// No header.
    Nothing,
    /// A header that is not valid.
    Malformed,
    /// A version 2 header of more than the allowed bytes.
    TooLong,
    /// A whole header.
    Whole {
        /// Its length in bytes.
        len: usize,
        /// The client that it names; `None` for LOCAL, UNKNOWN, and what is not a stream.
        client: Option<ClientAddr>,
        /// Its TLVs, whole ones, at most [`MAX_PROXY_TLVS`] bytes.
        tlvs: &'a [u8],
    },
}

/// Reads the header at the beginning of a connection. `max` is the most bytes of a version 2
/// header.
pub fn read(bytes: &[u8], max: usize) -> Header<'_> {
    let begins = |signature: &[u8]| {
        let common = signature.len().min(bytes.len());
        (bytes[..common] == signature[..common]).then_some(common == signature.len())
    };
    match (begins(VERSION_1), begins(VERSION_2)) {
        (Some(true), _) => version_1(bytes),
        (_, Some(true)) => version_2(bytes, max),
        (None, None) => Header::Nothing,
        (Some(false), _) | (_, Some(false)) => Header::Unknown,
    }
}

fn version_1(bytes: &[u8]) -> Header<'_> {
    let bytes = &bytes[..bytes.len().min(MAX_VERSION_1)];
    let Some(end) = bytes.windows(2).position(|pair| pair == b"\r\n") else {
        return if bytes.len() < MAX_VERSION_1 { Header::Begun } else { Header::Malformed };
    };
    let (line, len) = (&bytes[..end], end + 2);
    let Ok((header, used)) = ProxyHeader::parse(&bytes[..len], ParseConfig::default()) else {
        return Header::Malformed;
    };
    let client = header.proxied_address().map(|addresses| ClientAddr::from(addresses.source));
    // The number types of the standard library also accept "+80" and "080".
    let plain = |port: &[u8]| {
        port.iter().all(u8::is_ascii_digit) && (port.len() == 1 || !port.starts_with(b"0"))
    };
    let ports_are_plain = || line.split(|&byte| byte == b' ').skip(4).all(plain);
    if used != len || (client.is_some() && !ports_are_plain()) {
        return Header::Malformed;
    }
    Header::Whole { len, client, tlvs: &[] }
}

fn version_2(bytes: &[u8], max: usize) -> Header<'_> {
    let Some((fixed, rest)) = bytes.split_first_chunk::<FIXED>() else { return Header::Begun };
    let [.., command, family, high, low] = *fixed;
    let len = FIXED + usize::from(u16::from_be_bytes([high, low]));
    let local = match command {
        0x20 => true,
        0x21 => false,
        _ => return Header::Malformed,
    };
    if len > max {
        return Header::TooLong;
    }
    let Some(rest) = rest.get(..len - FIXED) else { return Header::Begun };
    let addresses = match family >> 4 {
        0 => 0,
        1 => 12,
        2 => 36,
        3 => 216,
        // LOCAL says nothing about its addresses, and nothing that follows can be found.
        _ if local => rest.len(),
        _ => return Header::Malformed,
    };
    let tlvs = rest.get(addresses..).unwrap_or_default();
    let tlvs = match whole_tlvs(&bytes[..len], len - tlvs.len()) {
        Ok(most) => &tlvs[..most],
        Err(NotValid) if local => &[],
        Err(NotValid) => return Header::Malformed,
    };
    if local {
        return Header::Whole { len, client: None, tlvs };
    }
    // The TLVs were checked above.
    let config = ParseConfig { include_tlvs: false, ..ParseConfig::default() };
    let Ok((header, used)) = ProxyHeader::parse(&bytes[..len], config) else {
        return Header::Malformed;
    };
    let client = match (header.proxied_address(), family) {
        (Some(addresses), _) if addresses.protocol == Protocol::Stream => {
            Some(ClientAddr::from(addresses.source))
        }
        // A client of a Unix socket of the proxy.
        (_, 0x31) => Some(ClientAddr::Unix),
        _ => None,
    };
    if used != len { Header::Malformed } else { Header::Whole { len, client, tlvs } }
}

/// A TLV ends after the header, or the checksum is wrong.
struct NotValid;

/// Checks the TLVs that begin at `start` of a header; returns how many bytes of them are whole TLVs
/// within [`MAX_PROXY_TLVS`].
fn whole_tlvs(header: &[u8], start: usize) -> Result<usize, NotValid> {
    let (mut at, mut kept) = (start, 0);
    while at < header.len() {
        let Some(&[kind, high, low]) = header[at..].first_chunk() else { return Err(NotValid) };
        let value = at + 3;
        let end = value + usize::from(u16::from_be_bytes([high, low]));
        let Some(content) = header.get(value..end) else { return Err(NotValid) };
        if kind == CHECKSUM && content != checksum(&header[..value], &header[end..]) {
            return Err(NotValid);
        }
        at = end;
        if at - start <= MAX_PROXY_TLVS {
            kept = at - start;
        }
    }
    Ok(kept)
}

/// The CRC32c of a header, with zeros in the place of the checksum.
fn checksum(before: &[u8], after: &[u8]) -> [u8; 4] {
    const CRC: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);
    let mut digest = CRC.digest();
    digest.update(before);
    digest.update(&[0; 4]);
    digest.update(after);
    digest.finalize().to_be_bytes()
}

#[cfg(test)]
mod tests;
