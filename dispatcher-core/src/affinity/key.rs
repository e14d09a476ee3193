//! Affinity keys: what a pool identifies its clients by.

use std::fmt;

use core::net::IpAddr;

use dispatch_protocol::ClientAddr;

use crate::types::AffinityKey;

/// The source of a pool's keys: `affinity.key`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeySource {
    /// The client's address, cut to these prefixes.
    ClientIp {
        /// Bits of an IPv4 address, 1 to 32.
        ipv4_prefix: u8,
        /// Bits of an IPv6 address, 1 to 128.
        ipv6_prefix: u8,
    },
    /// The cookie of this name in the first request.
    Cookie(String),
    /// `;NAME=value` in the path of the first request, or `NAME=value` in its query.
    Url(String),
    /// `NAME=value` in the urlencoded body of the first request.
    Form(String),
    /// The header field of this name in the first request.
    Header(String),
    /// The server name that a TLS client asks for.
    Sni,
}

impl fmt::Display for KeySource {
    /// As in the configuration.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KeySource::ClientIp { .. } => f.write_str("client-ip"),
            KeySource::Cookie(name) => write!(f, "cookie:{name}"),
            KeySource::Url(name) => write!(f, "url:{name}"),
            KeySource::Form(name) => write!(f, "form:{name}"),
            KeySource::Header(name) => write!(f, "header:{name}"),
            KeySource::Sni => f.write_str("sni"),
        }
    }
}

/// An identified client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientIdentity {
    /// Its key.
    pub key: AffinityKey,
    /// The name of a worker that a session id ends in (`ID.NAME`), hashed like a key.
    pub route: Option<AffinityKey>,
}

/// Longest name of a server: DNS has no longer ones.
const MAX_SERVER_NAME: usize = 255;

impl KeySource {
    /// Whether the key is in the first bytes.
    pub fn is_peeked(&self) -> bool {
        match self {
            KeySource::ClientIp { .. } => false,
            KeySource::Cookie(_)
            | KeySource::Url(_)
            | KeySource::Form(_)
            | KeySource::Header(_)
            | KeySource::Sni => true,
        }
    }

    /// The identity of a client before it has sent anything.
    pub fn of_peer(&self, peer: &ClientAddr) -> Option<ClientIdentity> {
        match self {
            KeySource::ClientIp { ipv4_prefix, ipv6_prefix } => {
                let key = of_address(peer.ip()?, *ipv4_prefix, *ipv6_prefix);
                Some(ClientIdentity { key, route: None })
            }
            KeySource::Cookie(_)
            | KeySource::Url(_)
            | KeySource::Form(_)
            | KeySource::Header(_)
            | KeySource::Sni => None,
        }
    }

    /// The identity that a worker claims with `value`: the decoded value that the client will send;
    /// for `client-ip` an address as text.
    pub fn of_value(&self, value: &[u8]) -> Option<ClientIdentity> {
        match self {
            KeySource::ClientIp { ipv4_prefix, ipv6_prefix } => {
                let ip = str::from_utf8(value).ok()?.parse().ok()?;
                let key = of_address(ip, *ipv4_prefix, *ipv6_prefix);
                Some(ClientIdentity { key, route: None })
            }
            KeySource::Sni => {
                let value = value.strip_suffix(b".").unwrap_or(value);
                let mut name = [0; MAX_SERVER_NAME];
                let name = name.get_mut(..value.len())?;
                name.copy_from_slice(value);
                name.make_ascii_lowercase();
                let key = Some(AffinityKey::of(name)).filter(|_| !name.is_empty())?;
                Some(ClientIdentity { key, route: None })
            }
            KeySource::Cookie(_)
            | KeySource::Url(_)
            | KeySource::Form(_)
            | KeySource::Header(_) => {
                let key = Some(AffinityKey::of(value)).filter(|_| !value.is_empty())?;
                // The route is everything after the first dot, as in mod_jk and mod_proxy_balancer.
                let dot = value.iter().position(|&byte| byte == b'.');
                let route = dot.and_then(|dot| value.get(dot + 1..));
                let route = route.filter(|route| !route.is_empty()).map(AffinityKey::of);
                Some(ClientIdentity { key, route })
            }
        }
    }
}

fn of_address(ip: IpAddr, ipv4_prefix: u8, ipv6_prefix: u8) -> AffinityKey {
    // An IPv4 client of an IPv6 listener is the same client.
    match ip.to_canonical() {
        IpAddr::V4(ip) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(ipv4_prefix.min(32))).unwrap_or(0);
            AffinityKey::of(&(u32::from(ip) & mask).to_be_bytes())
        }
        IpAddr::V6(ip) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(ipv6_prefix.min(128))).unwrap_or(0);
            AffinityKey::of(&(u128::from(ip) & mask).to_be_bytes())
        }
    }
}
