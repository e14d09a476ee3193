//! The waits of a blocking worker, their limits, and its callbacks.

use std::sync::mpsc;
use std::time::Instant;

use dispatch_protocol::scoreboard::slot;
use dispatch_protocol::wire::{Channel, Control, Drain, EntryFlags, Features, Resume, Update};
use worker_sdk::Error;

use super::*;
use test_support::fake_dispatcher::DEADLINE;

#[test]
fn accept_waits_no_longer_than_it_is_told() {
    let fake = FakeDispatcher::new();
    let (worker, mut peer) = join(&fake);
    let began = Instant::now();
    let short = Duration::from_millis(30);
    assert!(matches!(worker.accept_timeout(short), Err(Error::TimedOut)));
    assert!(began.elapsed() >= short);
    let (_client, ours) = fake.client();
    peer.send_one(&ours);
    assert!(worker.accept_timeout(DEADLINE).unwrap().is_some());
    // An available connection is found without waiting, too.
    peer.send_one(&ours);
    assert!(worker.accept_timeout(Duration::ZERO).unwrap().is_some());
    // One thread leads without a limit; the limit of another holds, and a thread gets the
    // connection.
    thread::scope(|scope| {
        let leading = scope.spawn(|| worker.accept().unwrap().is_some());
        let limited: Vec<_> = (0..3)
            .map(|_| scope.spawn(|| matches!(worker.accept_timeout(short), Err(Error::TimedOut))))
            .collect();
        assert!(limited.into_iter().all(|thread| thread.join().unwrap()));
        peer.send_one(&ours);
        assert!(leading.join().unwrap());
    });
    // A leader with a limit passes the leadership on.
    thread::scope(|scope| {
        let limited = scope.spawn(|| matches!(worker.accept_timeout(short), Err(Error::TimedOut)));
        let waiting = scope.spawn(|| worker.accept().unwrap().is_some());
        assert!(limited.join().unwrap());
        peer.send_one(&ours);
        assert!(waiting.join().unwrap());
    });
    worker.close();
    assert!(worker.accept_timeout(DEADLINE).unwrap().is_none());
}

#[test]
fn shutdown_ends_the_remaining_connections_at_its_deadline() {
    let fake = FakeDispatcher::new();
    let (worker, mut peer) = join(&fake);
    let (mut client, ours) = fake.client();
    peer.send_one(&ours);
    let mut connection = accept(&worker);
    let reading = thread::spawn(move || connection.read(&mut [0; 1]).unwrap());
    let began = Instant::now();
    let short = Duration::from_millis(30);
    assert_eq!(worker.shutdown(short), 1);
    assert!(began.elapsed() >= short);
    assert_eq!(reading.join().unwrap(), 0);
    assert_eq!(read_to_end(&mut client), b"");
    assert!(worker.wait_until_idle_timeout(DEADLINE));
    assert!(matches!(peer.control_record(), Some(Control::Goodbye(_))));
    assert!(peer.control_record().is_none());
    assert_eq!(worker.shutdown(short), 0, "again");
}

#[test]
fn shutdown_returns_with_the_last_connection() {
    let fake = FakeDispatcher::new();
    let (worker, mut peer) = join(&fake);
    let (_client, ours) = fake.client();
    peer.send_one(&ours);
    let connection = accept(&worker);
    let closing = worker.clone();
    let shutdown = thread::spawn(move || closing.shutdown(DEADLINE * 100));
    assert!(worker.accept().unwrap().is_none());
    drop(connection);
    assert_eq!(shutdown.join().unwrap(), 0);
}

#[test]
fn an_iterator_may_own_its_worker() {
    let fake = FakeDispatcher::new();
    let (worker, mut peer) = join(&fake);
    let pairs: Vec<_> = (0..3).map(|_| fake.client()).collect();
    peer.send(&pairs.iter().map(|(_, ours)| ours).collect::<Vec<_>>());
    let closing = worker.clone();
    let serving = thread::spawn(move || {
        let mut served = 0;
        for mut connection in worker {
            connection.write_all(b"x").unwrap();
            served += 1;
        }
        served
    });
    for (mut client, _) in pairs {
        client.read_exact(&mut [0]).unwrap();
    }
    closing.close();
    assert_eq!(serving.join().unwrap(), 3);
    assert!(closing.into_incoming().next().is_none());
}

#[test]
fn a_connection_has_the_number_of_the_dispatchers_log() {
    let fake = FakeDispatcher::new();
    let (worker, mut peer) = join(&fake);
    let (_client, ours) = fake.client();
    let entry = peer.send_one(&ours);
    assert_eq!(accept(&worker).number(), Some(entry.number));
    let mut unnamed = peer.offer(&ours);
    unnamed.number = 0;
    peer.send_raw(&[unnamed], &[ours.as_fd()]);
    assert_eq!(accept(&worker).number(), None, "an older dispatcher");
}

#[test]
fn a_connection_of_a_ready_check_is_marked() {
    let fake = FakeDispatcher::new();
    let (worker, mut peer) = join(&fake);
    let (_client, ours) = fake.client();
    peer.send_one(&ours);
    assert!(!accept(&worker).is_ready_check());
    let mut check = peer.offer(&ours);
    check.flags = check.flags | EntryFlags::READY_CHECK;
    peer.send_raw(&[check], &[ours.as_fd()]);
    let connection = accept(&worker);
    assert!(connection.is_ready_check() && connection.clone().is_ready_check());
    assert_eq!(worker.live(), 1, "it is live like any other");
    drop(connection);
    assert_eq!(worker.live(), 0);
}

#[test]
fn callbacks_run_for_joins_losses_and_resumes() {
    let fake = FakeDispatcher::new();
    let (worker, peer) = join(&fake);
    let (tell, told) = mpsc::channel();
    let next = || told.recv_timeout(DEADLINE).unwrap();
    let joined = tell.clone();
    // A callback may call the worker, because no lock is held; `close` drops a clone that it owns.
    let inside = worker.clone();
    worker.on_joined(move |id| joined.send(format!("{id} {}", inside.is_joined())).unwrap());
    assert_eq!(next(), "42 true", "it has joined already");
    worker.on_lost(|_| panic!("the other callbacks still run"));
    let lost = tell.clone();
    worker.on_lost(move |why| lost.send(why.to_owned()).unwrap());
    let resumed = tell.clone();
    worker.on_resumed(move || resumed.send("resumed".to_owned()).unwrap());
    let accepting = worker.clone();
    let waiting = thread::spawn(move || accepting.accept().unwrap().is_some());
    drop(peer);
    assert_eq!(next(), "it closed the connection");
    let mut peer = fake.welcome();
    assert_eq!(next(), "42 true");
    let (_client, ours) = fake.client();
    peer.send_one(&ours);
    assert!(waiting.join().unwrap());
    let notice = |notice: Channel| {
        let mut record = Vec::new();
        notice.encode(&mut record);
        peer.send_bytes(&record, &[]);
    };
    // The worker is not drained, so this has no effect.
    notice(Channel::Resume(Resume));
    notice(Channel::Drain(Drain::default()));
    assert!(worker.accept().unwrap().is_none());
    notice(Channel::Resume(Resume));
    assert!(worker.resumed().unwrap());
    assert_eq!(next(), "resumed");
    worker.close();
    drop(tell);
    assert!(told.recv_timeout(DEADLINE).is_err(), "all callbacks are dropped");
}

fn next_update(peer: &Peer) -> Update {
    match peer.control_record() {
        Some(Control::Update(update)) => update,
        other => panic!("expected an update, got {other:?}"),
    }
}

#[test]
fn weight_and_maximum_reach_this_and_the_next_dispatcher() {
    let fake = FakeDispatcher::new();
    let config = fake.config().weight(2);
    let worker = thread::spawn(move || Worker::connect(config).unwrap());
    let peer = fake.welcome_with_updates();
    let worker = worker.join().unwrap();
    assert!(peer.hello.features.contains(Features::UPDATE));
    worker.set_weight(7).unwrap();
    let update = Update { weight: 7, paused: false, max_connections: 1000 };
    assert_eq!(next_update(&peer), update);
    worker.set_max_connections(5).unwrap();
    worker.set_max_connections(5).unwrap();
    assert!(matches!(worker.set_weight(0), Err(Error::Config { .. })));
    assert!(matches!(worker.set_max_connections(0), Err(Error::Config { .. })));
    assert_eq!(next_update(&peer), Update { max_connections: 5, ..update });
    worker.pause_accepting().unwrap();
    assert!(next_update(&peer).paused);
    drop(peer);
    assert!(matches!(worker.accept_timeout(Duration::from_millis(20)), Err(Error::TimedOut)));
    let peer = thread::scope(|scope| {
        let again = scope.spawn(|| fake.welcome_with_updates());
        eventually("it has joined again", || {
            let result = worker.accept_timeout(Duration::from_millis(20));
            assert!(matches!(result, Err(Error::TimedOut)), "{result:?}");
            worker.is_joined()
        });
        again.join().unwrap()
    });
    assert_eq!((peer.hello.weight, peer.hello.max_connections), (7, 5));
    assert!(next_update(&peer).paused, "sent again");
    worker.resume_accepting().unwrap();
    assert!(!next_update(&peer).paused);
    // No record is sent twice.
    worker.close();
    assert!(matches!(peer.control_record(), Some(Control::Goodbye(_))));
}

#[test]
fn a_paused_worker_takes_nothing_unless_the_dispatcher_dies() {
    let fake = FakeDispatcher::new();
    let worker = thread::scope(|scope| {
        let worker = scope.spawn(|| Worker::connect(fake.config()).unwrap());
        let mut peer = fake.welcome_with_updates();
        let worker = worker.join().unwrap();
        let short = Duration::from_millis(30);
        let pairs: Vec<_> = (0..4).map(|_| fake.client()).collect();
        // One is taken, one is in the queue, one is on its way; all but the first are offered
        // during the pause.
        let entries = peer.send(&[&pairs[0].1, &pairs[1].1]);
        let taken = accept(&worker);
        worker.pause_accepting().unwrap();
        assert!(worker.is_paused());
        let late = peer.send_one(&pairs[2].1);
        assert!(matches!(worker.accept_timeout(short), Err(Error::TimedOut)));
        assert!(!peer.taken(&entries[1]) && !peer.taken(&late));
        // The dispatcher revokes them, as it does when it receives the pause.
        assert_eq!(peer.revoke(&entries[1]), slot::Revoke::Revoked);
        drop(taken);
        // One that the dispatcher had no time to revoke.
        let last = peer.send_one(&pairs[3].1);
        assert!(matches!(worker.accept_timeout(short), Err(Error::TimedOut)));
        let board = peer.die();
        // No other worker can get it now.
        for entry in [late, last] {
            let _orphan = worker.accept_timeout(DEADLINE).unwrap().unwrap();
            let state = slot::state(board.slot(entry.slot).unwrap(), entry.seq);
            assert_eq!(state, slot::SlotState::Taken);
        }
        worker
    });
    worker.resume_accepting().unwrap();
    let mut peer = thread::scope(|scope| {
        let waiting = scope.spawn(|| worker.accept().unwrap().is_some());
        let mut peer = fake.welcome_with_updates();
        peer.send_one(&fake.client().1);
        assert!(waiting.join().unwrap());
        peer
    });
    peer.send_one(&fake.client().1);
    assert!(worker.accept_timeout(DEADLINE).unwrap().is_some());
}

#[test]
fn alone_a_pause_leaves_clients_waiting() {
    let worker = Worker::connect(WorkerConfig::new().listen("127.0.0.1:0")).unwrap();
    let address = worker.local_addr().unwrap().socket_addr().unwrap();
    worker.pause_accepting().unwrap();
    let _client = TcpStream::connect(address).unwrap();
    assert!(matches!(worker.accept_timeout(Duration::from_millis(30)), Err(Error::TimedOut)));
    thread::scope(|scope| {
        let waiting = scope.spawn(|| worker.accept().unwrap().is_some());
        worker.resume_accepting().unwrap();
        assert!(waiting.join().unwrap());
    });
    worker.pause_accepting().unwrap();
    worker.close();
    assert!(!worker.is_paused());
    assert!(worker.accept().unwrap().is_none());
}
