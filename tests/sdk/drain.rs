//! Drains of a worker, in every layer, against a dispatcher made of the same protocol.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the report")]

use std::io::{Read, Write};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use dispatch_protocol::wire::{Channel, Control, Drain, Features, Resume};
use mio::{Events, Interest, Poll, Token};
use test_support::fake_dispatcher::{
    DEADLINE, FakeDispatcher, Peer, eventually, is_open, join, read_to_end,
};
use tokio::sync::Notify;
use worker_sdk::mio::MioWorker;
use worker_sdk::tokio::Listener;
use worker_sdk::{Error, Worker};

fn tell(peer: &Peer, notice: Channel) {
    let mut record = Vec::new();
    notice.encode(&mut record);
    peer.send_bytes(&record, &[]);
}

/// A drain with a deadline after this time.
fn drain(peer: &Peer, wait: Option<Duration>) {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let now: Duration = now.try_into().unwrap();
    let deadline_ns = wait.map_or(0, |wait| u64::try_from((now + wait).as_nanos()).unwrap());
    tell(peer, Channel::Drain(Drain { deadline_ns, left: None }));
}

#[test]
fn the_listener_ends_after_what_came_before() {
    let fake = FakeDispatcher::new();
    let (mut worker, mut peer) = join(&fake);
    assert!(peer.hello.features.contains(Features::DRAIN));
    let pairs: Vec<_> = (0..3).map(|_| fake.client()).collect();
    peer.send(&[&pairs[0].1, &pairs[1].1]);
    drain(&peer, None);
    let served: Vec<_> = worker.incoming().collect();
    assert_eq!(served.len(), 2, "earlier connections are still served");
    assert!(worker.is_draining());
    assert!(worker.accept().unwrap().is_none(), "while it is drained");
    assert!(matches!(worker.try_accept(), Err(Error::Draining)));
    assert!(is_open(&pairs[0].0) && is_open(&pairs[1].0), "live connections continue");

    // After the resume it takes connections again.
    tell(&peer, Channel::Resume(Resume));
    assert!(worker.resumed().unwrap());
    let third = peer.send_one(&pairs[2].1);
    assert!(worker.accept().unwrap().is_some());
    assert!(peer.taken(&third) && !worker.is_draining());
}

#[test]
fn every_thread_that_waits_hears_of_it() {
    let fake = FakeDispatcher::new();
    let (worker, peer) = join(&fake);
    let (started, starts) = mpsc::channel();
    thread::scope(|scope| {
        let waiting: Vec<_> = (0..3)
            .map(|_| {
                let started = started.clone();
                let worker = &worker;
                scope.spawn(move || {
                    started.send(()).unwrap();
                    worker.accept().unwrap().is_none()
                })
            })
            .collect();
        (0..3).for_each(|_| starts.recv().unwrap());
        drain(&peer, None);
        assert!(waiting.into_iter().all(|thread| thread.join().unwrap()));
        // Threads that wait for the end of the drain, and for the end of the worker.
        let resumed = scope.spawn(|| worker.resumed().unwrap());
        let other = scope.spawn(|| worker.resumed().unwrap());
        tell(&peer, Channel::Resume(Resume));
        assert!(resumed.join().unwrap() && other.join().unwrap());
        drain(&peer, None);
        assert!(worker.accept().unwrap().is_none());
        let closed = scope.spawn(|| worker.resumed().unwrap());
        worker.close();
        assert!(!closed.join().unwrap());
    });
}

#[test]
fn every_registered_callback_runs_once_per_drain() {
    let fake = FakeDispatcher::new();
    let (worker, peer) = join(&fake);
    let (tell_us, told) = mpsc::channel();
    let second = tell_us.clone();
    worker.on_drain(move |drain| tell_us.send(drain.deadline().is_some()).unwrap());
    drain(&peer, Some(Duration::from_secs(3600)));
    assert!(worker.accept().unwrap().is_none());
    assert_eq!(told.recv_timeout(DEADLINE), Ok(true));
    // A repeated drain, as after a hang, changes nothing. A callback registered now runs
    // immediately.
    drain(&peer, Some(Duration::from_secs(1800)));
    assert!(worker.accept().unwrap().is_none());
    worker.on_drain(move |_| second.send(false).unwrap());
    assert_eq!(told.recv_timeout(DEADLINE), Ok(false));
    tell(&peer, Channel::Resume(Resume));
    assert!(worker.resumed().unwrap());
    drain(&peer, None);
    assert!(worker.accept().unwrap().is_none());
    assert_eq!(told.recv_timeout(DEADLINE), Ok(false), "a new drain, without a deadline");
    assert_eq!(told.recv_timeout(DEADLINE), Ok(false), "both callbacks run");
    assert!(told.try_recv().is_err());
}

#[test]
fn at_the_deadline_what_is_left_is_ended() {
    let fake = FakeDispatcher::new();
    let (worker, mut peer) = join(&fake);
    let pairs: Vec<_> = (0..4).map(|_| fake.client()).collect();
    let mut connections: Vec<_> = pairs
        .iter()
        .map(|(_, ours)| {
            let entry = peer.send_one(ours);
            let connection = worker.accept().unwrap().unwrap();
            // As a dispatcher does: only the worker can end a taken connection.
            peer.release(&entry);
            connection
        })
        .collect();
    let (_parts, _guard) = connections.pop().unwrap().into_parts().unwrap();
    drop(connections.pop());
    let (mut first, other) = (connections.remove(0), connections.remove(0));
    first.write_all(b"last words").unwrap();
    drain(&peer, Some(Duration::ZERO));
    assert!(worker.accept().unwrap().is_none());
    // The application is reading; the client sees the end and everything that was written.
    assert_eq!(first.read(&mut [0; 16]).unwrap(), 0);
    let clients: Vec<_> = pairs.into_iter().map(|(client, _ours)| client).collect();
    let mut texts = clients.into_iter().map(|mut client| read_to_end(&mut client));
    assert_eq!(texts.next().unwrap(), b"last words");
    assert!(texts.all(|text| text.is_empty()), "also the one that `into_parts` gave away");
    assert_eq!(worker.live(), 3, "they count until the application drops them");
    drop((first, other));
    peer.wait_finished(3);
}

#[test]
fn a_resume_or_a_lost_dispatcher_ends_drain_and_deadline() {
    let mut fake = FakeDispatcher::new();
    let (worker, mut peer) = join(&fake);
    let (client, ours) = fake.client();
    let entry = peer.send_one(&ours);
    drop(ours);
    let _connection = worker.accept().unwrap().unwrap();
    peer.release(&entry);
    drain(&peer, Some(Duration::from_secs(3600)));
    assert!(worker.accept().unwrap().is_none());
    fake.stop();
    drop(peer.die());
    fake.start();
    // The next dispatcher does not know of the drain: connections come again.
    let (peer, next, second) = thread::scope(|scope| {
        let next = scope.spawn(|| worker.accept().unwrap());
        let mut peer = fake.welcome();
        let (second, ours) = fake.client();
        peer.send_one(&ours);
        (peer, next.join().unwrap().unwrap(), second)
    });
    assert!(!worker.is_draining());
    // A third drain, without a resume, shows that the deadlines of both have passed.
    let (other, mut other_peer) = join(&fake);
    let (mut third, ours) = fake.client();
    let entry = other_peer.send_one(&ours);
    drop(ours);
    let ended = other.accept().unwrap().unwrap();
    other_peer.release(&entry);
    let wait = Duration::from_millis(1500);
    drain(&peer, Some(wait));
    assert!(worker.accept().unwrap().is_none());
    tell(&peer, Channel::Resume(Resume));
    assert!(worker.resumed().unwrap());
    drain(&other_peer, Some(wait));
    assert!(other.accept().unwrap().is_none());
    assert!(read_to_end(&mut third).is_empty());
    assert!(is_open(&client) && is_open(&second), "their deadline no longer counts");
    drop((ended, next));
}

#[test]
fn a_callback_that_panics_or_blocks_delays_no_deadline() {
    let fake = FakeDispatcher::new();
    let (worker, mut peer) = join(&fake);
    let (tell_us, told) = mpsc::channel();
    let waiting = worker.clone();
    worker.on_drain(|_| panic!("intended by the test"));
    worker.on_drain(move |_| {
        waiting.wait_until_idle();
        tell_us.send(waiting.live()).unwrap();
    });
    for round in 0..2 {
        let (mut client, ours) = fake.client();
        let entry = peer.send_one(&ours);
        drop(ours);
        let mut connection = worker.accept().unwrap().unwrap();
        peer.release(&entry);
        drain(&peer, Some(Duration::ZERO));
        assert!(worker.accept().unwrap().is_none());
        assert_eq!(
            connection.read(&mut [0; 16]).unwrap(),
            0,
            "its deadline comes, in round {round}"
        );
        assert!(read_to_end(&mut client).is_empty() && told.try_recv().is_err());
        drop(connection);
        assert_eq!(
            told.recv_timeout(DEADLINE),
            Ok(0),
            "the next callback is called, in round {round}"
        );
        tell(&peer, Channel::Resume(Resume));
        assert!(worker.resumed().unwrap());
    }
    worker.close();
}

#[test]
fn close_drops_callbacks_after_they_have_run() {
    let fake = FakeDispatcher::new();
    let (worker, peer) = join(&fake);
    // A callback may own a handle of its worker and other values.
    let owned = Arc::new(());
    let (go_on, goes_on) = mpsc::channel();
    let (tell_us, told) = mpsc::channel();
    let (handle, kept) = (worker.clone(), Arc::clone(&owned));
    let goes_on = std::sync::Mutex::new(goes_on);
    worker.on_drain(move |_| {
        let _ = (&handle, &kept);
        goes_on.lock().unwrap().recv().unwrap();
    });
    let kept = Arc::clone(&owned);
    worker.on_drain(move |_| {
        let _ = &kept;
        tell_us.send(()).unwrap();
    });
    drain(&peer, None);
    assert!(worker.accept().unwrap().is_none());
    worker.close();
    assert!(matches!(peer.control_record(), Some(Control::Goodbye(_))));
    assert_eq!(Arc::strong_count(&owned), 3, "they have not run yet");
    go_on.send(()).unwrap();
    told.recv_timeout(DEADLINE).unwrap();
    eventually("both are dropped", || Arc::strong_count(&owned) == 1);
    // A callback registered later is dropped, because no drain follows.
    let kept = Arc::clone(&owned);
    worker.on_drain(move |_| drop(Arc::clone(&kept)));
    eventually("it is dropped, too", || Arc::strong_count(&owned) == 1);

    // Without a drain: immediately, and with them the whole worker.
    let (worker, peer) = join(&fake);
    let (handle, kept) = (worker.clone(), Arc::clone(&owned));
    worker.on_drain(move |_| drop((handle.clone(), Arc::clone(&kept))));
    worker.close();
    assert_eq!(Arc::strong_count(&owned), 1);
    assert!(matches!(peer.control_record(), Some(Control::Goodbye(_))));
    assert!(peer.control_record().is_none(), "the session has ended");
}

#[test]
fn a_goodbye_is_sent_although_claims_fill_the_socket() {
    let fake = FakeDispatcher::new();
    let (worker, peer) = thread::scope(|scope| {
        let worker = scope.spawn(|| Worker::connect(fake.config()).unwrap());
        let peer = fake.welcome_with_affinity();
        (worker.join().unwrap(), peer)
    });
    let claims = (0..).take_while(|n| worker.claim(format!("client-{n}")).is_ok()).count();
    let (tell_us, told) = mpsc::channel();
    let closing = thread::spawn(move || {
        tell_us.send(rustix::thread::gettid()).unwrap();
        worker.close();
    });
    // The test reads nothing before the thread sleeps on the socket or has given up.
    let stat = format!("/proc/self/task/{}/stat", told.recv().unwrap().as_raw_nonzero());
    eventually("it waits", || {
        let stat = std::fs::read_to_string(&stat).unwrap_or_default();
        closing.is_finished() || stat.rsplit(')').next().is_some_and(|s| s.starts_with(" S"))
    });
    for _ in 0..claims {
        assert!(matches!(peer.control_record(), Some(Control::Claim(_))));
    }
    assert!(matches!(peer.control_record(), Some(Control::Goodbye(_))));
    closing.join().unwrap();
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Fails instead of hanging.
async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.expect("in time")
}

async fn join_tokio(fake: FakeDispatcher) -> (FakeDispatcher, Listener, Peer) {
    let config = fake.config();
    let dispatcher = tokio::task::spawn_blocking(move || {
        let peer = fake.welcome();
        (fake, peer)
    });
    let (listener, joined) =
        soon(async { tokio::join!(Listener::connect(config), dispatcher) }).await;
    let (fake, peer) = joined.unwrap();
    (fake, listener.unwrap(), peer)
}

#[test]
fn with_tokio() {
    runtime().block_on(async {
        let (fake, listener, mut peer) = join_tokio(FakeDispatcher::new()).await;
        let (mut client, ours) = fake.client();
        let (_other, second) = fake.client();
        let drained = tokio::spawn({
            let listener = listener.clone();
            async move { listener.drained().await }
        });
        let entry = peer.send_one(&ours);
        drain(&peer, None);
        let connection = soon(listener.accept()).await.unwrap();
        peer.release(&entry);
        for _ in 0..2 {
            assert!(matches!(soon(listener.accept()).await, Err(Error::Draining)));
        }
        soon(drained).await.unwrap();
        assert!(listener.is_draining());
        let resumed = tokio::spawn({
            let listener = listener.clone();
            async move { listener.resumed().await }
        });
        tell(&peer, Channel::Resume(Resume));
        assert!(soon(resumed).await.unwrap().unwrap());
        peer.send_one(&second);
        soon(listener.accept()).await.unwrap();
        drop(ours);
        drain(&peer, Some(Duration::ZERO));
        assert!(matches!(soon(listener.accept()).await, Err(Error::Draining)));
        assert!(
            soon(tokio::task::spawn_blocking(move || read_to_end(&mut client)))
                .await
                .unwrap()
                .is_empty()
        );
        drop(connection);
    });
}

#[test]
fn with_tokio_a_cancelled_wait_leaves_nothing() {
    use std::task::{Context, Wake};

    struct Task;
    impl Wake for Task {
        fn wake(self: Arc<Self>) {}
    }

    runtime().block_on(async {
        let (_fake, listener, peer) = join_tokio(FakeDispatcher::new()).await;
        // As a `select!` per connection does.
        let tasks: Vec<_> = (0..10_000)
            .map(|_| {
                let task = Arc::new(Task);
                let waker = Arc::clone(&task).into();
                let mut drained = std::pin::pin!(listener.drained());
                assert!(drained.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
                assert!(Arc::strong_count(&task) > 1, "it would be woken");
                Arc::downgrade(&task)
            })
            .collect();
        assert_eq!(tasks.iter().filter(|task| task.strong_count() > 0).count(), 0);

        // A cancelled wait for the end of a drain does not take the event from the next caller.
        drain(&peer, None);
        assert!(matches!(soon(listener.accept()).await, Err(Error::Draining)));
        let given_up = tokio::time::timeout(Duration::from_millis(1), listener.resumed()).await;
        assert!(given_up.is_err());
        assert!(matches!(soon(listener.accept()).await, Err(Error::Draining)));
    });
}

#[test]
fn with_axum_serving_ends_gracefully() {
    use axum::{Router, routing::get};

    runtime().block_on(async {
        let (fake, listener, mut peer) = join_tokio(FakeDispatcher::new()).await;
        let (begun, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let (begins, goes_on) = (Arc::clone(&begun), Arc::clone(&go_on));
        let handler = move || async move {
            begins.notify_one();
            goes_on.notified().await;
            "hello"
        };
        let app = Router::new().route("/", get(handler));
        let closing = listener.clone();
        let stop = async move {
            closing.drained().await;
            closing.close();
        };
        let serve = axum::serve(listener, app).with_graceful_shutdown(stop);
        let served = tokio::spawn(serve.into_future());
        let (mut client, ours) = fake.client();
        client.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        peer.send_one(&ours);
        drop(ours);
        soon(begun.notified()).await;
        drain(&peer, None);
        let (goodbye, peer) =
            soon(tokio::task::spawn_blocking(move || (peer.control_record(), peer))).await.unwrap();
        assert!(matches!(goodbye, Some(Control::Goodbye(_))));
        go_on.notify_one();
        let answer = tokio::task::spawn_blocking(move || {
            String::from_utf8(read_to_end(&mut client)).unwrap()
        });
        let answer = soon(answer).await.unwrap();
        assert!(answer.ends_with("hello"), "served completely: {answer}");
        soon(served).await.unwrap().unwrap();
        drop(peer);
    });
}

#[test]
fn with_axum_alone_a_drained_worker_waits_for_a_resume() {
    use axum::{Router, routing::get};

    runtime().block_on(async {
        let (fake, listener, mut peer) = join_tokio(FakeDispatcher::new()).await;
        let app = Router::new().route("/", get(|| async { "again" }));
        let watch = listener.clone();
        let served = tokio::spawn(async move { axum::serve(listener, app).await });
        drain(&peer, None);
        soon(watch.drained()).await;
        tell(&peer, Channel::Resume(Resume));
        let (mut client, ours) = fake.client();
        peer.send_one(&ours);
        drop(ours);
        let answer = tokio::task::spawn_blocking(move || {
            client.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
            String::from_utf8(read_to_end(&mut client)).unwrap()
        });
        assert!(soon(answer).await.unwrap().ends_with("again"));
        served.abort();
    });
}

#[test]
fn with_mio() {
    let fake = FakeDispatcher::new();
    let mut worker = MioWorker::new(fake.config()).unwrap();
    let mut poll = Poll::new().unwrap();
    let mut events = Events::with_capacity(8);
    poll.registry().register(&mut worker, Token(0), Interest::READABLE).unwrap();
    let mut next = |worker: &MioWorker| loop {
        match worker.try_accept() {
            Ok(None) => poll.poll(&mut events, Some(DEADLINE)).unwrap(),
            other => return other,
        }
    };
    let (mut peer, first) = thread::scope(|scope| {
        let dispatcher = scope.spawn(|| {
            let mut peer = fake.welcome();
            let (client, ours) = fake.client();
            peer.send_one(&ours);
            drain(&peer, None);
            (peer, client)
        });
        let connection = next(&worker).unwrap().unwrap();
        let (peer, client) = dispatcher.join().unwrap();
        (peer, (connection, client))
    });
    assert!(matches!(next(&worker), Err(Error::Draining)));
    assert!(worker.is_draining() && worker.live() == 1 && is_open(&first.1));
    tell(&peer, Channel::Resume(Resume));
    let (_client, ours) = fake.client();
    peer.send_one(&ours);
    assert!(next(&worker).unwrap().is_some());
}
