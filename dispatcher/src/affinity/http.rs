//! Keys in the first request of HTTP/1: cookie, path or query, form field, header field.
//!
//! Of several with the same name the first counts that has a value. HTTP/2, and anything that is no HTTP, has no key.

use std::borrow::Cow;
use std::mem::MaybeUninit;

use httparse::{Header, Request, Status};
use percent_encoding::percent_decode;

use super::Found;

/// Header fields of a request; one with more has no key.
const MAX_HEADERS: usize = 128;

/// The value of a cookie.
pub(super) fn cookie<'a>(bytes: &'a [u8], name: &str) -> Found<'a> {
    with_head(bytes, |headers, _| {
        fields(headers, "cookie")
            .flat_map(|value| value.split(|&byte| byte == b';'))
            .filter_map(|pair| pair_named(pair, name.as_bytes()))
            .map(unquoted)
            .find(|value| !value.is_empty())
            .map_or(Found::Nothing, |value| Found::Value(Cow::Borrowed(value)))
    })
}

/// The value of a header field.
pub(super) fn header<'a>(bytes: &'a [u8], name: &str) -> Found<'a> {
    with_head(bytes, |headers, _| {
        fields(headers, name)
            .map(<[u8]>::trim_ascii)
            .find(|value| !value.is_empty())
            .map_or(Found::Nothing, |value| Found::Value(Cow::Borrowed(value)))
    })
}

/// The value of a path parameter, or else of a query parameter.
pub(super) fn url<'a>(bytes: &'a [u8], name: &str) -> Found<'a> {
    let mut headers = [MaybeUninit::uninit(); MAX_HEADERS];
    let mut request = Request::new(&mut []);
    let parsed = request.parse_with_uninit_headers(bytes, &mut headers);
    // The request line is all we need, so whatever is wrong after it is not ours to judge.
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
        .filter(|(key, _)| percent_decode(key.as_bytes()).eq(name.bytes()))
        .map(|(_, value)| Cow::from(percent_decode(value.as_bytes())))
        .find(|value| !value.is_empty());
    match parameter.or_else(|| urlencoded(query.as_bytes(), name)) {
        Some(value) => Found::Value(value),
        None => Found::Nothing,
    }
}

/// The value of a field in a form's body.
pub(super) fn form<'a>(bytes: &'a [u8], name: &str) -> Found<'a> {
    with_head(bytes, |headers, head| {
        let Some(length) = form_length(headers) else { return Found::Nothing };
        let body = bytes.get(head..).unwrap_or_default();
        if let Some(body) = body.get(..length) {
            return urlencoded(body, name).map_or(Found::Nothing, Found::Value);
        }
        // A pair is whole when the next one begins.
        let whole = body.iter().rposition(|&byte| byte == b'&').unwrap_or(0);
        match body.get(..whole).and_then(|body| urlencoded(body, name)) {
            Some(value) => Found::Value(value),
            None => Found::More,
        }
    })
}

/// The length of a body that is a form and is on its way; `None` if it is none, or comes in a way that is not read here.
fn form_length(headers: &[Header<'_>]) -> Option<usize> {
    let kind = fields(headers, "content-type").next()?;
    let kind = kind.split(|&byte| byte == b';').next()?.trim_ascii();
    if !kind.eq_ignore_ascii_case(b"application/x-www-form-urlencoded")
        || fields(headers, "transfer-encoding").next().is_some()
        // It waits for an answer, which only a worker can give.
        || fields(headers, "expect").next().is_some()
    {
        return None;
    }
    str::from_utf8(fields(headers, "content-length").next()?).ok()?.trim().parse().ok()
}

/// Goes on with the header fields and the length of the head, once it is whole.
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

/// The value of `name=value`, if that is its name.
fn pair_named<'a>(pair: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let at = pair.iter().position(|&byte| byte == b'=')?;
    let (key, value) = pair.split_at_checked(at)?;
    (key.trim_ascii() == name).then(|| value.get(1..).unwrap_or_default().trim_ascii())
}

fn unquoted(value: &[u8]) -> &[u8] {
    value.strip_prefix(b"\"").and_then(|value| value.strip_suffix(b"\"")).unwrap_or(value)
}

fn urlencoded<'a>(pairs: &'a [u8], name: &str) -> Option<Cow<'a, [u8]>> {
    form_urlencoded::parse(pairs)
        .filter(|(key, _)| key == name)
        .map(|(_, value)| match value {
            Cow::Borrowed(text) => Cow::Borrowed(text.as_bytes()),
            Cow::Owned(text) => Cow::Owned(text.into_bytes()),
        })
        .find(|value| !value.is_empty())
}
