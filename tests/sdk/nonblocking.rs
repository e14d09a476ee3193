//! The tokio, axum and mio layers over real sockets.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the report")]

mod like_tokio;

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use dispatch_protocol::scoreboard::slot::{Revoke, SlotState};
use dispatch_protocol::wire::{Control, RefusedCode};
use mio::{Events, Interest, Poll, Token};
use test_support::fake_dispatcher::{DEADLINE, FakeDispatcher, Peer, read_to_end};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use worker_sdk::mio::MioWorker;
use worker_sdk::tokio::Listener;
use worker_sdk::{Connection, Error, PeerAddr, WorkerConfig};

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Fails instead of hanging.
async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.expect("in time")
}

/// Runs the fake dispatcher, which blocks, next to the future.
async fn beside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    soon(tokio::task::spawn_blocking(work)).await.unwrap()
}

async fn join(fake: FakeDispatcher) -> (FakeDispatcher, Listener, Peer) {
    let config = fake.config();
    let dispatcher = beside(move || {
        let peer = fake.welcome();
        (fake, peer)
    });
    let (listener, (fake, peer)) = soon(async {
        tokio::join!(async { Listener::connect(config).await.unwrap() }, dispatcher)
    })
    .await;
    (fake, listener, peer)
}

#[test]
fn tokio_takes_serves_and_counts() {
    runtime().block_on(async {
        let (fake, listener, mut peer) = join(FakeDispatcher::new()).await;
        assert!(listener.is_joined());
        let (mut client, ours) = fake.client();
        let (_other, revoked) = fake.client();
        let entries = peer.send(&[&ours, &revoked]);
        let mut connection = soon(listener.accept()).await.unwrap();
        assert_eq!(peer.state(&entries[1]), SlotState::Sent, "not asked for");
        assert_eq!(peer.revoke(&entries[1]), Revoke::Revoked);
        assert_eq!((listener.live(), connection.listener()), (1, "http"));
        client.write_all(b"hi").unwrap();
        let mut bytes = [0; 2];
        connection.read_exact(&mut bytes).await.unwrap();
        connection.write_all(&bytes).await.unwrap();
        // The dispatcher has its copy, so the drop shuts down.
        drop(connection);
        assert_eq!(read_to_end(&mut client), b"hi");
        assert_eq!((listener.live(), peer.board.finished()), (0, 1));
        drop(listener);
        assert!(matches!(peer.control_record(), Some(Control::Goodbye(_))));
        assert!(peer.control_record().is_none());
    });
}

#[test]
fn tokio_is_woken_by_every_dispatcher_that_comes() {
    runtime().block_on(async {
        let (mut fake, listener, mut peer) = join(FakeDispatcher::new()).await;
        let (sender, mut connections) = tokio::sync::mpsc::unbounded_channel();
        let accepting = tokio::spawn({
            let listener = listener.clone();
            async move {
                loop {
                    match listener.accept().await {
                        Ok(connection) => sender.send(connection).unwrap(),
                        Err(error) => return error,
                    }
                }
            }
        });
        for round in 1..=5u64 {
            // One dispatcher finds the worker asleep, the other is there when the channel is.
            for _ in 0..2 {
                let (_client, ours) = fake.client();
                peer.send_one(&ours);
                drop(soon(connections.recv()).await.unwrap());
            }
            fake.stop();
            peer.die();
            (fake, peer) = beside(move || {
                fake.start();
                let peer = fake.welcome();
                (fake, peer)
            })
            .await;
            assert_eq!(peer.hello.base, 2 * round);
        }
        listener.close();
        let error = soon(accepting).await.unwrap();
        assert!(matches!(error, Error::Closed), "{error}");
    });
}

#[test]
fn tokio_reports_a_permanent_refusal_and_a_timeout() {
    runtime().block_on(async {
        let fake = FakeDispatcher::new();
        let config = fake.config();
        let refusing = beside(move || fake.refuse(RefusedCode::UnknownPool, "no pool x", None));
        let (result, _) = soon(async { tokio::join!(Listener::connect(config), refusing) }).await;
        assert!(matches!(result, Err(Error::Refused { .. })), "{result:?}");

        let fake = FakeDispatcher::absent();
        let config = fake.config().join_timeout(Duration::from_millis(30));
        let result = soon(Listener::connect(config)).await;
        assert!(matches!(result, Err(Error::JoinTimeout { .. })));
    });
}

#[test]
fn axum_serves_and_knows_the_peer() {
    use axum::extract::ConnectInfo;
    use axum::routing::get;
    runtime().block_on(async {
        let (fake, listener, mut peer) = join(FakeDispatcher::new()).await;
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let app = axum::Router::new().route(
            "/",
            get(|ConnectInfo(peer): ConnectInfo<PeerAddr>| async move { peer.to_string() }),
        );
        let service = app.into_make_service_with_connect_info::<PeerAddr>();
        let serving = tokio::spawn(async move {
            let graceful = axum::serve(listener, service).with_graceful_shutdown(async {
                let _ = stopped.await;
            });
            graceful.await
        });
        let (mut client, ours) = fake.client();
        peer.send_one(&ours);
        let address = client.local_addr().unwrap().to_string();
        let response = beside(move || {
            client.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
            String::from_utf8(read_to_end(&mut client)).unwrap()
        })
        .await;
        assert!(response.starts_with("HTTP/1.1 200"), "{response}");
        assert!(response.ends_with(&address), "{response}");
        let peer = beside(move || {
            peer.wait_finished(1);
            peer
        })
        .await;
        stop.send(()).unwrap();
        soon(serving).await.unwrap().unwrap();
        assert!(matches!(peer.control_record(), Some(Control::Goodbye(_))));
    });
}

#[test]
fn axum_serves_alone() {
    runtime().block_on(async {
        let config = WorkerConfig::new().listen("127.0.0.1:0");
        let listener = soon(Listener::connect(config)).await.unwrap();
        let local = axum::serve::Listener::local_addr(&listener).unwrap();
        let app = axum::Router::new().route("/", axum::routing::get(|| async { "alone" }));
        tokio::spawn(async move { axum::serve(listener, app).await });
        let mut client =
            tokio::net::TcpStream::connect(local.socket_addr().unwrap()).await.unwrap();
        let request = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        client.write_all(request).await.unwrap();
        let mut text = String::new();
        soon(client.read_to_string(&mut text)).await.unwrap();
        assert!(text.ends_with("alone"), "{text}");
    });
}

struct Loop {
    poll: Poll,
    worker: MioWorker,
    wakeups: usize,
}

impl Loop {
    fn new(config: WorkerConfig) -> Loop {
        let poll = Poll::new().unwrap();
        let mut worker = MioWorker::new(config).unwrap();
        let registry = poll.registry();
        registry.register(&mut worker, Token(7), Interest::READABLE).unwrap();
        Loop { poll, worker, wakeups: 0 }
    }

    /// Waits for one event, then accepts all available connections.
    fn turn(&mut self, wait: Duration) -> Result<Vec<Connection>, Error> {
        let mut events = Events::with_capacity(8);
        self.poll.poll(&mut events, Some(wait)).unwrap();
        let mut connections = Vec::new();
        for event in &events {
            assert_eq!(event.token(), Token(7));
            self.wakeups += 1;
            while let Some(connection) = self.worker.try_accept()? {
                connections.push(connection);
            }
        }
        Ok(connections)
    }

    fn until_one(&mut self) -> Result<Connection, Error> {
        let end = Instant::now() + DEADLINE;
        loop {
            assert!(Instant::now() < end, "no connection came");
            if let Some(connection) = self.turn(DEADLINE)?.pop() {
                return Ok(connection);
            }
        }
    }

    fn join(&mut self, fake: &FakeDispatcher) -> Peer {
        std::thread::scope(|scope| {
            let peer = scope.spawn(|| fake.welcome());
            let end = Instant::now() + DEADLINE;
            while !self.worker.is_joined() || !peer.is_finished() {
                assert!(Instant::now() < end, "never joined");
                assert!(self.turn(Duration::from_millis(10)).unwrap().is_empty());
            }
            peer.join().unwrap()
        })
    }
}

#[test]
fn mio_joins_in_the_background_and_with_every_dispatcher() {
    let mut fake = FakeDispatcher::absent();
    let mut looped = Loop::new(fake.config());
    looped.turn(Duration::from_millis(20)).unwrap();
    assert!(!looped.worker.is_joined());
    fake.start();
    let mut peer = looped.join(&fake);
    for round in 1..=5u64 {
        for _ in 0..2 {
            let (mut client, ours) = fake.client();
            peer.send_one(&ours);
            let mut connection = looped.until_one().unwrap();
            let nothing = connection.read(&mut [0]).unwrap_err();
            assert_eq!(nothing.kind(), std::io::ErrorKind::WouldBlock);
            connection.write_all(b"m").unwrap();
            drop(connection);
            assert_eq!(read_to_end(&mut client), b"m");
        }
        fake.stop();
        peer.die();
        while looped.worker.is_joined() {
            looped.turn(DEADLINE).unwrap();
        }
        fake.start();
        peer = looped.join(&fake);
        assert_eq!((peer.hello.base, peer.board.finished()), (2 * round, 2 * round));
    }
    looped.worker.close();
    let end = looped.until_one().unwrap_err();
    assert!(matches!(end, Error::Closed), "{end}");
}

#[test]
fn mio_does_not_spin_while_joined_or_waiting() {
    let mut fake = FakeDispatcher::new();
    let mut looped = Loop::new(fake.config());
    let peer = looped.join(&fake);
    let quiet = |looped: &mut Loop, most: usize| {
        let (before, end) = (looped.wakeups, Instant::now() + Duration::from_millis(200));
        while let Some(left) = end.checked_duration_since(Instant::now()) {
            looped.turn(left).unwrap();
        }
        let wakeups = looped.wakeups - before;
        assert!(wakeups <= most, "{wakeups} wake-ups");
    };
    quiet(&mut looped, 2);
    // The worker does not read records on the control connection, and they must not keep it awake.
    let mut record = Vec::new();
    dispatch_protocol::wire::Goodbye.encode(&mut record);
    test_support::fake_dispatcher::send(std::os::fd::AsFd::as_fd(&peer.control), &record, &[])
        .unwrap();
    quiet(&mut looped, 2);
    fake.stop();
    peer.die();
    // Attempts every 2.5 to 50 ms: a few.
    quiet(&mut looped, 100);
    assert!(!looped.worker.is_joined());
    fake.start();
    looped.join(&fake);
}

#[test]
fn mio_retries_after_an_error_if_the_caller_polls() {
    let fake = FakeDispatcher::new();
    let mut looped = Loop::new(fake.config());
    let error = std::thread::scope(|scope| {
        scope.spawn(|| fake.refuse(RefusedCode::UnknownPool, "no pool x", None));
        looped.until_one().unwrap_err()
    });
    assert!(matches!(error, Error::Refused { .. }), "{error}");
    looped.join(&fake);
}

#[test]
fn mio_connections_are_sources() {
    let mut looped = Loop::new(WorkerConfig::new().listen("127.0.0.1:0"));
    let address = looped.worker.local_addr().unwrap().socket_addr().unwrap();
    let mut client = std::net::TcpStream::connect(address).unwrap();
    let mut connection = looped.until_one().unwrap();
    let mut poll = Poll::new().unwrap();
    poll.registry().register(&mut connection, Token(1), Interest::READABLE).unwrap();
    client.write_all(b"x").unwrap();
    let mut events = Events::with_capacity(1);
    poll.poll(&mut events, Some(DEADLINE)).unwrap();
    assert_eq!(connection.read(&mut [0; 8]).unwrap(), 1);
    poll.registry().deregister(&mut connection).unwrap();
    drop(connection);
    assert_eq!(looped.worker.live(), 0);
}
