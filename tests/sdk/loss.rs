//! A worker that loses its dispatcher: what it does then, in every layer.

use std::io::Write;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use dispatch_protocol::wire::{Channel, Drain};
use test_support::fake_dispatcher::{
    DEADLINE, FakeDispatcher, eventually, is_open, join_with, read_to_end,
};
use worker_sdk::mio::MioWorker;
use worker_sdk::tokio::Listener;
use worker_sdk::{Error, OnDispatcherLoss, WorkerConfig};

const TOKEN: &str = "00112233445566778899aabbccddeeff";

fn config(fake: &FakeDispatcher, action: OnDispatcherLoss) -> WorkerConfig {
    fake.config().token(TOKEN.parse().unwrap()).on_dispatcher_loss(action)
}

#[test]
fn a_drained_worker_finishes_its_connections() {
    let mut fake = FakeDispatcher::new();
    let (worker, mut peer) = join_with(&fake, config(&fake, OnDispatcherLoss::Drain));
    let (tell, told) = mpsc::channel();
    let (drained, lost) = (tell.clone(), tell);
    worker.on_drain(move |drain| drained.send(format!("{:?}", drain.deadline())).unwrap());
    worker.on_lost(move |_| lost.send("lost".to_owned()).unwrap());
    let clients = [fake.client(), fake.client()];
    peer.send(&[&clients[0].1, &clients[1].1]);
    let first = worker.accept().unwrap().unwrap();
    fake.stop();
    peer.die();
    // What was sent to this worker, then the end.
    let second = worker.accept().unwrap().unwrap();
    assert!(worker.accept().unwrap().is_none());
    assert!(!worker.resumed().unwrap(), "it ends");
    assert!(!worker.is_joined() && worker.is_draining());
    let mut events = [(); 2].map(|()| told.recv_timeout(DEADLINE).unwrap());
    events.sort();
    assert_eq!(events, ["None", "lost"]);
    // The callbacks are dropped.
    assert!(told.recv_timeout(DEADLINE).is_err());
    fake.start();
    for (connection, (mut client, ours)) in [first, second].into_iter().zip(clients) {
        drop(ours);
        assert!(is_open(&client));
        { connection }.write_all(b"served").unwrap();
        assert_eq!(read_to_end(&mut client), b"served");
    }
    worker.wait_until_idle();
    worker.close();
    assert!(!fake.has_worker(), "it does not join again");
}

#[test]
fn a_stopped_worker_shuts_its_connections_down() {
    let fake = FakeDispatcher::new();
    let (worker, mut peer) = join_with(&fake, config(&fake, OnDispatcherLoss::Stop));
    let clients = [fake.client(), fake.client()];
    peer.send(&[&clients[0].1, &clients[1].1]);
    let taken = worker.accept().unwrap().unwrap();
    // A thread notices the loss, and the application holds on to its connection.
    let waiting = thread::spawn(move || {
        let untaken = worker.accept().unwrap();
        (worker.accept().unwrap().is_none(), untaken, worker)
    });
    let ours = clients.map(|(client, ours)| {
        drop(ours);
        client
    });
    peer.die();
    for mut client in ours {
        assert!(read_to_end(&mut client).is_empty());
    }
    let (ended, untaken, worker) = waiting.join().unwrap();
    assert!(ended);
    drop((taken, untaken));
    assert_eq!(worker.live(), 0);
}

/// All threads of the application are busy: none asks for connections.
#[test]
fn a_busy_worker_is_stopped_too() {
    for ordered in [false, true] {
        let fake = FakeDispatcher::new();
        let (worker, mut peer) = join_with(&fake, config(&fake, OnDispatcherLoss::Stop));
        let clients = [fake.client(), fake.client()];
        peer.send(&[&clients[0].1, &clients[1].1]);
        let mut taken = worker.accept().unwrap().unwrap();
        let [(mut client, ours), (mut untaken, others)] = clients;
        drop((ours, others));
        if ordered {
            let mut record = Vec::new();
            Channel::Drain(Drain { deadline_ns: 0, left: None }).encode(&mut record);
            peer.send_bytes(&record, &[]);
        }
        peer.die();
        eventually("the loss is noticed", || !worker.is_joined());
        if ordered {
            assert!(is_open(&client) && is_open(&untaken));
            taken.write_all(b"on").unwrap();
            drop(taken);
            assert_eq!(read_to_end(&mut client), b"on");
        } else {
            assert!(read_to_end(&mut client).is_empty() && read_to_end(&mut untaken).is_empty());
        }
        drop(worker.accept().unwrap().unwrap());
        assert!(worker.accept().unwrap().is_none());
    }
}

/// An orderly stop announces itself by a drain, and the connections have until its deadline.
#[test]
fn an_order_of_the_dispatcher_is_no_loss() {
    for (action, left) in [
        (OnDispatcherLoss::Stop, None),
        (OnDispatcherLoss::Stop, Some(Duration::from_millis(300))),
        (OnDispatcherLoss::Drain, Some(Duration::from_millis(300))),
        (OnDispatcherLoss::Serve, None),
        (OnDispatcherLoss::Serve, Some(Duration::from_millis(300))),
    ] {
        let fake = FakeDispatcher::new();
        let (worker, mut peer) = join_with(&fake, config(&fake, action));
        let (mut client, ours) = fake.client();
        let entry = peer.send_one(&ours);
        drop(ours);
        let mut connection = worker.accept().unwrap().unwrap();
        peer.release(&entry);
        let mut record = Vec::new();
        Channel::Drain(Drain { deadline_ns: 0, left }).encode(&mut record);
        peer.send_bytes(&record, &[]);
        peer.die();
        assert!(worker.accept().unwrap().is_none());
        eventually("the loss is noticed", || {
            assert!(worker.accept().unwrap().is_none());
            !worker.is_joined()
        });
        assert!(!worker.resumed().unwrap(), "it ends");
        match left {
            None => {
                assert!(is_open(&client));
                connection.write_all(b"on").unwrap();
                drop(connection);
                assert_eq!(read_to_end(&mut client), b"on");
            }
            // The deadline ends it, although the application does not.
            Some(_) => assert!(read_to_end(&mut client).is_empty()),
        }
        assert!(!fake.has_worker(), "it does not join again");
    }
}

#[test]
fn a_serving_worker_returns_with_its_token() {
    let mut fake = FakeDispatcher::new();
    let (worker, mut peer) = join_with(&fake, config(&fake, OnDispatcherLoss::Serve));
    let (mut client, ours) = fake.client();
    let entry = peer.send_one(&ours);
    drop(ours);
    let mut connection = worker.accept().unwrap().unwrap();
    peer.release(&entry);
    for _ in 0..3 {
        assert_eq!(peer.hello.token, Some(TOKEN.parse().unwrap()));
        fake.stop();
        peer.die();
        fake.start();
        let timeout = Duration::from_millis(1);
        peer = thread::scope(|scope| {
            let next = scope.spawn(|| fake.welcome());
            while !next.is_finished() {
                assert!(matches!(worker.accept_timeout(timeout), Err(Error::TimedOut)));
            }
            next.join().unwrap()
        });
        assert_eq!((peer.hello.base, peer.hello.finished), (1, 0));
    }
    connection.write_all(b"on").unwrap();
    drop(connection);
    assert_eq!(read_to_end(&mut client), b"on");
}

#[test]
fn with_mio() {
    for action in [OnDispatcherLoss::Drain, OnDispatcherLoss::Stop] {
        let fake = FakeDispatcher::new();
        let (mut poll, mut events) = (mio::Poll::new().unwrap(), mio::Events::with_capacity(8));
        let mut worker = MioWorker::new(config(&fake, action)).unwrap();
        poll.registry().register(&mut worker, mio::Token(0), mio::Interest::READABLE).unwrap();
        let mut step = |worker: &MioWorker| {
            poll.poll(&mut events, Some(DEADLINE)).unwrap();
            assert!(!events.is_empty(), "no event");
            worker.try_accept()
        };
        assert!(step(&worker).unwrap().is_none());
        let mut peer = fake.welcome();
        let (mut client, ours) = fake.client();
        peer.send_one(&ours);
        drop(ours);
        let connection = loop {
            if let Some(connection) = step(&worker).unwrap() {
                break connection;
            }
        };
        peer.die();
        let end = loop {
            match step(&worker) {
                Ok(connection) => assert!(connection.is_none()),
                Err(error) => break error,
            }
        };
        assert!(matches!(end, Error::Closed), "{end}");
        match action {
            OnDispatcherLoss::Stop => assert!(read_to_end(&mut client).is_empty()),
            _ => assert!(is_open(&client)),
        }
        drop(connection);
        assert!(matches!(worker.try_accept(), Err(Error::Closed)));
        assert_eq!(worker.live(), 0);
    }
}

#[test]
fn with_tokio() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        for action in [OnDispatcherLoss::Drain, OnDispatcherLoss::Stop] {
            let fake = FakeDispatcher::new();
            let config = config(&fake, action);
            let dispatcher = tokio::task::spawn_blocking(move || {
                let mut peer = fake.welcome();
                let (client, ours) = fake.client();
                peer.send_one(&ours);
                (peer, client)
            });
            let listener = Listener::connect(config).await.unwrap();
            let drained = tokio::spawn({
                let listener = listener.clone();
                async move { listener.drained().await }
            });
            let connection = listener.accept().await.unwrap();
            let (peer, mut client) = dispatcher.await.unwrap();
            peer.die();
            let end = tokio::time::timeout(DEADLINE, listener.accept()).await.unwrap();
            assert!(matches!(end, Err(Error::Closed)), "{end:?}");
            // A graceful shutdown that waits for a drain begins.
            tokio::time::timeout(DEADLINE, drained).await.unwrap().unwrap();
            assert!(!listener.resumed().await.unwrap());
            match action {
                OnDispatcherLoss::Stop => assert!(read_to_end(&mut client).is_empty()),
                _ => assert!(is_open(&client)),
            }
            drop(connection);
            tokio::time::timeout(DEADLINE, listener.wait_until_idle()).await.unwrap();
        }
    });
}
