//! What a client is known by: its address, or something in the first bytes it sends.
//!
//! Owns the reading of those bytes. Bytes go in, a key comes out; it knows nothing of sockets, time or workers, and
//! remembers nothing. Bytes of a stranger end here: whatever they are, the answer is a key, "more", or none.

mod http;
mod sni;

#[cfg(test)]
mod tests;

use std::fmt;
use std::net::IpAddr;

use dispatch_protocol::ClientAddr;

use crate::pool::AffinityKey;

/// What a pool knows its clients by: `affinity.key`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeySource {
    /// The client's address, as far as these prefixes go.
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

/// A client that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    /// What it is known by.
    pub key: AffinityKey,
    /// The name of a worker that a session id ends in (`ID.NAME`), hashed like a key.
    pub route: Option<AffinityKey>,
}

/// What the first bytes say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// This is the client.
    Known(Known),
    /// More bytes are needed to tell.
    More,
    /// However many come, they will not tell.
    Unknown,
}

/// What a reader of first bytes has found.
#[derive(Debug)]
enum Found<'a> {
    Value(&'a [u8]),
    More,
    Nothing,
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

    /// What a client is known by before it has sent anything.
    pub fn of_peer(&self, peer: &ClientAddr) -> Option<Known> {
        match self {
            KeySource::ClientIp { ipv4_prefix, ipv6_prefix } => {
                let key = of_address(peer.ip()?, *ipv4_prefix, *ipv6_prefix);
                Some(Known { key, route: None })
            }
            KeySource::Cookie(_)
            | KeySource::Url(_)
            | KeySource::Form(_)
            | KeySource::Header(_)
            | KeySource::Sni => None,
        }
    }

    /// What the first bytes say, from the very first on. With `end`, there will be no more of them.
    ///
    /// Whatever was said of fewer bytes, other than [`Look::More`], is said of more bytes too. `scratch` is for what has to be
    /// decoded: kept by the caller, so that it is warm.
    pub fn of_first_bytes(&self, bytes: &[u8], end: bool, scratch: &mut Vec<u8>) -> Look {
        let found = match self {
            KeySource::ClientIp { .. } => Found::Nothing,
            KeySource::Cookie(name) => http::cookie(bytes, name),
            KeySource::Url(name) => http::url(bytes, name, scratch),
            KeySource::Form(name) => http::form(bytes, name, scratch),
            KeySource::Header(name) => http::header(bytes, name),
            KeySource::Sni => sni::server_name(bytes, scratch),
        };
        match found {
            Found::Value(value) => match self.of_value(value) {
                Some(known) => Look::Known(known),
                None => Look::Unknown,
            },
            Found::More if !end => Look::More,
            Found::More | Found::Nothing => Look::Unknown,
        }
    }

    /// The client that a worker means by `value`: what the client will send, decoded; for `client-ip` an address as text.
    pub fn of_value(&self, value: &[u8]) -> Option<Known> {
        match self {
            KeySource::ClientIp { ipv4_prefix, ipv6_prefix } => {
                let ip = str::from_utf8(value).ok()?.parse().ok()?;
                let key = of_address(ip, *ipv4_prefix, *ipv6_prefix);
                Some(Known { key, route: None })
            }
            KeySource::Sni => {
                let value = value.strip_suffix(b".").unwrap_or(value);
                let mut name = [0; MAX_SERVER_NAME];
                let name = name.get_mut(..value.len())?;
                name.copy_from_slice(value);
                name.make_ascii_lowercase();
                let key = Some(AffinityKey::of(name)).filter(|_| !name.is_empty())?;
                Some(Known { key, route: None })
            }
            KeySource::Cookie(_)
            | KeySource::Url(_)
            | KeySource::Form(_)
            | KeySource::Header(_) => {
                let key = Some(AffinityKey::of(value)).filter(|_| !value.is_empty())?;
                // What mod_jk and mod_proxy_balancer take for the route: everything after the first dot.
                let dot = value.iter().position(|&byte| byte == b'.');
                let route = dot.and_then(|dot| value.get(dot + 1..));
                let route = route.filter(|route| !route.is_empty()).map(AffinityKey::of);
                Some(Known { key, route })
            }
        }
    }
}

/// Looking at a connection once costs about as much as reading this many bytes.
const LOOK_COST: usize = 64;

/// Whether a connection has been looked at as often as it may, once `bytes` are seen; `spent` is what that has cost so
/// far. Somebody who sends a byte at a time makes us read everything again for each of them; in total that is at most
/// four times `max_bytes` and a look.
pub fn is_enough(spent: &mut u32, bytes: usize, max_bytes: u32) -> bool {
    let cost = u32::try_from(bytes + LOOK_COST).unwrap_or(u32::MAX);
    *spent = spent.saturating_add(cost);
    *spent >= max_bytes.saturating_mul(4)
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
