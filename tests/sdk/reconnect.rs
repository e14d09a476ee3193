//! A worker that loses its dispatcher, and one without a dispatcher.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the report")]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use dispatch_protocol::scoreboard::slot;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use test_support::fake_dispatcher::{
    DEADLINE, FakeDispatcher, Peer, eventually, is_open, read_to_end,
};
use worker_sdk::{Connection, Error, PeerAddr, Worker, WorkerConfig};

/// A worker whose connections go through a queue, so that a thread is always in `accept`.
fn serve(fake: &FakeDispatcher) -> (Worker, Peer, mpsc::Receiver<Connection>) {
    let config = fake.config();
    let (sender, receiver) = mpsc::channel();
    let worker = thread::spawn(move || Worker::connect(config).unwrap());
    let peer = fake.welcome();
    let worker = worker.join().unwrap();
    let mut accepting = worker.clone();
    thread::spawn(move || {
        for connection in accepting.incoming() {
            if sender.send(connection).is_err() {
                return;
            }
        }
    });
    (worker, peer, receiver)
}

#[test]
fn connections_of_a_dead_dispatcher_are_taken_and_counted_once() {
    let fake = FakeDispatcher::new();
    let config = fake.config();
    let worker = thread::spawn(move || Worker::connect(config).unwrap());
    let mut peer = fake.welcome();
    let worker = worker.join().unwrap();
    let mut clients = Vec::new();
    let mut entries = Vec::new();
    for _ in 0..2 {
        let pairs = [fake.client(), fake.client()];
        entries.extend(peer.send(&[&pairs[0].1, &pairs[1].1]));
        clients.extend(pairs.map(|(client, _)| client));
    }
    let first = worker.accept().unwrap().unwrap();
    peer.revoke(&entries[3]);
    let board = peer.die();

    // The first was taken, two more can still be taken, the last was revoked.
    let (sender, receiver) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(|| {
            while let Some(connection) = worker.accept().unwrap() {
                sender.send(connection).unwrap();
            }
        });
        let next = |n: usize| {
            let connection = receiver.recv_timeout(DEADLINE).unwrap();
            let address = clients[n].local_addr().unwrap();
            assert_eq!(connection.peer_addr(), PeerAddr::from(address));
            connection
        };
        let held = [next(1), next(2)];
        for (i, entry) in entries.iter().enumerate() {
            let state = slot::state(board.slot(entry.slot).unwrap(), entry.seq);
            assert_eq!(state == slot::SlotState::Taken, i < 3, "entry {i}");
        }
        drop(first);
        let peer = fake.welcome();
        assert_eq!((peer.hello.base, peer.board.finished()), (3, 1));
        for mut connection in held {
            connection.write_all(b"served").unwrap();
        }
        peer.wait_finished(3);
        assert_eq!(read_to_end(&mut clients[1].try_clone().unwrap()), b"served");
        assert_eq!(worker.live(), 0);
        worker.close();
    });
}

#[test]
fn close_takes_the_connections_of_a_dead_dispatcher() {
    let fake = FakeDispatcher::new();
    let config = fake.config();
    let worker = thread::spawn(move || Worker::connect(config).unwrap());
    let mut peer = fake.welcome();
    let worker = worker.join().unwrap();
    let mut clients = Vec::new();
    // Of the first record one is taken and two are in the worker's queue; the others are still in
    // the channel.
    for count in [3, 1, 2] {
        let pairs: Vec<_> = (0..count).map(|_| fake.client()).collect();
        let ours: Vec<&TcpStream> = pairs.iter().map(|(_, ours)| ours).collect();
        let entries = peer.send(&ours);
        clients.extend(pairs.into_iter().map(|(client, _)| client).zip(entries));
    }
    let first = worker.accept().unwrap().unwrap();
    peer.revoke(&clients[2].1);
    let board = peer.die();
    // The worker has not noticed the loss, because it is busy, and is closed now.
    worker.close();
    assert_eq!(worker.live(), 5, "one was revoked before");
    drop(first);
    let mut addresses = Vec::new();
    while let Some(mut connection) = worker.accept().unwrap() {
        addresses.push(connection.peer_addr());
        connection.write_all(b"served").unwrap();
    }
    clients.remove(0);
    let revoked = clients.remove(1);
    assert!(board.slot(revoked.1.slot).is_some());
    for (place, (client, entry)) in clients.iter_mut().enumerate() {
        let state = slot::state(board.slot(entry.slot).unwrap(), entry.seq);
        assert_eq!(state, slot::SlotState::Taken);
        assert_eq!(addresses[place], PeerAddr::from(client.local_addr().unwrap()));
        assert_eq!(read_to_end(client), b"served");
    }
    assert_eq!((addresses.len(), worker.live()), (4, 0));
}

#[test]
fn close_leaves_connections_to_a_living_dispatcher() {
    let fake = FakeDispatcher::new();
    let config = fake.config();
    let worker = thread::spawn(move || Worker::connect(config).unwrap());
    let mut peer = fake.welcome();
    let worker = worker.join().unwrap();
    let pairs = [fake.client(), fake.client(), fake.client()];
    let entries = peer.send(&[&pairs[0].1, &pairs[1].1, &pairs[2].1]);
    drop(worker.accept().unwrap().unwrap());
    worker.close();
    assert!(worker.accept().unwrap().is_none());
    assert!(entries[1..].iter().all(|entry| !peer.taken(entry)), "the dispatcher revokes them");
}

#[test]
fn taken_connections_of_a_dead_dispatcher_survive_close() {
    let fake = FakeDispatcher::new();
    let (worker, mut peer, receiver) = serve(&fake);
    let pairs = [fake.client(), fake.client()];
    drop(receiver);
    let entries = peer.send(&[&pairs[0].1, &pairs[1].1]);
    // The receiver is gone, so the accepting thread takes one and ends; the other stays queued.
    peer.wait_taken(&entries[..1]);
    assert!(!peer.taken(&entries[1]));
    drop((peer, fake));
    let taken = thread::scope(|scope| {
        let waiting = scope.spawn(|| worker.accept().unwrap());
        waiting.join().unwrap().unwrap()
    });
    assert_eq!(taken.peer_addr(), PeerAddr::from(pairs[1].0.local_addr().unwrap()));
    worker.close();
    assert!(worker.accept().unwrap().is_none());
}

#[test]
fn counts_go_on_over_any_number_of_dispatchers() {
    let mut fake = FakeDispatcher::new();
    let (worker, mut peer, connections) = serve(&fake);
    let mut held = Vec::new();
    for round in 1..=4u64 {
        let (client, ours) = fake.client();
        let (short, ours_too) = fake.client();
        peer.send(&[&ours, &ours_too]);
        held.push((connections.recv_timeout(DEADLINE).unwrap(), client));
        drop(connections.recv_timeout(DEADLINE).unwrap());
        peer.wait_finished(round);
        drop(short);
        fake.stop();
        peer.die();
        fake.start();
        peer = fake.welcome();
        assert_eq!((peer.hello.base, peer.hello.finished), (2 * round, round));
        assert_eq!(peer.board.finished(), round);
    }
    assert_eq!(worker.live(), 4);
    let (mut connection, client) = held.remove(0);
    // A connection of the first dispatcher ends under the fifth.
    connection.write_all(b"old").unwrap();
    drop(connection);
    assert_eq!(read_to_end(&mut { client }), b"old");
    peer.wait_finished(5);
    // It keeps the worker's last control connection open.
    worker.close();
    assert!(peer.control_record().is_some());
    assert!(connections.recv_timeout(DEADLINE).is_err());
    let last = held.pop();
    drop(held);
    peer.wait_finished(7);
    drop(last);
    peer.wait_finished(8);
    assert!(peer.control_record().is_none());
}

#[test]
fn closes_without_a_dispatcher_reach_the_next_one() {
    let mut fake = FakeDispatcher::new();
    let (worker, mut peer, connections) = serve(&fake);
    let (_client, ours) = fake.client();
    peer.send_one(&ours);
    let connection = connections.recv_timeout(DEADLINE).unwrap();
    fake.stop();
    peer.die();
    eventually("the worker notices", || !worker.is_joined());
    assert_eq!(worker.id(), None);
    drop(connection);
    fake.start();
    let peer = fake.welcome();
    assert_eq!(peer.hello.base, 1);
    peer.wait_finished(1);
}

#[test]
fn a_refusal_after_the_first_join_is_retried() {
    let fake = FakeDispatcher::new();
    let (worker, peer, connections) = serve(&fake);
    peer.die();
    for _ in 0..3 {
        fake.refuse(dispatch_protocol::wire::RefusedCode::UnknownPool, "no such pool", None);
    }
    let mut peer = fake.welcome();
    let (_client, ours) = fake.client();
    peer.send_one(&ours);
    drop(connections.recv_timeout(DEADLINE).unwrap());
    worker.close();
}

#[test]
fn closing_wakes_a_worker_that_waits_for_a_dispatcher() {
    let mut fake = FakeDispatcher::new();
    let (worker, peer, connections) = serve(&fake);
    fake.stop();
    peer.die();
    eventually("the worker notices", || !worker.is_joined());
    worker.close();
    assert!(connections.recv().is_err(), "the accepting thread has left");
}

/// The dispatcher has a duplicate of the worker's end. Without a removal from the epoll set, the
/// closed channel would stay in it and be readable for ever.
#[test]
fn a_channel_that_ended_does_not_keep_the_worker_awake() {
    let mut fake = FakeDispatcher::new();
    let config = fake.config();
    let worker = thread::spawn(move || Worker::connect(config).unwrap());
    let mut peer = fake.welcome();
    let worker = worker.join().unwrap();
    fake.stop();
    peer.channel = None;
    let (mut wakeups, end) = (0, Instant::now() + Duration::from_millis(200));
    while Instant::now() < end {
        assert!(worker.try_accept().unwrap().is_none());
        let timeout = Timespec::try_from(Duration::from_millis(200)).unwrap();
        poll(&mut [PollFd::new(&worker, PollFlags::IN)], Some(&timeout)).unwrap();
        wakeups += 1;
    }
    assert!(!worker.is_joined());
    // The worker tries again every 2.5 to 50 ms.
    assert!(wakeups < 100, "{wakeups} wake-ups");
    assert!(peer.control_record().is_none());
}

#[test]
fn alone_it_listens_on_tcp() {
    let config = WorkerConfig::new().listen("127.0.0.1:0");
    let worker = Worker::connect(config).unwrap();
    assert!(worker.is_joined());
    let address = worker.local_addr().unwrap().socket_addr().unwrap();
    let mut client = TcpStream::connect(address).unwrap();
    let mut connection = worker.accept().unwrap().unwrap();
    assert_eq!(connection.peer_addr(), PeerAddr::from(client.local_addr().unwrap()));
    assert_eq!((connection.listener(), worker.live()), ("", 1));
    connection.write_all(b"alone").unwrap();
    drop(connection);
    let mut text = String::new();
    client.read_to_string(&mut text).unwrap();
    assert_eq!((text.as_str(), worker.live()), ("alone", 0));

    let other = Worker::connect(WorkerConfig::new().listen(address.to_string()));
    assert!(matches!(other, Err(Error::Io { .. })), "{other:?}");
    thread::scope(|scope| {
        let waiting = scope.spawn(|| worker.accept().unwrap().is_none());
        worker.close();
        assert!(waiting.join().unwrap());
    });
    assert!(TcpStream::connect(address).is_err());
    let again = Worker::connect(WorkerConfig::new().listen(address.to_string()));
    assert!(again.is_ok(), "{again:?}");
}

#[test]
fn alone_it_listens_on_a_unix_socket_and_replaces_a_stale_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("web.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let config = || WorkerConfig::new().listen(format!("unix:{}", path.display()));
    let worker = Worker::connect(config()).unwrap();
    assert!(Worker::connect(config()).is_err(), "a socket in use is left alone");
    // The attempt connected to the socket.
    drop(worker.accept().unwrap().unwrap());
    let mut client = UnixStream::connect(&path).unwrap();
    client.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut connection = worker.accept().unwrap().unwrap();
    assert_eq!(connection.peer_addr(), PeerAddr::Unix);
    assert!(connection.as_tcp().is_none());
    connection.set_nodelay(true).unwrap();
    client.write_all(b"u").unwrap();
    let mut byte = [0];
    connection.read_exact(&mut byte).unwrap();
    connection.write_all(&byte).unwrap();
    client.read_exact(&mut byte).unwrap();
    drop(worker);
    assert!(!path.exists());
    connection.write_all(b"x").unwrap();
    client.read_exact(&mut byte).unwrap();
}

#[test]
fn a_socket_of_another_kind_is_an_immediate_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("stream.sock");
    let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let error = Worker::connect(WorkerConfig::new().dispatch_socket(&path)).unwrap_err();
    let said = error.to_string();
    assert!(matches!(error, Error::Protocol { .. }), "{said}");
    assert!(said.contains("stream.sock") && said.contains("socket of another kind"), "{said}");
    assert!(said.contains("does dispatch_socket name the dispatch socket"), "{said}");
}

#[test]
fn connections_survive_their_dispatcher() {
    let fake = FakeDispatcher::new();
    let (_worker, mut peer, connections) = serve(&fake);
    let (mut client, ours) = fake.client();
    let entry = peer.send_one(&ours);
    let mut connection = connections.recv_timeout(DEADLINE).unwrap();
    peer.release(&entry);
    peer.die();
    drop((ours, fake));
    assert!(is_open(&client));
    connection.write_all(b"on").unwrap();
    drop(connection);
    assert_eq!(read_to_end(&mut client), b"on");
}
