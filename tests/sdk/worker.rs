//! A blocking worker against a dispatcher made of the same protocol, over real sockets.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the report")]

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use dispatch_protocol::ClientAddr;
use dispatch_protocol::scoreboard::slot::{Revoke, SlotState, want};
use dispatch_protocol::wire::{Control, EntryFlags, Handoff, ProxyHeader, RefusedCode};
use test_support::fake_dispatcher::{
    FakeDispatcher, Peer, accept, is_open, join, join_with, read_to_end,
};
use worker_sdk::{Connection, Error, PeerAddr, Worker};

#[test]
fn joins_and_says_who_it_is() {
    let fake = FakeDispatcher::new();
    let config = fake.config().pool("web").weight(3).priority(2);
    let (worker, peer) = join_with(&fake, config);
    let hello = &peer.hello;
    assert_eq!((hello.pool.as_str(), hello.name.as_str()), ("web", "tested"));
    assert_eq!((hello.weight, hello.priority), (3, 2));
    assert_eq!(hello.max_connections, 1000);
    assert_eq!((hello.base, hello.finished), (0, 0));
    assert!(worker.is_joined());
    assert_eq!((worker.id(), worker.pool(), worker.live()), (Some(42), "web", 0));
}

#[test]
fn takes_a_connection_only_when_the_application_asks() {
    let fake = FakeDispatcher::new();
    let (worker, mut peer) = join(&fake);
    let (mut client, ours) = fake.client();
    let entry = peer.send_one(&ours);
    assert_eq!(peer.state(&entry), SlotState::Sent);

    let mut connection = accept(&worker);
    assert_eq!(peer.state(&entry), SlotState::Taken);
    assert_eq!(worker.live(), 1);
    assert_eq!(connection.peer_addr(), PeerAddr::from(client.local_addr().unwrap()));
    assert_eq!(connection.listener(), "http");
    let accepted = std::time::UNIX_EPOCH + Duration::from_nanos(entry.accepted_ns);
    assert_eq!(connection.accepted_at(), accepted);
    let age = connection.age();
    assert!(age >= Duration::from_secs(1) && age < Duration::from_secs(60), "{age:?}");
    client.write_all(b"ping").unwrap();
    let mut bytes = [0; 4];
    connection.read_exact(&mut bytes).unwrap();
    connection.write_all(&bytes).unwrap();
    peer.release(&entry);
    drop((connection, ours));
    assert_eq!(read_to_end(&mut client), b"ping");
    assert_eq!((worker.live(), peer.board.finished()), (0, 1));
}

#[test]
fn a_connection_knows_what_its_proxy_said() {
    let fake = FakeDispatcher::new();
    let (worker, mut peer) = join(&fake);
    let pairs: Vec<_> = (0..3).map(|_| fake.client()).collect();
    let mut entries: Vec<_> = pairs.iter().map(|(_, ours)| peer.offer(ours)).collect();
    let source = entries[1].peer;
    // The second one came through a proxy, which names a client of a Unix socket.
    entries[1].peer = ClientAddr::Unix;
    let tlvs = b"\x02\0\x0bexample.org\xea\0\x03\x01ab".to_vec();
    let header = ProxyHeader { address: source, local: false, tlvs };
    let mut record = Vec::new();
    Handoff { entries, proxy_headers: vec![(1, header)] }.encode(&mut record);
    let fds: Vec<_> = pairs.iter().map(|(_, ours)| ours.as_fd()).collect();
    peer.send_bytes(&record, &fds);
    let connections: Vec<Connection> = (0..3).map(|_| accept(&worker)).collect();
    assert!(connections[0].proxy().is_none() && connections[2].proxy().is_none());
    let proxied = &connections[1];
    let proxy = proxied.proxy().unwrap();
    assert_eq!((proxied.peer_addr(), proxy.address()), (PeerAddr::Unix, source.into()));
    assert_eq!((proxy.authority(), proxy.is_local()), (Some("example.org"), false));
    assert_eq!(proxy.tlv(worker_sdk::Proxy::AWS), Some(&b"\x01ab"[..]));
    assert_eq!(proxy.tlvs().count(), 2);
    // The socket is what it is, whatever the client is.
    assert!(proxied.as_tcp().is_some());
    proxied.set_nodelay(true).unwrap();
    assert_eq!(proxied.local_addr().unwrap(), PeerAddr::from(pairs[1].1.local_addr().unwrap()));
}

#[test]
fn one_record_of_many_is_taken_one_by_one() {
    let fake = FakeDispatcher::new();
    let (worker, mut peer) = join(&fake);
    let pairs: Vec<_> = (0..64).map(|_| fake.client()).collect();
    let entries = peer.send(&pairs.iter().map(|(_, ours)| ours).collect::<Vec<_>>());
    let mut held = Vec::new();
    for i in 0..64 {
        held.push(accept(&worker));
        let taken = entries.iter().filter(|entry| peer.taken(entry)).count();
        assert_eq!(taken, i + 1);
        let address = pairs[i].0.local_addr().unwrap();
        assert_eq!(held[i].peer_addr(), PeerAddr::from(address));
    }
    assert_eq!(worker.live(), 64);
}

#[test]
fn a_connection_revoked_in_the_queue_is_not_touched() {
    let fake = FakeDispatcher::new();
    let (worker, mut peer) = join(&fake);
    let pairs: Vec<_> = (0..3).map(|_| fake.client()).collect();
    let entries = peer.send(&[&pairs[0].1, &pairs[1].1, &pairs[2].1]);
    let first = accept(&worker);
    assert_eq!(peer.revoke(&entries[1]), Revoke::Revoked);
    let third = accept(&worker);
    assert_eq!(third.peer_addr(), PeerAddr::from(pairs[2].0.local_addr().unwrap()));
    assert_eq!(worker.live(), 2);
    // Closing the worker's copy ended nothing: the dispatcher's copy works.
    let (client, ours) = &pairs[1];
    (&*ours).write_all(b"served elsewhere").unwrap();
    let mut bytes = [0; 16];
    (&*client).read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"served elsewhere");
    assert_eq!(
        peer.revoke(&entries[0]),
        Revoke::Was(SlotState::Taken),
        "too late for a taken connection"
    );
    drop((first, third));
}

#[test]
fn takes_and_closes_ring_a_sleeping_dispatcher() {
    let fake = FakeDispatcher::new();
    let (worker, mut peer) = join(&fake);
    let (_client, ours) = fake.client();
    let server = thread::spawn(move || {
        let connection = accept(&worker);
        (worker, connection)
    });
    let entry = peer.send_one(&ours);
    peer.sleep_unless(want::TAKEN | want::ROOM, |peer| peer.taken(&entry));
    let (_worker, connection) = server.join().unwrap();
    let closer = thread::spawn(move || drop(connection));
    peer.sleep_unless(want::ROOM, |peer| peer.board.finished() == 1);
    closer.join().unwrap();
}

#[test]
fn a_probe_is_answered_when_the_application_asks() {
    let fake = FakeDispatcher::new();
    let (worker, mut peer) = join(&fake);
    let (_client, ours) = fake.client();
    let entry = peer.send_one(&ours);
    let first = accept(&worker);
    let probe = peer.probe();
    let slot = |peer: &Peer| {
        let word = peer.board.slot(probe.slot).unwrap();
        dispatch_protocol::scoreboard::slot::state(word, probe.seq)
    };
    assert!(peer.taken(&entry));
    assert_eq!(slot(&peer), SlotState::Sent, "the application has not asked");
    let (_client, ours) = fake.client();
    peer.send_one(&ours);
    let second = accept(&worker);
    assert_eq!(slot(&peer), SlotState::Taken);
    assert_eq!(worker.live(), 2, "a probe is not a connection");
    drop((first, second));
}

#[test]
fn the_blocking_mode_is_set_after_the_take() {
    let fake = FakeDispatcher::new();
    let (worker, mut peer) = join(&fake);
    let (_client, ours) = fake.client();
    ours.set_nonblocking(true).unwrap();
    peer.send_one(&ours);
    let connection = accept(&worker);
    let flags = rustix::fs::fcntl_getfl(connection.as_fd()).unwrap();
    assert!(!flags.contains(rustix::fs::OFlags::NONBLOCK));
    let flags = rustix::io::fcntl_getfd(connection.as_fd()).unwrap();
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
}

#[test]
fn dropping_an_unreleased_connection_shuts_it_down() {
    let fake = FakeDispatcher::new();
    let (worker, mut peer) = join(&fake);
    let (mut client, ours) = fake.client();
    let _entry = peer.send_one(&ours);
    drop(accept(&worker));
    // `ours`, the dispatcher's copy, is still open.
    assert_eq!(read_to_end(&mut client), b"");
    drop(ours);
}

#[test]
fn dropping_a_released_connection_only_closes_it() {
    let fake = FakeDispatcher::new();
    let (worker, mut peer) = join(&fake);
    let (client, ours) = fake.client();
    let entry = peer.send_one(&ours);
    let connection = accept(&worker);
    peer.release(&entry);
    drop(connection);
    peer.wait_finished(1);
    // A copy elsewhere, for example in a forked child, still works.
    assert!(is_open(&client));
    (&ours).write_all(b"x").unwrap();
    (&client).read_exact(&mut [0]).unwrap();
}

#[test]
fn dropping_a_resent_connection_always_shuts_it_down() {
    let fake = FakeDispatcher::new();
    let (worker, mut peer) = join(&fake);
    let (mut client, ours) = fake.client();
    let mut entry = peer.offer(&ours);
    entry.flags = EntryFlags::RESENT;
    peer.send_raw(&[entry], &[ours.as_fd()]);
    let connection = accept(&worker);
    peer.release(&entry);
    drop(connection);
    assert_eq!(read_to_end(&mut client), b"");
}

#[test]
fn clones_are_one_connection() {
    let fake = FakeDispatcher::new();
    let (worker, mut peer) = join(&fake);
    let (mut client, ours) = fake.client();
    peer.send_one(&ours);
    let connection = accept(&worker);
    let mut clone = connection.clone();
    drop(connection);
    assert_eq!((worker.live(), peer.board.finished()), (1, 0));
    clone.write_all(b"still here").unwrap();
    drop(clone);
    assert_eq!((worker.live(), peer.board.finished()), (0, 1));
    assert_eq!(read_to_end(&mut client), b"still here");
}

#[test]
fn parts_count_until_the_guard_is_dropped() {
    let fake = FakeDispatcher::new();
    let (worker, mut peer) = join(&fake);
    let (mut client, ours) = fake.client();
    let entry = peer.send_one(&ours);
    let (mut stream, guard) = accept(&worker).into_parts().unwrap();
    assert!(guard.must_shut_down(), "the dispatcher has its copy");
    stream.write_all(b"parts").unwrap();
    peer.release(&entry);
    assert!(!guard.must_shut_down(), "the dispatcher has closed its copy");
    drop((stream, ours));
    assert_eq!(read_to_end(&mut client), b"parts");
    assert_eq!((worker.live(), peer.board.finished()), (1, 0));
    drop(guard);
    assert_eq!((worker.live(), peer.board.finished()), (0, 1));
}

#[test]
fn threads_share_one_record_and_serve_each_connection_once() {
    let fake = FakeDispatcher::new();
    let (worker, mut peer) = join(&fake);
    let served = Arc::new(AtomicUsize::new(0));
    let threads: Vec<_> = (0..8)
        .map(|_| {
            let (mut worker, served) = (worker.clone(), Arc::clone(&served));
            thread::spawn(move || {
                for mut connection in worker.incoming() {
                    served.fetch_add(1, Ordering::SeqCst);
                    let mut byte = [0];
                    connection.read_exact(&mut byte).unwrap();
                    connection.write_all(&byte).unwrap();
                }
            })
        })
        .collect();
    let mut finished = 0;
    for batch in [1, 8, 3, 40, 1, 1, 8, 64] {
        let mut pairs: Vec<_> = (0..batch).map(|_| fake.client()).collect();
        let entries = peer.send(&pairs.iter().map(|(_, ours)| ours).collect::<Vec<_>>());
        // In reverse order: eight are held by threads that wait for bytes, so only those can
        // answer.
        for (client, _) in &mut pairs {
            client.write_all(b"z").unwrap();
        }
        peer.wait_taken(&entries);
        for (client, _) in &mut pairs {
            assert_eq!(read_to_end(client), b"z");
        }
        finished += batch as u64;
        peer.wait_finished(finished);
    }
    worker.close();
    threads.into_iter().for_each(|t| t.join().unwrap());
    assert_eq!(served.load(Ordering::SeqCst) as u64, finished);
    assert_eq!(worker.live(), 0);
}

#[test]
fn take_or_revoke_wins_for_every_connection() {
    let fake = FakeDispatcher::new();
    let (worker, mut peer) = join(&fake);
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let mut worker = worker.clone();
            thread::spawn(move || worker.incoming().map(|c| c.peer_addr()).collect::<Vec<_>>())
        })
        .collect();
    let mut taken = Vec::new();
    for batch in 1..60 {
        let pairs: Vec<_> = (0..batch % 7 + 1).map(|_| fake.client()).collect();
        let entries = peer.send(&pairs.iter().map(|(_, ours)| ours).collect::<Vec<_>>());
        for (entry, (mut client, ours)) in entries.iter().zip(pairs).rev() {
            match peer.revoke(entry) {
                Revoke::Revoked => {
                    (&ours).write_all(b"elsewhere").unwrap();
                    drop(ours);
                    assert_eq!(read_to_end(&mut client), b"elsewhere");
                }
                Revoke::Was(state) => {
                    assert_eq!(state, SlotState::Taken);
                    taken.push(entry.peer);
                    assert_eq!(read_to_end(&mut client), b"");
                }
            }
        }
    }
    peer.wait_finished(taken.len() as u64);
    worker.close();
    let served = threads.into_iter().flat_map(|t| t.join().unwrap());
    let mut served: Vec<_> = served.map(|peer| peer.to_string()).collect();
    let mut taken: Vec<_> = taken.iter().map(ToString::to_string).collect();
    served.sort();
    taken.sort();
    assert_eq!(served, taken);
}

#[test]
fn closing_wakes_every_thread_in_accept() {
    let fake = FakeDispatcher::new();
    let (worker, peer) = join(&fake);
    thread::scope(|scope| {
        let waiting: Vec<_> =
            (0..4).map(|_| scope.spawn(|| worker.accept().unwrap().is_none())).collect();
        worker.close();
        assert!(waiting.into_iter().all(|t| t.join().unwrap()));
    });
    assert!(worker.accept().unwrap().is_none());
    assert!(matches!(peer.control_record(), Some(Control::Goodbye(_))));
}

#[test]
fn goodbye_leaves_untaken_and_counts_taken_connections() {
    let fake = FakeDispatcher::new();
    let (worker, mut peer) = join(&fake);
    let pairs: Vec<_> = (0..4).map(|_| fake.client()).collect();
    let queued = peer.send(&[&pairs[0].1, &pairs[1].1]);
    let connection = accept(&worker);
    let unread = peer.send(&[&pairs[2].1, &pairs[3].1]);
    drop(worker);
    assert!(matches!(peer.control_record(), Some(Control::Goodbye(_))));
    assert!(peer.taken(&queued[0]));
    for entry in [queued[1], unread[0], unread[1]] {
        assert_eq!(peer.revoke(&entry), Revoke::Revoked);
    }
    assert!(is_open(&pairs[1].0) && is_open(&pairs[2].0) && is_open(&pairs[3].0));
    let more = dispatch_protocol::wire::Channel::Probe(dispatch_protocol::wire::Probe {
        seq: 99,
        slot: 0,
    });
    let mut record = Vec::new();
    more.encode(&mut record);
    let result =
        test_support::fake_dispatcher::send(peer.channel.as_ref().unwrap().as_fd(), &record, &[]);
    assert_eq!(result, Err(rustix::io::Errno::PIPE), "it receives no more");

    assert_eq!(peer.board.finished(), 0);
    drop(connection);
    assert_eq!(peer.board.finished(), 1);
    assert!(
        peer.control_record().is_none(),
        "the control connection ends with the last connection"
    );
}

#[test]
fn two_workers_in_one_process_count_apart() {
    let fake = FakeDispatcher::new();
    let (one, mut peer_one) = join(&fake);
    let (two, mut peer_two) = join(&fake);
    let (_a, a) = fake.client();
    let (_b, b) = fake.client();
    peer_one.send_one(&a);
    peer_two.send_one(&b);
    let (first, second) = (accept(&one), accept(&two));
    drop(first);
    assert_eq!((one.live(), two.live()), (0, 1));
    assert_eq!((peer_one.board.finished(), peer_two.board.finished()), (1, 0));
    drop(one);
    assert!(matches!(peer_one.control_record(), Some(Control::Goodbye(_))));
    assert!(two.is_joined());
    drop(second);
}

#[test]
fn a_late_dispatcher_is_waited_for() {
    let mut fake = FakeDispatcher::absent();
    let config = fake.config();
    let worker = thread::spawn(move || Worker::connect(config).unwrap());
    // The result does not depend on an earlier attempt.
    thread::sleep(Duration::from_millis(30));
    fake.start();
    fake.refuse(RefusedCode::Stopping, "stopping", None);
    let (_, unanswered) = fake.hello();
    drop(unanswered);
    let _peer = fake.welcome();
    assert!(worker.join().unwrap().is_joined());
}

#[test]
fn a_dispatcher_that_never_comes_ends_the_join_timeout() {
    let fake = FakeDispatcher::absent();
    let config = fake.config().join_timeout(Duration::from_millis(40));
    let error = Worker::connect(config).unwrap_err();
    assert!(matches!(error, Error::JoinTimeout { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("dispatch.sock"), "{text}");
    assert!(text.contains("No such file"), "{text}");
}

#[test]
fn a_permanent_refusal_has_the_reason_and_the_setting() {
    let fake = FakeDispatcher::new();
    let config = fake.config();
    let worker = thread::spawn(move || Worker::connect(config));
    fake.refuse(
        RefusedCode::NotAllowed,
        "user 33 may not join pool web",
        Some("pool.web.allow_users"),
    );
    let error = worker.join().unwrap().unwrap_err();
    assert!(matches!(error, Error::Refused { code: RefusedCode::NotAllowed, .. }));
    let text = error.to_string();
    assert!(text.contains("user 33 may not join pool web"), "{text}");
    assert!(text.contains("pool.web.allow_users"), "{text}");
}

#[test]
fn a_worker_can_be_polled_like_a_socket() {
    let fake = FakeDispatcher::new();
    let (worker, mut peer) = join(&fake);
    assert!(worker.try_accept().unwrap().is_none());
    let pairs = [fake.client(), fake.client()];
    peer.send(&[&pairs[0].1, &pairs[1].1]);
    test_support::fake_dispatcher::wait_readable(worker.as_fd(), "a connection");
    let mut first = worker.try_accept().unwrap().unwrap();
    let nothing = first.read(&mut [0]).unwrap_err();
    assert_eq!(nothing.kind(), std::io::ErrorKind::WouldBlock);
    // Both kinds of callers may share one worker.
    let second = worker.accept().unwrap().unwrap();
    assert!(worker.try_accept().unwrap().is_none());
    worker.close();
    test_support::fake_dispatcher::wait_readable(worker.as_fd(), "the end");
    assert!(matches!(worker.try_accept(), Err(Error::Closed)));
    drop((first, second));
}

#[test]
fn handles_go_to_any_thread() {
    fn shared<T: Send + Sync>() {}
    shared::<Worker>();
    shared::<Connection>();
    shared::<worker_sdk::Guard>();
}
