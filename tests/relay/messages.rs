//! From one worker to another: outcomes, order, sizes, requests.

use std::time::Duration;

use test_support::PATIENCE;
use worker_sdk::relay::{Outcome, RequestError};

use super::{Directory, id, text_of};

#[test]
fn a_message_reaches_the_worker_that_holds_the_id() {
    let directory = Directory::start("");
    let (a, b) = (directory.relay("a"), directory.relay("b"));
    let alice = b.register(&id("alice")).wait().unwrap();
    assert_eq!(a.send(&id("alice"), "1").wait(), Outcome::Delivered);
    assert_eq!(b.send(&id("alice"), "2").wait(), Outcome::Delivered, "in the same process");
    assert_eq!(text_of!(alice).as_deref(), Some("1"));
    assert_eq!(text_of!(alice).as_deref(), Some("2"));
    assert_eq!(a.send(&id("bob"), "3").wait(), Outcome::NotFound);
    drop(alice);
    let config = directory.config().name("impatient").timeout(Duration::from_secs(30));
    let impatient = worker_sdk::relay::Relay::connect(config).wait().unwrap();
    assert_eq!(impatient.send(&id("alice"), "4").wait(), Outcome::NotFound, "after the grace");
    assert_eq!(a.send(&id("alice"), "5").wait(), Outcome::NotFound, "its place was known");
}

#[test]
fn many_messages_arrive_in_order_and_large_ones_whole() {
    let directory = Directory::start("");
    let (a, b) = (directory.relay("a"), directory.relay("b"));
    let alice = b.register(&id("alice")).wait().unwrap();
    let sizes = [0, 1, 64, 1000, 65_536, 300_000, 1024 * 1024];
    let body = |n: usize| {
        let mut body = vec![n as u8; sizes[n % sizes.len()]];
        body.extend_from_slice(&(n as u32).to_le_bytes());
        body.truncate(1024 * 1024);
        body
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in 0..200 {
                let message = alice.recv().wait_for(PATIENCE).expect("a message");
                assert_eq!(message.bytes(), body(n), "message {n}");
            }
        });
        let mut n = 0;
        while n < 200 {
            match a.send(&id("alice"), body(n)).wait() {
                Outcome::Delivered => n += 1,
                other => panic!("{other:?}"),
            }
        }
    });
    let too_long = vec![0; 1024 * 1024 + 1];
    assert_eq!(a.send(&id("alice"), &too_long).wait(), Outcome::TooLong);
    // Many at once, before the first has an outcome.
    let pending: Vec<_> = (0..1000u32).map(|n| a.send(&id("alice"), n.to_le_bytes())).collect();
    let outcomes: Vec<_> = pending.into_iter().map(|one| one.wait()).collect();
    assert!(outcomes.iter().all(|outcome| *outcome == Outcome::Delivered));
    for n in 0..1000u32 {
        assert_eq!(alice.recv().wait_for(PATIENCE).unwrap().bytes(), n.to_le_bytes());
    }
}

#[test]
fn a_full_queue_is_told_and_delays_no_one_else() {
    let directory = Directory::start("");
    let a = directory.relay("a");
    let config = directory.config().name("b").queue(3);
    let b = worker_sdk::relay::Relay::connect(config).wait().unwrap();
    let (slow, quick) = (b.register(&id("slow")).wait().unwrap(), b.register(&id("quick")));
    let quick = quick.wait().unwrap();
    for n in 0..10 {
        let expected = if n < 3 { Outcome::Delivered } else { Outcome::Backpressure };
        assert_eq!(a.send(&id("slow"), n.to_string()).wait(), expected, "message {n}");
        assert_eq!(a.send(&id("quick"), "x").wait(), Outcome::Delivered);
        assert_eq!(text_of!(quick).as_deref(), Some("x"));
    }
    assert_eq!(text_of!(slow).as_deref(), Some("0"));
    assert_eq!(a.send(&id("slow"), "again").wait(), Outcome::Delivered, "there is room again");
    // A post is only counted.
    for _ in 0..5 {
        a.post(&id("slow"), "dropped");
    }
    test_support::wait_until("all outcomes", || {
        let stats = a.stats();
        stats.sent == stats.delivered + stats.not_found + stats.backpressure + stats.lost
    });
    let stats = a.stats();
    assert_eq!((stats.delivered, stats.backpressure), (14, 12));
    assert_eq!(b.stats().refused, 12);
}

#[test]
fn a_newer_registration_takes_over_and_the_older_one_is_told() {
    let directory = Directory::start("");
    let (a, b, c) = (directory.relay("a"), directory.relay("b"), directory.relay("c"));
    let old = b.register(&id("alice")).wait().unwrap();
    assert_eq!(a.send(&id("alice"), "to b").wait(), Outcome::Delivered);
    let new = c.register(&id("alice")).wait().unwrap();
    // Its place was known, and is wrong now.
    assert_eq!(a.send(&id("alice"), "to c").wait(), Outcome::Delivered);
    assert_eq!(text_of!(new).as_deref(), Some("to c"));
    assert_eq!(text_of!(old).as_deref(), Some("to b"), "what had arrived stays");
    assert_eq!(text_of!(old), None);
    assert_eq!(old.ended(), Some(worker_sdk::relay::Ended::Superseded));
    drop(old);
    assert_eq!(a.send(&id("alice"), "still to c").wait(), Outcome::Delivered);
    assert_eq!(text_of!(new).as_deref(), Some("still to c"));
}

#[test]
fn all_registrations_receive_where_that_is_configured() {
    let directory = Directory::start("[namespaces.default]\nregistrations = \"all\"");
    let (a, b, c) = (directory.relay("a"), directory.relay("b"), directory.relay("c"));
    let alice = [a.register(&id("alice")), b.register(&id("alice")), c.register(&id("alice"))]
        .map(|registering| registering.wait().unwrap());
    assert_eq!(a.send(&id("alice"), "all").wait(), Outcome::Delivered);
    for registration in &alice {
        assert_eq!(text_of!(registration).as_deref(), Some("all"));
    }
    alice[1].close();
    let outcome = a.send(&id("alice"), "two").wait();
    assert_eq!(outcome, Outcome::Delivered);
    assert_eq!(text_of!(alice[0]).as_deref(), Some("two"));
    assert_eq!(text_of!(alice[2]).as_deref(), Some("two"));
    assert_eq!(text_of!(alice[1]), None);
}

#[test]
fn messages_wait_while_a_client_reconnects_elsewhere() {
    let directory = Directory::start("grace = \"30s\"");
    let config = directory.config().name("a").timeout(Duration::from_secs(60));
    let a = worker_sdk::relay::Relay::connect(config).wait().unwrap();
    let (b, c) = (directory.relay("b"), directory.relay("c"));
    let alice = b.register(&id("alice")).wait().unwrap();
    assert_eq!(a.send(&id("alice"), "0").wait(), Outcome::Delivered);
    assert_eq!(text_of!(alice).as_deref(), Some("0"));
    drop(alice);
    let mut pending: Vec<_> = (1..=5).map(|n| a.send(&id("alice"), n.to_string())).collect();
    std::thread::sleep(super::MOMENT);
    assert!(pending.iter_mut().all(|one| one.try_take().is_none()), "they wait");
    let alice = c.register(&id("alice")).wait().unwrap();
    for (n, one) in (1..=5).zip(pending) {
        assert_eq!(one.wait(), Outcome::Delivered);
        assert_eq!(text_of!(alice), Some(n.to_string()), "in order");
    }
}

#[test]
fn requests_have_a_reply_or_a_reason() {
    let directory = Directory::start("grace = \"0s\"");
    let (a, b) = (directory.relay("a"), directory.relay("b"));
    let alice = b.register(&id("alice")).wait().unwrap();
    let own = a.register(&id("own")).wait().unwrap();
    let short = Duration::from_millis(100);
    std::thread::scope(|scope| {
        let answer = scope.spawn(|| {
            let message = alice.recv().wait_for(PATIENCE).unwrap();
            assert!(message.is_request());
            message.reply("pong").unwrap();
            drop(alice.recv().wait_for(PATIENCE).unwrap());
            alice.recv().wait_for(PATIENCE).unwrap()
        });
        assert_eq!(&*a.request(&id("alice"), "ping", PATIENCE).wait().unwrap(), b"pong");
        assert_eq!(a.request(&id("alice"), "", PATIENCE).wait(), Err(RequestError::NoReply));
        assert_eq!(a.request(&id("alice"), "", short).wait(), Err(RequestError::TimedOut));
        let late = answer.join().unwrap();
        late.reply("too late").unwrap();
    });
    assert_eq!(a.request(&id("nobody"), "", PATIENCE).wait(), Err(RequestError::NotFound));
    std::thread::scope(|scope| {
        scope.spawn(|| own.recv().wait_for(PATIENCE).unwrap().reply("own").unwrap());
        assert_eq!(&*a.request(&id("own"), "", PATIENCE).wait().unwrap(), b"own");
    });
    // A request that the application will not receive is answered.
    let pending = a.request(&id("alice"), "", PATIENCE);
    test_support::wait_until("the request to arrive", || b.stats().received == 4);
    drop(alice);
    assert_eq!(pending.wait(), Err(RequestError::NoReply));
}

#[test]
fn tasks_await_what_threads_wait_for() {
    let directory = Directory::start("");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let work = async {
        let a = worker_sdk::relay::Relay::connect(directory.config().name("a")).await.unwrap();
        let b = worker_sdk::relay::Relay::connect(directory.config().name("b")).await.unwrap();
        let alice = b.register(&id("alice")).await.unwrap();
        let receives = async {
            let message = alice.recv().await.unwrap();
            message.reply(b"pong").unwrap();
            alice.recv().await.map(|message| message.bytes().to_vec())
        };
        let sends = async {
            let reply = a.request(&id("alice"), "ping", PATIENCE).await.unwrap();
            assert_eq!(&*reply, b"pong");
            a.send(&id("alice"), "bye").await
        };
        let (received, outcome) = tokio::join!(receives, sends);
        assert_eq!((received.as_deref(), outcome), (Some(&b"bye"[..]), Outcome::Delivered));
        let gone = tokio::time::timeout(super::MOMENT, alice.recv()).await;
        assert!(gone.is_err(), "a receive can be given up");
    };
    runtime.block_on(async { tokio::time::timeout(PATIENCE, work).await.unwrap() });
}
