//! Unusual settings, loggers and clocks.

use std::sync::{Mutex, OnceLock, mpsc};
use std::time::Instant;

use dispatch_protocol::wire::{Channel, Drain, Resume};
use worker_sdk::{Error, Sampling};

use super::*;
use test_support::fake_dispatcher::DEADLINE;

#[test]
fn no_duration_panics() {
    let long = [Duration::from_nanos(1), Duration::from_secs(1 << 62), Duration::MAX];
    for min in long {
        for max in long {
            if min > max {
                continue;
            }
            let config = WorkerConfig::new()
                .dispatch_socket("/nonexistent/dispatch.sock")
                .join_timeout(Duration::from_millis(20))
                .reconnect(min, max)
                .sample(Sampling::Always, max.max(Duration::from_millis(10)));
            let result = Worker::connect(config);
            assert!(
                matches!(result, Err(Error::JoinTimeout { .. })),
                "{min:?} {max:?}: {result:?}"
            );
        }
    }
    let config = WorkerConfig::new().listen("127.0.0.1:0").join_timeout(Duration::MAX);
    let worker = Worker::connect(config).unwrap();
    assert!(matches!(worker.accept_timeout(Duration::ZERO), Err(Error::TimedOut)));
    assert!(worker.wait_until_idle_timeout(Duration::MAX));
    let address = worker.local_addr().unwrap().socket_addr().unwrap();
    let _client = TcpStream::connect(address).unwrap();
    let connection = worker.accept_timeout(Duration::MAX).unwrap().unwrap();
    assert!(!worker.wait_until_idle_timeout(Duration::from_nanos(1)));
    drop(connection);
    assert_eq!(worker.shutdown(Duration::MAX), 0);
}

/// A structured log with the worker's state in every line, whichever code of the SDK logs.
struct Asking;

static WORKER: OnceLock<Worker> = OnceLock::new();
static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());

impl log::Log for Asking {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        WORKER.get().is_none_or(|worker| worker.pool() == "default" && !worker.is_draining())
    }
    fn log(&self, record: &log::Record<'_>) {
        let joined = WORKER.get().map(Worker::is_joined);
        let gauge = WORKER.get().map(|worker| worker.gauge("lines").is_ok());
        LINES.lock().unwrap().push(format!("{joined:?} {gauge:?} {}", record.args()));
    }
    fn flush(&self) {}
}

#[test]
fn the_logger_may_call_the_worker() {
    in_child("close::surprises::logger_child");
}

#[test]
fn logger_child() {
    if !is_child("close::surprises::logger_child") {
        return;
    }
    log::set_logger(&Asking).unwrap();
    log::set_max_level(log::LevelFilter::Trace);
    let mut fake = FakeDispatcher::new();
    let (worker, peer) = join(&fake);
    WORKER.set(worker.clone()).unwrap();
    let serving = thread::spawn(move || worker.accept().unwrap().is_some());
    let said = |what: &str| {
        eventually(what, || LINES.lock().unwrap().iter().any(|line| line.contains(what)));
    };
    said("joined the dispatcher");
    fake.stop();
    drop(peer);
    said("lost the dispatcher");
    said("cannot join the dispatcher");
    fake.start();
    let mut peer = fake.welcome();
    let mut record = Vec::new();
    Channel::Drain(Drain::default()).encode(&mut record);
    Channel::Resume(Resume).encode(&mut Vec::new());
    let (_client, ours) = fake.client();
    peer.send_one(&ours);
    assert!(serving.join().unwrap());
    peer.send_bytes(&record, &[]);
    assert!(WORKER.get().unwrap().accept().unwrap().is_none(), "drained");
    WORKER.get().unwrap().close();
    let lines = LINES.lock().unwrap();
    assert!(lines.iter().any(|line| line.starts_with("Some(false)")), "{lines:?}");
}

#[test]
fn without_a_logger_a_waiting_worker_warns_once() {
    let stderr = in_child("close::surprises::silent_child");
    let lines: Vec<_> = stderr.lines().filter(|line| line.contains("/nonexistent/")).collect();
    assert_eq!(lines.len(), 1, "{stderr}");
    assert!(lines[0].starts_with("cannot join the dispatcher at /nonexistent/"), "{stderr}");
}

#[test]
fn silent_child() {
    if !is_child("close::surprises::silent_child") {
        return;
    }
    let config = WorkerConfig::new()
        .dispatch_socket("/nonexistent/dispatch.sock")
        .join_timeout(Duration::from_millis(50))
        .reconnect(Duration::from_millis(1), Duration::from_millis(5));
    assert!(matches!(Worker::connect(config), Err(Error::JoinTimeout { .. })));
}

/// A worker whose monotonic clock is eleven days ahead of the dispatcher's.
#[test]
fn a_connection_is_as_old_in_a_time_namespace() {
    let unshare = ["unshare", "--time", "--monotonic", "1000000", "--fork", "--kill-child"];
    let probed = Command::new(unshare[0]).args(&unshare[1..]).arg("true").output();
    if !probed.is_ok_and(|output| output.status.success()) {
        return test_support::skip("needs unshare and the right to make a time namespace");
    }
    let fake = FakeDispatcher::new();
    thread::scope(|scope| {
        let worker = scope.spawn(|| {
            in_child_with(
                "close::surprises::elsewhen_child",
                &unshare,
                &[("DISPATCH_SOCKET", fake.path())],
            )
        });
        let mut peer = fake.welcome();
        let (mut client, ours) = fake.client();
        peer.send_one(&ours);
        drop(ours);
        let age = String::from_utf8(read_to_end(&mut client)).unwrap();
        let age = Duration::from_millis(age.parse().unwrap_or_else(|_| panic!("{age:?}")));
        assert!(age >= Duration::from_secs(1) && age < DEADLINE, "{age:?}");
        worker.join().unwrap();
    });
}

#[test]
fn elsewhen_child() {
    if !is_child("close::surprises::elsewhen_child") {
        return;
    }
    let worker = Worker::connect(WorkerConfig::from_env().unwrap()).unwrap();
    let mut connection = accept(&worker);
    let age = connection.age().as_millis().to_string();
    connection.write_all(age.as_bytes()).unwrap();
}

/// The drain of a dispatcher with another clock: only the time left counts.
#[test]
fn a_drain_deadline_is_the_time_that_is_left() {
    let fake = FakeDispatcher::new();
    let (worker, mut peer) = join(&fake);
    let (client, ours) = fake.client();
    peer.send_one(&ours);
    let connection = accept(&worker);
    let (tell, told) = mpsc::channel();
    worker.on_drain(move |drain| tell.send(drain.deadline()).unwrap());
    let drain = |deadline_ns, left| {
        let mut record = Vec::new();
        Channel::Drain(Drain { deadline_ns, left: Some(left) }).encode(&mut record);
        peer.send_bytes(&record, &[]);
    };
    // By this clock the deadline has passed long ago.
    let hour = Duration::from_secs(3600);
    let began = Instant::now();
    drain(1, hour);
    assert!(worker.accept().unwrap().is_none());
    let deadline = told.recv_timeout(DEADLINE).unwrap().unwrap();
    assert!(deadline >= began + hour && deadline <= Instant::now() + hour);
    assert!(is_open(&client));
    // By this clock the deadline is centuries away.
    drain(u64::MAX, Duration::ZERO);
    assert!(worker.accept().unwrap().is_none());
    let mut client = client;
    assert_eq!(read_to_end(&mut client), b"");
    drop((connection, ours));
}
