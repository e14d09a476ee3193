//! Faults of members, links and the directory: a clear failure for the one that causes it, nothing
//! for the others, and a way back.

use std::time::Duration;

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use test_support::{PATIENCE, wait_until};
use worker_sdk::relay::{Ended, Error, Outcome, Relay, ReplyError, RequestError};

use super::{Directory, id, text_of};

#[test]
fn a_reply_that_is_too_long_fails_at_both_ends_and_the_link_stays() {
    let directory = Directory::start("max_message = 100000");
    let (a, b) = (directory.relay("a"), directory.relay("b"));
    let alice = b.register(&id("alice")).wait().unwrap();
    let own = a.register(&id("own")).wait().unwrap();
    let body = vec![0; 100_001];
    for (relay, inbox, to) in [(&a, &alice, "alice"), (&a, &own, "own")] {
        let pending = relay.request(&id(to), "ping", PATIENCE);
        let message = inbox.recv().wait_for(PATIENCE).unwrap();
        let refused = message.reply(&body);
        assert_eq!(refused, Err(ReplyError::TooLong { len: 100_001, max: 100_000 }));
        assert_eq!(pending.wait(), Err(RequestError::ReplyTooLong));
        let pending = relay.request(&id(to), "ping", PATIENCE);
        inbox.recv().wait_for(PATIENCE).unwrap().reply(&body[1..]).unwrap();
        assert_eq!(pending.wait().unwrap().len(), 100_000, "the longest one fits");
    }
    let links = directory.count("links_total");
    assert_eq!(links, 1, "the link that there was before");
    assert_eq!(a.send(&id("alice"), "x").wait(), Outcome::Delivered);
    let message = alice.recv().wait_for(PATIENCE).unwrap();
    assert_eq!(message.reply("no request"), Err(ReplyError::NotARequest));
}

#[test]
fn messages_wait_for_a_directory_that_has_no_descriptor_left_for_a_link() {
    let directory = Directory::start("");
    let config = directory.config().name("a").timeout(Duration::from_secs(600));
    let a = Relay::connect(config).wait().unwrap();
    let b = directory.relay("b");
    let alice = b.register(&id("alice")).wait().unwrap();
    // No descriptor more than it has.
    let pid = Pid::from_raw(directory.pid().pid());
    let before = getrlimit(Resource::Nofile);
    let limit = |current| {
        let limit = Rlimit { current, maximum: before.maximum };
        prlimit(pid, Resource::Nofile, limit).unwrap();
    };
    limit(Some(3));
    let mut pending = a.send(&id("alice"), "waits");
    wait_until("the directory to refuse links", || directory.log().contains("link_failed"));
    // Several times: it is asked again.
    wait_until("to be asked again", || directory.log().matches("link_failed").count() >= 3);
    assert_eq!(pending.try_take(), None);
    limit(before.current);
    assert_eq!(pending.wait(), Outcome::Delivered);
    assert_eq!(text_of!(alice).as_deref(), Some("waits"));
}

#[test]
fn groups_that_are_sent_to_once_take_no_memory_for_long() {
    let directory = Directory::start("");
    let config = directory.config().name("a").routes(50).timeout(Duration::from_secs(60));
    let many = Relay::connect(config.group_ttl(Duration::from_secs(600))).wait().unwrap();
    let short = Duration::from_millis(200);
    let config = directory.config().name("b").timeout(short).group_ttl(short);
    let brief = Relay::connect(config.routes(50)).wait().unwrap();
    // No group is forgotten while it is in use, or may be: then others are refused, at once.
    for n in 0..60 {
        let published = many.publish(&id(&format!("many-{n}")), "x").wait();
        assert_eq!(published.unknown, n >= 50, "group {n}");
    }
    assert_eq!((many.stats().groups, directory.count("memberships")), (50, 50));
    // Later there is room again, for any number of names.
    for n in 0..500 {
        let group = id(&format!("brief-{n}"));
        wait_until("room for a group", || !brief.publish(&group, "x").wait().unknown);
        assert!(brief.stats().groups <= 50);
    }
    wait_until("the groups to be forgotten", || brief.stats().groups == 0);
    wait_until("the directory to forget them", || directory.count("memberships") == 50);
    assert_eq!(directory.count("groups"), 50);
    drop(many);
    wait_until("all to be forgotten", || directory.count("groups") == 0);
}

#[test]
fn limits_of_a_user_are_named_and_end_what_exceeds_them() {
    let directory = Directory::start(
        "grace = \"0s\"\nmax_ids_per_user = 2\nmax_groups_per_user = 2\nmax_watches_per_user = 2\n\
         max_members_per_user = 3\n",
    );
    let (a, b) = (directory.relay("a"), directory.relay("b"));
    let ids = [a.register(&id("1")).wait().unwrap(), b.register(&id("2")).wait().unwrap()];
    match b.register(&id("3")).wait() {
        Err(Error::NotAccepted(reason)) => assert!(reason.contains("max_ids_per_user"), "{reason}"),
        other => panic!("{other:?}"),
    }
    drop(ids);
    wait_until("room for another id", || b.register(&id("3")).wait().is_ok());

    let rooms = [a.join(&id("1")), b.join(&id("2"))];
    wait_until("the groups to be there", || directory.count("groups") == 2);
    let third = a.join(&id("3"));
    assert!(third.recv().wait_for(PATIENCE).is_none());
    assert_eq!(third.ended(), Some(Ended::NotAccepted));
    assert!(b.publish(&id("3"), "x").wait().unknown);
    drop(rooms);
    wait_until("room for another group", || !b.publish(&id("3"), "x").wait().unknown);

    let watches = [a.watch(&id("1")), a.watch(&id("2"))];
    wait_until("the watches to be there", || directory.count("watches") == 2);
    let third = b.watch(&id("3"));
    assert!(third.recv().wait_for(PATIENCE).is_none());
    assert_eq!(third.ended(), Some(Ended::NotAccepted));
    drop(watches);

    let _third = directory.relay("c");
    let config = directory.config().name("d").join_timeout(Duration::from_millis(300));
    assert!(matches!(Relay::connect(config).wait(), Err(Error::JoinTimeout(_))));
    assert!(directory.log().contains("max_members_per_user"), "{}", directory.log());
}

#[test]
fn queues_of_the_application_are_bounded_in_bytes() {
    let directory = Directory::start("");
    let a = directory.relay("a");
    let config = directory.config().name("b").queue_bytes(250_000).queues_bytes(600_000);
    let b = Relay::connect(config).wait().unwrap();
    let inboxes = ["1", "2", "3"].map(|text| b.register(&id(text)).wait().unwrap());
    let body = vec![0; 100_000];
    let outcomes = |to: &str, count| -> Vec<bool> {
        let send = |_| a.send(&id(to), &body).wait();
        (0..count).map(send).map(|outcome| outcome == Outcome::Delivered).collect()
    };
    assert_eq!(outcomes("1", 3), [true, true, false], "the queue's bytes");
    assert_eq!(outcomes("2", 3), [true, true, false], "of each");
    assert_eq!(outcomes("3", 2), [true, false], "of all together");
    drop(inboxes[0].recv().wait_for(PATIENCE).unwrap());
    assert_eq!(outcomes("3", 2), [true, false]);
    let whole = vec![0; 400_000];
    drop(inboxes);
    let large = b.register(&id("4")).wait().unwrap();
    assert_eq!(a.send(&id("4"), &whole).wait(), Outcome::Delivered, "one may exceed the queue's");
    assert_eq!(large.recv().wait_for(PATIENCE).unwrap().bytes().len(), 400_000);
}

#[test]
fn an_id_that_has_moved_away_from_a_member_that_hangs_is_reached() {
    let directory = Directory::start("");
    let config = directory.config().name("a").timeout(Duration::from_millis(500));
    let a = Relay::connect(config).wait().unwrap();
    let mut hung = std::process::Command::new(test_support::example("relay-worker"));
    hung.arg(directory.socket()).arg(directory.path().join("hung.log")).args(["hung", "1", "1"]);
    let hung = test_support::Process::start("relay-worker", &mut hung);
    // It has the id 0, and is known.
    wait_until("a message to it", || a.send(&id("0"), "hung 1").wait() == Outcome::Delivered);
    hung.signal(nix::sys::signal::Signal::SIGSTOP);
    wait_until("it to hang", || a.send(&id("0"), "hung 2").wait() == Outcome::Lost);
    let b = directory.relay("b");
    let moved = b.register(&id("0")).wait().unwrap();
    wait_until("the id to be reached", || a.send(&id("0"), "here").wait() == Outcome::Delivered);
    assert_eq!(text_of!(moved).as_deref(), Some("here"));
}
