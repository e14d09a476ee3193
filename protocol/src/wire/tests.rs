//! The bytes of every record, in both directions. `docs/PROTOCOL.md` prints the same vectors.

use std::net::SocketAddrV6;

use proptest::prelude::*;

use self::vectors::*;
use super::*;
use crate::scoreboard::gauge::GAUGES;

mod vectors;

pub(super) fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<u32> = hex.chars().filter_map(|c| c.to_digit(16)).collect();
    let pairs = digits.chunks_exact(2);
    pairs.map(|pair| (pair[0] * 16 + pair[1]) as u8).collect()
}

fn encoded(record: &Control) -> Vec<u8> {
    let mut out = Vec::new();
    record.encode(&mut out);
    out
}

fn channel_encoded(record: &Channel) -> Vec<u8> {
    let mut out = Vec::new();
    record.encode(&mut out);
    out
}

#[test]
fn a_proxy_header_belongs_to_one_connection_of_the_record() {
    let Handoff { entries, proxy_headers } = proxied();
    let header = &proxy_headers[0].1;
    let with = |of: &[u16], header: &ProxyHeader| {
        let mut record = Vec::new();
        Handoff::encode_entries(&entries, &mut record);
        of.iter().for_each(|&entry| header.encode(entry, &mut record));
        Channel::decode(&record)
    };
    assert_eq!(with(&[0], header), Ok(Channel::Handoff(proxied())));
    assert!(matches!(with(&[1], header), Err(WireError::Invalid(_))));
    assert!(matches!(with(&[0, 0], header), Err(WireError::Repeated(_))));
    // A longer one is cut by the sender, and refused by the receiver.
    let long = ProxyHeader { tlvs: vec![7; MAX_PROXY_TLVS + 1], local: true, ..header.clone() };
    let Ok(Channel::Handoff(cut)) = with(&[0], &long) else { panic!("it is cut") };
    assert_eq!(cut.proxy_headers[0].1.tlvs.len(), MAX_PROXY_TLVS);
    assert!(cut.proxy_headers[0].1.local);
    let mut record = Vec::new();
    Handoff::encode_entries(&entries, &mut record);
    codec::put_tlv(&mut record, tlv::PROXY_HEADER, &[&[0, 0, 0, 0, 1][..], &[0; 536]].concat());
    assert!(matches!(Channel::decode(&record), Err(WireError::Invalid(_))));
}

#[test]
fn a_record_has_room_for_full_headers() {
    let header =
        ProxyHeader { tlvs: vec![7; MAX_PROXY_TLVS], ..proxied().proxy_headers[0].1.clone() };
    let count = MAX_PROXY_HEADERS / header.encoded_len();
    let record = Handoff {
        entries: vec![numbered().entries[0]; MAX_FDS_PER_RECORD],
        proxy_headers: (0..count as u16).map(|entry| (entry, header.clone())).collect(),
    };
    let bytes = channel_encoded(&Channel::Handoff(record.clone()));
    assert!(count >= 6 && bytes.len() <= MAX_CHANNEL_RECORD, "{count}, {}", bytes.len());
    assert_eq!(Channel::decode(&bytes), Ok(Channel::Handoff(record)));
}

#[test]
fn there_is_a_number_for_each_connection_or_none() {
    for value in [&[][..], &[0; 7], &[0; 16]] {
        let mut record = bytes(NUMBERED)[..8 + ENTRY_LEN].to_vec();
        codec::put_tlv(&mut record, tlv::NUMBERS, value);
        assert_eq!(Channel::decode(&record), Err(WireError::Invalid("numbers")));
    }
    let mut twice = bytes(NUMBERED);
    codec::put_tlv(&mut twice, tlv::NUMBERS, &[0; 8]);
    assert!(matches!(Channel::decode(&twice), Err(WireError::Repeated(_))));
    let full =
        Handoff { entries: vec![numbered().entries[0]; MAX_FDS_PER_RECORD], ..Handoff::default() };
    let record = channel_encoded(&Channel::Handoff(full.clone()));
    assert_eq!(Channel::decode(&record), Ok(Channel::Handoff(full)));
}

#[test]
fn an_update_has_possible_numbers() {
    for (at, len) in [(4, 2), (8, 4)] {
        let mut record = bytes(UPDATE);
        record[at..at + len].fill(0);
        assert!(matches!(Control::decode(&record), Err(WireError::Invalid(_))));
    }
    let mut record = bytes(DRAIN);
    codec::put_tlv(&mut record, tlv::TIME_LEFT, &[0; 7]);
    assert_eq!(Channel::decode(&record), Err(WireError::Invalid("time left")));
}

#[test]
fn control_records_have_these_bytes() {
    for (hex, record) in control_vectors() {
        assert_eq!(encoded(&record), bytes(hex), "{record:?}");
        assert_eq!(Control::decode(&bytes(hex)), Ok(record));
    }
}

#[test]
fn channel_records_have_these_bytes() {
    for (hex, record) in channel_vectors() {
        assert_eq!(channel_encoded(&record), bytes(hex), "{record:?}");
        assert_eq!(Channel::decode(&bytes(hex)), Ok(record));
    }
}

#[test]
fn the_document_prints_these_vectors() {
    let document = include_str!("../../../docs/PROTOCOL.md");
    let document: String = document.split_whitespace().collect();
    let control = control_vectors().into_iter().map(|(hex, _)| hex);
    for hex in control.chain(channel_vectors().into_iter().map(|(hex, _)| hex)) {
        assert!(document.contains(hex), "docs/PROTOCOL.md lacks {hex}");
    }
}

#[test]
fn descriptors_belong_to_these_records_only() {
    for (_, record) in control_vectors() {
        let expected = if matches!(record, Control::Welcome(_)) { WELCOME_FDS } else { 0 };
        assert_eq!(record.fds(), expected);
    }
    assert_eq!(Channel::Handoff(handoff()).fds(), 3);
    assert_eq!(Channel::Probe(Probe { seq: 1, slot: 1 }).fds(), 0);
    assert_eq!(Channel::Drain(Drain::default()).fds() + Channel::Resume(Resume).fds(), 0);
}

#[test]
fn tlvs_of_a_later_version_are_skipped() {
    let future = [0x34, 0x12, 3, 0, b'a', b'b', b'c', 0xff, 0xff, 0, 0];
    for (hex, record) in control_vectors() {
        let longer = [&bytes(hex)[..], &future].concat();
        assert_eq!(Control::decode(&longer), Ok(record));
    }
    for (hex, record) in channel_vectors() {
        let longer = [&bytes(hex)[..], &future].concat();
        assert_eq!(Channel::decode(&longer), Ok(record));
    }
}

/// A cut record never decodes, except if the cut removes exactly the optional TLVs.
#[test]
fn a_record_cut_anywhere_is_refused() {
    for (hex, record) in control_vectors() {
        let whole = bytes(hex);
        for len in 0..whole.len() {
            match (Control::decode(&whole[..len]), &record) {
                (Err(_), _) => {}
                (Ok(Control::Welcome(cut)), Control::Welcome(whole)) => {
                    assert!(whole.listeners.starts_with(&cut.listeners));
                    assert!(whole.gauges.starts_with(&cut.gauges));
                    assert!(cut.listeners.len() < whole.listeners.len());
                }
                (Ok(Control::Hello(cut)), Control::Hello(_)) => assert_eq!(cut.token, None),
                (Ok(Control::Refused(cut)), Control::Refused(_)) => assert_eq!(cut.key, None),
                (Ok(other), _) => panic!("{len} bytes decoded as {other:?}"),
            }
        }
    }
    for (hex, record) in channel_vectors() {
        let whole = bytes(hex);
        for len in 0..whole.len() {
            match (Channel::decode(&whole[..len]), &record) {
                (Err(error), _) => {
                    assert!(matches!(error, WireError::TooShort(_)), "{len}: {error}")
                }
                (Ok(Channel::Drain(cut)), Channel::Drain(_)) => assert_eq!(cut.left, None),
                (Ok(Channel::Handoff(cut)), Channel::Handoff(_)) => {
                    assert!(cut.entries.iter().all(|entry| entry.number == 0));
                }
                (Ok(other), _) => panic!("{len} bytes decoded as {other:?}"),
            }
        }
    }
}

#[test]
fn half_a_tlv_at_the_end_is_refused() {
    for tail in [&[1][..], &[1, 0], &[1, 0, 4], &[1, 0, 4, 0, 1, 2, 3]] {
        for (hex, _) in control_vectors() {
            let error = Control::decode(&[&bytes(hex)[..], tail].concat()).unwrap_err();
            assert!(matches!(error, WireError::TooShort(_)), "{error}");
        }
        for (hex, _) in channel_vectors() {
            let error = Channel::decode(&[&bytes(hex)[..], tail].concat()).unwrap_err();
            assert!(matches!(error, WireError::TooShort(_)), "{error}");
        }
    }
}

#[test]
fn reserved_fields_must_be_zero() {
    let all = [
        (HELLO, &[2, 10, 24][..]),
        (WELCOME, &[2, 6]),
        (REFUSED, &[2, 6]),
        (GOODBYE, &[2]),
        (CLAIM, &[2]),
    ];
    for (hex, offsets) in all {
        for &offset in offsets {
            let mut record = bytes(hex);
            record[offset] = 1;
            let error = Control::decode(&record).unwrap_err();
            assert!(matches!(error, WireError::Reserved(_)), "{offset}: {error}");
        }
    }
    for (hex, offsets) in [(HANDOFF, &[2, 6][..]), (PROBE, &[2, 16]), (DRAIN, &[2]), (RESUME, &[2])]
    {
        for &offset in offsets {
            let mut record = bytes(hex);
            record[offset] = 1;
            let error = Channel::decode(&record).unwrap_err();
            assert!(matches!(error, WireError::Reserved(_)), "{offset}: {error}");
        }
    }
}

#[test]
fn each_socket_has_its_kinds() {
    for (hex, _) in channel_vectors() {
        let error = Control::decode(&bytes(hex)).unwrap_err();
        assert!(matches!(error, WireError::UnknownKind(_)));
    }
    for (hex, _) in control_vectors() {
        let error = Channel::decode(&bytes(hex)).unwrap_err();
        assert!(matches!(error, WireError::UnknownKind(_)));
    }
    assert_eq!(Control::decode(&[0xff, 0xff, 0, 0]), Err(WireError::UnknownKind(0xffff)));
}

#[test]
fn too_long_a_record_is_refused() {
    let control = [&bytes(GOODBYE)[..], &[0; MAX_CONTROL_RECORD]].concat();
    let too_long = WireError::TooLong { len: control.len(), max: MAX_CONTROL_RECORD };
    assert_eq!(Control::decode(&control), Err(too_long));
    let channel = [&bytes(PROBE)[..], &[0; MAX_CHANNEL_RECORD]].concat();
    assert!(matches!(Channel::decode(&channel), Err(WireError::TooLong { .. })));
}

#[test]
fn a_handoff_has_1_to_64_entries() {
    for count in [0, 65, u16::MAX] {
        let mut record = bytes(HANDOFF);
        record[4..6].copy_from_slice(&count.to_le_bytes());
        assert_eq!(Channel::decode(&record), Err(WireError::Invalid("count")));
    }
    // The count is larger, or smaller, than the number of entries: the rest must be TLVs.
    for count in [4u16, 2] {
        let mut record = bytes(HANDOFF);
        record[4..6].copy_from_slice(&count.to_le_bytes());
        assert!(Channel::decode(&record).is_err(), "{count}");
    }
    let full =
        Handoff { entries: vec![handoff().entries[0]; MAX_FDS_PER_RECORD], ..Handoff::default() };
    let record = channel_encoded(&Channel::Handoff(full.clone()));
    assert!(record.len() <= MAX_CHANNEL_RECORD - 4096);
    assert_eq!(Channel::decode(&record), Ok(Channel::Handoff(full)));
}

#[test]
fn an_unknown_address_family_is_refused() {
    for family in [0, 2, 5, 10, u16::MAX] {
        let mut record = bytes(HANDOFF);
        record[8 + 24..8 + 26].copy_from_slice(&family.to_le_bytes());
        assert_eq!(Channel::decode(&record), Err(WireError::Invalid("address family")));
    }
}

#[test]
fn a_hello_with_impossible_numbers_is_refused() {
    let bad = [
        Hello { weight: 0, ..hello() },
        Hello { max_connections: 0, ..hello() },
        Hello { finished: 8, ..hello() },
        Hello { advertise: Some(String::new()), ..hello() },
        Hello { advertise: Some("a b:80".to_owned()), ..hello() },
        Hello { advertise: Some("x".repeat(260)), ..hello() },
    ];
    for hello in bad {
        let error = Control::decode(&encoded(&Control::Hello(hello))).unwrap_err();
        assert!(matches!(error, WireError::Invalid(_)), "{error}");
    }
    let mut welcome = bytes(WELCOME);
    welcome[8..12].fill(0);
    assert_eq!(Control::decode(&welcome), Err(WireError::Invalid("slots")));
}

#[test]
fn bad_names_are_refused() {
    let long = "x".repeat(MAX_NAME + 1);
    for bad in ["", "two words", "line\nbreak", "tab\t", "\u{7f}", &long] {
        for hello in
            [Hello { pool: bad.to_owned(), ..hello() }, Hello { name: bad.to_owned(), ..hello() }]
        {
            let error = Control::decode(&encoded(&Control::Hello(hello))).unwrap_err();
            assert!(matches!(error, WireError::Invalid(_)), "{bad:?}: {error}");
        }
    }
    let name = "é".repeat(MAX_NAME / 2);
    let record = Control::Hello(Hello { name, ..hello() });
    assert_eq!(Control::decode(&encoded(&record)), Ok(record));
    // Not UTF-8: the last byte of the name.
    let mut record = bytes(HELLO);
    *record.last_mut().unwrap() = 0xff;
    assert_eq!(Control::decode(&record), Err(WireError::Invalid("worker name")));
    // The name of a listener, and one that is too short for its index.
    for value in [&[0, 0][..], &[0, 0, b' '], &[0]] {
        let mut record = bytes(WELCOME);
        codec::put_tlv(&mut record, tlv::LISTENER, value);
        assert!(Control::decode(&record).is_err(), "{value:?}");
    }
}

#[test]
fn a_tlv_that_may_appear_once_may_not_twice() {
    for (hex, kind, value) in [
        (HELLO, tlv::POOL, &b"web"[..]),
        (HELLO, tlv::NAME, b"w"),
        (HELLO_TOKEN, tlv::TOKEN, &[0; 16]),
        (REFUSED, tlv::REASON, b"x"),
        (REFUSED, tlv::KEY, b"x"),
        (CLAIM, tlv::CLIENT_KEY, b"x"),
    ] {
        let mut record = bytes(hex);
        codec::put_tlv(&mut record, kind, value);
        let error = Control::decode(&record).unwrap_err();
        assert!(matches!(error, WireError::Repeated(_)), "{kind}: {error}");
    }
}

#[test]
fn a_tlv_that_is_needed_must_be_there() {
    let fixed = &bytes(HELLO)[..44];
    assert_eq!(Control::decode(fixed), Err(WireError::Missing("pool name")));
    let mut record = fixed.to_vec();
    codec::put_tlv(&mut record, tlv::POOL, b"web");
    assert_eq!(Control::decode(&record), Err(WireError::Missing("worker name")));
    assert_eq!(Control::decode(&bytes(REFUSED)[..8]), Err(WireError::Missing("reason")));
    assert_eq!(Control::decode(&bytes(CLAIM)[..4]), Err(WireError::Missing("client key")));
}

#[test]
fn a_token_is_16_bytes_and_32_digits() {
    let mut record = bytes(HELLO);
    codec::put_tlv(&mut record, tlv::TOKEN, &[0; 15]);
    assert_eq!(Control::decode(&record), Err(WireError::Invalid("token")));
    let token = Token(std::array::from_fn(|i| i as u8 * 16 + 1));
    assert_eq!(token.to_string().parse(), Ok(token));
    assert!(!format!("{token:?}").contains("01"), "the token is a secret");
    for bad in ["", "0", &"g".repeat(32), &"é".repeat(16), &"+1".repeat(16)] {
        assert!(bad.parse::<Token>().is_err(), "{bad:?}");
    }
}

#[test]
fn a_claimed_key_is_1_to_4000_bytes_of_any_kind() {
    let longest = Claim::new(&[0xff; MAX_KEY]).unwrap();
    let record = encoded(&Control::Claim(longest.clone()));
    assert!(record.len() <= MAX_CONTROL_RECORD);
    assert_eq!(Control::decode(&record), Ok(Control::Claim(longest)));
    assert_eq!(Claim::new(&[0; MAX_KEY + 1]), None);
    for value in [&[][..], &[0; MAX_KEY + 1]] {
        let mut record = bytes(CLAIM)[..4].to_vec();
        codec::put_tlv(&mut record, tlv::CLIENT_KEY, value);
        assert_eq!(Control::decode(&record), Err(WireError::Invalid("client key")));
    }
}

#[test]
fn texts_are_cut_and_cannot_forge_log_lines() {
    let refused = Refused {
        code: RefusedCode::Other(900),
        reason: format!("a\nb{}", "é".repeat(1000)),
        key: None,
    };
    match Control::decode(&encoded(&Control::Refused(refused))) {
        Ok(Control::Refused(refused)) => {
            assert_eq!(refused.code, RefusedCode::Other(900));
            assert!(refused.reason.starts_with("a bé") && refused.reason.len() <= 1024);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_long_welcome_keeps_gauges_and_drops_listeners() {
    let listeners =
        (0..200).map(|index| WelcomeListener { index, name: format!("listener-{index:040}") });
    let Ok(Control::Welcome(mut welcome)) = Control::decode(&bytes(WELCOME)) else {
        panic!("a vector");
    };
    welcome.listeners = listeners.collect();
    welcome.gauges = (0..GAUGES).map(|n| format!("{n:048}").parse().unwrap()).collect();
    let record = encoded(&Control::Welcome(welcome.clone()));
    assert!(record.len() <= MAX_CONTROL_RECORD);
    match Control::decode(&record) {
        Ok(Control::Welcome(cut)) => {
            assert!(!cut.listeners.is_empty() && welcome.listeners.starts_with(&cut.listeners));
            assert_eq!(welcome.gauges, cut.gauges);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn gauges_of_a_later_dispatcher_are_kept() {
    // More gauges than this version makes: as many as a record holds beside a ticket of the relay.
    let mut record = bytes(WELCOME);
    while record.len() + 5 + 4 + crate::relay::ticket::MAX_TICKET <= MAX_CONTROL_RECORD {
        record.extend_from_slice(&[19, 0, 1, 0, b'a']);
    }
    let Ok(Control::Welcome(welcome)) = Control::decode(&record) else { panic!("a welcome") };
    assert!(welcome.gauges.len() > GAUGES as usize);
    let again = encoded(&Control::Welcome(welcome.clone()));
    assert_eq!(again.len(), record.len());
    assert_eq!(Control::decode(&again), Ok(Control::Welcome(welcome)));
}

#[test]
fn a_mapped_peer_is_the_ipv4_peer_it_is() {
    let mapped: SocketAddrV6 = "[::ffff:192.0.2.1]:80".parse().unwrap();
    let peer = ClientAddr::from(std::net::SocketAddr::from(mapped));
    assert_eq!(peer.to_string(), "192.0.2.1:80");
    assert_eq!(ClientAddr::Unix.to_string(), "unix");
    assert_eq!(ClientAddr::Unix.ip(), None);
}

/// A record that starts like one of these, so that random bytes pass the first checks.
pub(super) fn like<T>(vectors: Vec<(&'static str, T)>) -> impl Strategy<Value = Vec<u8>> {
    let vectors: Vec<Vec<u8>> = vectors.into_iter().map(|(hex, _)| bytes(hex)).collect();
    let edits = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4);
    let tail = prop::collection::vec(any::<u8>(), 0..16);
    (prop::sample::select(vectors), edits, tail).prop_map(|(mut record, edits, tail)| {
        for (index, value) in edits {
            let index = index.index(record.len());
            record[index] = value;
        }
        record.extend(tail);
        record
    })
}

proptest! {
    #[test]
    fn decoded_records_encode_to_equal_ones(
        record in prop_oneof![
            like(control_vectors()),
            like(channel_vectors()),
            prop::collection::vec(any::<u8>(), 0..300),
        ]
    ) {
        if let Ok(value) = Control::decode(&record) {
            prop_assert_eq!(Control::decode(&encoded(&value)), Ok(value));
        }
        if let Ok(value) = Channel::decode(&record) {
            prop_assert_eq!(Channel::decode(&channel_encoded(&value)), Ok(value));
        }
    }
}

#[test]
fn a_gauge_in_a_welcome_has_a_name() {
    for bad in [&b""[..], b"two words", b"\xff", b"a\0", &[b'x'; 49]] {
        let mut record = bytes(WELCOME);
        record.extend_from_slice(&[19, 0, bad.len() as u8, 0]);
        record.extend_from_slice(bad);
        assert_eq!(Control::decode(&record), Err(WireError::Invalid("gauge name")), "{bad:?}");
    }
}
