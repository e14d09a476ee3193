//! The end of a worker that finishes its connections: waits, in every layer, until the last has
//! ended.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the report")]

use std::sync::mpsc;
use std::thread;

use mio::{Events, Interest, Poll, Token};
use test_support::fake_dispatcher::{DEADLINE, FakeDispatcher, eventually};
use worker_sdk::mio::MioWorker;
use worker_sdk::tokio::Listener;
use worker_sdk::{Error, Worker};

fn eventually_asleep(thread: rustix::thread::Pid) {
    let stat = format!("/proc/self/task/{}/stat", thread.as_raw_nonzero());
    eventually("it sleeps", || {
        let stat = std::fs::read_to_string(&stat).unwrap();
        stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" S"))
    });
}

#[test]
fn the_last_connection_wakes_every_waiting_thread() {
    let fake = FakeDispatcher::new();
    let (worker, mut peer) = thread::scope(|scope| {
        let worker = scope.spawn(|| Worker::connect(fake.config()).unwrap());
        let peer = fake.welcome();
        (worker.join().unwrap(), peer)
    });
    worker.wait_until_idle();
    let pairs: Vec<_> = (0..3).map(|_| fake.client()).collect();
    let mut connections: Vec<_> = pairs
        .iter()
        .map(|(_, ours)| {
            peer.send_one(ours);
            worker.accept().unwrap().unwrap()
        })
        .collect();
    worker.close();
    let (done, ends) = mpsc::channel();
    let (started, starts) = mpsc::channel();
    thread::scope(|scope| {
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let (worker, done, started) = (&worker, done.clone(), started.clone());
                scope.spawn(move || {
                    started.send(rustix::thread::gettid()).unwrap();
                    worker.wait_until_idle();
                    done.send(worker.live()).unwrap();
                })
            })
            .collect();
        (0..3).for_each(|_| eventually_asleep(starts.recv().unwrap()));
        drop(connections.pop());
        drop(connections.pop());
        assert!(ends.try_recv().is_err(), "one is left");
        // A connection that is given away still counts.
        let (stream, guard) = connections.remove(0).into_parts().unwrap();
        drop(stream);
        assert!(ends.try_recv().is_err(), "its guard is left");
        drop(guard);
        (0..3).for_each(|_| assert_eq!(ends.recv_timeout(DEADLINE), Ok(0)));
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
    peer.wait_finished(3);
}

#[test]
fn no_end_is_missed() {
    let worker = Worker::connect(worker_sdk::WorkerConfig::new().listen("127.0.0.1:0")).unwrap();
    let address = worker.local_addr().unwrap().socket_addr().unwrap();
    // The end of a connection races with the check for live connections.
    for _ in 0..500 {
        let _client = std::net::TcpStream::connect(address).unwrap();
        let connection = worker.accept().unwrap().unwrap();
        let ending = thread::spawn(move || drop(connection));
        let (done, end) = mpsc::channel();
        let waiting = worker.clone();
        thread::spawn(move || {
            waiting.wait_until_idle();
            done.send(()).unwrap();
        });
        end.recv_timeout(DEADLINE).expect("it returns");
        ending.join().unwrap();
    }
}

/// Fails instead of hanging.
async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.expect("it returns")
}

#[test]
fn with_tokio() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let config = worker_sdk::WorkerConfig::new().listen("127.0.0.1:0");
        let listener = Listener::connect(config).await.unwrap();
        let address = listener.local_addr().unwrap().socket_addr().unwrap();
        soon(listener.wait_until_idle()).await;
        for _ in 0..100 {
            let _client = tokio::net::TcpStream::connect(address).await.unwrap();
            let connection = listener.accept().await.unwrap();
            let waiting = listener.clone();
            let waiting = tokio::spawn(async move { waiting.wait_until_idle().await });
            let ending = tokio::spawn(async move { drop(connection) });
            soon(waiting).await.unwrap();
            ending.await.unwrap();
        }
        // Cancelled: no task waits any more.
        let _client = tokio::net::TcpStream::connect(address).await.unwrap();
        let connection = listener.accept().await.unwrap();
        let wait = std::time::Duration::from_millis(1);
        assert!(tokio::time::timeout(wait, listener.wait_until_idle()).await.is_err());
        listener.close();
        assert!(matches!(listener.accept().await, Err(Error::Closed)));
        drop(connection);
        soon(listener.wait_until_idle()).await;
    });
}

#[test]
fn with_mio_an_event_says_so() {
    let fake = FakeDispatcher::new();
    let mut worker = MioWorker::new(fake.config()).unwrap();
    let mut poll = Poll::new().unwrap();
    let mut events = Events::with_capacity(8);
    poll.registry().register(&mut worker, Token(0), Interest::READABLE).unwrap();
    thread::scope(|scope| {
        let dispatcher = scope.spawn(|| {
            let mut peer = fake.welcome();
            let pair = fake.client();
            peer.send_one(&pair.1);
            (peer, pair)
        });
        let connection = loop {
            match worker.try_accept().unwrap() {
                Some(connection) => break connection,
                None => poll.poll(&mut events, Some(DEADLINE)).unwrap(),
            }
        };
        let (peer, _pair) = dispatcher.join().unwrap();
        worker.close();
        // All events so far.
        let quiet = Some(std::time::Duration::ZERO);
        eventually("no event is left", || {
            poll.poll(&mut events, quiet).unwrap();
            events.is_empty()
        });
        assert!(matches!(worker.try_accept(), Err(Error::Closed)));
        assert_eq!(worker.live(), 1);
        // Another thread serves and ends it.
        scope.spawn(move || drop(connection));
        while worker.live() > 0 {
            poll.poll(&mut events, Some(DEADLINE)).unwrap();
            assert!(!events.is_empty(), "an event for the end of the last one");
        }
        peer.wait_finished(1);
    });
}
