//! The server name in a TLS ClientHello.
//!
//! Only the records with the complete message are given to rustls, so each is parsed once and later
//! bytes change nothing.
//!
//! rustls allocates during parsing. This is the only allocation per connection in the event loop,
//! and only in pools with this key. A parser of its own would avoid it at the price of more code
//! that reads untrusted bytes.

use rustls::server::Acceptor;

use super::Found;

/// Longest plaintext record.
const MAX_RECORD: usize = 1 << 14;

/// Longest ClientHello: four times the largest record; real ones are far smaller.
const MAX_HELLO: usize = 4 * MAX_RECORD;

/// The server name that a TLS client requests.
pub(super) fn server_name<'a>(bytes: &'a [u8], scratch: &'a mut Vec<u8>) -> Found<'a> {
    let hello = match hello(bytes) {
        Extent::Whole(hello) => hello,
        Extent::More => return Found::More,
        Extent::NotTls => return Found::Nothing,
    };
    let mut acceptor = Acceptor::default();
    let mut rest = hello;
    while !rest.is_empty() {
        match acceptor.read_tls(&mut rest) {
            Ok(read) if read > 0 => {}
            Ok(_) | Err(_) => return Found::Nothing,
        }
    }
    match acceptor.accept() {
        Ok(Some(accepted)) => match accepted.client_hello().server_name() {
            Some(name) => {
                scratch.clear();
                scratch.extend_from_slice(name.as_bytes());
                Found::Value(scratch)
            }
            None => Found::Nothing,
        },
        Ok(None) | Err(_) => Found::Nothing,
    }
}

enum Extent<'a> {
    Whole(&'a [u8]),
    More,
    NotTls,
}

/// The records of the first handshake message.
fn hello(bytes: &[u8]) -> Extent<'_> {
    // Type and length of the message; they may be split over several records.
    let mut header = [0; 4];
    let (mut at, mut seen) = (0, 0);
    loop {
        let record = bytes.get(at..).unwrap_or_default();
        // 22 is a handshake record; 3 is the major version of all versions since SSL 3.
        if record.iter().zip([22, 3]).any(|(&byte, expected)| byte != expected) {
            return Extent::NotTls;
        }
        let Some(&[_, _, _, high, low]) = record.first_chunk() else { return Extent::More };
        let length = usize::from(u16::from_be_bytes([high, low]));
        if length == 0 || length > MAX_RECORD {
            return Extent::NotTls;
        }
        let body = record.get(5..).unwrap_or_default();
        for (place, &byte) in header.iter_mut().skip(seen).zip(body.iter().take(length)) {
            *place = byte;
        }
        // 1 is a ClientHello.
        if (seen > 0 || !body.is_empty()) && header[0] != 1 {
            return Extent::NotTls;
        }
        if body.len() < length {
            return Extent::More;
        }
        seen += length;
        at += 5 + length;
        let message = u32::from_be_bytes([0, header[1], header[2], header[3]]) as usize;
        if seen >= 4 && message > MAX_HELLO {
            return Extent::NotTls;
        }
        if seen >= 4 && seen >= 4 + message {
            return match bytes.get(..at) {
                Some(hello) => Extent::Whole(hello),
                None => Extent::More,
            };
        }
    }
}
