//! Affinity keys in the first request of HTTP/1: cookie, path or query parameter, form field,
//! header field.
//!
//! Among several values with the same name the first non-empty one counts. HTTP/2 and other
//! protocols have no key. Only the matching value is decoded, into a buffer of the caller, so no
//! client causes an allocation.

use std::mem::MaybeUninit;

use httparse::{Header, Request, Status};
use percent_encoding::percent_decode;

use super::Found;

/// Most header fields of a request; a request with more has no key.
const MAX_HEADERS: usize = 128;

/// The value of a cookie.
pub(super) fn cookie<'a>(bytes: &'a [u8], name: &str) -> Found<'a> {
    with_head(bytes, |headers, _| {
        fields(headers, "cookie")
            .flat_map(|value| value.split(|&byte| byte == b';'))
            .filter_map(|pair| pair_named(pair, name.as_bytes()))
            .map(unquoted)
            .find(|value| !value.is_empty())
            .map_or(Found::Nothing, Found::Value)
    })
}

/// The value of a header field.
pub(super) fn header<'a>(bytes: &'a [u8], name: &str) -> Found<'a> {
    with_head(bytes, |headers, _| {
        fields(headers, name)
            .map(<[u8]>::trim_ascii)
            .find(|value| !value.is_empty())
            .map_or(Found::Nothing, Found::Value)
    })
}

/// The value of a path parameter, otherwise of a query parameter.
pub(super) fn url<'a>(bytes: &'a [u8], name: &str, scratch: &'a mut Vec<u8>) -> Found<'a> {
    let mut headers = [MaybeUninit::uninit(); MAX_HEADERS];
    let mut request = Request::new(&mut []);
    let parsed = request.parse_with_uninit_headers(bytes, &mut headers);
    // Only the request line is needed, so mistakes after it do not matter.
    let Some(target) = request.path else {
        return match parsed {
            Ok(Status::Partial) => Found::More,
            Ok(Status::Complete(_)) | Err(_) => Found::Nothing,
        };
    };
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let parameter = path
        .split('/')
        .flat_map(|segment| segment.split(';').skip(1))
        .filter_map(|parameter| parameter.split_once('='))
        .find(|(key, value)| !value.is_empty() && Escapes::Percent.say(key.as_bytes(), name));
    if let Some((_, value)) = parameter {
        return Found::Value(Escapes::Percent.decoded(value.as_bytes(), scratch));
    }
    match urlencoded(query.as_bytes(), name) {
        Some(value) => Found::Value(Escapes::Form.decoded(value, scratch)),
        None => Found::Nothing,
    }
}

/// The value of a field in the body of a form.
pub(super) fn form<'a>(bytes: &'a [u8], name: &str, scratch: &'a mut Vec<u8>) -> Found<'a> {
    with_head(bytes, |headers, head| {
        let Some(length) = form_length(headers) else { return Found::Nothing };
        let body = bytes.get(head..).unwrap_or_default();
        let (whole, otherwise) = match body.get(..length) {
            Some(body) => (body, Found::Nothing),
            // A pair is complete when the next one begins.
            None => {
                let end = body.iter().rposition(|&byte| byte == b'&').unwrap_or(0);
                (body.get(..end).unwrap_or_default(), Found::More)
            }
        };
        match urlencoded(whole, name) {
            Some(value) => Found::Value(Escapes::Form.decoded(value, scratch)),
            None => otherwise,
        }
    })
}

/// The length of the body of a form; `None` if the body is not a form or has an encoding that is
/// not supported.
fn form_length(headers: &[Header<'_>]) -> Option<usize> {
    let kind = fields(headers, "content-type").next()?;
    let kind = kind.split(|&byte| byte == b';').next()?.trim_ascii();
    if !kind.eq_ignore_ascii_case(b"application/x-www-form-urlencoded")
        || fields(headers, "transfer-encoding").next().is_some()
        // The client waits for an answer that only a worker can give.
        || fields(headers, "expect").next().is_some()
    {
        return None;
    }
    str::from_utf8(fields(headers, "content-length").next()?).ok()?.trim().parse().ok()
}

/// Calls `then` with the header fields and the length of the head, when the head is complete.
fn with_head<'a>(
    bytes: &'a [u8],
    then: impl FnOnce(&[Header<'a>], usize) -> Found<'a>,
) -> Found<'a> {
    let mut headers = [MaybeUninit::uninit(); MAX_HEADERS];
    let mut request = Request::new(&mut []);
    match request.parse_with_uninit_headers(bytes, &mut headers) {
        Ok(Status::Complete(head)) => then(request.headers, head),
        Ok(Status::Partial) => Found::More,
        Err(_) => Found::Nothing,
    }
}

fn fields<'a>(headers: &[Header<'a>], name: &str) -> impl Iterator<Item = &'a [u8]> {
    headers.iter().filter(move |h| h.name.eq_ignore_ascii_case(name)).map(|h| h.value)
}

/// The value in `name=value`, if the name matches.
fn pair_named<'a>(pair: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let at = pair.iter().position(|&byte| byte == b'=')?;
    let (key, value) = pair.split_at_checked(at)?;
    (key.trim_ascii() == name).then(|| value.get(1..).unwrap_or_default().trim_ascii())
}

fn unquoted(value: &[u8]) -> &[u8] {
    value.strip_prefix(b"\"").and_then(|value| value.strip_suffix(b"\"")).unwrap_or(value)
}

/// The first non-empty value of this name, still encoded.
fn urlencoded<'a>(pairs: &'a [u8], name: &str) -> Option<&'a [u8]> {
    pairs.split(|&byte| byte == b'&').find_map(|pair| {
        let at = pair.iter().position(|&byte| byte == b'=')?;
        let (key, value) = pair.split_at_checked(at)?;
        let value = value.get(1..).filter(|value| !value.is_empty())?;
        Escapes::Form.say(key, name).then_some(value)
    })
}

/// The encoding of special bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Escapes {
    /// `%20`: in a path.
    Percent,
    /// `%20` and `+` for a space: in queries and forms.
    Form,
}

impl Escapes {
    fn decode(self, bytes: &[u8]) -> impl Iterator<Item = u8> {
        let parts = bytes.split(move |&byte| self == Escapes::Form && byte == b'+');
        parts.enumerate().flat_map(|(n, part)| {
            let space = (n > 0).then_some(b' ');
            space.into_iter().chain(percent_decode(part))
        })
    }

    fn say(self, bytes: &[u8], what: &str) -> bool {
        self.decode(bytes).eq(what.bytes())
    }

    fn decoded<'a>(self, bytes: &'a [u8], scratch: &'a mut Vec<u8>) -> &'a [u8] {
        let plain = |&byte: &u8| byte != b'%' && (self == Escapes::Percent || byte != b'+');
        if bytes.iter().all(plain) {
            return bytes;
        }
        scratch.clear();
        // Decoding never lengthens a value, so the buffer is bounded by the most bytes that are
        // read.
        scratch.reserve(bytes.len());
        scratch.extend(self.decode(bytes));
        scratch
    }
}
