//! handoff: connections for a worker, with one file descriptor per entry, in the order of the
//! entries.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

use super::codec::{Reader, WireError, header, once, put_tlv_of};
use super::{MAX_FDS_PER_RECORD, ProxyHeader, kind, tlv};

/// The length of one entry, in bytes.
pub const ENTRY_LEN: usize = 48;

/// The address that a client connected from, as the dispatcher saw it.
///
/// An IPv4 client of a dual-stack listener has its IPv4 address, not the mapped IPv6 address.
///
/// ```
/// use std::net::SocketAddr;
/// use dispatch_protocol::ClientAddr;
///
/// # fn main() -> Result<(), std::net::AddrParseError> {
/// let peer = ClientAddr::from("[::ffff:192.0.2.1]:50000".parse::<SocketAddr>()?);
/// assert_eq!(peer.to_string(), "192.0.2.1:50000");
/// assert_eq!(peer.ip(), Some("192.0.2.1".parse()?));
/// assert_eq!(peer.socket_addr().map(|addr| addr.port()), Some(50000));
///
/// assert_eq!(ClientAddr::Unix.to_string(), "unix");
/// assert_eq!(ClientAddr::Unix.ip(), None);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ClientAddr {
    /// A TCP client.
    Inet(SocketAddr),
    /// A client of a Unix listener; such a client has no address.
    Unix,
}

impl ClientAddr {
    /// The client's IP address; `None` for a Unix client.
    pub fn ip(&self) -> Option<IpAddr> {
        self.socket_addr().map(|addr| addr.ip())
    }

    /// The client's address and port; `None` for a Unix client.
    pub fn socket_addr(&self) -> Option<SocketAddr> {
        match self {
            ClientAddr::Inet(addr) => Some(*addr),
            ClientAddr::Unix => None,
        }
    }
}

impl From<SocketAddr> for ClientAddr {
    /// A mapped IPv4 address becomes the plain IPv4 address.
    fn from(addr: SocketAddr) -> Self {
        match addr.ip().to_canonical() {
            // A mapped address has no scope; a real IPv6 address keeps its scope.
            IpAddr::V4(ip) => ClientAddr::Inet((ip, addr.port()).into()),
            IpAddr::V6(_) => ClientAddr::Inet(addr),
        }
    }
}

impl fmt::Display for ClientAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ClientAddr::Inet(addr) => addr.fmt(f),
            ClientAddr::Unix => f.write_str("unix"),
        }
    }
}

/// Properties of one connection, one bit each. Unknown bits are ignored.
///
/// ```
/// use dispatch_protocol::wire::EntryFlags;
///
/// let flags = EntryFlags(0b101);
/// assert!(flags.contains(EntryFlags::RESENT));
/// assert!(!EntryFlags::NONE.contains(EntryFlags::RESENT));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EntryFlags(pub u16);

impl EntryFlags {
    /// No property.
    pub const NONE: EntryFlags = EntryFlags(0);
    /// The connection was sent to another worker before. That worker may still have a copy of the
    /// descriptor, so the last handle shuts the socket down even if the slot is already RELEASED.
    pub const RESENT: EntryFlags = EntryFlags(1);
    /// The socket is in non-blocking mode and was never sent to another worker.
    pub const NONBLOCKING: EntryFlags = EntryFlags(2);
    /// The dispatcher itself has connected, to see whether the worker is ready.
    pub const READY_CHECK: EntryFlags = EntryFlags(4);

    /// Whether all bits of `other` are set.
    pub fn contains(self, other: EntryFlags) -> bool {
        self.0 & other.0 == other.0
    }
}

impl std::ops::BitOr for EntryFlags {
    type Output = EntryFlags;

    fn bitor(self, other: EntryFlags) -> EntryFlags {
        EntryFlags(self.0 | other.0)
    }
}

/// One connection of a handoff. See [`Handoff`] for an example.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Sequence number; higher than that of every earlier entry for this worker.
    pub seq: u64,
    /// The scoreboard slot that holds `seq`.
    pub slot: u32,
    /// Index of the listener that the client connected to; the welcome has its name.
    pub listener: u16,
    /// See [`EntryFlags`].
    pub flags: EntryFlags,
    /// When the dispatcher accepted the connection: nanoseconds of `CLOCK_REALTIME`, which is the
    /// same in every time namespace.
    pub accepted_ns: u64,
    /// The address that the client connected from.
    pub peer: ClientAddr,
    /// The dispatcher's number of the connection, `conn=` in its log; 0 if not given.
    pub number: u64,
}

const FAMILY_UNIX: u16 = 1;
const FAMILY_V4: u16 = 4;
const FAMILY_V6: u16 = 6;

/// The length of an address, in bytes.
pub(super) const ADDRESS_LEN: usize = 24;

pub(super) fn put_address(out: &mut Vec<u8>, address: &ClientAddr) {
    let (family, port, scope, ip) = match address {
        ClientAddr::Unix => (FAMILY_UNIX, 0, 0, [0; 16]),
        ClientAddr::Inet(SocketAddr::V4(addr)) => {
            let mut ip = [0; 16];
            ip[..4].copy_from_slice(&addr.ip().octets());
            (FAMILY_V4, addr.port(), 0, ip)
        }
        ClientAddr::Inet(SocketAddr::V6(addr)) => {
            (FAMILY_V6, addr.port(), addr.scope_id(), addr.ip().octets())
        }
    };
    out.extend_from_slice(&family.to_le_bytes());
    out.extend_from_slice(&port.to_le_bytes());
    out.extend_from_slice(&scope.to_le_bytes());
    out.extend_from_slice(&ip);
}

pub(super) fn take_address(reader: &mut Reader<'_>) -> Result<ClientAddr, WireError> {
    let family = reader.u16("address family")?;
    let port = reader.u16("port")?;
    let scope = reader.u32("scope")?;
    let ip = reader.bytes16("address")?;
    match family {
        FAMILY_UNIX => Ok(ClientAddr::Unix),
        FAMILY_V4 => Ok(ClientAddr::Inet((Ipv4Addr::new(ip[0], ip[1], ip[2], ip[3]), port).into())),
        FAMILY_V6 => {
            Ok(ClientAddr::Inet(SocketAddrV6::new(Ipv6Addr::from(ip), port, 0, scope).into()))
        }
        _ => Err(WireError::Invalid("address family")),
    }
}

impl Entry {
    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.seq.to_le_bytes());
        out.extend_from_slice(&self.accepted_ns.to_le_bytes());
        out.extend_from_slice(&self.slot.to_le_bytes());
        out.extend_from_slice(&self.listener.to_le_bytes());
        out.extend_from_slice(&self.flags.0.to_le_bytes());
        put_address(out, &self.peer);
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Entry, WireError> {
        let seq = reader.u64("sequence")?;
        let accepted_ns = reader.u64("accept time")?;
        let slot = reader.u32("slot")?;
        let listener = reader.u16("listener")?;
        let flags = EntryFlags(reader.u16("flags")?);
        let peer = take_address(reader)?;
        // The numbers follow the entries, in a TLV.
        let number = 0;
        Ok(Entry { seq, slot, listener, flags, accepted_ns, peer, number })
    }
}

/// Connections for this worker.
///
/// ```
/// use dispatch_protocol::ClientAddr;
/// use dispatch_protocol::wire::{Channel, Entry, EntryFlags, Handoff};
///
/// let entry = Entry {
///     seq: 1,
///     slot: 0,
///     listener: 0,
///     flags: EntryFlags::NONE,
///     accepted_ns: 1_000_000_000, // One second after the epoch.
///     peer: ClientAddr::Inet(([192, 0, 2, 1], 50_000).into()),
///     number: 1234,
/// };
/// let mut record = Vec::new();
/// Handoff::encode_entries(&[entry], &mut record);
///
/// let handoff = Handoff { entries: vec![entry], proxy_headers: vec![] };
/// let mut same = Vec::new();
/// handoff.encode(&mut same);
/// assert_eq!(record, same);
/// assert_eq!(Channel::decode(&record), Ok(Channel::Handoff(handoff)));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Handoff {
    /// 1 to [`MAX_FDS_PER_RECORD`] entries.
    pub entries: Vec<Entry>,
    /// For each connection that came through a proxy, its index in `entries` and what the proxy
    /// said. At most [`MAX_PROXY_HEADERS`](super::MAX_PROXY_HEADERS) bytes when encoded.
    pub proxy_headers: Vec<(u16, ProxyHeader)>,
}

impl Handoff {
    /// Appends the record's bytes to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        Handoff::encode_entries(&self.entries, out);
        self.proxy_headers.iter().for_each(|(entry, header)| header.encode(*entry, out));
    }

    /// Appends the bytes of a handoff of these entries to `out`, without building a `Handoff`.
    ///
    /// The caller passes 1 to [`MAX_FDS_PER_RECORD`] entries; a reader refuses any other number.
    pub fn encode_entries(entries: &[Entry], out: &mut Vec<u8>) {
        header(out, kind::HANDOFF);
        let count = u16::try_from(entries.len()).unwrap_or(u16::MAX);
        out.extend_from_slice(&count.to_le_bytes());
        out.extend_from_slice(&[0, 0]);
        entries.iter().for_each(|entry| entry.encode(out));
        if entries.iter().any(|entry| entry.number != 0) {
            put_tlv_of(out, tlv::NUMBERS, entries.iter().map(|entry| entry.number.to_le_bytes()));
        }
    }

    pub(super) fn decode_body(reader: &mut Reader<'_>) -> Result<Handoff, WireError> {
        let count = usize::from(reader.u16("count")?);
        reader.reserved16("handoff")?;
        if count == 0 || count > MAX_FDS_PER_RECORD {
            return Err(WireError::Invalid("count"));
        }
        let mut entries =
            (0..count).map(|_| Entry::decode(reader)).collect::<Result<Vec<_>, WireError>>()?;
        let mut seen = None;
        let mut proxy_headers: Vec<(u16, ProxyHeader)> = Vec::new();
        while let Some((kind, value)) = reader.tlv()? {
            if kind == tlv::PROXY_HEADER {
                let (entry, header) = ProxyHeader::decode(value)?;
                if usize::from(entry) >= entries.len() {
                    return Err(WireError::Invalid("connection of a proxy header"));
                }
                if proxy_headers.iter().any(|(other, _)| *other == entry) {
                    return Err(WireError::Repeated("proxy header"));
                }
                proxy_headers.push((entry, header));
            }
            if kind == tlv::NUMBERS {
                once(&mut seen, (), "numbers")?;
                let (numbers, []) = value.as_chunks() else {
                    return Err(WireError::Invalid("numbers"));
                };
                if numbers.len() != entries.len() {
                    return Err(WireError::Invalid("numbers"));
                }
                for (entry, number) in entries.iter_mut().zip(numbers) {
                    entry.number = u64::from_le_bytes(*number);
                }
            }
        }
        Ok(Handoff { entries, proxy_headers })
    }
}
