//! The gauges of a worker, and their values when the dispatcher goes.
#![allow(unsafe_code, reason = "the test wraps system calls")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the report")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::close::{in_child, is_child};
use dispatch_protocol::scoreboard::Scoreboard;
use dispatch_protocol::scoreboard::gauge::{GAUGES, Reading, names};
use test_support::fake_dispatcher::{FakeDispatcher, Peer, eventually};
use worker_sdk::{Error, Sampling, Worker, WorkerConfig};

/// A worker of a pool that uses these gauges for scores.
fn joined(fake: &FakeDispatcher, config: WorkerConfig, scored: &[&str]) -> (Worker, Peer) {
    let worker = thread::spawn(move || Worker::connect(config).unwrap());
    let peer = fake.welcome_scoring(256, scored);
    (worker.join().unwrap(), peer)
}

fn number(board: &Scoreboard, name: &str) -> Option<u32> {
    let named = |&gauge: &u32| board.gauge_name(gauge).unwrap().unwrap().as_str() == name;
    (0..board.named_gauges()).find(named)
}

fn reading(board: &Scoreboard, name: &str) -> Option<Reading> {
    board.gauge(number(board, name)?)
}

fn named(board: &Scoreboard) -> Vec<String> {
    (0..board.named_gauges()).map(|n| board.gauge_name(n).unwrap().unwrap().to_string()).collect()
}

fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    u64::try_from(now.tv_sec).unwrap() * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap()
}

/// Threads of this process that take samples.
fn samplers() -> usize {
    let name = |entry: std::io::Result<std::fs::DirEntry>| {
        std::fs::read_to_string(entry.ok()?.path().join("comm")).ok()
    };
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    tasks.filter_map(name).filter(|name| name.trim() == "gauges").count()
}

#[test]
fn a_set_gauge_is_visible_immediately_with_its_time() {
    let fake = FakeDispatcher::new();
    let (worker, peer) = joined(&fake, fake.config(), &[]);
    assert_eq!(peer.board.named_gauges(), 0);
    let wait = worker.gauge(names::QUEUE_WAIT).unwrap();
    let own = worker.gauge("my.own-gauge_1").unwrap();
    assert_eq!(named(&peer.board), ["queue_wait", "my.own-gauge_1"]);
    assert_eq!(reading(&peer.board, "queue_wait"), None, "not set yet");
    for value in [0.5, -1e300, 0.0] {
        let before = now();
        wait.set(value);
        let seen = reading(&peer.board, "queue_wait").unwrap();
        assert_eq!(seen.value, value);
        assert!((before..=now()).contains(&seen.at));
    }
    // The same name is the same gauge, from any handle and thread.
    let again = worker.clone().gauge("my.own-gauge_1").unwrap();
    thread::spawn(move || again.set(3.0)).join().unwrap();
    assert_eq!(reading(&peer.board, "my.own-gauge_1").unwrap().value, 3.0);
    own.clone().set(4.0);
    assert_eq!(reading(&peer.board, "my.own-gauge_1").unwrap().value, 4.0);
    assert_eq!(peer.board.named_gauges(), 2);
    assert_eq!(format!("{own:?}"), "Gauge(Some(\"my.own-gauge_1\"))");
}

#[test]
fn what_is_no_number_is_not_set() {
    let fake = FakeDispatcher::new();
    let (worker, peer) = joined(&fake, fake.config(), &[]);
    let gauge = worker.gauge("x").unwrap();
    gauge.set(1.0);
    let before = reading(&peer.board, "x");
    for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        gauge.set(value);
        assert_eq!(reading(&peer.board, "x"), before);
    }
}

#[test]
fn bad_names_and_too_many_gauges_are_errors() {
    let worker = Worker::connect(WorkerConfig::new().listen("127.0.0.1:0")).unwrap();
    for bad in ["", "two words", "a\n", "\u{e9}", &"x".repeat(49)] {
        match worker.gauge(bad) {
            Err(Error::Config { setting: "gauge", problem }) => {
                assert!(problem.contains("48"), "{problem}");
            }
            other => panic!("{other:?}"),
        }
    }
    for gauge in 0..GAUGES {
        worker.gauge(&format!("g{gauge}")).unwrap().set(1.0);
    }
    let error = worker.gauge("one-more").unwrap_err().to_string();
    assert!(error.contains("24 gauges already"), "{error}");
    worker.gauge("g23").expect("it is there already");
}

#[test]
fn values_outlive_their_dispatcher() {
    let mut fake = FakeDispatcher::new();
    let (worker, peer) = joined(&fake, fake.config(), &[]);
    let (wait, sessions) = (worker.gauge("queue_wait").unwrap(), worker.gauge("sessions").unwrap());
    let never = worker.gauge("never-set").unwrap();
    wait.set(1.0);
    let before = reading(&peer.board, "queue_wait").unwrap();
    fake.stop();
    let old = peer.die();
    // Between two dispatchers: one gauge is set, one is new.
    let accepting = worker.clone();
    let serving = thread::spawn(move || accepting.accept());
    eventually("the worker notices", || !worker.is_joined());
    sessions.set(7.0);
    worker.gauge("new").unwrap().set(8.0);
    assert_eq!(reading(&old, "sessions"), None, "the old one gets no more");
    fake.start();
    let peer = fake.welcome();
    eventually("all are shown again", || peer.board.named_gauges() == 4);
    eventually("the values are shown, too", || reading(&peer.board, "new").is_some());
    assert_eq!(reading(&peer.board, "queue_wait"), Some(before), "with the time it was set");
    assert_eq!(reading(&peer.board, "sessions").unwrap().value, 7.0);
    assert_eq!(reading(&peer.board, "new").unwrap().value, 8.0);
    assert_eq!(reading(&peer.board, "never-set"), None);
    never.set(9.0);
    wait.set(2.0);
    assert_eq!(reading(&peer.board, "never-set").unwrap().value, 9.0);
    assert!(reading(&peer.board, "queue_wait").unwrap().at > before.at);
    worker.close();
    serving.join().unwrap().unwrap();
}

#[test]
fn nothing_is_lost_when_it_is_set_during_a_rejoin() {
    let mut fake = FakeDispatcher::new();
    let (worker, mut peer) = joined(&fake, fake.config(), &[]);
    let gauge = worker.gauge("counter").unwrap();
    let accepting = worker.clone();
    let serving = thread::spawn(move || accepting.accept());
    let done = AtomicBool::new(false);
    let (last, peer) = thread::scope(|scope| {
        let setting = scope.spawn(|| {
            let mut count = 0.0;
            while !done.load(Ordering::SeqCst) {
                count += 1.0;
                gauge.set(count);
            }
            count
        });
        for _ in 0..5 {
            fake.stop();
            drop(peer);
            fake.start();
            peer = fake.welcome();
            eventually("it is shown again", || reading(&peer.board, "counter").is_some());
            // The first visible value may be slightly old, but values never go backwards.
            let mut before = 0.0;
            for _ in 0..1000 {
                let value = reading(&peer.board, "counter").unwrap().value;
                assert!(value >= before, "{value} after {before}");
                before = value;
            }
        }
        done.store(true, Ordering::SeqCst);
        (setting.join().unwrap(), peer)
    });
    assert_eq!(reading(&peer.board, "counter").unwrap().value, last);
    worker.close();
    serving.join().unwrap().unwrap();
}

/// One test for all cases, because they look for threads of this process.
#[test]
fn sampling_starts_for_the_pool_or_by_configuration() {
    let fake = FakeDispatcher::new();
    let often = Duration::from_millis(10);

    // By default the SDK measures nothing.
    let (worker, peer) = joined(&fake, fake.config(), &["queue_wait"]);
    assert_eq!((peer.board.named_gauges(), samplers()), (0, 0));
    drop((worker, peer));

    // The pool asks for two of them; both are measured repeatedly.
    let config = fake.config().sample(Sampling::Auto, often);
    let scored = ["process_cpu", "queue_wait", "free_memory"];
    let (worker, peer) = joined(&fake, config, &scored);
    eventually("both are set", || {
        ["process_cpu", "free_memory"].iter().all(|name| reading(&peer.board, name).is_some())
    });
    assert_eq!((named(&peer.board).len(), samplers()), (2, 1));
    assert!(reading(&peer.board, "free_memory").unwrap().value > 1.0);
    let first = reading(&peer.board, "process_cpu").unwrap().at;
    eventually("they are set again", || {
        let later = |name| reading(&peer.board, name).unwrap().at > first + 20_000_000;
        later("process_cpu") && later("free_memory")
    });
    // A busy thread is visible.
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        });
        eventually("a busy thread is seen", || {
            reading(&peer.board, "process_cpu").unwrap().value > 0.1
        });
        done.store(true, Ordering::Relaxed);
    });
    drop(worker);
    eventually("the thread ends with the worker", || samplers() == 0);

    // Not with `never`.
    let config = fake.config().sample(Sampling::Never, often);
    let (worker, peer) = joined(&fake, config, &scored);
    assert_eq!((peer.board.named_gauges(), samplers()), (0, 0));
    drop(worker);

    // All four with `always`.
    let config = fake.config().sample(Sampling::Always, often);
    let (worker, peer) = joined(&fake, config, &[]);
    eventually("all four are set", || {
        let four = ["system_cpu", "free_memory", "process_cpu", "process_rss"];
        four.iter().all(|name| reading(&peer.board, name).is_some())
    });
    assert!((0.0..=1.0).contains(&reading(&peer.board, "system_cpu").unwrap().value));
    assert!(reading(&peer.board, "process_rss").unwrap().value > 0.4);
    drop(worker);
    eventually("the thread ends with the worker", || samplers() == 0);
}

#[test]
fn a_forked_child_sets_nothing() {
    // In a separate process, because a fork concerns every connection of the process.
    in_child("gauges::gauge_child");
}

#[test]
fn gauge_child() {
    if !is_child("gauges::gauge_child") {
        return;
    }
    let fake = FakeDispatcher::new();
    let (worker, peer) = joined(&fake, fake.config(), &[]);
    let gauge = worker.gauge("x").unwrap();
    gauge.set(1.0);
    let before = reading(&peer.board, "x");
    // SAFETY: the child takes no lock, allocates nothing, and ends itself.
    unsafe {
        match nix::unistd::fork().unwrap() {
            nix::unistd::ForkResult::Child => {
                gauge.set(2.0);
                let refused = matches!(worker.gauge("of.the.child"), Err(Error::Forked));
                libc::_exit(if refused { 0 } else { 1 });
            }
            nix::unistd::ForkResult::Parent { child } => {
                let status = nix::sys::wait::waitpid(child, None).unwrap();
                assert_eq!(status, nix::sys::wait::WaitStatus::Exited(child, 0));
            }
        }
    }
    assert_eq!(reading(&peer.board, "x"), before);
    // The parent's values are unchanged.
    worker.gauge("y").unwrap().set(3.0);
    assert_eq!(named(&peer.board), ["x", "y"]);
    assert_eq!(reading(&peer.board, "y").unwrap().value, 3.0);
}

#[test]
fn a_gauge_with_another_index_is_not_shown() {
    let fake = FakeDispatcher::new();
    let (worker, peer) = joined(&fake, fake.config(), &[]);
    worker.gauge("before").unwrap().set(1.0);
    peer.board.name_gauge(&"stranger".parse().unwrap()).unwrap();
    worker.gauge("x").unwrap().set(2.0);
    assert_eq!(named(&peer.board), ["before", "stranger", "x"]);
    assert_eq!((reading(&peer.board, "stranger"), reading(&peer.board, "x")), (None, None));
}

#[test]
fn gauges_work_without_a_dispatcher() {
    let worker = Worker::connect(WorkerConfig::new().listen("127.0.0.1:0")).unwrap();
    let gauge = worker.gauge("x").unwrap();
    gauge.set(1.0);
    drop(worker);
    gauge.set(2.0);
}
