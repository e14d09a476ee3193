//! Segments of strangers.

use std::net::TcpStream;

use dispatch_steer::WorkerSettings;
pub use test_support::forger::{ACK, Forger, SYN, black_hole};

use crate::lab::*;

#[test]
fn a_syn_flood_neither_stops_nor_skews_the_service() {
    let Some(mut lab) = Lab::keepers(4) else { return };
    black_hole();
    for worker in 0..4 {
        let limited = WorkerSettings { maximum: 600, ..WorkerSettings::new(1) };
        lab.steering().set_worker(worker, limited).unwrap();
    }
    // The kernel remembers few handshakes, so that most of the flood is answered with SYN cookies.
    std::fs::write("/proc/sys/net/ipv4/tcp_max_syn_backlog", "64").unwrap();
    std::fs::write("/proc/sys/net/core/somaxconn", "64").unwrap();
    for worker in 0..4 {
        lab.kill(worker);
        lab.spawn(worker, &["python3", "-c", KEEPER, "127.0.0.1", "PORT"]);
        lab.wait_listening(worker);
    }
    let forger = Forger::new();
    let mut held: Vec<TcpStream> = Vec::new();
    for round in 0..100u32 {
        for n in 0..100 {
            forger.send(round * 100 + n, 1024, SYN);
        }
        held.push(connect(V4));
    }
    let totals = lab.steering().totals().unwrap();
    assert!(totals.chosen >= 10_000, "{totals:?}");
    assert_eq!(totals.full, 0, "10,000 forged SYNs do not fill 2,400 places: {totals:?}");
    assert!(lab.pending() <= 600, "only handshakes that the kernel remembers: {}", lab.pending());
    let live = lab.live();
    assert!(live.iter().all(|&live| (10..=40).contains(&live)), "{live:?}");
    eventually("the flood to be forgotten", 0, || lab.pending());
    held.extend((0..100).map(|_| connect(V4)));
    let live = lab.live();
    assert!(spread(&live) <= 1, "{live:?}");
    assert_eq!(live.iter().sum::<i64>(), 200);
    drop(held);
    eventually("no connection to count", vec![0; 4], || lab.live());
}

#[test]
fn stray_acks_count_nothing() {
    let Some(mut lab) = Lab::keepers(2) else { return };
    black_hole();
    let forger = Forger::new();
    for n in 0..2_000 {
        forger.send(n, 2000, ACK);
    }
    // At most one for each processor, until its next look-up.
    let processors = std::thread::available_parallelism().unwrap().get() as u64;
    assert!(lab.pending() <= processors, "{}", lab.pending());
    let held: Vec<TcpStream> = (0..50).map(|_| connect(V4)).collect();
    let live = lab.live();
    assert!(spread(&live) <= 2, "{live:?}");
    eventually("nothing to be pending", 0, || lab.pending());
    drop(held);
    eventually("no connection to count", vec![0; 2], || lab.live());
}

#[test]
fn a_flood_larger_than_the_memory_of_handshakes_leaks_nothing() {
    let Some(mut lab) = Lab::keepers(2) else { return };
    black_hole();
    let held: Vec<TcpStream> = (0..20).map(|_| connect(V4)).collect();
    let forger = Forger::new();
    for n in 0..80_000 {
        forger.send(n % 60_000, 3000 + (n / 60_000) as u16, SYN);
    }
    assert!(lab.steering().handshakes().unwrap() <= 65_536);
    assert_eq!(lab.live(), [10, 10]);
    eventually("the flood to be forgotten", 0, || lab.pending());
    drop(held);
    eventually("no connection to count", vec![0; 2], || lab.live());
}
