//! The address of a client.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use dispatch_protocol::ClientAddr;

/// The address that a client connected from, as the dispatcher saw it.
///
/// An IPv4 client of a dual-stack listener has its IPv4 address, not the mapped IPv6 address.
///
/// ```
/// use std::net::SocketAddr;
/// use worker_sdk::PeerAddr;
///
/// # fn main() -> Result<(), std::net::AddrParseError> {
/// let peer = PeerAddr::from("[::ffff:192.0.2.1]:50000".parse::<SocketAddr>()?);
/// assert_eq!(peer.to_string(), "192.0.2.1:50000");
/// assert_eq!(peer.ip(), Some("192.0.2.1".parse()?));
/// assert_eq!(peer.socket_addr().map(|addr| addr.port()), Some(50000));
///
/// assert_eq!(PeerAddr::Unix.to_string(), "unix");
/// assert_eq!(PeerAddr::Unix.ip(), None);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PeerAddr {
    /// A TCP client.
    Inet(SocketAddr),
    /// A client of a Unix listener; such a client has no address.
    Unix,
}

impl PeerAddr {
    /// The client's IP address; `None` for a Unix client.
    pub fn ip(&self) -> Option<IpAddr> {
        self.socket_addr().map(|addr| addr.ip())
    }

    /// The client's address and port; `None` for a Unix client.
    pub fn socket_addr(&self) -> Option<SocketAddr> {
        match self {
            PeerAddr::Inet(addr) => Some(*addr),
            PeerAddr::Unix => None,
        }
    }
}

impl From<SocketAddr> for PeerAddr {
    /// A mapped IPv4 address becomes the plain IPv4 address.
    fn from(addr: SocketAddr) -> Self {
        ClientAddr::from(addr).into()
    }
}

impl From<ClientAddr> for PeerAddr {
    fn from(addr: ClientAddr) -> Self {
        match addr {
            ClientAddr::Inet(addr) => PeerAddr::Inet(addr),
            ClientAddr::Unix => PeerAddr::Unix,
        }
    }
}

impl fmt::Display for PeerAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PeerAddr::Inet(addr) => addr.fmt(f),
            PeerAddr::Unix => f.write_str("unix"),
        }
    }
}
