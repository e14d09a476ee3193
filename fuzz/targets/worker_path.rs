//! A worker's receive paths on real sockets: no descriptor stays open, no call waits, and the
//! result is that of the record.

use std::os::fd::AsFd;

use dispatch_protocol::scoreboard::Scoreboard;
use dispatch_protocol::wire::{Channel, Control, Resume, VERSION, WELCOME_FDS};

use super::sockets::{
    Delivery, ReceivePath, alternating, checked, file, identity, pair, send, with_room,
};
use super::worker_fuzzing::{FromChannel, answer, from_channel};

/// Does nothing with an input for another path.
pub fn worker_path(data: &[u8]) {
    let delivery = Delivery::new(data);
    match delivery.path {
        ReceivePath::Dispatcher => {}
        ReceivePath::Worker => checked(|| to_worker(&delivery)),
        ReceivePath::JoiningWorker => checked(|| to_joining_worker(&delivery)),
    }
}

fn to_worker(delivery: &Delivery<'_>) {
    let &Delivery { count, room, closes, record, .. } = delivery;
    let (ours, theirs) = pair();
    let (one, other) = (file(), file());
    if !send(&theirs, record, &alternating(&one, &other, count)) {
        return;
    }
    let _theirs = (!closes).then_some(theirs);
    let received = with_room(room, || from_channel(ours.as_fd()));
    // With less room than descriptors, the receiver cannot know how many were sent.
    let short = room.is_some_and(|room| room < count);
    match (received, Channel::decode(record)) {
        // An empty record is the end; a record whose descriptors found no room looks the same.
        (FromChannel::End, Err(_)) => assert!(record.is_empty() && (count == 0 || short)),
        (FromChannel::Broken(_), Err(_)) => {}
        (FromChannel::Broken(why), Ok(sent)) => assert!(count > sent.fds(), "{sent:?}: {why}"),
        (FromChannel::Probe(received), Ok(sent)) => {
            assert_eq!(Channel::Probe(received), sent);
            assert!(count == 0 || short);
        }
        (FromChannel::Drain(received), Ok(sent)) => {
            assert_eq!(Channel::Drain(received), sent);
            assert!(count == 0 || short);
        }
        (FromChannel::Resume, Ok(sent)) => {
            assert_eq!(Channel::Resume(Resume), sent);
            assert!(count == 0 || short);
        }
        (FromChannel::Handoff { arrived, lost }, Ok(Channel::Handoff(sent))) => {
            assert!(short && arrived.len() < count || !short && arrived.len() == count);
            let entries = arrived.iter().map(|(entry, _)| entry).chain(&lost);
            assert!(entries.eq(&sent.entries), "in order, and none is missing");
            for (place, (_, fd)) in arrived.iter().enumerate() {
                let expected = if place % 2 == 0 { &one } else { &other };
                assert_eq!(identity(fd), identity(expected), "each with its own descriptor");
            }
        }
        (received, sent) => panic!("{sent:?} became {received:?}"),
    }
    match from_channel(ours.as_fd()) {
        FromChannel::End => assert!(closes),
        FromChannel::Empty => assert!(!closes),
        more => panic!("{more:?}"),
    }
}

/// The answer to a hello. The first descriptors are valid, as far as the record describes them.
fn to_joining_worker(delivery: &Delivery<'_>) {
    let &Delivery { count, room, closes, record, .. } = delivery;
    let (ours, theirs) = pair();
    let sent = Control::decode(record);
    let slots = match &sent {
        Ok(Control::Welcome(welcome)) => welcome.slots.min(64),
        _ => 4,
    };
    let (_board, board) = Scoreboard::create(slots, 0).expect("a scoreboard");
    let (channel, _far) = pair();
    let doorbell = file();
    let mut fds = vec![channel.as_fd(), board.as_fd(), doorbell.as_fd()];
    fds.resize(count.max(fds.len()), doorbell.as_fd());
    if !send(&theirs, record, &fds[..count]) {
        return;
    }
    let _theirs = (!closes).then_some(theirs);
    match with_room(room, || answer(&ours)) {
        Ok(Some(welcome)) => {
            assert_eq!((welcome.version, count), (VERSION, WELCOME_FDS));
            assert_eq!(sent, Ok(Control::Welcome(welcome)));
        }
        Ok(None) => panic!("an answer was overlooked"),
        Err(why) => {
            assert!(!why.is_empty());
            let short = room.is_some_and(|room| room < count);
            match sent {
                Ok(Control::Welcome(w)) if w.version == VERSION && w.slots <= 64 => {
                    assert!(short || count != WELCOME_FDS, "a good welcome: {why}");
                }
                _ => {}
            }
        }
    }
    match answer(&ours) {
        Ok(None) => assert!(!closes),
        Err(_) => assert!(closes),
        Ok(Some(more)) => panic!("{more:?}"),
    }
}
