//! The load of a worker between and after its reports.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;

use test_support::*;

use super::worker::*;

/// A client that a worker serves.
fn served(address: SocketAddr, worker: &LineWorker) -> (TcpStream, TcpStream) {
    let client = connect(address);
    (client, worker.serve())
}

#[test]
fn the_load_follows_each_end_without_a_report() {
    let (dispatcher, address) = start("");
    if !exact(&dispatcher) {
        return;
    }
    let worker = LineWorker::join(&dispatcher, 0, "", "line-1");
    let mut connections: Vec<_> = (0..10).map(|_| served(address, &worker)).collect();
    assert_eq!(load(&dispatcher, "line-1"), Some(10), "sent counts at once");
    for left in (0..10).rev() {
        connections.pop();
        wait_load(&dispatcher, "line-1", left);
    }
    assert_eq!(reports(&dispatcher), 1, "it has not reported again");
}

#[test]
fn a_count_that_is_too_low_is_corrected_and_a_higher_one_counts() {
    let (dispatcher, address) = start("");
    if !exact(&dispatcher) {
        return;
    }
    // It had two connections before.
    let worker = LineWorker::join(&dispatcher, 2, "", "line-1");
    let mut connections: Vec<_> = (0..5).map(|_| served(address, &worker)).collect();
    wait_load(&dispatcher, "line-1", 7);
    for low in [0, 3, 5] {
        worker.report(&dispatcher, low);
        wait_load(&dispatcher, "line-1", 5);
    }
    worker.report(&dispatcher, 9);
    wait_load(&dispatcher, "line-1", 9);
    connections.truncate(2);
    wait_load(&dispatcher, "line-1", 6);
    // The first report after these ends may have been written before them; the second was not.
    worker.report(&dispatcher, 6);
    worker.report(&dispatcher, 6);
    wait_load(&dispatcher, "line-1", 6);
    worker.report(&dispatcher, 2);
    wait_load(&dispatcher, "line-1", 2);
}

#[test]
fn a_count_written_before_the_last_connections_were_read_does_not_hide_them() {
    let (dispatcher, address) = start("");
    let worker = LineWorker::join(&dispatcher, 0, "", "line-1");
    let clients: Vec<_> = (0..4).map(|_| connect(address)).collect();
    wait_load(&dispatcher, "line-1", 4);
    // It has three from elsewhere, and has read none of the four.
    worker.report(&dispatcher, 3);
    wait_load(&dispatcher, "line-1", 7);
    let taken: Vec<_> = (0..4).map(|_| worker.take()).collect();
    worker.report(&dispatcher, 7);
    worker.report(&dispatcher, 7);
    wait_load(&dispatcher, "line-1", 7);
    drop((clients, taken));
}

#[test]
fn without_the_kernels_word_the_counts_and_what_was_sent_since_count() {
    let dispatcher = Dispatcher::start(
        "[[listener]]\nname = \"web\"\naddress = \"unix:DIR/app.sock\"\npool = \"web\"\n\
         [pool.web]\nline_socket = \"DIR/line.sock\"\n",
    );
    // The kernel tells nothing about Unix sockets.
    let path = dispatcher.dir.join("app.sock");
    let worker = LineWorker::join(&dispatcher, 1, "", "line-1");
    let client = || UnixStream::connect(&path).unwrap();
    let mut clients = vec![client(), client(), client()];
    wait_load(&dispatcher, "line-1", 4);
    let mut taken = vec![worker.take(), worker.take()];
    assert_eq!(taken[0].0, "unix");
    // One is unread: the worker cannot have counted it.
    worker.report(&dispatcher, 3);
    wait_load(&dispatcher, "line-1", 4);
    taken.push(worker.take());
    worker.report(&dispatcher, 4);
    wait_load(&dispatcher, "line-1", 4);
    taken.clear();
    clients.clear();
    assert_eq!(load(&dispatcher, "line-1"), Some(4), "until it reports");
    worker.report(&dispatcher, 1);
    wait_load(&dispatcher, "line-1", 1);
}

#[test]
fn loads_are_exact_after_hundreds_of_short_connections() {
    let (dispatcher, address) = start("");
    let exact = exact(&dispatcher);
    let mut workers: Vec<Process> = (0..3).map(|_| c_worker(&dispatcher, "echo")).collect();
    dispatcher.wait_joined("web", 3);
    let before = dispatcher.fds();
    let threads: Vec<_> = (0..6)
        .map(|_| {
            std::thread::spawn(move || {
                for _ in 0..100 {
                    let mut client = connect(address);
                    client.set_read_timeout(Some(PATIENCE)).unwrap();
                    client.write_all(b"hello").unwrap();
                    let mut five = [0; 5];
                    client.read_exact(&mut five).unwrap();
                    assert_eq!(&five, b"hello");
                    client.shutdown(std::net::Shutdown::Write).unwrap();
                    assert_eq!(client.read(&mut five).unwrap(), 0, "the worker has closed it");
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    let quiet = |status: &dispatcher::api::status::Status| {
        status.pools[0].workers.iter().all(|worker| worker.load == 0)
    };
    let status = dispatcher.wait_status("every load is 0", quiet);
    assert_eq!((status.taken, status.in_flight, status.queued), (600, 0, 0));
    assert_eq!(status.line.as_ref().unwrap().tracked, 0);
    // The workers' own counts agree, and stay so.
    let agree = |status: &dispatcher::api::status::Status| {
        let lines = status.pools[0].workers.iter().filter_map(|worker| worker.line.as_ref());
        quiet(status) && lines.map(|line| line.used.unwrap()).sum::<u64>() == 600
    };
    let status = dispatcher.wait_status("the counts agree", agree);
    let sent: Vec<u64> = status.pools[0].workers.iter().map(|worker| worker.sent).collect();
    assert!(!exact || sent.iter().all(|&sent| sent >= 50), "all got some: {sent:?}");
    wait_until("every copy is closed", || dispatcher.fds() <= before);
    assert!(workers.iter_mut().all(Process::running));
}

#[test]
fn held_connections_are_spread_evenly() {
    let (dispatcher, address) = start("");
    let _workers: Vec<Process> = (0..3).map(|_| c_worker(&dispatcher, "echo")).collect();
    dispatcher.wait_joined("web", 3);
    let clients: Vec<TcpStream> = (0..90).map(|_| connect(address)).collect();
    dispatcher.wait_status("all are read", |status| {
        let workers = &status.pools[0].workers;
        status.taken == 90 && workers.iter().all(|w| w.line.as_ref().unwrap().unread == 0)
    });
    let (spread, difference) = loads(&dispatcher.status(), "web");
    assert_eq!((spread.iter().sum::<u64>(), difference), (90, 0), "{spread:?}");
    drop(clients);
}
