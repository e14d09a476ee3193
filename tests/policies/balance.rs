//! Balance: loads differ by at most one at any time, with every kind of worker.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use test_support::*;

const CONFIG: &str = r#"
[[listener]]
name = "web"
address = "127.0.0.1:0"
pool = "web"

[pool.web]
handoff_timeout = "30s"
"#;

/// Requests the status repeatedly while `work` runs; no answer may have a spread above `most`.
fn watched(dispatcher: &Dispatcher, most: u64, work: impl FnOnce()) -> usize {
    let done = AtomicBool::new(false);
    let mut samples = 0;
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut samples = 0;
            while !done.load(Ordering::Relaxed) {
                let status = dispatcher.status();
                let (loads, spread) = loads(&status, "web");
                assert!(spread <= most, "spread {spread}: {loads:?}");
                samples += 1;
            }
            samples
        });
        // A panic in `work` must still end the watcher.
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        done.store(true, Ordering::Relaxed);
        samples = watcher.join().unwrap();
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    });
    samples
}

/// The tests in this file share one process, whose descriptors suffice for 10,000 connections once.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// 10,000 connections opened and held over 4 workers.
fn ten_thousand_held(flavour: &str) {
    if !descriptors(16_000) {
        return;
    }
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let dispatcher = Dispatcher::start(CONFIG);
    let _workers = dispatcher.workers(flavour, "web", 4);
    let address = dispatcher.address("web");
    dispatcher.prove_all(address);
    let before = dispatcher.status().taken;
    let mut clients = Vec::new();
    let samples = watched(&dispatcher, 1, || {
        // As fast as the workers take connections: a worker with `max_untaken` untaken connections
        // is skipped, and on a machine with few cores this client alone could fill one.
        for opened in (500..=10_000).step_by(500) {
            clients.extend((0..500).map(|_| connect(address)));
            dispatcher.wait_status("all to be taken", |status| status.taken == before + opened);
        }
    });
    assert!(samples > 10, "only {samples} samples");
    let status = dispatcher.status();
    assert_eq!(loads(&status, "web"), (vec![2500; 4], 0));
    assert_eq!((status.queued, status.in_flight), (0, 0));
    // Every connection is served.
    for client in clients.drain(..).step_by(500) {
        Client::greeted(client).unwrap().echo("hello");
    }
    dispatcher.wait_status("all to be closed", |status| loads(status, "web").0 == [0; 4]);
}

#[test]
fn ten_thousand_held_blocking() {
    ten_thousand_held("blocking");
}

#[test]
fn ten_thousand_held_tokio() {
    ten_thousand_held("tokio");
}

#[test]
fn ten_thousand_held_mio() {
    ten_thousand_held("mio");
}

/// 2,000 clients connect at once over 8 workers.
fn burst(flavour: &str) {
    if !descriptors(3_000) {
        return;
    }
    let dispatcher = Dispatcher::start(CONFIG);
    let _workers = dispatcher.workers(flavour, "web", 8);
    let address = dispatcher.address("web");
    dispatcher.prove_all(address);
    let before = dispatcher.status().taken;
    let mut clients = Vec::new();
    watched(&dispatcher, 1, || {
        let threads: Vec<_> = (0..8)
            .map(|_| {
                std::thread::spawn(move || (0..250).map(|_| connect(address)).collect::<Vec<_>>())
            })
            .collect();
        for thread in threads {
            clients.extend(thread.join().unwrap());
        }
        dispatcher.wait_status("all to be taken", |status| status.taken == before + 2_000);
    });
    assert_eq!(loads(&dispatcher.status(), "web"), (vec![250; 8], 0));
}

#[test]
fn burst_blocking() {
    burst("blocking");
}

#[test]
fn burst_tokio() {
    burst("tokio");
}

#[test]
fn burst_mio() {
    burst("mio");
}

/// 2,000 held over 8 workers, then 8,000 close/open events: max/mean at most 1.01 in every status.
fn churn(flavour: &str) {
    if !descriptors(3_000) {
        return;
    }
    let dispatcher = Dispatcher::start(CONFIG);
    let _workers = dispatcher.workers(flavour, "web", 8);
    let address = dispatcher.address("web");
    dispatcher.prove_all(address);
    let mut clients: Vec<Client> = (0..2_000).map(|_| Client::connect(address).unwrap()).collect();
    // xorshift: the same sequence in every run.
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut worst: f64 = 0.0;
    for event in 0..4_000 {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let victim = usize::try_from(random % clients.len() as u64).unwrap();
        clients.swap_remove(victim).finish();
        clients.push(Client::connect(address).unwrap());
        if event % 100 == 99 {
            let status = dispatcher.wait_status("the count to settle", |status| {
                loads(status, "web").0.iter().sum::<u64>() == 2_000
            });
            let (loads, _) = loads(&status, "web");
            worst = worst.max(*loads.iter().max().unwrap() as f64 / 250.0);
        }
    }
    assert!(worst <= 1.01, "max/mean {worst}");
}

#[test]
fn churn_blocking() {
    churn("blocking");
}

#[test]
fn churn_tokio() {
    churn("tokio");
}

#[test]
fn churn_mio() {
    churn("mio");
}
