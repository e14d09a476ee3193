//! Groups: to all, to one, and what happens when the one is gone or full.

use std::collections::BTreeMap;

use test_support::{PATIENCE, wait_until};
use worker_sdk::relay::{Membership, Options, Outcome, Pick, Relay};

use super::{Directory, id, text_of};

/// How many of `count` messages each membership received.
fn distribution(
    sender: &Relay,
    members: &[Membership],
    count: usize,
    options: Options,
) -> Vec<usize> {
    for _ in 0..count {
        let outcome = sender.send_any(&id("jobs"), "job", options).wait();
        assert_eq!(outcome, Outcome::Delivered);
    }
    let received = |member: &Membership| std::iter::from_fn(|| member.try_recv()).count();
    members.iter().map(received).collect()
}

/// Waits until a sender knows so many memberships.
fn wait_known(sender: &Relay, group: &str, count: u32) {
    wait_until("the memberships to be known", || {
        sender.publish(&id(group), "").wait().delivered == count
    });
}

#[test]
fn what_is_published_reaches_every_member() {
    let directory = Directory::start("");
    let (a, b) = (directory.relay("a"), directory.relay("b"));
    let room = [a.join(&id("room")), b.join(&id("room")), b.join(&id("room"))];
    wait_known(&a, "room", 3);
    room.iter().for_each(|member| while member.try_recv().is_some() {});
    let published = a.publish(&id("room"), "hello").wait();
    assert_eq!((published.delivered, published.dropped, published.lost), (3, 0, 0));
    for member in &room {
        assert_eq!(text_of!(member).as_deref(), Some("hello"));
    }
    let [own, gone, stays] = room;
    drop(gone);
    wait_known(&a, "room", 2);
    drop((own, stays));
    wait_known(&a, "room", 0);
}

#[test]
fn one_member_is_chosen_as_the_call_says() {
    let directory = Directory::start("");
    let relays = ["a", "b", "c"].map(|name| directory.relay(name));
    let sender = directory.relay("sender");
    let weights = [1, 2, 5];
    let members: Vec<_> = relays
        .iter()
        .zip(weights)
        .map(|(relay, weight)| relay.join_with_weight(&id("jobs"), weight))
        .collect();
    wait_known(&sender, "jobs", 3);
    members.iter().for_each(|member| while member.try_recv().is_some() {});

    let even = distribution(&sender, &members, 300, Options::new());
    assert_eq!(even, [100, 100, 100], "round-robin");
    let random = distribution(&sender, &members, 600, Options::new().pick(Pick::Random));
    assert!(random.iter().all(|&count| (120..=280).contains(&count)), "{random:?}");
    let weighted = distribution(&sender, &members, 800, Options::new().pick(Pick::Weighted));
    for (count, weight) in weighted.iter().zip(weights) {
        let expected = 100 * usize::from(weight);
        assert!((expected / 2..=expected * 2).contains(count), "{weighted:?}");
    }
    let sticky = distribution(&sender, &members, 50, Options::new().sticky(true));
    assert_eq!(sticky.iter().filter(|&&count| count == 50).count(), 1, "{sticky:?}");
    let local = distribution(&sender, &members, 30, Options::new().prefer_local(true));
    assert_eq!(local, [10, 10, 10], "all are on this host");
}

#[test]
fn the_next_is_tried_when_one_is_full_or_gone() {
    let directory = Directory::start("");
    let sender = directory.relay("sender");
    let small = Relay::connect(directory.config().name("small").queue(2)).wait().unwrap();
    let large = directory.relay("large");
    let (first, second) = (small.join(&id("jobs")), large.join(&id("jobs")));
    wait_until("both to be known", || {
        let outcomes: Vec<_> =
            (0..2).map(|_| sender.send_any(&id("jobs"), "x", Options::new()).wait()).collect();
        let both = first.try_recv().is_some() && second.try_recv().is_some();
        while first.try_recv().is_some() || second.try_recv().is_some() {}
        both && outcomes.iter().all(|outcome| *outcome == Outcome::Delivered)
    });
    for _ in 0..20 {
        assert_eq!(sender.send_any(&id("jobs"), "job", Options::new()).wait(), Outcome::Delivered);
    }
    let count = |member: &Membership| std::iter::from_fn(|| member.try_recv()).count();
    assert_eq!((count(&first), count(&second)), (2, 18), "the full one has what fits");
    // The member goes while its place is still known.
    drop(first);
    for _ in 0..10 {
        assert_eq!(sender.send_any(&id("jobs"), "job", Options::new()).wait(), Outcome::Delivered);
    }
    assert_eq!(count(&second), 10);
    drop(second);
    wait_until("no member to be left", || {
        sender.send_any(&id("jobs"), "job", Options::new()).wait() == Outcome::NotFound
    });
}

#[test]
fn workers_without_clients_share_requests() {
    let directory = Directory::start("");
    let sender = directory.relay("sender");
    let workers = ["a", "b"].map(|name| directory.relay(name));
    let mut served = BTreeMap::new();
    let members = workers.each_ref().map(|relay| relay.join(&id("jobs")));
    std::thread::scope(|scope| {
        for (n, member) in members.iter().enumerate() {
            scope.spawn(move || {
                while let Some(job) = member.recv().wait_for(PATIENCE) {
                    if job.bytes() == b"end" {
                        break;
                    }
                    // What was published to the group is no request.
                    if job.is_request() {
                        job.reply(format!("{n}")).unwrap();
                    }
                }
            });
        }
        wait_known(&sender, "jobs", 2);
        for _ in 0..40 {
            let reply = sender.request_any(&id("jobs"), "job", PATIENCE, Options::new()).wait();
            let text = String::from_utf8(reply.unwrap().to_vec()).unwrap();
            *served.entry(text).or_insert(0) += 1;
        }
        assert_eq!(sender.publish(&id("jobs"), "end").wait().delivered, 2);
    });
    assert_eq!(served, BTreeMap::from([("0".to_owned(), 20), ("1".to_owned(), 20)]));
}
