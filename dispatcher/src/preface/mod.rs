//! The preface, the first bytes of a connection: finds headers of the PROXY protocol, and after
//! them the affinity key in HTTP requests and TLS ClientHellos.
//!
//! It is a pure function of untrusted bytes: for any input the result is a key or a header, "more
//! bytes needed", or none. It has no state and does no I/O.

mod http;
pub mod proxy;
mod sni;

#[cfg(test)]
mod tests;

use dispatcher_core::{ClientIdentity, KeySource};

/// The result for the bytes so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// The key of the client.
    Identity(ClientIdentity),
    /// More bytes are needed.
    Incomplete,
    /// There is no key, and further bytes cannot change that.
    NoIdentity,
}

/// The result of a parser.
#[derive(Debug)]
enum Found<'a> {
    Value(&'a [u8]),
    More,
    Nothing,
}

/// Searches the key in the bytes of a connection from its beginning. With `end`, no more bytes will
/// come.
///
/// A result other than [`Parsed::Incomplete`] stays the same when more bytes are added. `scratch`
/// is a buffer for decoded values; the caller reuses it.
pub fn read(source: &KeySource, bytes: &[u8], end: bool, scratch: &mut Vec<u8>) -> Parsed {
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
            Some(known) => Parsed::Identity(known),
            None => Parsed::NoIdentity,
        },
        Found::More if !end => Parsed::Incomplete,
        Found::More | Found::Nothing => Parsed::NoIdentity,
    }
}

/// Fixed cost of one search, in bytes.
const PARSE_COST: usize = 64;

/// Whether the search budget of a connection is used up, after `bytes` have been searched; `spent`
/// is the cost so far. Each search starts at the beginning, so a client that sends single bytes
/// causes many. The total is bounded by four times `max_bytes` and one search.
pub fn is_enough(spent: &mut u32, bytes: usize, max_bytes: u32) -> bool {
    let cost = u32::try_from(bytes + PARSE_COST).unwrap_or(u32::MAX);
    *spent = spent.saturating_add(cost);
    *spent >= max_bytes.saturating_mul(4)
}
