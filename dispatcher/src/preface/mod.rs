//! The first bytes of a connection: reads the affinity key out of HTTP requests and TLS ClientHellos.
//!
//! Bytes go in, a key comes out; it knows nothing of sockets, time or workers, and keeps no state. The bytes are untrusted:
//! whatever they are, the answer is a key, "more", or none.

mod http;
mod sni;

#[cfg(test)]
mod tests;

use dispatcher_core::{KeySource, Known};

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

/// What the first bytes say, from the very first on. With `end`, there will be no more of them.
///
/// Whatever was said of fewer bytes, other than [`Look::More`], is said of more bytes too. `scratch` is for what has to be
/// decoded: kept by the caller, so that it is warm.
pub fn read(source: &KeySource, bytes: &[u8], end: bool, scratch: &mut Vec<u8>) -> Look {
    let found = match source {
        KeySource::ClientIp { .. } => Found::Nothing,
        KeySource::Cookie(name) => http::cookie(bytes, name),
        KeySource::Url(name) => http::url(bytes, name, scratch),
        KeySource::Form(name) => http::form(bytes, name, scratch),
        KeySource::Header(name) => http::header(bytes, name),
        KeySource::Sni => sni::server_name(bytes, scratch),
    };
    match found {
        Found::Value(value) => match source.of_value(value) {
            Some(known) => Look::Known(known),
            None => Look::Unknown,
        },
        Found::More if !end => Look::More,
        Found::More | Found::Nothing => Look::Unknown,
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
