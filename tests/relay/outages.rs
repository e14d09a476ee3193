//! The directory ends and returns.

use test_support::{PATIENCE, wait_until};
use worker_sdk::relay::{Change, Outcome, Relay};

use super::{Directory, id, text_of};

#[test]
fn known_workers_continue_and_everything_registers_again() {
    let mut directory = Directory::start("");
    let (a, b) = (directory.relay("a"), directory.relay("b"));
    let alice = b.register(&id("alice")).wait().unwrap();
    let room = b.join(&id("room"));
    let watch = a.watch(&id("bob"));
    assert_eq!(a.send(&id("alice"), "1").wait(), Outcome::Delivered);
    wait_until("the group to be known", || a.publish(&id("room"), "x").wait().delivered == 1);

    directory.kill();
    wait_until("the loss to be noticed", || !a.is_joined() && !b.is_joined());
    assert_eq!(a.send(&id("alice"), "2").wait(), Outcome::Delivered, "without a directory");
    assert_eq!(a.publish(&id("room"), "y").wait().delivered, 1);
    assert!(a.who(&id("alice")).wait().is_err());
    // A registration and a message to an unknown id wait for the directory.
    let bob = b.register(&id("bob"));
    let to_carol = a.send(&id("carol"), "");

    directory.restart();
    let bob = bob.wait().unwrap();
    let change = watch.recv().wait_for(PATIENCE).unwrap().change;
    assert_eq!(change, Change::Missed, "bob may have come before the watch was there again");
    // The question goes the way of the watch, so the directory has the watch when it answers.
    assert!(!a.who(&id("bob")).wait().unwrap().places.is_empty());
    let next = b.register(&id("bob")).wait().unwrap();
    wait_until("the watch to tell", || {
        watch.try_recv().is_some_and(|event| event.change == Change::Moved)
    });
    drop(bob);
    let bob = next;
    assert_ne!(to_carol.wait(), Outcome::Delivered);
    let c = directory.relay("c");
    wait_until("alice to be registered again", || {
        !c.who(&id("alice")).wait().unwrap().places.is_empty()
    });
    assert_eq!(c.send(&id("alice"), "3").wait(), Outcome::Delivered);
    assert_eq!(a.send(&id("bob"), "4").wait(), Outcome::Delivered);
    for expected in ["1", "2", "3"] {
        assert_eq!(text_of!(alice).as_deref(), Some(expected));
    }
    assert_eq!(text_of!(bob).as_deref(), Some("4"));
    wait_until("the group to be known again", || c.publish(&id("room"), "z").wait().delivered == 1);
    drop(room);
}

#[test]
fn the_newest_registration_stays_the_newest_over_a_restart() {
    let mut directory = Directory::start("");
    let (a, b) = (directory.relay("a"), directory.relay("b"));
    // It registers again first when it hears of the directory first; the stamps decide anyhow.
    for _ in 0..3 {
        let old = a.register(&id("alice")).wait().unwrap();
        let new = b.register(&id("alice")).wait().unwrap();
        directory.kill();
        wait_until("the loss to be noticed", || !a.is_joined() && !b.is_joined());
        directory.restart();
        wait_until("both to be back", || a.is_joined() && b.is_joined());
        let c = directory.relay("c");
        wait_until("it to be registered again", || {
            let places = c.who(&id("alice")).wait().unwrap().places;
            places.first().is_some_and(|place| place.worker == "b")
        });
        assert_eq!(c.send(&id("alice"), "x").wait(), Outcome::Delivered);
        assert_eq!(text_of!(new).as_deref(), Some("x"));
        drop(old);
    }
}

#[test]
fn a_message_without_a_directory_is_lost_after_the_timeout() {
    let mut directory = Directory::start("");
    let config = directory.config().timeout(super::MOMENT * 4);
    let a = Relay::connect(config).wait().unwrap();
    directory.kill();
    wait_until("the loss to be noticed", || !a.is_joined());
    assert_eq!(a.send(&id("alice"), "").wait(), Outcome::Lost);
    assert!(a.publish(&id("room"), "").wait().unknown);
}
