//! Honest workers that are slow, beside stuck ones: every client is served, moves are few, and trust does not flicker.

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use test_support::*;

const CLIENTS: u64 = 60;

/// So many clients, 20 in a second, each served to its end; says how long each waited for its greeting.
fn clients(address: SocketAddr) -> Vec<Duration> {
    let visits: Vec<_> = (0..CLIENTS)
        .map(|_| {
            thread::sleep(Duration::from_millis(50));
            thread::spawn(move || {
                let began = Instant::now();
                let client = Client::connect(address).expect("every client is served");
                let waited = began.elapsed();
                client.finish();
                waited
            })
        })
        .collect();
    visits.into_iter().map(|visit| visit.join().unwrap()).collect()
}

/// Workers of this flavour whose rounds, or whose service of one client, take so long.
fn slow(dispatcher: &Dispatcher, flavour: &str, count: usize, pause: u64) -> Vec<Process> {
    let pause = pause.to_string();
    let environment = [("TEST_WORKER_PAUSE", pause.as_str())];
    let worker = |n| dispatcher.worker_with(flavour, "web", &format!("slow{n}"), &environment);
    (0..count).map(worker).collect()
}

fn all_are_served(flavour: &str, count: usize, pause: u64) {
    let dispatcher = Dispatcher::start(&one_pool(""));
    let _workers = slow(&dispatcher, flavour, count, pause);
    dispatcher.wait_joined("web", count);
    let mut waits = clients(dispatcher.address("web"));
    waits.sort();
    // For people: the machine's noise decides nothing here.
    let (median, longest) = (waits[waits.len() / 2], waits[waits.len() - 1]);
    println!("{flavour}, {count} of {pause} ms: half waited {median:?}, the longest {longest:?}");
    let status = dispatcher.wait_status("all to be taken", |status| status.taken == CLIENTS);
    let pool = pool(&status, "web");
    // A thread of another worker that is idle is reason enough to move; for event loops only a stop is.
    let most = if flavour == "serial" { CLIENTS } else { CLIENTS / 3 };
    assert!(pool.revoked <= most, "{} moves", pool.revoked);
    // On a busy machine a worker may really stop for a moment.
    assert!(pool.suspects <= 2 * count as u64, "suspect {} times", pool.suspects);
}

#[test]
fn two_loops_of_320_ms() {
    for flavour in ["mio", "tokio"] {
        all_are_served(flavour, 2, 320);
    }
}

#[test]
fn eight_loops_of_50_ms() {
    for flavour in ["mio", "tokio"] {
        all_are_served(flavour, 8, 50);
    }
}

#[test]
fn serial_workers() {
    all_are_served("serial", 2, 50);
    all_are_served("serial", 8, 200);
}

#[test]
fn stuck_workers_beside_slow_ones() {
    let dispatcher = Dispatcher::start(&one_pool(""));
    let never = [("TEST_WORKER", "never-take")];
    let _silent = dispatcher.worker_with("blocking", "web", "silent", &never);
    let answers = [("TEST_WORKER", "only-answer")];
    let _stuck: Vec<Process> = (0..3)
        .map(|n| dispatcher.worker_with("mio", "web", &format!("stuck{n}"), &answers))
        .collect();
    let _slow = slow(&dispatcher, "tokio", 2, 50);
    dispatcher.wait_joined("web", 6);
    clients(dispatcher.address("web"));
    let status = dispatcher.wait_status("all to be taken", |status| status.taken == CLIENTS);
    for name in ["silent", "stuck0", "stuck1", "stuck2"] {
        let stuck = worker(&status, name).unwrap();
        assert_eq!((stuck.taken, stuck.load, stuck.proven), (0, 0, false), "{name}");
    }
}

#[test]
fn a_pool_that_is_not_served_refuses_until_it_is() {
    let dispatcher = Dispatcher::start(&one_pool("wait_for_worker = \"1s\""));
    let address = dispatcher.address("web");
    let answers = [("TEST_WORKER", "only-answer")];
    let _stuck = dispatcher.worker_with("mio", "web", "stuck", &answers);
    dispatcher.wait_joined("web", 1);
    // It waits, and is turned away with all that come later.
    assert!(Client::connect(address).is_err());
    dispatcher.wait_status("refusal", |status| pool(status, "web").state == "refusing");
    let (code, _) = http_get(&dispatcher.dir.join("admin.sock"), "/readyz").unwrap();
    assert_eq!(code, 503);
    wait_for_log(&dispatcher, "event=refusing pool=web");
    let _good = dispatcher.worker("tokio", "web", "good");
    dispatcher.wait_status("service", |_| Client::connect(address).is_ok());
    dispatcher.wait_status("readiness", |_| {
        http_get(&dispatcher.dir.join("admin.sock"), "/readyz").is_ok_and(|(code, _)| code == 200)
    });
}
