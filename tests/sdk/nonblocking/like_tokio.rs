//! A tokio listener and its connections in comparison with tokio's own.

use std::future::poll_fn;
use std::os::fd::AsRawFd;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread;

use dispatch_protocol::wire::{Channel, Drain, Resume};
use futures_core::Stream;
use tokio::io::Interest;
use worker_sdk::tokio::Connection;

use super::*;

fn alone() -> WorkerConfig {
    WorkerConfig::new().listen("127.0.0.1:0")
}

async fn listening() -> (Listener, std::net::SocketAddr) {
    let listener = Listener::connect(alone()).await.unwrap();
    let address = listener.local_addr().unwrap().socket_addr().unwrap();
    (listener, address)
}

/// A connection of the SDK and its client.
async fn pair() -> (Connection, std::net::TcpStream) {
    let (listener, address) = listening().await;
    let client = std::net::TcpStream::connect(address).unwrap();
    client.set_read_timeout(Some(DEADLINE)).unwrap();
    (soon(listener.accept()).await.unwrap(), client)
}

fn tell(peer: &Peer, notice: Channel) {
    let mut record = Vec::new();
    notice.encode(&mut record);
    peer.send_bytes(&record, &[]);
}

#[test]
fn accepts_in_a_row_let_other_tasks_run() {
    runtime().block_on(async {
        let (fake, listener, mut peer) = join(FakeDispatcher::new()).await;
        let (_client, ours) = fake.client();
        for _ in 0..8 {
            peer.send(&[&ours; 25]);
        }
        let turns = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&turns);
        let other = tokio::spawn(async move {
            loop {
                counter.fetch_add(1, Ordering::SeqCst);
                tokio::task::yield_now().await;
            }
        });
        tokio::task::yield_now().await;
        let before = turns.load(Ordering::SeqCst);
        // In one task, as an accept loop: more connections than the budget of a turn.
        let mut taken = Vec::new();
        for _ in 0..200 {
            taken.push(listener.accept().await.unwrap());
        }
        assert!(turns.load(Ordering::SeqCst) > before, "all were there, and none was waited for");
        other.abort();
    });
}

#[test]
fn a_loop_that_ignores_errors_is_slow_and_can_be_resumed() {
    runtime().block_on(async {
        let (fake, listener, mut peer) = join(FakeDispatcher::new()).await;
        let errors = Arc::new(AtomicUsize::new(0));
        let (counter, accepting) = (Arc::clone(&errors), listener.clone());
        let (sender, mut connections) = tokio::sync::mpsc::unbounded_channel();
        let looping = tokio::spawn(async move {
            loop {
                match accepting.accept().await {
                    Ok(connection) => sender.send(connection).unwrap(),
                    Err(_taken_for_transient) => drop(counter.fetch_add(1, Ordering::SeqCst)),
                }
            }
        });
        tell(&peer, Channel::Drain(Drain::default()));
        let count = || errors.load(Ordering::SeqCst);
        let seen = |wanted: usize| async move {
            while count() < wanted {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        soon(seen(2)).await;
        // Each error takes a tenth of a second, so only a few fit into the time.
        let (before, began) = (count(), Instant::now());
        tokio::time::sleep(Duration::from_millis(300)).await;
        let most = began.elapsed().as_millis() as usize / 100 + 1;
        assert!(count() - before <= most, "{} errors", count() - before);
        tell(&peer, Channel::Resume(Resume));
        let (_client, ours) = fake.client();
        peer.send_one(&ours);
        soon(connections.recv()).await.unwrap();
        let before = count();
        listener.close();
        soon(seen(before + 2)).await;
        looping.abort();
    });
}

#[test]
fn every_handle_gets_its_first_error_immediately() {
    runtime().block_on(async {
        let (listener, _) = listening().await;
        let clones: Vec<_> = (0..50).map(|_| listener.clone()).collect();
        listener.close();
        let began = Instant::now();
        for clone in clones {
            assert!(matches!(clone.accept().await, Err(Error::Closed)));
        }
        assert!(began.elapsed() < Duration::from_secs(4), "50 times 100 ms are 5 s");
    });
}

/// An executor that is not tokio's.
fn block_on<F: Future>(future: F) -> F::Output {
    struct Thread(thread::Thread);
    impl Wake for Thread {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Thread(thread::current())));
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(value) => return value,
            Poll::Pending => thread::park(),
        }
    }
}

#[test]
fn a_connection_works_outside_a_runtime_while_its_own_lives() {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_io().build().unwrap();
    let (mut connection, mut client) = runtime.block_on(async {
        // This runtime has no timers, and the SDK needs none.
        let listener = Listener::connect(alone()).await.unwrap();
        let address = listener.local_addr().unwrap().socket_addr().unwrap();
        let client = std::net::TcpStream::connect(address).unwrap();
        let connection = listener.accept().await.unwrap();
        listener.close();
        assert!(listener.accept().await.is_err());
        assert!(listener.accept().await.is_err(), "the second one waits, without a timer");
        (connection, client)
    });
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(20));
            client.write_all(b"x").unwrap();
        });
        let mut byte = [0];
        assert_eq!(block_on(connection.read(&mut byte)).unwrap(), 1, "it had to wait");
        assert_eq!(&byte, b"x");
        block_on(connection.write_all(b"y")).unwrap();
    });
    client.read_exact(&mut [0]).unwrap();
}

#[test]
fn shutting_down_after_a_reset_is_no_error() {
    runtime().block_on(async {
        let (mut connection, client) = pair().await;
        rustix::net::sockopt::set_socket_linger(&client, Some(Duration::ZERO)).unwrap();
        drop(client);
        // A read reports the reset once it has arrived.
        let error = soon(connection.read(&mut [0])).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        connection.shutdown().await.unwrap();
    });
}

#[test]
fn it_is_peeked_waited_for_and_tried() {
    runtime().block_on(async {
        let (connection, mut client) = pair().await;
        let mut buffer = [0; 8];
        let kind = |result: std::io::Result<usize>| result.map_err(|error| error.kind());
        // Before the registration with the runtime, and after it.
        assert_eq!(kind(connection.try_read(&mut buffer)), Err(std::io::ErrorKind::WouldBlock));
        soon(connection.writable()).await.unwrap();
        assert_eq!(connection.try_write(b"to you").unwrap(), 6);
        client.read_exact(&mut [0; 6]).unwrap();
        assert_eq!(kind(connection.try_read(&mut buffer)), Err(std::io::ErrorKind::WouldBlock));
        client.write_all(b"hello").unwrap();
        soon(connection.readable()).await.unwrap();
        let ready = soon(connection.ready(Interest::READABLE)).await.unwrap();
        assert!(ready.is_readable());
        assert_eq!(soon(connection.peek(&mut buffer)).await.unwrap(), 5);
        assert_eq!(soon(connection.peek(&mut buffer)).await.unwrap(), 5, "it is still there");
        let (mut one, mut rest) = ([0; 1], [0; 8]);
        let mut slices = [std::io::IoSliceMut::new(&mut one), std::io::IoSliceMut::new(&mut rest)];
        assert_eq!(connection.try_read_vectored(&mut slices).unwrap(), 5);
        assert_eq!((&one, &rest[..4]), (b"h", &b"ello"[..]));
        assert_eq!(kind(connection.try_read(&mut buffer)), Err(std::io::ErrorKind::WouldBlock));
        let slices = [std::io::IoSlice::new(b"by"), std::io::IoSlice::new(b"e")];
        assert_eq!(connection.try_write_vectored(&slices).unwrap(), 3);
        assert_eq!(connection.local_addr().unwrap(), client.peer_addr().unwrap().into());
        assert!(connection.as_raw_fd() > 2);
        client.read_exact(&mut [0; 3]).unwrap();
        drop(client);
        soon(connection.readable()).await.unwrap();
        assert!(kind(connection.try_read(&mut buffer)).is_ok_and(|count| count == 0));
    });
}

#[test]
fn halves_work_in_two_tasks_and_can_be_reunited() {
    runtime().block_on(async {
        let (connection, mut client) = pair().await;
        let (mut reader, mut writer) = connection.into_split();
        let reading = tokio::spawn(async move {
            let mut text = [0; 4];
            reader.read_exact(&mut text).await.unwrap();
            (reader, text)
        });
        let writing = tokio::spawn(async move {
            writer.write_all(b"from").await.unwrap();
            writer
        });
        client.write_all(b"to me").unwrap();
        let ((reader, text), writer) = (reading.await.unwrap(), writing.await.unwrap());
        client.read_exact(&mut [0; 4]).unwrap();
        assert_eq!(&text, b"to m");
        let (other, _other_client) = pair().await;
        let (other_reader, other_writer) = other.into_split();
        let error = reader.reunite(other_writer).unwrap_err();
        let (reader, other_writer) = (error.0, error.1);
        drop((other_reader, other_writer));
        let mut connection = reader.reunite(writer).unwrap();
        connection.write_all(b"both").await.unwrap();
        client.read_exact(&mut [0; 4]).unwrap();
        // Dropping the writer ends the sending direction, while the reader continues.
        let (mut reader, writer) = connection.into_split();
        drop(writer);
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
        client.write_all(b"!").unwrap();
        let mut last = [0; 2];
        soon(reader.read_exact(&mut last)).await.unwrap();
        assert_eq!(&last, b"e!");
    });
}

#[test]
fn parts_are_other_streams_and_count_until_the_guard_is_dropped() {
    runtime().block_on(async {
        let (fake, listener, mut peer) = join(FakeDispatcher::new()).await;
        let pairs: Vec<_> = (0..3).map(|_| fake.client()).collect();
        peer.send(&pairs.iter().map(|(_, ours)| ours).collect::<Vec<_>>());
        let mut accepted = Vec::new();
        for _ in 0..3 {
            accepted.push(soon(listener.accept()).await.unwrap());
        }
        let [mut first, second, third] = <[Connection; 3]>::try_from(accepted).unwrap();
        assert_eq!(first.number(), Some(7_001), "as the dispatcher's log shows it");
        assert!(!first.is_ready_check());
        // A connection that is registered with the runtime.
        (&pairs[0].0).write_all(b"watched").unwrap();
        soon(first.readable()).await.unwrap();
        soon(first.read_exact(&mut [0; 7])).await.unwrap();
        let (mut stream, first) = first.into_parts().unwrap();
        let (mut std, second) = second.into_std().unwrap();
        let (fd, third) = third.into_fd().unwrap();
        stream.write_all(b"parts").await.unwrap();
        let answered = (&pairs[0].0).write_all(b"x");
        answered.unwrap();
        soon(stream.read_exact(&mut [0])).await.unwrap();
        std.write_all(b"std").unwrap();
        rustix::io::write(&fd, b"fd").unwrap();
        assert_eq!((listener.live(), peer.board.finished()), (3, 0));
        drop((stream, std, fd));
        assert_eq!(listener.live(), 3);
        drop((first, second, third));
        assert_eq!((listener.live(), peer.board.finished()), (0, 3));
        for ((mut client, ours), expected) in pairs.into_iter().zip(["parts", "std", "fd"]) {
            // No shutdown: the end comes when the dispatcher, which was notified, closes its copy.
            assert!(
                test_support::fake_dispatcher::is_open(&client)
                    || client.peek(&mut [0]).unwrap() > 0
            );
            drop(ours);
            assert_eq!(read_to_end(&mut client), expected.as_bytes());
        }
        test_support::fake_dispatcher::wait_readable(
            std::os::fd::AsFd::as_fd(&peer.doorbell),
            "the dispatcher is notified",
        );
    });
}

#[test]
fn connections_come_by_polling_and_as_a_stream_that_ends() {
    runtime().block_on(async {
        let (listener, address) = listening().await;
        let mut clients = Vec::new();
        let mut connect = || clients.push(std::net::TcpStream::connect(address).unwrap());
        connect();
        soon(poll_fn(|cx| listener.poll_accept(cx))).await.unwrap();
        // A pending poll is woken.
        let polling = listener.clone();
        let waiting =
            tokio::spawn(async move { poll_fn(|cx| polling.poll_accept(cx)).await.is_ok() });
        tokio::task::yield_now().await;
        connect();
        assert!(soon(waiting).await.unwrap());

        let closing = listener.clone();
        let mut incoming = Box::pin(listener.into_incoming());
        connect();
        connect();
        for _ in 0..2 {
            soon(poll_fn(|cx| incoming.as_mut().poll_next(cx))).await.unwrap().unwrap();
        }
        // Two streams wait at the same time, and both end.
        let mut other = Box::pin(closing.clone().into_incoming());
        let ended = async {
            let first = poll_fn(|cx| incoming.as_mut().poll_next(cx));
            let second = poll_fn(|cx| other.as_mut().poll_next(cx));
            tokio::join!(first, second)
        };
        let close = async {
            tokio::task::yield_now().await;
            closing.close();
        };
        let ((first, second), ()) = soon(async { tokio::join!(ended, close) }).await;
        assert!(first.is_none() && second.is_none());
        assert!(soon(poll_fn(|cx| incoming.as_mut().poll_next(cx))).await.is_none(), "for good");
        let closed = soon(poll_fn(|cx| closing.poll_accept(cx))).await;
        assert!(matches!(closed, Err(Error::Closed)));
    });
}

#[test]
fn shutdown_waits_and_then_ends_what_remains() {
    runtime().block_on(async {
        let (listener, address) = listening().await;
        let _client = std::net::TcpStream::connect(address).unwrap();
        let mut connection = soon(listener.accept()).await.unwrap();
        let reading = tokio::spawn(async move { connection.read(&mut [0]).await.unwrap() });
        assert_eq!(soon(listener.shutdown(Duration::from_millis(20))).await, 1);
        assert_eq!(soon(reading).await.unwrap(), 0);
        assert_eq!(soon(listener.shutdown(Duration::MAX)).await, 0);
    });
}

#[test]
fn callbacks_and_settings_work_as_in_the_other_layers() {
    runtime().block_on(async {
        let (_fake, listener, peer) = join(FakeDispatcher::new()).await;
        let (tell_test, told) = std::sync::mpsc::channel();
        listener.on_joined(move |id| tell_test.send(id).unwrap());
        assert_eq!(told.recv_timeout(DEADLINE).unwrap(), 42);
        listener.on_lost(|_| {});
        listener.on_resumed(|| {});
        listener.set_weight(2).unwrap();
        listener.set_max_connections(2).unwrap();
        listener.pause_accepting().unwrap();
        assert!(listener.is_paused());
        listener.resume_accepting().unwrap();
        drop(peer);
    });
}
