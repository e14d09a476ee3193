//! Workers that leave, or do not read: what becomes of the connections in their sockets.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;

use nix::sys::signal::Signal;
use test_support::*;

use super::worker::*;

/// Waits until a worker has so many unread connections.
fn wait_unread(dispatcher: &Dispatcher, name: &str, wanted: u64) {
    dispatcher.wait_status(&format!("{wanted} unread"), |status| {
        let line = worker(status, name).and_then(|worker| worker.line.as_ref());
        line.is_some_and(|line| line.unread == wanted)
    });
}

#[test]
fn what_a_killed_worker_has_not_read_goes_to_another_one() {
    let (dispatcher, address) = start("");
    let mut stopped = c_worker(&dispatcher, "a");
    dispatcher.wait_joined("web", 1);
    let mut used = connect(address);
    used.write_all(b"x").unwrap();
    used.read_exact(&mut [0]).unwrap();
    stopped.signal(Signal::SIGSTOP);
    let clients: Vec<TcpStream> = (0..5u8)
        .map(|number| {
            let mut client = connect(address);
            client.write_all(&[number]).unwrap();
            client
        })
        .collect();
    wait_unread(&dispatcher, "a-1", 5);
    assert_eq!(dispatcher.status().taken, 6, "sent is taken");
    stopped.kill();
    let status = dispatcher.wait_status("they come back", |status| status.returned == 5);
    assert_eq!(status.line.as_ref().unwrap().recovered, 5);
    assert!(status.closed.get("unread").is_none_or(|&closed| closed == 0));
    assert_eq!(used.read(&mut [0]).unwrap_or(0), 0, "the one that it served has ended with it");

    let other = LineWorker::connect(&dispatcher);
    other.write("count=0&type=b\r\n");
    let mut seen: Vec<(u8, TcpStream)> = (0..5)
        .map(|_| {
            let mut server = other.serve();
            let mut number = [0];
            server.read_exact(&mut number).unwrap();
            server.write_all(&number).unwrap();
            (number[0], server)
        })
        .collect();
    seen.sort_by_key(|(number, _)| *number);
    assert_eq!(seen.iter().map(|(number, _)| *number).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    for (number, mut client) in (0..).zip(clients) {
        let mut back = [0];
        client.read_exact(&mut back).unwrap();
        assert_eq!(back[0], number, "served once, with its bytes");
    }
    let status = dispatcher.status();
    assert_eq!((status.taken, status.returned, status.in_flight), (11, 5, 0));
}

#[test]
fn what_a_worker_leaves_unread_when_it_closes_its_stream_goes_to_another_one() {
    let (dispatcher, address) = start("");
    let worker = LineWorker::join(&dispatcher, 0, "a", "a-1");
    let clients: Vec<_> = (0..3).map(|_| connect(address)).collect();
    wait_unread(&dispatcher, "a-1", 3);
    // It reads one, keeps it, and closes its stream: its process lives.
    let (text, kept) = worker.take();
    assert_eq!(text, clients[0].local_addr().unwrap().to_string());
    wait_unread(&dispatcher, "a-1", 2);
    drop(worker);
    dispatcher.wait_status("two come back", |status| status.returned == 2);
    let other = LineWorker::connect(&dispatcher);
    other.write("count=0&type=b\n");
    let mut texts = [other.take(), other.take()].map(|(text, _)| text);
    texts.sort();
    let mut wanted = [1, 2].map(|n: usize| clients[n].local_addr().unwrap().to_string());
    wanted.sort();
    assert_eq!(texts, wanted, "each exactly once");
    let mut kept = TcpStream::from(kept);
    kept.write_all(b"y").unwrap();
    (&clients[0]).read_exact(&mut [0]).unwrap();
}

/// The end of a stream that is shut down does not say that everything was read.
#[test]
fn what_is_unread_in_a_stream_that_is_shut_down_first_is_not_taken_for_read() {
    for how in [Shutdown::Write, Shutdown::Both] {
        let (dispatcher, address) = start("");
        let worker = LineWorker::join(&dispatcher, 0, "a", "a-1");
        let _clients: Vec<_> = (0..3).map(|_| connect(address)).collect();
        wait_unread(&dispatcher, "a-1", 3);
        worker.stream.shutdown(how).unwrap();
        drop(worker);
        let status = dispatcher.wait_status("all come back", |status| status.returned == 3);
        // On a busy machine the stream may be looked at before it is closed; then they are closed.
        let unread = status.closed.get("unread").copied().unwrap_or(0);
        assert!(unread == 0 || unread == 3, "{how:?}: {status:?}");
        assert_eq!(status.queued + unread, 3, "{how:?}: {status:?}");
    }
}

#[test]
fn what_cannot_be_recovered_is_closed_with_a_reason() {
    let dispatcher = Dispatcher::start(
        "[[listener]]\nname = \"web\"\naddress = \"unix:DIR/app.sock\"\npool = \"web\"\n\
         [pool.web]\nline_socket = \"DIR/line.sock\"\n",
    );
    let mut stopped = c_worker(&dispatcher, "a");
    dispatcher.wait_joined("web", 1);
    stopped.signal(Signal::SIGSTOP);
    let mut clients: Vec<UnixStream> =
        (0..3).map(|_| UnixStream::connect(dispatcher.dir.join("app.sock")).unwrap()).collect();
    wait_unread(&dispatcher, "a-1", 3);
    stopped.kill();
    // Whether a Unix socket was used cannot be seen.
    let status = dispatcher.wait_status("they are closed", |status| {
        status.closed.get("unread").is_some_and(|&closed| closed == 3)
    });
    assert_eq!((status.returned, status.line.as_ref().unwrap().unread_closed), (3, 3));
    assert!(status.faults.iter().any(|fault| fault.kind == "connection_unread"), "{status:?}");
    for client in &mut clients {
        assert_eq!(client.read(&mut [0]).unwrap_or(0), 0);
    }
}

#[test]
fn a_worker_that_stops_reading_gets_no_more_and_others_do() {
    let (dispatcher, address) = start("max_untaken = 4\npolicy = \"round-robin\"");
    let stuck = LineWorker::join(&dispatcher, 0, "a", "a-1");
    let reader = LineWorker::join(&dispatcher, 0, "b", "b-1");
    let mut clients = Vec::new();
    let mut taken = Vec::new();
    for number in 0..40 {
        clients.push(connect(address));
        wait_until("it is sent", || dispatcher.status().taken == number + 1);
        // The reader reads what it has at once.
        let unread = |status: &dispatcher::api::status::Status| {
            worker(status, "b-1").and_then(|it| it.line.as_ref()).map_or(0, |line| line.unread)
        };
        while unread(&dispatcher.status()) > 0 {
            taken.push(reader.take());
            wait_unread(&dispatcher, "b-1", 0);
        }
    }
    let status = dispatcher.status();
    let sent = |name| worker(&status, name).unwrap().sent;
    assert_eq!((sent("a-1"), sent("b-1")), (4, 36));
    // When it reads again, it gets connections again.
    taken.push(stuck.take());
    wait_unread(&dispatcher, "a-1", 3);
    clients.extend((0..2).map(|_| connect(address)));
    wait_unread(&dispatcher, "a-1", 4);
}

#[test]
fn a_full_pool_makes_clients_wait_and_room_lets_them_in() {
    let (dispatcher, address) = start("max_untaken = 2\n");
    let worker = LineWorker::join(&dispatcher, 0, "", "line-1");
    let clients: Vec<_> = (0..6).map(|_| connect(address)).collect();
    wait_unread(&dispatcher, "line-1", 2);
    let taken: Vec<_> = (0..6).map(|_| worker.take()).collect();
    let mut texts: Vec<String> = taken.iter().map(|(text, _)| text.clone()).collect();
    texts.sort();
    let mut wanted: Vec<String> =
        clients.iter().map(|client| client.local_addr().unwrap().to_string()).collect();
    wanted.sort();
    assert_eq!(texts, wanted);
}

#[test]
fn the_end_of_the_dispatcher_leaves_served_connections_and_what_is_in_the_sockets() {
    let (mut dispatcher, address) = start("");
    let worker = LineWorker::join(&dispatcher, 0, "", "line-1");
    let mut first = connect(address);
    let mut served = worker.serve();
    let mut second = connect(address);
    wait_unread(&dispatcher, "line-1", 1);
    assert!(dispatcher.stop().success());
    assert!(!dispatcher.dir.join("line.sock").exists(), "its file is removed");
    served.write_all(b"x").unwrap();
    first.read_exact(&mut [0]).unwrap();
    let mut late = worker.serve();
    late.write_all(b"y").unwrap();
    second.read_exact(&mut [0]).unwrap();
    assert!(worker.receive().is_none(), "then its stream ends");
}
