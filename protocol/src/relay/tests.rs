#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

use proptest::prelude::*;

use super::frame::{self, Frame, Reply, Status};
use super::*;

fn id() -> impl Strategy<Value = Id> {
    proptest::collection::vec(any::<u8>(), 1..=MAX_ID).prop_map(|bytes| Id::new(bytes).unwrap())
}

fn name() -> impl Strategy<Value = Name> {
    "[a-z0-9.-]{1,64}".prop_map(|text| Name::new(&text).unwrap())
}

fn to_directory() -> impl Strategy<Value = ToDirectory> {
    let ticket = proptest::collection::vec(any::<u8>(), 0..100);
    prop_oneof![
        (any::<u16>(), name(), any::<u64>(), name(), ticket).prop_map(
            |(version, namespace, member, worker, ticket)| ToDirectory::Hello {
                version,
                namespace,
                member,
                worker,
                ticket
            }
        ),
        (any::<u64>(), id(), any::<u64>()).prop_map(|(request, id, stamp)| ToDirectory::Register {
            request,
            id,
            stamp,
            key: 7
        }),
        (id(), any::<u32>(), any::<u16>()).prop_map(|(group, key, weight)| ToDirectory::Join {
            group,
            key,
            weight
        }),
        (id(), any::<bool>()).prop_map(|(id, group)| ToDirectory::Watch { id, group }),
        (id(), any::<u64>(), any::<bool>()).prop_map(|(id, newest, ended)| ToDirectory::Lookup {
            request: 5,
            id,
            newest,
            ended
        }),
        any::<u64>().prop_map(|request| ToDirectory::Stats { request }),
    ]
}

fn from_directory() -> impl Strategy<Value = FromDirectory> {
    let place = (id(), name(), name(), any::<u64>()).prop_map(|(id, worker, host, stamp)| Place {
        id,
        worker,
        host,
        stamp,
    });
    let places = proptest::collection::vec(place, 0..MAX_PAGE);
    let membership = (any::<u64>(), any::<u64>(), any::<u32>(), any::<u16>())
        .prop_map(|(host, member, key, weight)| Membership { host, member, key, weight });
    let list = proptest::collection::vec(membership, 0..MAX_PAGE);
    prop_oneof![
        (any::<u64>(), places, any::<u64>()).prop_map(|(request, places, next)| {
            FromDirectory::Places { request, places, next }
        }),
        (id(), any::<bool>(), any::<bool>(), list.clone(), list).prop_map(
            |(group, reset, complete, added, removed)| FromDirectory::Memberships {
                group,
                reset,
                complete,
                added,
                removed
            }
        ),
        (id(), any::<u32>()).prop_map(|(id, key)| FromDirectory::Declined {
            wish: Wish::WatchGroup,
            id,
            key,
            reason: b"full".to_vec()
        }),
        id().prop_map(|id| FromDirectory::Changed { id, group: true, change: Change::Moved }),
    ]
}

proptest! {
    #[test]
    fn every_record_decodes_to_itself(a in to_directory(), b in from_directory()) {
        let mut bytes = Vec::new();
        a.encode(&mut bytes);
        prop_assert!(bytes.len() <= MAX_RECORD);
        prop_assert_eq!(ToDirectory::decode(&bytes).unwrap(), a);
        bytes.push(0);
        prop_assert!(ToDirectory::decode(&bytes).is_err(), "a byte too many");
        bytes.clear();
        b.encode(&mut bytes);
        prop_assert!(bytes.len() <= MAX_RECORD);
        prop_assert_eq!(FromDirectory::decode(&bytes).unwrap(), b);
        bytes.pop();
        prop_assert!(FromDirectory::decode(&bytes).is_err(), "a byte too few");
    }

    #[test]
    fn no_bytes_make_a_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = ToDirectory::decode(&bytes);
        let _ = FromDirectory::decode(&bytes);
        let _ = Frame::decode(&bytes);
        let mut framed = (bytes.len() as u32).to_le_bytes().to_vec();
        framed.extend_from_slice(&bytes);
        if let Ok(Frame::Answers(answers)) = Frame::decode(&framed) {
            answers.count();
        }
    }

    #[test]
    fn frames_follow_each_other(to in id(), payload in proptest::collection::vec(any::<u8>(), 0..99)) {
        let mut stream = Vec::new();
        frame::data(&mut stream, frame::flag::REQUEST, 1, 2, to.as_bytes(), &payload);
        frame::answers(&mut stream, &[(1, 5, Status::Full), (9, 1, Status::Delivered)]);
        frame::spread(&mut stream, 3, 4, 5);
        frame::reply(&mut stream, 6, Reply::Payload(&payload));
        frame::reply(&mut stream, 7, Reply::None);
        frame::reply(&mut stream, 7, Reply::TooLong);
        let inner = stream.clone();
        frame::forward(&mut stream, 8, 9, (1, 2), true, &inner);
        frame::unreachable(&mut stream, 10, 11);

        let mut rest = &stream[..];
        let mut next = || {
            let (one, after) = rest.split_at(Frame::len_of(rest).unwrap());
            rest = after;
            Frame::decode(one).unwrap()
        };
        let expected = Frame::Data {
            flags: frame::flag::REQUEST, sequence: 1, key: 2, to: to.as_bytes(), payload: &payload,
        };
        prop_assert_eq!(next(), expected);
        let Frame::Answers(answers) = next() else { panic!("answers") };
        let answers: Vec<_> = answers.collect();
        prop_assert_eq!(answers, [(1, 5, Status::Full), (9, 1, Status::Delivered)]);
        prop_assert_eq!(next(), Frame::Spread { sequence: 3, delivered: 4, full: 5 });
        prop_assert_eq!(next(), Frame::Reply { sequence: 6, reply: Reply::Payload(&payload) });
        prop_assert_eq!(next(), Frame::Reply { sequence: 7, reply: Reply::None });
        prop_assert_eq!(next(), Frame::Reply { sequence: 7, reply: Reply::TooLong });
        let expected = Frame::Forward {
            host: 8, member: 9, epoch: 1, other: 2, reset: true, frames: &inner,
        };
        prop_assert_eq!(next(), expected);
        prop_assert_eq!(next(), Frame::Unreachable { host: 10, member: 11 });
        prop_assert_eq!(frame::longest_message(&inner), Some(payload.len()));
        prop_assert_eq!(frame::longest_message(&inner[1..]), None);
    }

    /// What one forward takes is whole frames within the bound, and all of them come in turn.
    #[test]
    fn forwards_split_between_frames(sizes in proptest::collection::vec(0..400_000usize, 1..12)) {
        let mut stream = Vec::new();
        for (n, size) in sizes.iter().enumerate() {
            frame::data(&mut stream, 0, n as u64, 1, b"a", &vec![0; *size]);
        }
        let (mut rest, mut frames) = (&stream[..], 0);
        while !rest.is_empty() {
            let end = frame::forwarded_at_once(rest);
            let (mut part, after) = rest.split_at(end);
            let first = Frame::len_of(part).unwrap();
            prop_assert!(end <= frame::MAX_FORWARD || end == first, "{}", end);
            let mut whole = Vec::new();
            frame::forward(&mut whole, 1, 2, (3, 4), false, part);
            prop_assert!(whole.len() <= frame::longest_forward(400_000));
            while let Some(len) = Frame::len_of(part) {
                prop_assert!(Frame::decode(&part[..len]).is_ok());
                part = &part[len..];
                frames += 1;
            }
            rest = after;
        }
        prop_assert_eq!(frames, sizes.len());
        prop_assert_eq!(frame::forwarded_at_once(&stream[..3]), 0);
    }
}

#[test]
fn ids_cannot_forge_a_line() {
    assert_eq!(Id::new(b"a\nb\xff\\").unwrap().to_string(), "a\\u{a}b\\xff\\\\");
    assert!(Id::new(b"").is_err() && Id::new([0; MAX_ID + 1]).is_err());
}

#[cfg(feature = "ticket")]
#[test]
fn a_changed_ticket_is_worth_nothing() {
    let key = ticket::Key::new([1; ticket::KEY]);
    let ticket = key.issue("web", 1000);
    assert!(ticket.len() <= ticket::MAX_TICKET);
    assert_eq!(key.pool(&ticket, 1000), Some("web"));
    assert_eq!(ticket::Key::new([2; ticket::KEY]).pool(&ticket, 1000), None);
    for (place, bit) in (0..ticket.len()).flat_map(|place| (0..8).map(move |bit| (place, bit))) {
        let mut changed = ticket.clone();
        changed[place] ^= 1 << bit;
        assert_eq!(key.pool(&changed, 1000), None, "byte {place}");
        assert_eq!(key.pool(&changed[..place], 1000), None);
    }
}
