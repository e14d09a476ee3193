//! What goes wrong between members and with the directory, and that each of it has an end.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

use dispatch_protocol::relay::frame::{self, Frame};
use dispatch_protocol::relay::{FromDirectory, Location, Membership, Wish};

use super::peer::{FrameError, Way};
use super::tests::{A, B, engine, queue, settings, told};
use super::*;
use crate::relay::Published;
use crate::relay::slot::Pending;

const HOST: u64 = 7;
const LIMIT: usize = 1 << 20;

fn id(text: &str) -> Id {
    Id::new(text).unwrap()
}

fn joined(own: u64) -> Engine {
    let mut engine = engine(own);
    engine.welcomed(0, HOST, LIMIT, false);
    engine
}

fn send(engine: &mut Engine, now: u64, bytes: &[u8]) -> Pending<Outcome> {
    let (slot, pending) = Slot::new();
    engine.send_to_id(now, &id("x"), bytes.into(), Done::Send(slot));
    fire(engine);
    pending
}

fn fire(engine: &mut Engine) {
    std::mem::take(&mut engine.fired).into_iter().for_each(Fired::fire);
}

fn all_told(engine: &mut Engine) -> Vec<ToDirectory> {
    std::iter::from_fn(|| told(engine)).collect()
}

/// Answers the look-up that was asked.
fn answer(engine: &mut Engine, now: u64, host: u64, stamp: u64) -> (u64, bool) {
    let records = all_told(engine);
    let asked = records.iter().find_map(|record| match record {
        ToDirectory::Lookup { request, newest, ended, .. } => Some((*request, *newest, *ended)),
        _ => None,
    });
    let (request, newest, ended) = asked.unwrap_or_else(|| panic!("no look-up in {records:?}"));
    let places = vec![Location { host, member: B, stamp, key: 5 }];
    engine.directory_record(now, FromDirectory::Found { request, places });
    fire(engine);
    (newest, ended)
}

fn asked_for_link(engine: &mut Engine) -> Option<u64> {
    all_told(engine).into_iter().find_map(|record| match record {
        ToDirectory::Connect { member: B, after } => Some(after),
        _ => None,
    })
}

/// A member with a link to B over which so many messages were sent.
fn linked(messages: usize) -> (Engine, Vec<Pending<Outcome>>) {
    let mut engine = joined(A);
    let mut pending = vec![send(&mut engine, 0, b"0")];
    answer(&mut engine, 0, HOST, 9);
    engine.link_up(0, B, 1, LIMIT);
    pending.extend((1..messages).map(|_| send(&mut engine, 0, b"0")));
    let sent = engine.peers[&B].unsent().len();
    engine.peers.get_mut(&B).unwrap().advance(sent);
    (engine, pending)
}

fn answers(runs: &[(u64, u32)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let runs: Vec<_> =
        runs.iter().map(|&(first, count)| (first, count, Status::Delivered)).collect();
    frame::answers(&mut bytes, &runs);
    bytes
}

#[test]
fn an_answer_is_for_a_message_that_waits_and_for_it_once() {
    for runs in [
        &[(0, 1)][..],
        &[(2, 1)],
        &[(1, 0)],
        &[(1, 6)],
        &[(1, u32::MAX)],
        &[(u64::MAX, 1)],
        &[(1, 5), (1, 5)],
        &[(1, 2), (2, 1)],
    ] {
        let (mut engine, _pending) = linked(5);
        let result = engine.frame(0, B, &answers(runs));
        assert!(matches!(result, Err(FrameError::Answer)), "{runs:?}: {result:?}");
    }
    // A member that has sent a lot: the work for a frame is bounded by what waits, not by that.
    let (mut engine, _first) = linked(1);
    engine.frame(0, B, &answers(&[(1, 1)])).unwrap();
    for sequence in 2..=20_000 {
        drop(send(&mut engine, 0, b""));
        let sent = engine.peers[&B].unsent().len();
        engine.peers.get_mut(&B).unwrap().advance(sent);
        engine.frame(0, B, &answers(&[(sequence, 1)])).unwrap();
    }
    let everything = vec![(1, 20_000); 80_000];
    assert!(matches!(engine.frame(0, B, &answers(&everything)), Err(FrameError::Answer)));
    // A late answer for a message that has been given up is one, too.
    let (mut engine, mut pending) = linked(3);
    engine.tick(10_000);
    fire(&mut engine);
    assert!(pending.iter_mut().all(|one| one.try_take() == Some(Outcome::Lost)));
    engine.frame(10_000, B, &answers(&[(1, 3)])).unwrap();
}

#[test]
fn a_reply_that_is_too_long_is_refused_and_the_link_stays() {
    let mut b = joined(B);
    let inbox: Arc<Queue<Message>> = queue(4);
    let (slot, _registered) = Slot::new();
    let key = b.register(&id("x"), Arc::clone(&inbox), slot);
    let generation = b.link_up(0, A, 1, 1000);
    let mut request = Vec::new();
    frame::data(&mut request, frame::flag::REQUEST, 1, key.into(), b"x", b"ping");
    b.frame(0, A, &request).unwrap();
    let to = ReplyTo { member: A, generation, sequence: 1 };
    let refused = b.reply(&to, Some(&[0; 1001]));
    assert_eq!(refused, Err(ReplyError::TooLong { len: 1001, max: 1000 }));
    let sent = b.peers[&A].unsent();
    assert_eq!(
        Frame::decode(sent).unwrap(),
        Frame::Reply { sequence: 1, reply: Reply::TooLong },
        "the requester is told"
    );
    assert_eq!(b.reply(&to, Some(&[0; 1000])), Ok(()));
    assert!(b.has_link(A, generation));
    let gone = ReplyTo { member: A, generation: generation + 1, sequence: 1 };
    assert_eq!(b.reply(&gone, Some(b"")), Err(ReplyError::Lost));

    // The requester.
    let (mut a, _first) = linked(1);
    let (slot, mut pending) = Slot::new();
    a.send_to_id(0, &id("x"), Arc::from(&b"ping"[..]), Done::Request(slot, 1000));
    a.frame(0, B, &answers(&[(1, 2)])).unwrap();
    let mut reply = Vec::new();
    frame::reply(&mut reply, 2, Reply::TooLong);
    a.frame(0, B, &reply).unwrap();
    fire(&mut a);
    assert_eq!(pending.try_take(), Some(Err(RequestError::ReplyTooLong)));
}

#[test]
fn a_link_that_breaks_before_the_message_has_left_says_nothing_about_its_recipient() {
    let mut a = joined(A);
    let mut pending = send(&mut a, 0, b"1");
    answer(&mut a, 0, HOST, 9);
    assert_eq!(asked_for_link(&mut a), Some(0));
    a.link_up(0, B, 1, LIMIT);
    a.link_down(0, B);
    // The registration may be where it was, so the directory may answer with it again.
    assert_eq!(answer(&mut a, 0, HOST, 9), (9, false));
    assert_eq!(asked_for_link(&mut a), Some(1));
    a.link_up(0, B, 2, LIMIT);
    a.frame(0, B, &answers(&[(1, 1)])).unwrap();
    fire(&mut a);
    assert_eq!(pending.try_take(), Some(Outcome::Delivered));
    // One that the recipient has refused has ended.
    let mut pending = send(&mut a, 0, b"2");
    let mut refusal = Vec::new();
    frame::answers(&mut refusal, &[(2, 1, Status::NotHere)]);
    a.frame(0, B, &refusal).unwrap();
    assert_eq!(answer(&mut a, 0, HOST, 10), (9, true));
    // A way that breaks again and again is a bounded failure, and not a missing recipient.
    a.link_down(0, B);
    fire(&mut a);
    assert_eq!(pending.try_take(), Some(Outcome::Lost));
    drop(send(&mut a, 0, b"3"));
    assert_eq!(answer(&mut a, 0, HOST, 10), (10, false), "and the next message asks again");
}

#[test]
fn a_link_is_asked_for_as_long_as_a_message_waits_for_it() {
    let mut a = joined(A);
    let mut pending = send(&mut a, 0, b"1");
    let lookup = told(&mut a).unwrap();
    let ToDirectory::Lookup { request, .. } = lookup else { panic!("{lookup:?}") };
    let places = vec![Location { host: HOST, member: B, stamp: 9, key: 5 }];
    a.directory_record(0, FromDirectory::Found { request, places });
    assert_eq!(asked_for_link(&mut a), Some(0));
    // The directory refuses; one was made, and its descriptor did not come.
    let reason = b"no".to_vec();
    a.directory_record(0, FromDirectory::NoLink { member: B, reason });
    a.tick(100);
    assert_eq!(asked_for_link(&mut a), None, "not at once");
    a.tick(300);
    assert_eq!(asked_for_link(&mut a), Some(0));
    a.link_missed(300, B, 77);
    a.tick(600);
    assert_eq!(asked_for_link(&mut a), Some(77));
    // The message's time is over: nothing is asked for any more, and the next message begins again.
    a.tick(1100);
    fire(&mut a);
    assert_eq!(pending.try_take(), Some(Outcome::Lost));
    a.tick(2000);
    all_told(&mut a);
    assert!(a.peers.is_empty() && !a.has_deadlines());
    let mut pending = send(&mut a, 2000, b"2");
    let (newest, _) = answer(&mut a, 2000, HOST, 9);
    assert_eq!(newest, 9);
    a.link_up(2000, B, 78, LIMIT);
    a.frame(2000, B, &answers(&[(1, 1)])).unwrap();
    fire(&mut a);
    assert_eq!(pending.try_take(), Some(Outcome::Delivered));
}

#[test]
fn a_member_that_does_not_answer_is_looked_up_again() {
    let (mut a, mut pending) = linked(1);
    a.tick(5000);
    fire(&mut a);
    assert_eq!(pending[0].try_take(), Some(Outcome::Lost));
    // Its client may have come to another worker meanwhile.
    drop(send(&mut a, 5000, b"2"));
    assert_eq!(answer(&mut a, 5000, HOST, 10), (9, false));
    // A directory that does not answer is asked again with a later message.
    let mut a = joined(A);
    let mut pending = send(&mut a, 0, b"1");
    assert_eq!(all_told(&mut a).len(), 1);
    a.tick(1000);
    fire(&mut a);
    assert_eq!(pending.try_take(), Some(Outcome::Lost));
    drop(send(&mut a, 1000, b"2"));
    assert_eq!(all_told(&mut a).len(), 1);
    assert_eq!(a.requests.len(), 1, "the first question is forgotten");
}

/// Carries forwarded frames between two engines of different hosts, as their directories do.
fn exchange(now: u64, a: &mut Engine, b: &mut Engine) {
    for _ in 0..10 {
        for (from, to, own, other) in [(true, B, A, 1), (false, A, B, 2)] {
            let (from, into) = if from { (&mut *a, &mut *b) } else { (&mut *b, &mut *a) };
            let mut out = Vec::new();
            from.take_resets(&mut out);
            from.take_forwards(to, &mut out, usize::MAX);
            let mut rest = &out[..];
            while let Some(len) = Frame::len_of(rest) {
                let Frame::Forward { epoch, other: theirs, reset, frames, .. } =
                    Frame::decode(&rest[..len]).unwrap()
                else {
                    panic!("no forward")
                };
                let mut delivered = Vec::new();
                frame::forward(&mut delivered, other, own, (epoch, theirs), reset, frames);
                into.gateway_frame(now, &delivered).unwrap();
                rest = &rest[len..];
            }
            fire(into);
        }
    }
}

#[test]
fn a_member_of_another_host_that_starts_again_with_its_number_is_understood() {
    let remote = |wall: u64| {
        let mut b = Engine::new(settings(), B, wall);
        b.welcomed(0, 2, LIMIT, true);
        let inbox: Arc<Queue<Message>> = queue(100);
        let (slot, _registered) = Slot::new();
        let key = b.register(&id("y"), inbox, slot);
        (b, key)
    };
    let mut a = Engine::new(settings(), A, 2_000_000);
    a.welcomed(0, 1, LIMIT, true);
    let inbox: Arc<Queue<Message>> = queue(100);
    let (slot, _registered) = Slot::new();
    let key = a.register(&id("x"), Arc::clone(&inbox), slot);
    let deliver = |a: &mut Engine, b: &mut Engine| {
        let mut pending = send(b, 0, b"1");
        let place = Location { host: 1, member: A, stamp: 9, key };
        let records = all_told(b);
        let request = records.iter().find_map(|record| match record {
            ToDirectory::Lookup { request, .. } => Some(*request),
            _ => None,
        });
        if let Some(request) = request {
            b.directory_record(0, FromDirectory::Found { request, places: vec![place] });
        }
        exchange(0, a, b);
        pending.try_take()
    };
    // Its clock goes on, or was set back: then the first exchange is lost, and the next one works.
    for wall in [3_000_000, 4_000_000, 1_000_000] {
        let (mut b, _) = remote(wall);
        let first = deliver(&mut a, &mut b);
        let second = deliver(&mut a, &mut b);
        assert!(
            first == Some(Outcome::Delivered) || wall == 1_000_000,
            "with a clock that went on: {first:?}"
        );
        assert_eq!(second, Some(Outcome::Delivered), "wall {wall}");
    }
    assert!(inbox.try_take().is_some());
    // Epochs of the far future would make those of honest members look old.
    let mut bytes = Vec::new();
    frame::forward(&mut bytes, 2, B, (u64::MAX, 0), false, &[]);
    a.gateway_frame(0, &bytes).unwrap();
    frame::forward(&mut bytes, 2, B, (u64::MAX, 0), true, &[]);
    assert!(a.peers.get(&B).is_none_or(|peer| peer.other < u64::MAX / 2));
    assert!(a.epoch < u64::MAX / 2);
}

#[test]
fn what_is_forwarded_is_never_longer_than_both_ends_allow() {
    let limits = Settings { link_bytes: 8 << 20, window: 10_000, ..settings() };
    let mut a = Engine::new(limits, A, 1);
    a.welcomed(0, 1, LIMIT, true);
    drop(send(&mut a, 0, b"1"));
    answer(&mut a, 0, 2, 9);
    let mut sent = 1;
    while a.peers[&B].unsent().len() < 7 << 20 {
        drop(send(&mut a, 0, &vec![0; if sent % 20 == 0 { LIMIT } else { 30_000 }]));
        sent += 1;
    }
    let mut out = Vec::new();
    assert!(a.take_forwards(B, &mut out, usize::MAX));
    let (mut rest, mut messages) = (&out[..], 0);
    while let Some(len) = Frame::len_of(rest) {
        assert!(len <= frame::longest_forward(LIMIT), "{len} bytes");
        let Frame::Forward { mut frames, .. } = Frame::decode(&rest[..len]).unwrap() else {
            panic!("no forward")
        };
        while let Some(len) = Frame::len_of(frames) {
            messages += 1;
            frames = &frames[len..];
        }
        rest = &rest[len..];
    }
    assert_eq!(messages, sent);
    // As much as there is room for, and the rest later.
    drop(send(&mut a, 0, b"1"));
    let mut full = vec![0; 10];
    assert!(!a.take_forwards(B, &mut full, 5));
    assert!(a.take_forwards(B, &mut full, 10));
}

#[test]
fn both_ends_of_a_link_have_one_bound_whatever_the_directory_allowed_before() {
    let mut a = joined(A);
    let mut pending = send(&mut a, 0, &vec![0; 5000]);
    answer(&mut a, 0, HOST, 9);
    // The directory has started again with a smaller `max_message`.
    a.link_up(0, B, 1, 1000);
    answer(&mut a, 0, HOST, 9);
    fire(&mut a);
    assert_eq!(pending.try_take(), Some(Outcome::TooLong));
    assert_eq!(a.stats().sent, 0, "not counted");
    assert!(a.peers[&B].unsent().is_empty() && a.peers[&B].way == Way::Socket);
    let mut fits = send(&mut a, 0, &vec![0; 1000]);
    let sent = a.peers[&B].unsent();
    assert!(sent.len() <= a.peers[&B].longest_frame());
    a.frame(0, B, &answers(&[(1, 1)])).unwrap();
    fire(&mut a);
    assert_eq!(fits.try_take(), Some(Outcome::Delivered));
}

#[test]
fn what_the_directory_declines_ends_and_can_be_asked_for_again() {
    let mut a = joined(A);
    let decline = |a: &mut Engine, wish, text: &str, key| {
        let reason = b"max_groups".to_vec();
        a.directory_record(0, FromDirectory::Declined { wish, id: id(text), key, reason });
        fire(a);
    };
    let inbox: Arc<Queue<Message>> = queue(4);
    let key = a.join(&id("room"), 1, Arc::clone(&inbox));
    decline(&mut a, Wish::Join, "room", key);
    assert_eq!(inbox.ended(), Some(super::super::Ended::NotAccepted));
    let events: Arc<Queue<PresenceEvent>> = queue(4);
    a.watch(&id("room"), true, Arc::clone(&events));
    decline(&mut a, Wish::WatchGroup, "room", 0);
    assert_eq!(events.ended(), Some(super::super::Ended::NotAccepted));
    all_told(&mut a);
    for _ in 0..2 {
        let (slot, mut pending) = Slot::new();
        a.publish(0, &id("room"), Arc::from(&b"1"[..]), Some(slot));
        let asked = ToDirectory::Subscribe { group: id("room") };
        assert_eq!(all_told(&mut a), [asked], "each time");
        decline(&mut a, Wish::Subscribe, "room", 0);
        assert!(pending.try_take().unwrap().unknown);
    }
    assert_eq!((a.waiting_bytes, a.views.len()), (0, 0));
}

fn told_members(a: &mut Engine, reset: bool, keys: &[u32]) {
    let added = keys.iter().map(|&key| Membership { host: HOST, member: A, key, weight: 1 });
    let (group, added, removed) = (id("room"), added.collect(), Vec::new());
    let record = FromDirectory::Memberships { group, reset, complete: true, added, removed };
    a.directory_record(0, record);
    fire(a);
}

#[test]
fn groups_that_are_not_used_are_forgotten() {
    let mut a = joined(A);
    let publish = |a: &mut Engine, now| {
        let (slot, pending) = Slot::new();
        a.publish(now, &id("room"), Arc::from(&b"1"[..]), Some(slot));
        fire(a);
        pending
    };
    drop(publish(&mut a, 0));
    told_members(&mut a, true, &[]);
    assert_eq!(a.stats().groups, 1);
    drop(publish(&mut a, 3000));
    all_told(&mut a);
    a.tick(7000);
    assert_eq!(all_told(&mut a), [], "it was used");
    a.tick(20_000);
    assert_eq!(all_told(&mut a), [ToDirectory::Unsubscribe { group: id("room") }]);
    assert_eq!((a.stats().groups, a.sweep_at()), (0, None));
    // What was on its way belongs to the subscription that has ended.
    let mut pending = publish(&mut a, 20_000);
    told_members(&mut a, false, &[3]);
    assert!(pending.try_take().is_none(), "it waits for the list");
    told_members(&mut a, true, &[]);
    assert_eq!(pending.try_take(), Some(Published::default()));
    // With no room for another group those that are not used go first.
    for n in 0..100 {
        let (slot, _pending) = Slot::new();
        a.publish(30_000 + n * 2000, &id(&n.to_string()), Arc::from(&b"1"[..]), Some(slot));
        a.tick(31_500 + n * 2000);
        fire(&mut a);
        assert!(a.views.len() <= settings().routes);
    }
    assert!(a.views.contains_key(&id("99")));
}

#[test]
fn what_waits_is_bounded_in_bytes_of_each_recipient_and_of_all() {
    let limits =
        Settings { waiting: 100, recipient_bytes: 3000, waiting_bytes: 4000, ..settings() };
    let mut a = Engine::new(limits, A, 1);
    a.welcomed(0, HOST, LIMIT, false);
    let mut send = |to: &str| {
        let (slot, mut pending) = Slot::new();
        a.send_to_id(0, &id(to), vec![0; 1000].into(), Done::Send(slot));
        fire(&mut a);
        pending.try_take()
    };
    assert_eq!([send("x"), send("x")], [None, None]);
    assert_eq!(send("x"), Some(Outcome::Backpressure), "of one recipient");
    assert_eq!(send("y"), None, "which does not concern others");
    assert_eq!(send("z"), Some(Outcome::Backpressure), "of all");
    a.tick(1000);
    fire(&mut a);
    assert_eq!(a.waiting_bytes, 0);
    assert!(a.routes.values().all(|route| !route.waits()));
}

#[test]
fn records_for_a_directory_that_does_not_read_are_bounded() {
    let mut a = joined(A);
    let mut count = 0;
    while !a.has_too_many_records() {
        let events: Arc<Queue<PresenceEvent>> = queue(1);
        let serial = a.watch(&id("x"), false, events);
        a.unwatch(&id("x"), false, serial);
        count += 1;
        assert!(count < 10_000_000, "no bound");
    }
    // It is given up, and told everything that lasts again, which has room.
    a.directory_lost(0);
    assert!(!a.has_too_many_records());
    for n in 0..1000 {
        let (slot, _registered) = Slot::new();
        a.register(&id(&n.to_string()), queue(1), slot);
    }
    a.welcomed(0, HOST, LIMIT, false);
    assert!(!a.has_too_many_records());
    assert_eq!(all_told(&mut a).len(), 1000);
}

#[test]
fn counts_of_another_member_cannot_overflow() {
    let mut a = joined(A);
    let (slot, mut pending) = Slot::new();
    a.publish(0, &id("room"), Arc::from(&b"1"[..]), Some(slot));
    let member = |member| Membership { host: HOST, member, key: 1, weight: 1 };
    let added = vec![member(B), member(B + 1)];
    let (group, removed) = (id("room"), Vec::new());
    let record = FromDirectory::Memberships { group, reset: true, complete: true, added, removed };
    a.directory_record(0, record);
    for member in [B, B + 1] {
        a.link_up(0, member, 1, LIMIT);
        let mut spread = Vec::new();
        frame::spread(&mut spread, 1, u32::MAX, u32::MAX);
        a.frame(0, member, &spread).unwrap();
    }
    fire(&mut a);
    assert_eq!(pending.try_take().unwrap().delivered, u32::MAX);
}
