//! A dispatcher that does not read its worker's records: nothing in the worker waits for it.

use std::thread;
use std::time::{Duration, Instant};

use dispatch_protocol::wire::{Control, Update};
use test_support::fake_dispatcher::{DEADLINE, FakeDispatcher, Peer};
use worker_sdk::{ClaimError, Worker};

/// Half of the time that one-second waits for each record would take, and far more than a busy
/// machine needs without them.
const PROMPT: Duration = Duration::from_secs(4);

/// A worker with no room for its next record.
fn stuffed(fake: &FakeDispatcher) -> (Worker, Peer) {
    let (worker, peer) = thread::scope(|scope| {
        let worker = scope.spawn(|| Worker::connect(fake.config()).unwrap());
        let peer = fake.welcome_with_affinity_and_updates();
        (worker.join().unwrap(), peer)
    });
    for _ in 0..100_000 {
        match worker.claim("key") {
            Ok(()) => {}
            Err(ClaimError::Busy) => return (worker, peer),
            Err(error) => panic!("{error}"),
        }
    }
    panic!("the socket never fills");
}

/// The first record that is not a claim.
fn after_claims(peer: &Peer) -> Option<Control> {
    loop {
        match peer.control_record() {
            Some(Control::Claim(_)) => {}
            other => return other,
        }
    }
}

#[test]
fn accepts_and_drops_continue_while_changes_are_unsent() {
    let fake = FakeDispatcher::new();
    let (worker, mut peer) = stuffed(&fake);
    let pairs: Vec<_> = (0..8).map(|_| fake.client()).collect();
    let began = Instant::now();
    thread::scope(|scope| {
        let changing = scope.spawn(|| {
            for weight in 2..10 {
                worker.set_weight(weight).unwrap();
            }
        });
        for (_, ours) in &pairs {
            peer.send_one(ours);
            drop(worker.accept_timeout(DEADLINE).unwrap().unwrap());
        }
        changing.join().unwrap();
    });
    assert!(began.elapsed() < PROMPT, "{:?}", began.elapsed());
    // Once there is room, only the last change is sent.
    let update = Update { weight: 9, paused: false, max_connections: 1000 };
    assert_eq!(after_claims(&peer), Some(Control::Update(update)));
    worker.close();
    assert!(matches!(after_claims(&peer), Some(Control::Goodbye(_))));
    assert!(peer.control_record().is_none(), "the end");
}

#[test]
fn an_unsent_goodbye_blocks_nothing_and_precedes_the_end() {
    let fake = FakeDispatcher::new();
    let (worker, mut peer) = stuffed(&fake);
    let (_client, ours) = fake.client();
    peer.send_one(&ours);
    let connection = worker.accept().unwrap().unwrap();
    let began = Instant::now();
    for weight in 2..9 {
        worker.set_weight(weight).unwrap();
    }
    worker.close();
    assert!(worker.accept().unwrap().is_none());
    drop(connection);
    assert!(began.elapsed() < PROMPT, "{:?}", began.elapsed());
    assert_eq!(peer.board.finished(), 1);
    // The goodbye replaces the change, and precedes the end of the session although no connection
    // is live.
    assert!(matches!(after_claims(&peer), Some(Control::Goodbye(_))));
    assert!(peer.control_record().is_none(), "the end");
    worker.wait_until_idle();
}

#[test]
fn a_dispatcher_that_never_reads_delays_the_end_by_a_second() {
    let fake = FakeDispatcher::new();
    let (worker, peer) = stuffed(&fake);
    worker.close();
    let began = Instant::now();
    assert_eq!(worker.shutdown(Duration::from_secs(60)), 0);
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    // The end of the session is there to read.
    assert_eq!(after_claims(&peer), None);
}
