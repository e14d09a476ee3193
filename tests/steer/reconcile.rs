//! Counts that are wrong, which no known event makes them, are corrected; others are not.

use std::net::TcpStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use aya::maps::{Array, Map, MapData};
use dispatch_steer::{Correction, Count, WorkerCounts};
use test_support::wait_until;

use crate::lab::*;

/// Adds to a worker's count behind the programs' back, through the pinned map. Not atomic.
fn spoil(pins: &Path, worker: u32, change: impl FnOnce(&mut WorkerCounts)) {
    let data = MapData::from_pin(pins.join("counts")).unwrap();
    let mut map: Array<_, WorkerCounts> = Map::from_map_data(data).unwrap().try_into().unwrap();
    let mut counts = map.get(&worker, 0).unwrap();
    change(&mut counts);
    map.set(worker, counts, 0).unwrap();
}

#[test]
fn wrong_counts_are_corrected_when_they_are_seen_twice() {
    let Some(mut lab) = Lab::keepers(3) else { return };
    let (_mounted, pins) = lab.pin();
    let held: Vec<TcpStream> = (0..30).map(|_| connect(V4)).collect();
    lab.settled();
    spoil(&pins, 0, |counts| counts.live += 5);
    spoil(&pins, 2, |counts| counts.live -= 12);
    spoil(&pins, 1, |counts| counts.listeners = [3, 1]);
    assert_eq!(lab.live(), [15, 10, -2]);
    assert_eq!(lab.steering().reconcile().unwrap(), [], "seen once");
    let of = |worker, count, change| Correction { worker, count, change };
    assert_eq!(
        lab.steering().reconcile().unwrap(),
        [
            of(1, Count::ListenersV4, -2),
            of(1, Count::ListenersV6, -1),
            of(0, Count::Live, -5),
            of(2, Count::Live, 12)
        ]
    );
    assert_eq!(lab.live(), [10; 3]);
    lab.settled();
    // A worker that was removed.
    spoil(&pins, 1, |counts| counts.live = 11);
    lab.steering().remove_worker(1).unwrap();
    lab.steering().reconcile().unwrap();
    assert_eq!(lab.steering().reconcile().unwrap(), [of(1, Count::Live, -1)]);
    drop(held);
    lab.empty();
}

#[test]
fn what_comes_and_goes_meanwhile_is_not_corrected_and_hides_no_error_for_long() {
    let Some(mut lab) = Lab::keepers(2) else { return };
    let (_mounted, pins) = lab.pin();
    let done = AtomicBool::new(false);
    // Connections of both kinds, and listeners, while the lists are read.
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut held: Vec<TcpStream> = Vec::new();
            while !done.load(Ordering::Relaxed) {
                held.push(connect(V4));
                if held.len() > 40 {
                    held.drain(..fastrand::usize(1..40));
                }
            }
        });
        for _ in 0..200 {
            assert_eq!(lab.steering().reconcile().unwrap(), []);
        }
        spoil(&pins, 0, |counts| counts.live += 1_000);
        let mut corrected = 0;
        wait_until("the count to be corrected", || {
            corrected +=
                lab.steering().reconcile().unwrap().iter().map(|one| one.change).sum::<i64>();
            lab.live()[0] < 100
        });
        // The way in which the count was spoilt can be wrong by some.
        assert!((-1_010..=-900).contains(&corrected), "{corrected}");
        done.store(true, Ordering::Relaxed);
    });
    wait_until("the rest to be corrected", || {
        lab.steering().reconcile().unwrap();
        lab.live() == [0, 0]
    });
    lab.empty();
}
