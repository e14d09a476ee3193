//! Every header in every split, headers of others, and any bytes.

use proptest::prelude::*;
use proxy_header::{ProxiedAddress, SslInfo, Tlv};

use super::*;

const MAX: usize = 536;

fn client(text: &str) -> Option<ClientAddr> {
    Some(ClientAddr::Inet(text.parse().expect("an address")))
}

fn v2(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
    let len = u16::try_from(rest.len()).expect("it fits").to_be_bytes();
    [VERSION_2, &[command, family], &len, rest].concat()
}

fn v4_addresses() -> Vec<u8> {
    [&[192, 0, 2, 1, 10, 0, 0, 1][..], &50_000u16.to_be_bytes(), &443u16.to_be_bytes()].concat()
}

fn v6_addresses() -> Vec<u8> {
    let [a, b] = ["2001:db8::1", "2001:db8::2"].map(|ip| {
        let ip: std::net::Ipv6Addr = ip.parse().expect("an address");
        ip.octets()
    });
    [&a[..], &b, &50_000u16.to_be_bytes(), &443u16.to_be_bytes()].concat()
}

fn with_checksum(mut header: Vec<u8>, tlvs: &[u8]) -> Vec<u8> {
    header.extend_from_slice(tlvs);
    header.extend_from_slice(&[CHECKSUM, 0, 4, 0, 0, 0, 0]);
    let len = u16::try_from(header.len() - FIXED).expect("it fits").to_be_bytes();
    header[14..16].copy_from_slice(&len);
    let at = header.len() - 4;
    let sum = checksum(&header[..at], &[]);
    header[at..].copy_from_slice(&sum);
    header
}

/// Valid headers with the client and the TLVs in them.
fn valid() -> Vec<(Vec<u8>, Option<ClientAddr>, Vec<u8>)> {
    let v1 = |line: &str, who| (format!("{line}\r\n").into_bytes(), who, Vec::new());
    let authority = [&[2, 0, 11][..], b"example.org"].concat();
    let endpoint = [&[0xea, 0, 5, 1][..], b"vpce"].concat();
    let tlvs = [&authority[..], &endpoint].concat();
    let full = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff";
    let long = format!("PROXY TCP6 {full} {full} 65535 65535");
    assert_eq!(long.len() + 2, MAX_VERSION_1 - 3);
    let checked = with_checksum(v2(0x21, 0x11, &v4_addresses()), &authority);
    let checked_tlvs = checked[FIXED + 12..].to_vec();
    let unix = vec![b'/'; 216];
    vec![
        v1("PROXY TCP4 192.0.2.1 10.0.0.1 50000 443", client("192.0.2.1:50000")),
        v1(
            "PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535",
            client("255.255.255.255:65535"),
        ),
        v1("PROXY TCP4 0.0.0.0 0.0.0.0 0 0", client("0.0.0.0:0")),
        v1("PROXY TCP6 2001:db8::1 ::1 50000 443", client("[2001:db8::1]:50000")),
        v1("PROXY TCP6 ::ffff:192.0.2.1 ::1 50000 443", client("192.0.2.1:50000")),
        v1(&long, client(&format!("[{full}]:65535"))),
        v1("PROXY UNKNOWN", None),
        v1(&format!("PROXY UNKNOWN {full} {full} 65535 65535"), None),
        v1("PROXY UNKNOWN anything at all", None),
        (v2(0x21, 0x11, &v4_addresses()), client("192.0.2.1:50000"), vec![]),
        (v2(0x21, 0x21, &v6_addresses()), client("[2001:db8::1]:50000"), vec![]),
        (
            v2(0x21, 0x11, &[v4_addresses(), tlvs.clone()].concat()),
            client("192.0.2.1:50000"),
            tlvs.clone(),
        ),
        (v2(0x21, 0x31, &unix), Some(ClientAddr::Unix), vec![]),
        (v2(0x21, 0x31, &[&unix[..], &tlvs].concat()), Some(ClientAddr::Unix), tlvs.clone()),
        // A datagram's client is not the client of this stream.
        (v2(0x21, 0x12, &v4_addresses()), None, vec![]),
        (v2(0x21, 0x32, &unix), None, vec![]),
        (v2(0x21, 0x00, &tlvs), None, tlvs.clone()),
        (v2(0x20, 0x00, &[]), None, vec![]),
        (v2(0x20, 0x00, &tlvs), None, tlvs.clone()),
        (v2(0x20, 0x11, &[v4_addresses(), tlvs.clone()].concat()), None, tlvs.clone()),
        // LOCAL: whatever follows is ignored.
        (v2(0x20, 0x11, &[1, 2, 3]), None, vec![]),
        (v2(0x20, 0xff, &[1, 2, 3]), None, vec![]),
        (v2(0x20, 0x00, &[2, 0, 9]), None, vec![]),
        (checked, client("192.0.2.1:50000"), checked_tlvs),
    ]
}

#[test]
fn a_valid_header_is_read_from_every_split() {
    for (header, client, tlvs) in valid() {
        let whole = Header::Whole { len: header.len(), client, tlvs: &tlvs };
        assert_eq!(read(&header, MAX), whole, "{header:?}");
        for after in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"\r\n", b"PROXY ", b"\0"] {
            assert_eq!(read(&[&header[..], after].concat(), MAX), whole, "{header:?}");
        }
        for cut in 0..header.len() {
            let signature = if header.starts_with(VERSION_1) { VERSION_1 } else { VERSION_2 };
            let expected = if cut < signature.len() { Header::Unknown } else { Header::Begun };
            assert_eq!(read(&header[..cut], MAX), expected, "{cut} of {header:?}");
        }
    }
}

#[test]
fn what_the_specification_forbids_is_malformed() {
    let v1 = [
        "PROXY TCP4 192.0.2.1 10.0.0.1 50000",
        "PROXY TCP4 192.0.2.1 10.0.0.1 50000 443 1",
        "PROXY TCP4 192.0.2.1 10.0.0.1 50000 65536",
        "PROXY TCP4 192.0.2.1 10.0.0.1 +50000 443",
        "PROXY TCP4 192.0.2.1 10.0.0.1 50000 0443",
        "PROXY TCP4 192.0.2.1 10.0.0.1  443",
        "PROXY TCP4 192.0.2.01 10.0.0.1 50000 443",
        "PROXY TCP4 192.0.2 10.0.0.1 50000 443",
        "PROXY TCP4 2001:db8::1 10.0.0.1 50000 443",
        "PROXY TCP6 192.0.2.1 10.0.0.1 50000 443",
        "PROXY TCP6 fe80::1%eth0 ::1 50000 443",
        "PROXY TCP5 192.0.2.1 10.0.0.1 50000 443",
        "PROXY  TCP4 192.0.2.1 10.0.0.1 50000 443",
        "PROXY tcp4 192.0.2.1 10.0.0.1 50000 443",
        "PROXY TCP4 192.0.2.1\t10.0.0.1 50000 443",
        "PROXY TCP4 \0 10.0.0.1 50000 443",
        "PROXY ",
    ];
    for line in v1 {
        let bytes = format!("{line}\r\nmore bytes of the connection");
        assert_eq!(read(bytes.as_bytes(), MAX), Header::Malformed, "{line}");
    }
    let endless = format!("PROXY UNKNOWN {}\r\n", "x".repeat(100));
    assert_eq!(read(endless.as_bytes(), MAX), Header::Malformed);
    assert_eq!(read(&endless.as_bytes()[..MAX_VERSION_1], MAX), Header::Malformed);
    assert_eq!(read(&endless.as_bytes()[..MAX_VERSION_1 - 1], MAX), Header::Begun);

    let (v4, v6) = (v4_addresses(), v6_addresses());
    let mut bad_sum = with_checksum(v2(0x21, 0x11, &v4), &[]);
    *bad_sum.last_mut().expect("not empty") ^= 1;
    let mut changed = with_checksum(v2(0x21, 0x11, &v4), &[]);
    changed[FIXED] ^= 1;
    let v2s = [
        v2(0x11, 0x11, &v4),
        v2(0x22, 0x11, &v4),
        v2(0x2f, 0x11, &v4),
        v2(0x31, 0x11, &v4),
        v2(0x21, 0x11, &v4[..11]),
        v2(0x21, 0x21, &v6[..35]),
        v2(0x21, 0x21, &v4),
        v2(0x21, 0x31, &[0; 215]),
        v2(0x21, 0x41, &v4),
        v2(0x21, 0xff, &v4),
        v2(0x21, 0x13, &v4),
        v2(0x21, 0x10, &v4),
        v2(0x21, 0x01, &[]),
        v2(0x21, 0x11, &[&v4[..], &[2, 0]].concat()),
        v2(0x21, 0x11, &[&v4[..], &[2, 0, 2, b'a']].concat()),
        v2(0x21, 0x11, &[&v4[..], &[CHECKSUM, 0, 3, 0, 0, 0]].concat()),
        bad_sum,
        changed,
    ];
    for header in v2s {
        assert_eq!(read(&header, MAX), Header::Malformed, "{header:?}");
    }
}

#[test]
fn other_protocols_are_told_at_the_first_byte_that_differs() {
    for bytes in
        [&b"GET / HTTP/1.1\r\n"[..], b"\x16\x03\x01", b"PROXYx", b"POST", b"\r\n\r\nG", b"\n"]
    {
        assert_eq!(read(bytes, MAX), Header::Nothing, "{bytes:?}");
    }
    for bytes in [&b""[..], b"P", b"PROXY", b"\r", b"\r\n\r\n\0\r\nQUIT"] {
        assert_eq!(read(bytes, MAX), Header::Unknown, "{bytes:?}");
    }
}

#[test]
fn a_long_header_is_refused_as_soon_as_its_length_is_known() {
    let tlv = |len: usize| [&[0xe0, (len >> 8) as u8, len as u8][..], &vec![7; len]].concat();
    let fits = v2(0x21, 0x11, &[v4_addresses(), tlv(MAX - FIXED - 12 - 3)].concat());
    assert_eq!(fits.len(), MAX);
    assert!(matches!(read(&fits, MAX), Header::Whole { len: MAX, .. }));
    let longer = v2(0x21, 0x11, &[v4_addresses(), tlv(MAX - FIXED - 12 - 2)].concat());
    assert_eq!(read(&longer, MAX), Header::TooLong);
    assert_eq!(read(&longer[..FIXED], MAX), Header::TooLong);
    // Allowed by the configuration: only whole TLVs of the first 512 bytes are passed on.
    let big = v2(0x21, 0x11, &[v4_addresses(), tlv(300), tlv(300), tlv(3)].concat());
    let Header::Whole { len, tlvs, .. } = read(&big, 16_384) else { panic!("{big:?}") };
    assert_eq!((len, tlvs), (big.len(), &tlv(300)[..]));
}

#[test]
fn the_checksum_is_that_of_the_specification() {
    // From RFC 3720, B.4: 32 bytes of zeros.
    let crc = Crc::<u32>::new(&CRC_32_ISCSI);
    assert_eq!(crc.checksum(&[0; 32]), 0x8a91_36aa);
}

proptest! {
    /// No bytes panic, and a result does not change with later bytes.
    #[test]
    fn any_bytes_give_one_result(
        signature in 0..3usize,
        rest in prop::collection::vec(any::<u8>(), 0..700),
        flip in any::<prop::sample::Index>(),
        header in prop::sample::select(valid()),
    ) {
        let mut changed = header.0;
        let at = flip.index(changed.len());
        changed[at] ^= rest.first().copied().unwrap_or(1);
        changed.extend_from_slice(&rest);
        let prefix: &[u8] = [&b""[..], VERSION_1, VERSION_2][signature];
        for bytes in [[prefix, &rest].concat(), changed] {
            let whole = read(&bytes, MAX);
            for cut in 0..=bytes.len() {
                let said = read(&bytes[..cut], MAX);
                prop_assert!(matches!(said, Header::Unknown | Header::Begun) || said == whole);
            }
            if let Header::Whole { len, tlvs, .. } = whole {
                prop_assert!(len <= MAX && tlvs.len() <= MAX_PROXY_TLVS);
            }
        }
    }

    /// What another program writes is read as it was meant.
    #[test]
    fn headers_of_a_writer_are_read(
        source in any::<std::net::SocketAddr>(),
        port in any::<u16>(),
        authority in "[a-z.]{0,40}",
        id in prop::collection::vec(any::<u8>(), 0..100),
        ssl in any::<bool>(),
    ) {
        let source = std::net::SocketAddr::new(source.ip(), source.port());
        let destination = std::net::SocketAddr::new(source.ip(), port);
        let addresses = ProxiedAddress::stream(source, destination);
        let mut bytes = Vec::new();
        prop_assert!(ProxyHeader::with_address(addresses.clone()).encode_v1(&mut bytes).is_ok());
        let named = Some(ClientAddr::from(source));
        prop_assert_eq!(read(&bytes, MAX), Header::Whole { len: bytes.len(), client: named, tlvs: &[] });
        let mut tlvs = vec![Tlv::Authority(authority.into()), Tlv::UniqueId(id.into()), Tlv::Noop(3)];
        if ssl {
            tlvs.push(Tlv::Ssl(SslInfo::new(true, false, false, 0)));
        }
        let mut bytes = Vec::new();
        let header = ProxyHeader::with_tlvs(Some(addresses), tlvs);
        prop_assert!(header.encode_v2(&mut bytes).is_ok());
        let start = FIXED + if source.is_ipv4() { 12 } else { 36 };
        let expected = Header::Whole { len: bytes.len(), client: named, tlvs: &bytes[start..] };
        prop_assert_eq!(read(&bytes, MAX), expected);
    }
}
