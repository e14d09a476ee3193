//! The bytes of the records, in both directions. `docs/PROTOCOL.md` prints the same vectors.

use proptest::prelude::*;

use super::super::tests::{bytes, like};
use super::super::{Channel, Control};
use super::*;

const FORK: &str = "20000000070000000000000002000500776562 2d310300100000112233445566778899aabbccddee\
     ff20000700434143484 53d31";
const FORKED: &str = "210000000700000000000000671200000000 0000";
const NOT_FORKED: &str = "22000000070000000000000011000900322074687265616473";
const ENDED: &str = "23000000671200000f000000";

fn encoded(record: &Prefork) -> Vec<u8> {
    let mut out = Vec::new();
    record.encode(&mut out);
    out
}

fn fork() -> Fork {
    Fork {
        id: 7,
        name: "web-1".to_owned(),
        token: Token(std::array::from_fn(|i| 17 * i as u8)),
        variables: vec![("CACHE".to_owned(), "1".to_owned())],
    }
}

fn vectors() -> Vec<(&'static str, Prefork)> {
    vec![
        (FORK, Prefork::Fork(fork())),
        (FORKED, Prefork::Forked(Forked { id: 7, pid: 4711 })),
        (NOT_FORKED, Prefork::NotForked(NotForked { id: 7, reason: "2 threads".to_owned() })),
        (ENDED, Prefork::Ended(Ended { pid: 4711, status: 15 })),
    ]
}

#[test]
fn records_have_these_bytes() {
    for (hex, record) in vectors() {
        assert_eq!(encoded(&record), bytes(hex), "{record:?}");
        assert_eq!(Prefork::decode(&bytes(hex)), Ok(record));
    }
}

#[test]
fn the_document_prints_these_vectors() {
    let document = include_str!("../../../../docs/PROTOCOL.md");
    let document: String = document.split_whitespace().collect();
    for (hex, _) in vectors() {
        let hex: String = hex.split_whitespace().collect();
        assert!(document.contains(&hex), "docs/PROTOCOL.md lacks {hex}");
    }
}

#[test]
fn tlvs_of_a_later_version_are_skipped() {
    let future = [0x34, 0x12, 3, 0, b'a', b'b', b'c', 0xff, 0xff, 0, 0];
    for (hex, record) in vectors() {
        let longer = [&bytes(hex)[..], &future].concat();
        assert_eq!(Prefork::decode(&longer), Ok(record));
    }
}

#[test]
fn a_record_cut_anywhere_is_refused() {
    for (hex, record) in vectors() {
        let whole = bytes(hex);
        for len in 0..whole.len() {
            match (Prefork::decode(&whole[..len]), &record) {
                (Err(_), _) => {}
                (Ok(Prefork::Fork(cut)), Prefork::Fork(_)) => assert_eq!(cut.variables, []),
                (Ok(other), _) => panic!("{len} bytes decoded as {other:?}"),
            }
        }
        for tail in [&[1][..], &[1, 0], &[1, 0, 4], &[1, 0, 4, 0, 1, 2, 3]] {
            let error = Prefork::decode(&[&whole[..], tail].concat()).unwrap_err();
            assert!(matches!(error, WireError::TooShort(_)), "{error}");
        }
        let mut reserved = whole.clone();
        reserved[2] = 1;
        assert_eq!(Prefork::decode(&reserved), Err(WireError::Reserved("header")));
        // The records of other sockets have other kinds.
        assert!(matches!(Control::decode(&whole), Err(WireError::UnknownKind(_))));
        assert!(matches!(Channel::decode(&whole), Err(WireError::UnknownKind(_))));
    }
    let mut reserved = bytes(FORKED);
    reserved[17] = 1;
    assert_eq!(Prefork::decode(&reserved), Err(WireError::Reserved("forked")));
    assert_eq!(Prefork::decode(&[4, 0, 0, 0]), Err(WireError::UnknownKind(4)));
    let long = vec![0; MAX_PREFORK_RECORD + 1];
    assert!(matches!(Prefork::decode(&long), Err(WireError::TooLong { .. })));
}

#[test]
fn values_that_are_not_possible_are_refused() {
    for pid in [0u32, 0x8000_0000, u32::MAX] {
        for (hex, at) in [(FORKED, 12), (ENDED, 4)] {
            let mut record = bytes(hex);
            record[at..at + 4].copy_from_slice(&pid.to_le_bytes());
            assert_eq!(Prefork::decode(&record), Err(WireError::Invalid("process id")), "{pid}");
        }
    }
    for value in [&b""[..], b"=x", b"NAME", b"A=\0", b"A=\xff", b"A\0=1"] {
        let mut record = bytes(FORK);
        put_tlv(&mut record, tlv::VARIABLE, value);
        assert_eq!(Prefork::decode(&record), Err(WireError::Invalid("variable")), "{value:?}");
    }
    for (kind, value) in [(tlv::NAME, &b"w"[..]), (tlv::TOKEN, &[0; 16])] {
        let mut record = bytes(FORK);
        put_tlv(&mut record, kind, value);
        assert!(matches!(Prefork::decode(&record), Err(WireError::Repeated(_))), "{kind}");
    }
    let bare = &bytes(FORK)[..12];
    assert_eq!(Prefork::decode(bare), Err(WireError::Missing("worker name")));
    assert_eq!(Prefork::decode(&bytes(NOT_FORKED)[..12]), Err(WireError::Missing("reason")));
    let mut record = bytes(FORK)[..21].to_vec();
    assert_eq!(Prefork::decode(&record), Err(WireError::Missing("token")));
    put_tlv(&mut record, tlv::TOKEN, &[0; 15]);
    assert_eq!(Prefork::decode(&record), Err(WireError::Invalid("token")));
}

#[test]
fn descriptors_belong_to_a_fork_only() {
    for (_, record) in vectors() {
        for count in 0..5 {
            let expected = match record {
                Prefork::Fork(_) => count == 1 || count == 3,
                _ => count == 0,
            };
            assert_eq!(record.allows_fds(count), expected, "{record:?} {count}");
        }
    }
}

#[test]
fn a_reason_is_cut_and_cannot_forge_a_log_line() {
    let reason = format!("a\nb{}", "é".repeat(1000));
    match Prefork::decode(&encoded(&Prefork::NotForked(NotForked { id: 1, reason }))) {
        Ok(Prefork::NotForked(record)) => {
            assert!(record.reason.starts_with("a bé") && record.reason.len() <= 1024);
        }
        other => panic!("{other:?}"),
    }
    assert!(!format!("{:?}", fork()).contains("22"), "the token is a secret");
}

proptest! {
    #[test]
    fn decoded_records_encode_to_equal_ones(
        record in prop_oneof![like(vectors()), prop::collection::vec(any::<u8>(), 0..300)]
    ) {
        if let Ok(value) = Prefork::decode(&record) {
            prop_assert_eq!(Prefork::decode(&encoded(&value)), Ok(value));
        }
    }

    #[test]
    fn every_fork_comes_back(
        id in any::<u64>(),
        name in "[a-z0-9-]{1,64}",
        token in any::<[u8; 16]>(),
        variables in prop::collection::vec(("[A-Za-z_. ]{1,20}", "[^\0]{0,200}"), 0..20),
    ) {
        let fork = Prefork::Fork(Fork { id, name, token: Token(token), variables });
        prop_assert_eq!(Prefork::decode(&encoded(&fork)), Ok(fork));
    }
}
