//! Keys from first bytes: real requests, broken requests, and arbitrary bytes with arbitrary cuts.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use dispatch_protocol::ClientAddr;
use dispatcher_core::AffinityKey;
use proptest::prelude::*;

use super::*;

fn key(value: &str) -> Parsed {
    let route = value.split_once('.').map(|(_, route)| AffinityKey::of(route.as_bytes()));
    Parsed::Identity(ClientIdentity { key: AffinityKey::of(value.as_bytes()), route })
}

fn cookie(name: &str) -> KeySource {
    KeySource::Cookie(name.to_owned())
}

fn url(name: &str) -> KeySource {
    KeySource::Url(name.to_owned())
}

fn form(name: &str) -> KeySource {
    KeySource::Form(name.to_owned())
}

fn header(name: &str) -> KeySource {
    KeySource::Header(name.to_owned())
}

/// The result for the whole, after a check that no prefix gives another result.
#[track_caller]
fn parse(source: &KeySource, bytes: impl AsRef<[u8]>) -> Parsed {
    let bytes = bytes.as_ref();
    // Leftovers of an earlier client must not matter.
    let mut scratch = b"left from before".to_vec();
    let whole = read(source, bytes, false, &mut scratch);
    for cut in 0..bytes.len() {
        let said = read(source, &bytes[..cut], false, &mut scratch);
        assert!(
            said == Parsed::Incomplete || said == whole,
            "{cut} bytes: {said:?}, all: {whole:?}"
        );
    }
    assert_ne!(read(source, bytes, true, &mut scratch), Parsed::Incomplete);
    whole
}

fn get(target: &str, headers: &str) -> String {
    format!("GET {target} HTTP/1.1\r\nHost: a\r\n{headers}\r\n")
}

fn post(headers: &str, body: &str) -> String {
    let length = body.len();
    format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n{headers}\r\n{body}")
}

const FORM: &str = "Content-Type: application/x-www-form-urlencoded\r\n";

#[test]
fn cookies() {
    let id = cookie("ID");
    let with = |value: &str| get("/", &format!("Cookie: {value}\r\n"));
    for good in
        ["ID=abc", "a=b; ID=abc", "ID=abc;c=d", "x;  ID = abc ;y", "ID=; ID=abc", "ID=\"abc\""]
    {
        assert_eq!(parse(&id, with(good)), key("abc"), "{good}");
    }
    for none in ["", "id=abc", "IDX=abc", "XID=abc", "ID", "ID=", "ID=\"\"", "a=ID=abc"] {
        assert_eq!(parse(&id, with(none)), Parsed::NoIdentity, "{none}");
    }
    // The value is opaque; only its ends are trimmed.
    assert_eq!(parse(&id, with("ID=a=b%20c")), key("a=b%20c"));
    // Header names in any case, several fields, and not the field of a response.
    assert_eq!(parse(&id, get("/", "cOOKIE: a=b\r\nCOOKIE: ID=abc\r\n")), key("abc"));
    assert_eq!(parse(&id, get("/", "Set-Cookie: ID=abc\r\n")), Parsed::NoIdentity);
    // Of two values with the same name the first counts.
    assert_eq!(parse(&id, with("ID=one; ID=two")), key("one"));
}

#[test]
fn parameters_of_path_and_query() {
    let id = url("jsessionid");
    for good in [
        "/x;jsessionid=abc",
        "/x;jsessionid=abc?y=z",
        "/x;v=1;jsessionid=abc/y;z",
        "/a/b;jsessionid=abc;c=d",
        "/x?jsessionid=abc",
        "/x?a=b&jsessionid=abc&c",
        "/x?jsessionid=&jsessionid=abc",
        "/x;%6asessionid=%61bc",
        "/x?%6asessionid=%61bc",
        "http://host/x;jsessionid=abc",
    ] {
        assert_eq!(parse(&id, get(good, "")), key("abc"), "{good}");
    }
    for none in [
        "/",
        "*",
        "/jsessionid=abc",
        "/x;JSESSIONID=abc",
        "/x;jsessionid",
        "/x;jsessionid=",
        "/x?y;jsessionid=abc",
        "/x;xjsessionid=abc",
    ] {
        assert_eq!(parse(&id, get(none, "")), Parsed::NoIdentity, "{none}");
    }
    assert_eq!(parse(&url("q"), get("/?q=a+b", "")), key("a b"));
    assert_eq!(parse(&id, get("/x;jsessionid=one?jsessionid=two", "")), key("one"), "path first");
    // The request line is enough.
    assert_eq!(parse(&id, "GET /x;jsessionid=abc "), key("abc"));
    assert_eq!(parse(&id, "GET /x;jsessionid=abc HTTP/1.1\r\n\0\0"), key("abc"));
}

#[test]
fn fields_of_a_form() {
    let id = form("id");
    for good in ["id=abc", "a=b&id=abc", "id=abc&a=b", "id=&id=abc", "%69d=%61bc"] {
        assert_eq!(parse(&id, post(FORM, good)), key("abc"), "{good}");
    }
    for none in ["", "x=y", "ID=abc", "id", "id=", "xid=abc"] {
        assert_eq!(parse(&id, post(FORM, none)), Parsed::NoIdentity, "{none}");
    }
    let charset = "content-type: Application/X-WWW-form-urlencoded; charset=UTF-8\r\n";
    assert_eq!(parse(&id, post(charset, "id=abc")), key("abc"));
    // A value is complete when the next one begins or the body ends.
    let long = "POST / HTTP/1.1\r\nContent-Length: 100\r\nContent-Type: application/x-www-form-urlencoded\r\n\r\n";
    assert_eq!(parse(&id, format!("{long}id=abc")), Parsed::Incomplete);
    assert_eq!(parse(&id, format!("{long}id=abc&")), key("abc"));
    // Unsupported requests give a result at once, so that no client waits.
    for none in [
        "Content-Type: multipart/form-data; boundary=x\r\n".to_owned(),
        format!("{FORM}Expect: 100-continue\r\n"),
        format!("{FORM}Transfer-Encoding: chunked\r\n"),
        String::new(),
    ] {
        assert_eq!(parse(&id, post(&none, "id=abc")), Parsed::NoIdentity, "{none}");
    }
    assert_eq!(parse(&id, get("/?id=abc", FORM)), Parsed::NoIdentity, "no body");
}

#[test]
fn header_fields() {
    let user = header("X-User");
    assert_eq!(parse(&user, get("/", "x-uSER:  abc \r\n")), key("abc"));
    assert_eq!(parse(&user, get("/", "X-User:\r\nX-User: abc\r\n")), key("abc"));
    assert_eq!(parse(&user, get("/", "X-Users: abc\r\n")), Parsed::NoIdentity);
    let many = "a: b\r\n".repeat(500);
    assert_eq!(parse(&user, get("/", &format!("{many}X-User: abc\r\n"))), Parsed::NoIdentity);
}

#[test]
fn routes() {
    let Parsed::Identity(known) = parse(&cookie("ID"), get("/", "Cookie: ID=abc.w1.x\r\n")) else {
        panic!("a key")
    };
    assert_eq!(known.key, AffinityKey::of(b"abc.w1.x"));
    assert_eq!(known.route, Some(AffinityKey::of(b"w1.x")), "after the first dot");
    assert_eq!(cookie("ID").of_value(b"abc.").unwrap().route, None);
    assert_eq!(KeySource::Sni.of_value(b"a.test").unwrap().route, None, "a name is no id");
}

#[test]
fn other_protocols_have_no_key() {
    let tls = client_hello("a.test");
    let http2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    let garbage = b"\xff\xfe\x00hello".to_vec();
    let telnet = b"hello there\r\nbye\r\n".to_vec();
    for bytes in [tls, http2, garbage, telnet] {
        for source in [cookie("a"), url("a"), form("a"), header("a")] {
            assert_eq!(parse(&source, &bytes), Parsed::NoIdentity, "{source}");
        }
    }
    for bytes in [get("/", ""), "SSH-2.0-x\r\n".to_owned(), "\u{16}\u{4}".to_owned()] {
        assert_eq!(parse(&KeySource::Sni, bytes), Parsed::NoIdentity);
    }
    for source in [cookie("a"), url("a"), form("a"), header("a"), KeySource::Sni] {
        assert_eq!(read(&source, b"", false, &mut Vec::new()), Parsed::Incomplete);
        assert_eq!(read(&source, b"", true, &mut Vec::new()), Parsed::NoIdentity);
        assert!(source.is_peeked());
    }
}

/// The first bytes of a TLS client.
fn client_hello(name: &str) -> Vec<u8> {
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    let name = rustls::pki_types::ServerName::try_from(name.to_owned()).unwrap();
    let mut client = rustls::ClientConnection::new(config.into(), name).unwrap();
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).unwrap();
    bytes
}

/// The same message in records of `size` bytes.
fn fragmented(hello: &[u8], size: usize) -> Vec<u8> {
    let fragments = hello[5..].chunks(size);
    fragments.flat_map(|part| [&[22, 3, 1, 0, part.len() as u8][..], part].concat()).collect()
}

#[test]
fn server_names() {
    let hello = client_hello("A.Test");
    let expected = Parsed::Identity(KeySource::Sni.of_value(b"a.test").unwrap());
    assert_eq!(parse(&KeySource::Sni, &hello), expected);
    // With early data after it, and in any number of records.
    assert_eq!(parse(&KeySource::Sni, [&hello[..], b"\x17\x03\x03\0\x01x"].concat()), expected);
    assert_eq!(parse(&KeySource::Sni, [&hello[..], b"garbage"].concat()), expected);
    for size in [1, 2, 3, 5, 100] {
        assert_eq!(parse(&KeySource::Sni, fragmented(&hello, size)), expected, "{size}");
    }
    // A client that connects by address sends no name.
    assert_eq!(parse(&KeySource::Sni, client_hello("127.0.0.1")), Parsed::NoIdentity);
    // Upper and lower case and a trailing dot do not matter.
    assert_eq!(KeySource::Sni.of_value(b"A.TEST."), KeySource::Sni.of_value(b"a.test"));
    assert_eq!(KeySource::Sni.of_value(b"."), None);
    assert!(KeySource::Sni.of_value(&[b'a'; 255]).is_some());
    assert_eq!(KeySource::Sni.of_value(&[b'a'; 256]), None, "no server is called that");
}

#[test]
fn addresses() {
    let source = |ipv4_prefix, ipv6_prefix| KeySource::ClientIp { ipv4_prefix, ipv6_prefix };
    let of = |source: &KeySource, ip: &str| {
        let ip: IpAddr = ip.parse().unwrap();
        source.of_peer(&ClientAddr::Inet(SocketAddr::new(ip, 5))).unwrap().key
    };
    let whole = source(32, 128);
    assert_eq!(of(&whole, "192.0.2.1"), of(&whole, "::ffff:192.0.2.1"));
    assert_eq!(of(&whole, "192.0.2.1"), AffinityKey::of(&Ipv4Addr::new(192, 0, 2, 1).octets()));
    assert_ne!(of(&whole, "192.0.2.1"), of(&whole, "192.0.2.2"));
    assert_ne!(of(&whole, "2001:db8::1"), of(&whole, "2001:db8::2"));
    let net = source(24, 64);
    assert_eq!(of(&net, "192.0.2.1"), of(&net, "192.0.2.254"));
    assert_ne!(of(&net, "192.0.2.1"), of(&net, "192.0.3.1"));
    assert_eq!(of(&net, "2001:db8::1"), of(&net, "2001:db8::ffff:0:0:9"));
    assert_ne!(of(&net, "2001:db8::1"), of(&net, "2001:db8:0:1::1"));
    assert_eq!(of(&source(1, 1), "1.2.3.4"), of(&source(1, 1), "100.2.3.4"));
    assert_eq!(whole.of_peer(&ClientAddr::Unix), None);
    assert_eq!(whole.of_value(b"192.0.2.1").unwrap().key, of(&whole, "192.0.2.1"));
    assert_eq!(whole.of_value(b"somebody"), None);
    assert_eq!(read(&whole, b"x", false, &mut Vec::new()), Parsed::NoIdentity);
    assert!(!whole.is_peeked());
    assert_eq!(cookie("a").of_peer(&ClientAddr::Unix), None);
}

#[test]
fn the_search_for_a_key_is_bounded() {
    let (mut spent, mut looks) = (0, 0);
    while !is_enough(&mut spent, looks, 16_384) {
        looks += 1;
    }
    assert!((100..1_000).contains(&looks), "a byte at a time: {looks} looks");
    assert!(spent < 5 * 16_384);
}

/// Bytes that pass the first checks.
fn likely() -> impl Strategy<Value = Vec<u8>> {
    let seeds = vec![
        get("/x;id=abc.w1?id=%61&b", "Cookie: a=b; id=\"abc\"\r\nX-Id: c\r\n").into_bytes(),
        post(FORM, "a=b&id=%61bc&c").into_bytes(),
        client_hello("a.test"),
        fragmented(&client_hello("a.test"), 60),
    ];
    let edits = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4);
    let tail = prop::collection::vec(any::<u8>(), 0..16);
    (prop::sample::select(seeds), edits, tail).prop_map(|(mut bytes, edits, tail)| {
        for (index, value) in edits {
            let index = index.index(bytes.len());
            bytes[index] = value;
        }
        bytes.extend(tail);
        bytes
    })
}

proptest! {
    /// Compared with the reference crate, which allocates for every pair.
    #[test]
    fn pairs_are_read_as_elsewhere(pairs in "(id|i%64|x|%69+d|%C3%A4)?(=|==|&|%|%4|%zz|%41|[a+&=])*") {
        let found = form_urlencoded::parse(pairs.as_bytes())
            .find(|(key, value)| key == "id" && !value.is_empty());
        // The other decoder replaces what is no UTF-8; a key is made of any bytes.
        prop_assume!(!found.as_ref().is_some_and(|(_, value)| value.contains('\u{fffd}')));
        let expected = found.map_or(Parsed::NoIdentity, |(_, value)| key(&value));
        prop_assert_eq!(parse(&url("id"), get(&format!("/?{pairs}"), "")), expected);
        prop_assert_eq!(parse(&form("id"), post(FORM, &pairs)), expected);
    }

    #[test]
    fn any_bytes_cut_anywhere_give_the_same_answer(
        bytes in prop_oneof![4 => likely(), 1 => prop::collection::vec(any::<u8>(), 0..300)]
    ) {
        let ip = KeySource::ClientIp { ipv4_prefix: 32, ipv6_prefix: 128 };
        for source in [cookie("id"), url("id"), form("id"), header("x-id"), KeySource::Sni, ip] {
            parse(&source, &bytes);
            source.of_value(&bytes);
        }
    }
}
