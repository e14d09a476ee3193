//! Tests of the relay that need a process of their own: a fork, and a count of descriptors.
#![allow(unsafe_code, reason = "fork is unsafe")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the report")]
#![allow(dead_code, reason = "the other tests need more of the directory")]

#[path = "relay/directory.rs"]
mod directory;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid};
use test_support::{PATIENCE, wait_until};
use worker_sdk::relay::{Ended, Error, Id, Options, Outcome, Relay, ReplyError, RequestError};

use directory::Directory;

/// One at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn id(text: &str) -> Id {
    Id::new(text).unwrap()
}

/// A child that does not outlive its test.
struct Child(Pid);

impl Drop for Child {
    fn drop(&mut self) {
        // It has mostly ended, and was waited for.
        if waitpid(self.0, Some(WaitPidFlag::WNOHANG)) == Ok(WaitStatus::StillAlive) {
            let _ = kill(self.0, Signal::SIGKILL);
            let _ = waitpid(self.0, None);
        }
    }
}

/// Runs in a child; its exit code says which check failed.
fn in_child(checks: impl FnOnce() -> i32) {
    // SAFETY: the child runs the checks, which the C library supports after a fork, and `_exit`.
    match unsafe { nix::unistd::fork() }.unwrap() {
        ForkResult::Child => {
            let code = checks();
            // SAFETY: it ends the process, without what the parent has registered for its end.
            unsafe { libc::_exit(code) }
        }
        ForkResult::Parent { child } => {
            let _child = Child(child);
            wait_until("the child to end", || {
                match waitpid(child, Some(WaitPidFlag::WNOHANG)).unwrap() {
                    WaitStatus::StillAlive => false,
                    WaitStatus::Exited(_, 0) => true,
                    other => panic!("{other:?}: the code is the number of the check"),
                }
            });
        }
    }
}

#[test]
fn a_forked_child_cannot_use_the_relay_and_does_not_disturb_it() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let directory = Directory::start("");
    let (a, b) = (directory.relay("a"), directory.relay("b"));
    let alice = a.register(&id("alice")).wait().unwrap();
    let room = a.join(&id("room"));
    let watch = a.watch(&id("alice"));
    wait_until("the group to be known", || b.publish(&id("room"), "x").wait().delivered == 1);
    // A thread that has the locks again and again, as others at the moment of a fork.
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::SeqCst) {
                let _ = a.send(&id("other"), "x").wait();
                a.post(&id("alice"), "busy");
                drop(alice.try_recv());
            }
        });
        for round in 0..20 {
            wait_until("a request to arrive", || {
                let pending = b.request(&id("alice"), "ping", Duration::from_secs(5));
                let found = alice.recv().wait_for(Duration::from_secs(5));
                let request = found.filter(|message| message.is_request());
                let arrived = request.is_some();
                if let Some(message) = request {
                    in_child(|| {
                        check(&directory, round, &a, &alice, &room, &watch, message, pending)
                    });
                }
                arrived
            });
        }
        stop.store(true, Ordering::SeqCst);
    });
    // Nothing of the parent has ended.
    assert!(a.is_joined() && alice.ended().is_none() && room.ended().is_none());
    wait_until("room in the queue", || {
        while alice.try_recv().is_some() {}
        b.send(&id("alice"), "still").wait() == Outcome::Delivered
    });
    // After what the thread has posted.
    wait_until("the message to come", || {
        alice.recv().wait_for(PATIENCE).unwrap().bytes() == b"still"
    });
    assert_eq!(b.publish(&id("room"), "x").wait().delivered, 1);
    assert_eq!(watch.ended(), None);
    assert_eq!(directory.log().matches("member_left").count(), 20, "the children's own relays");
}

#[allow(clippy::too_many_arguments, reason = "everything that there is")]
fn check(
    directory: &Directory,
    round: usize,
    relay: &Relay,
    registration: &worker_sdk::relay::Registration,
    membership: &worker_sdk::relay::Membership,
    watch: &worker_sdk::relay::Watch,
    message: worker_sdk::relay::Message,
    pending: worker_sdk::relay::Pending<Result<std::sync::Arc<[u8]>, RequestError>>,
) -> i32 {
    let alice = id("alice");
    let unknown = relay.publish(&alice, "x").wait().unknown;
    let checks = [
        relay.send(&alice, "x").wait() == Outcome::Forked,
        relay.request(&alice, "x", PATIENCE).wait() == Err(RequestError::Forked),
        relay.send_any(&alice, "x", Options::new()).wait() == Outcome::Forked,
        unknown,
        matches!(relay.register(&alice).wait(), Err(Error::Forked)),
        matches!(relay.who(&alice).wait(), Err(Error::Forked)),
        relay.join(&alice).ended() == Some(Ended::Forked),
        relay.watch(&alice).recv().wait().is_none(),
        !relay.is_joined() && relay.stats() == worker_sdk::relay::Stats::default(),
        registration.recv().wait().is_none() && registration.try_recv().is_none(),
        registration.ended() == Some(Ended::Forked),
        membership.recv().wait_for(PATIENCE).is_none(),
        watch.recv().wait().is_none() && watch.ended() == Some(Ended::Forked),
        message.reply("pong") == Err(ReplyError::Forked),
        pending.wait() == Err(RequestError::Forked),
    ];
    if let Some(failed) = checks.iter().position(|passed| !passed) {
        return 1 + failed as i32;
    }
    relay.post(&alice, "x");
    registration.close();
    membership.leave();
    // A relay of its own works, and ends.
    let Ok(own) = Relay::connect(directory.config().name("child")).wait() else { return 101 };
    let Ok(registered) = own.register(&id(&format!("child-{round}"))).wait() else { return 102 };
    drop((own, registered));
    0
}

#[test]
fn no_descriptor_leaks_when_members_come_and_go() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let directory = Directory::start("grace = \"0s\"");
    let stays = directory.relay("stays");
    let own = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let inbox = stays.register(&id("stays")).wait().unwrap();
    let next = |inbox: &worker_sdk::relay::Registration| {
        inbox.recv().wait_for(PATIENCE).unwrap().bytes().to_vec()
    };
    let round = || {
        let comes = directory.relay("comes");
        let goes = comes.register(&id("goes")).wait().unwrap();
        assert_eq!(comes.send(&id("stays"), "x").wait(), Outcome::Delivered);
        assert_eq!(next(&inbox), b"x");
        assert_eq!(stays.send(&id("goes"), "y").wait(), Outcome::Delivered);
        assert_eq!(next(&goes), b"y");
    };
    round();
    let rest = || {
        wait_until("the links to be closed", || stays.stats().links == 0);
        wait_until("the other member to be gone", || directory.count("members") == 1);
    };
    rest();
    // The second time everything is there that is made once.
    round();
    rest();
    let before = (directory.pid().fds(), own());
    (0..20).for_each(|_| round());
    rest();
    // The thread of a relay ends a moment after it, with its descriptors.
    wait_until("directory and members to have closed everything", || {
        directory.pid().fds() <= before.0 && own() <= before.1
    });
}
