//! `least-score` with real processes: gauges that rise, are stale, have wrong values, or do not
//! exist.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use dispatch_protocol::scoreboard::Scoreboard;
use dispatch_protocol::scoreboard::gauge::{GaugeName, Reading};
use dispatch_protocol::wire::Hello;
use test_support::peer::{Peer, hello};
use test_support::*;
use worker_sdk::{Gauge, Worker};

/// A pool with these multipliers; gauges are valid for long, so that a slow machine does not make
/// them stale.
fn scoring(multipliers: &str) -> (Dispatcher, std::net::SocketAddr) {
    start_scoring(multipliers, "10m")
}

fn start_scoring(multipliers: &str, valid_for: &str) -> (Dispatcher, std::net::SocketAddr) {
    start_one_pool(&format!(
        "policy = \"least-score\"\nhandoff_timeout = \"10m\"\n\
         [pool.web.scores]\nmultipliers = {{ {multipliers} }}\nvalid_for = \"{valid_for}\""
    ))
}

/// A worker in this process that takes every connection and keeps it.
fn taking(dispatcher: &Dispatcher, name: &str) -> Worker {
    let mut worker = own_worker(dispatcher, name);
    let handle = worker.clone();
    thread::spawn(move || {
        let _held: Vec<_> = worker.incoming().collect();
    });
    handle
}

/// Waits until every worker has taken a connection: before that each is tested with one connection
/// at a time.
fn prove(dispatcher: &Dispatcher, address: std::net::SocketAddr) {
    dispatcher.wait_status("every worker to have taken something", |status| {
        drop(connect(address));
        status.pools[0].workers.iter().all(|worker| worker.proven)
    });
}

/// The number of further connections of each worker after this many clients, one after the other.
fn shares(
    dispatcher: &Dispatcher,
    address: std::net::SocketAddr,
    held: &mut Vec<std::net::TcpStream>,
    names: &[&str],
    count: usize,
) -> Vec<u64> {
    let of = |status: &dispatcher::api::status::Status| -> Vec<u64> {
        names.iter().map(|name| worker(status, name).unwrap().taken).collect()
    };
    let before = dispatcher.status();
    for _ in 0..count {
        held.push(connect(address));
    }
    let taken = before.taken + count as u64;
    let after = dispatcher.wait_status("all to be taken", |status| status.taken == taken);
    of(&after).iter().zip(of(&before)).map(|(after, before)| after - before).collect()
}

fn gauge(worker: &Worker, name: &str, value: f64) -> Gauge {
    let gauge = worker.gauge(name).unwrap();
    gauge.set(value);
    gauge
}

#[test]
fn a_longer_queue_wait_shifts_the_next_connections() {
    let (dispatcher, address) = scoring("queue_wait = 1000");
    let names = ["a", "b", "c"];
    let workers = names.map(|name| taking(&dispatcher, name));
    let waits: Vec<Gauge> = workers.iter().map(|w| gauge(w, "queue_wait", 0.0)).collect();
    let mut held = Vec::new();
    // A worker without a taken connection is tested with one connection.
    for _ in names {
        shares(&dispatcher, address, &mut held, &names, 1);
    }
    assert_eq!(loads(&dispatcher.status(), "web").0, [1, 1, 1]);
    assert_eq!(shares(&dispatcher, address, &mut held, &names, 30), [10, 10, 10]);
    // 20 ms more count as much as 20 connections.
    waits[0].set(0.020);
    assert_eq!(shares(&dispatcher, address, &mut held, &names, 1)[0], 0, "the very next one");
    assert_eq!(shares(&dispatcher, address, &mut held, &names, 39)[0], 0);
    assert_eq!(loads(&dispatcher.status(), "web").0, [11, 31, 31]);
    assert_eq!(shares(&dispatcher, address, &mut held, &names, 3), [1, 1, 1], "level again");
    waits[0].set(0.0);
    assert_eq!(shares(&dispatcher, address, &mut held, &names, 10), [10, 0, 0]);

    let status = dispatcher.status();
    let shown = worker(&status, "b").unwrap();
    assert_eq!((shown.gauges[0].name.as_str(), shown.gauges[0].value), ("queue_wait", Some(0.0)));
    assert!(shown.gauges[0].age_milliseconds.is_some_and(|age| age < 600_000));
    assert_eq!((shown.score, shown.not_scored.as_deref()), (Some(33.0), None));
}

#[test]
fn stale_gauges_exclude_a_worker() {
    let (dispatcher, address) = start_scoring("queue_wait = 1", "500ms");
    let names = ["old", "fresh"];
    let [old, fresh] = names.map(|name| taking(&dispatcher, name));
    // One of them would always be chosen if its gauge counted.
    let (old, fresh) = (gauge(&old, "queue_wait", 0.0), gauge(&fresh, "queue_wait", 1e6));
    let (stop, pause) = (AtomicBool::new(false), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::SeqCst) {
                fresh.set(1e6);
                if !pause.load(Ordering::SeqCst) {
                    old.set(0.0);
                }
                thread::sleep(Duration::from_millis(1));
            }
        });
        // A panic in here must still end the thread.
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let is_out = |name: &str| {
                let status = dispatcher.status();
                let worker = worker(&status, name).unwrap();
                worker.not_scored.clone().filter(|_| worker.score.is_none())
            };
            let mut held = Vec::new();
            wait_until("both to be fresh", || names.iter().all(|name| is_out(name).is_none()));
            // Several attempts: on a machine that stalls for half a second both gauges are stale,
            // and the load decides.
            let mut until = |expected: [u64; 2]| {
                let mut seen = Vec::new();
                while seen.last().is_none_or(|shares| *shares != expected) {
                    assert!(seen.len() < 40, "{seen:?} and never {expected:?}");
                    seen.push(shares(&dispatcher, address, &mut held, &names, 20));
                }
            };
            until([20, 0]);

            pause.store(true, Ordering::SeqCst);
            let why = wait_for("the gauge to be old", || is_out("old"));
            assert!(why.starts_with("gauge queue_wait stale: set "), "{why}");
            until([0, 20]);

            pause.store(false, Ordering::SeqCst);
            wait_until("it to be fresh again", || is_out("old").is_none());
            until([20, 0]);
        }));
        stop.store(true, Ordering::SeqCst);
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    });
}

/// Eight processes on one machine, a pool with machine and process gauges, and 1,000 clients at
/// once.
#[test]
fn idle_workers_on_one_machine_share_a_burst_evenly() {
    if !descriptors(3_000) {
        return;
    }
    // As in docs/LOAD_BALANCING.md for workers of one machine.
    let (dispatcher, address) = scoring("connections = 1, process_cpu = 10, process_rss = 0.01");
    let environment = [("DISPATCH_SAMPLE_INTERVAL", "50ms")];
    let _workers: Vec<Process> = (0..8)
        .map(|n| dispatcher.worker_with("mio", "web", &format!("w{n}"), &environment))
        .collect();
    dispatcher.wait_status("all to be measured", |status| {
        let workers = &pool(status, "web").workers;
        workers.len() == 8 && workers.iter().all(|w| w.score.is_some() && w.gauges.len() == 2)
    });
    let streams = connect_at_once(&dispatcher, address, 1_000);
    let status = dispatcher.wait_status("all to be taken", |status| status.taken == 1_000);
    let (loads, spread) = loads(&status, "web");
    assert_eq!(loads.iter().sum::<u64>(), 1_000);
    // The spread is at most that of the gauges: a fully used processor counts as 10 connections,
    // and the memory gauge is equal for all.
    assert!(spread <= 12, "{loads:?}");
    for stream in streams.into_iter().step_by(100) {
        Client::greeted(stream).unwrap().echo("hello");
    }
}

/// A pool that scores by `queue_wait` and reads gauges at this interval.
fn now_and_then(interval: &str) -> (Dispatcher, std::net::SocketAddr) {
    start_one_pool(&format!(
        "policy = \"least-score\"\nhandoff_timeout = \"10m\"\n\
         [pool.web.scores]\nmultipliers = {{ queue_wait = 1 }}\nvalid_for = \"1h\"\n\
         mode = \"interval\"\ninterval = \"{interval}\""
    ))
}

#[test]
fn interval_mode_keeps_scores_but_sees_new_workers() {
    let (dispatcher, address) = now_and_then("30m");
    let names = ["a", "b", "late"];
    let (a, b) = (taking(&dispatcher, "a"), taking(&dispatcher, "b"));
    prove(&dispatcher, address);
    let wait = gauge(&a, "queue_wait", 0.0);
    let _other = gauge(&b, "queue_wait", 100.0);
    let mut held = Vec::new();
    assert_eq!(shares(&dispatcher, address, &mut held, &names[..2], 10), [10, 0]);
    wait.set(500.0);
    assert_eq!(
        shares(&dispatcher, address, &mut held, &names[..2], 10),
        [10, 0],
        "no decision reads gauges"
    );
    let late = taking(&dispatcher, "late");
    assert_eq!(shares(&dispatcher, address, &mut held, &names, 1), [1, 0, 0], "it has set none");
    let _its = gauge(&late, "queue_wait", 0.0);
    dispatcher.wait_status("it to have taken something", |status| {
        held.push(connect(address));
        worker(status, "late").unwrap().proven
    });
    dispatcher.wait_status("all to be taken", |status| status.taken == status.accepted);
    assert_eq!(shares(&dispatcher, address, &mut held, &names, 10), [0, 0, 10]);
}

#[test]
fn at_the_end_of_an_interval_gauges_are_read_again() {
    let (dispatcher, address) = now_and_then("50ms");
    let (a, b) = (taking(&dispatcher, "a"), taking(&dispatcher, "b"));
    prove(&dispatcher, address);
    let wait = gauge(&a, "queue_wait", 0.0);
    let _other = gauge(&b, "queue_wait", 100.0);
    let mut held = Vec::new();
    assert_eq!(shares(&dispatcher, address, &mut held, &["a", "b"], 10), [10, 0]);
    wait.set(500.0);
    dispatcher.wait_status("the core to know", |status| {
        worker(status, "a").is_some_and(|a| a.score.is_some_and(|score| score > 500.0))
    });
    assert_eq!(shares(&dispatcher, address, &mut held, &["a", "b"], 10), [0, 10]);
}

#[test]
fn a_worker_without_gauges_is_a_standby() {
    let (dispatcher, address) = scoring("queue_wait = 1");
    let names = ["new", "older"];
    let [new, _older] = names.map(|name| taking(&dispatcher, name));
    let mut held = Vec::new();
    assert_eq!(shares(&dispatcher, address, &mut held, &names, 10), [5, 5], "no worker has gauges");
    gauge(&new, "queue_wait", 1_000.0);
    assert_eq!(shares(&dispatcher, address, &mut held, &names, 10), [10, 0]);
    let (code, explained) = http_get(&dispatcher.admin(), "/v1/pools/web/explain").unwrap();
    assert_eq!(code, 200);
    for text in ["\"chosen\"", "\"stale-gauge\"", "gauge queue_wait never set"] {
        assert!(explained.contains(text), "{text}: {explained}");
    }
    new.close();
    dispatcher.wait_status("it to leave", |status| {
        worker(status, "new").is_none_or(|w| w.state == "draining")
    });
    let before = worker(&dispatcher.status(), "older").unwrap().taken;
    held.push(connect(address));
    dispatcher.wait_status("the other one to get it", |status| {
        worker(status, "older").unwrap().taken == before + 1
    });
}

#[test]
fn gauges_and_names_that_are_garbage_cost_only_their_worker() {
    let (dispatcher, address) = scoring("queue_wait = 1, \"my.own\" = 2");
    let honest = taking(&dispatcher, "honest");
    let gauges = [gauge(&honest, "my.own", 3.0), gauge(&honest, "queue_wait", 1.0)];
    let peer = Peer::connect(&dispatcher.dispatch());
    let (welcome, mut lane) = peer.join(&Hello { name: "bad".to_owned(), ..hello() });
    let wanted: Vec<&str> = welcome.gauges.iter().map(GaugeName::as_str).collect();
    assert_eq!(wanted, ["queue_wait", "my.own"], "it is told what the pool goes by");
    let file = lane[1].try_clone().unwrap();
    let board = Scoreboard::open(lane.remove(1), welcome.slots).unwrap();
    let first = (256 + 16 * u64::from(welcome.slots)).next_multiple_of(64);
    let write = |at: u64, bytes: &[u8]| {
        assert_eq!(rustix::io::pwrite(&file, bytes, at), Ok(bytes.len()));
    };
    let mut held = Vec::new();
    let names = ["bad", "honest"];
    let mut nothing_for_it = |what: &str| {
        let shares = shares(&dispatcher, address, &mut held, &names, 5);
        assert_eq!(shares, [0, 5], "{what}");
    };
    nothing_for_it("no gauges at all");

    // A valid value of each gauge, and then invalid values.
    board.name_gauge(&"queue_wait".parse().unwrap());
    board.name_gauge(&"my.own".parse().unwrap());
    let now = || {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
        now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
    };
    board.set_gauge(1, Reading { value: 0.0, at: now() });
    for value in [f64::NAN, f64::NEG_INFINITY] {
        board.set_gauge(0, Reading { value, at: now() });
        nothing_for_it("no number");
    }
    wait_for_log(&dispatcher, "event=gauge_impossible worker=2 pool=web name=bad");
    wait_for_log(
        &dispatcher,
        "gauge=queue_wait problem=\"a value that is not a number: as if never set\"",
    );
    board.set_gauge(0, Reading { value: 1e200, at: now() });
    nothing_for_it("clamped to what is far too much");
    let status = dispatcher.status();
    assert_eq!(worker(&status, "bad").unwrap().score, Some(1e15 + 1.0));
    // A time in the future, as after a clock change: it counts as set now.
    board.set_gauge(0, Reading { value: 1e200, at: now() + 3_600_000_000_000 });
    nothing_for_it("an hour ahead");
    assert_eq!(worker(&dispatcher.status(), "bad").unwrap().score, Some(1e15 + 1.0));

    // Names: a duplicate, none, then more than fit.
    board.name_gauge(&"queue_wait".parse().unwrap());
    write(192, &4_u32.to_ne_bytes());
    nothing_for_it("names");
    wait_for_log(&dispatcher, "the name of another gauge: ignored");
    wait_for_log(&dispatcher, "gauge=- problem=\"an invalid name: ignored\"");
    write(192, &u32::MAX.to_ne_bytes());
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    for _ in 0..50 {
        let garbage: Vec<u8> = (0..64 * 24)
            .map(|_| {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                random as u8
            })
            .collect();
        write(first, &garbage);
        // Read by the status and by decisions. Any worker may get the connection: an invalid
        // reading may be a number.
        held_by_somebody(&dispatcher, address);
    }
    let said = dispatcher.log().matches("event=gauge_impossible").count();
    assert!(said <= 5, "each problem is named once, not {said} times");
    let status = dispatcher.status();
    assert_eq!(worker(&status, "honest").unwrap().gauges.len(), 2);
    assert_eq!(worker(&status, "honest").unwrap().state, "active");
    drop((peer, lane));
    dispatcher.wait_status("it to go", |status| worker(status, "bad").is_none());
    drop(gauges);
}

/// A connection that ends at once, at any worker.
fn held_by_somebody(dispatcher: &Dispatcher, address: std::net::SocketAddr) {
    let before = dispatcher.status().accepted;
    drop(connect(address));
    dispatcher.wait_status("it to be accepted", |status| status.accepted > before);
}
