//! Faults of workers and clients, one at a time: every unserved client is served, and no connection
//! is counted twice.
#![allow(clippy::unwrap_used)]

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::time::Duration;

use dispatch_protocol::scoreboard::{Scoreboard, slot};
use dispatch_protocol::wire::{Channel, Entry, Hello};
use nix::sys::signal::Signal;
use test_support::peer::{Peer, encode, hello, receive};
use test_support::*;

const QUICK: &str = "handoff_timeout = \"100ms\"";
const PATIENT: &str = "handoff_timeout = \"10m\"";

fn is_over(client: &mut Client) -> bool {
    let mut rest = Vec::new();
    match client.stream.read_to_end(&mut rest) {
        Ok(_) => true,
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    }
}

#[test]
fn a_worker_killed_while_serving_costs_only_its_own_clients() {
    for flavour in ["blocking", "tokio", "mio"] {
        let (dispatcher, address) = start_one_pool(PATIENT);
        let mut workers = dispatcher.workers(flavour, "web", 2);
        let clients: Vec<Client> = (0..20).map(|_| Client::connect(address).unwrap()).collect();
        let (mut of_killed, mut others): (Vec<_>, Vec<_>) =
            clients.into_iter().partition(|client| client.served_by == "w0");
        assert_eq!((of_killed.len(), others.len()), (10, 10));
        workers[0].kill();
        assert!(of_killed.iter_mut().all(is_over), "{flavour}");
        others.iter_mut().for_each(|client| client.echo("untouched"));
        wait_for_log(&dispatcher, "resent=0 live=10");
        let status = dispatcher.status();
        assert_eq!((status.taken, loads(&status, "web").0), (20, vec![10]), "{flavour}");
    }
}

/// A hand-made worker that has received a connection and not claimed it.
struct Holding {
    peer: Peer,
    lane: Vec<OwnedFd>,
    board: Scoreboard,
    entry: Entry,
    copy: Option<OwnedFd>,
}

impl Holding {
    fn join(dispatcher: &Dispatcher, address: SocketAddr) -> (Holding, TcpStream) {
        let peer = Peer::connect(&dispatcher.dispatch());
        // It states earlier service, and by weight it would get every client.
        let hello = Hello { weight: 10_000, base: 1, finished: 1, ..hello() };
        let (welcome, mut lane) = peer.join(&hello);
        let board = Scoreboard::open(lane.remove(1), welcome.slots).unwrap();
        let stream = connect(address);
        let (record, mut fds) = receive(&lane[0]).unwrap();
        let Channel::Handoff(handoff) = Channel::decode(&record).unwrap() else {
            panic!("not a handoff")
        };
        let entry = handoff.entries[0];
        (Holding { peer, lane, board, entry, copy: fds.pop() }, stream)
    }

    /// Waits until the connection cannot be claimed any more, and checks that.
    fn find_it_revoked(&mut self, dispatcher: &Dispatcher) {
        dispatcher.wait_status("suspicion", |status| {
            worker(status, "bad").is_some_and(|w| w.state == "suspect" && w.revoked == 1)
        });
        assert!(!slot::take(self.board.slot(self.entry.slot).unwrap(), self.entry.seq));
        self.copy = None;
    }

    /// Answers the probe that follows.
    fn answer_probe(&self) {
        answer_probe(&self.lane, &self.board);
    }
}

fn answer_probe(lane: &[OwnedFd], board: &Scoreboard) {
    let (record, fds) = receive(&lane[0]).unwrap();
    let Channel::Probe(probe) = Channel::decode(&record).unwrap() else { panic!("not a probe") };
    assert!(fds.is_empty());
    assert!(slot::take(board.slot(probe.slot).unwrap(), probe.seq));
    rustix::io::write(&lane[1], &1_u64.to_ne_bytes()).unwrap();
}

#[test]
fn killed_between_receiving_and_taking() {
    let (dispatcher, address) = start_one_pool(PATIENT);
    let (holding, stream) = Holding::join(&dispatcher, address);
    let _other = dispatcher.worker("tokio", "web", "other");
    dispatcher.wait_joined("web", 2);
    // All its descriptors close at once, including the received connection, as when a process is
    // killed.
    drop(holding);
    let mut client = Client::greeted(stream).unwrap();
    assert_eq!(client.served_by, "other");
    client.echo("served by another");
    client.finish();
    wait_for_log(&dispatcher, "resent=1 live=0");
    let status = dispatcher.status();
    assert_eq!((status.taken, status.in_flight, status.queued), (1, 0, 0));
}

#[test]
fn stopped_between_receiving_and_taking_then_continued() {
    let (dispatcher, address) = start_one_pool(QUICK);
    let (mut holding, stream) = Holding::join(&dispatcher, address);
    let _other = dispatcher.worker("blocking", "web", "other");
    let mut client = Client::greeted(stream).unwrap();
    assert_eq!(client.served_by, "other");
    holding.find_it_revoked(&dispatcher);
    // Its copy is closed by now; the client's connection is still open.
    client.echo("served exactly once");
    holding.answer_probe();
    client.finish();
    let over = |status: &_| worker(status, "other").is_some_and(|w| w.load == 0);
    let status = dispatcher.wait_status("the end", over);
    assert_eq!((status.taken, status.in_flight, status.queued), (1, 0, 0));
    // A living worker need not be a serving worker.
    assert_eq!(worker(&status, "bad").unwrap().state, "suspect");
    drop(holding.peer);
}

#[test]
fn an_application_that_hangs_after_one_take_loses_the_rest() {
    let (dispatcher, address) = start_one_pool(QUICK);
    let slow = own_worker(&dispatcher, "slow");
    dispatcher.wait_joined("web", 1);
    let streams = connect_at_once(&dispatcher, address, 20);
    // The connections come in few records; the application takes one and is then busy.
    let first = slow.accept().unwrap().unwrap();
    // Its thread is only busy; the rest goes back to the queue, where the first free thread gets
    // it.
    dispatcher.wait_status("the rest to wait", |status| status.queued > 0 && status.in_flight == 0);
    let _other = dispatcher.worker("blocking", "web", "other");
    dispatcher.wait_status("the others to be served", |status| {
        worker(status, "other").is_some_and(|w| w.taken == 19)
    });
    // It returns to its channel, where no connection belongs to it any more.
    let back = std::thread::spawn(move || {
        let mut later = Vec::new();
        while let Some(mut connection) = slow.accept().unwrap() {
            connection.write_all(b"slow 0 web 127.0.0.1:0\n").unwrap();
            later.push(connection);
        }
        later.len()
    });
    let status = dispatcher.status();
    assert_eq!((status.taken, status.in_flight), (20, 0));
    assert!(!dispatcher.log().contains("event=worker_suspect"));
    let mut first = first;
    first.write_all(b"slow 0 web 127.0.0.1:0\n").unwrap();
    let clients = all_greeted(streams);
    assert_eq!((tally(&clients)["slow"], tally(&clients)["other"]), (1, 19));
    drop((clients, first, dispatcher));
    drop(back);
}

#[test]
fn a_stuck_thread_does_not_make_its_worker_suspect() {
    let (dispatcher, address) = start_one_pool(QUICK);
    let worker_here = own_worker(&dispatcher, "half");
    dispatcher.wait_joined("web", 1);
    let stream = connect(address);
    let stuck = worker_here.accept().unwrap().unwrap();
    let taker = worker_here.clone();
    let other = std::thread::spawn(move || {
        let mut taken = Vec::new();
        while let Some(mut connection) = taker.accept().unwrap() {
            connection.write_all(b"half 0 web 127.0.0.1:0\n").unwrap();
            taken.push(connection);
        }
    });
    let clients: Vec<Client> = (0..50).map(|_| Client::connect(address).unwrap()).collect();
    assert_eq!(tally(&clients)["half"], 50);
    assert!(!dispatcher.log().contains("event=worker_suspect"));
    worker_here.close();
    other.join().unwrap();
    drop((stuck, stream));
}

#[test]
fn a_worker_that_never_takes_costs_nobody_more_than_the_timeout() {
    let (dispatcher, address) = start_one_pool(QUICK);
    let _lazy = dispatcher.worker_with("blocking", "web", "lazy", &[("TEST_WORKER", "never-take")]);
    let _other = dispatcher.worker("blocking", "web", "other");
    dispatcher.wait_joined("web", 2);
    let clients = all_greeted((0..40).map(|_| connect(address)).collect());
    assert_eq!(tally(&clients)["other"], 40);
    let status = dispatcher.status();
    // It answers no probe, so it gets no trial.
    let lazy = worker(&status, "lazy").unwrap();
    assert_eq!((lazy.proven, lazy.load), (false, 0));
    assert_eq!(status.taken, 40);
}

#[test]
fn a_client_that_resets_in_flight_is_delivered_as_accept_would() {
    for flavour in ["blocking", "tokio", "mio"] {
        let (dispatcher, address) = start_one_pool(PATIENT);
        let workers = dispatcher.workers(flavour, "web", 1);
        workers[0].signal(Signal::SIGSTOP);
        let mut streams: Vec<TcpStream> = (0..10).map(|_| connect(address)).collect();
        dispatcher.wait_status("one in flight", |status| status.in_flight == 10);
        for gone in streams.drain(..5) {
            rustix::net::sockopt::set_socket_linger(&gone, Some(Duration::ZERO)).unwrap();
        }
        for half in &mut streams {
            half.write_all(b"all I have to say\n").unwrap();
            half.shutdown(std::net::Shutdown::Write).unwrap();
        }
        workers[0].signal(Signal::SIGCONT);
        for mut half in all_greeted(streams) {
            let mut text = String::new();
            half.stream.read_to_string(&mut text).unwrap();
            assert_eq!(text, "all I have to say\n", "{flavour}");
        }
        let status = dispatcher.wait_status("all to be over", |status| {
            worker(status, "w0").is_some_and(|w| w.taken == 10 && w.load == 0)
        });
        assert_eq!(status.closed.values().sum::<u64>(), 0, "{flavour}");
    }
}

#[test]
fn a_reset_drops_a_queued_client_and_a_half_close_does_not() {
    let (dispatcher, address) =
        start_one_pool("handoff_timeout = \"10m\"\nwait_for_worker = \"10m\"");
    let mut workers = dispatcher.workers("blocking", "web", 1);
    workers[0].signal(Signal::SIGSTOP);
    let mut streams: Vec<TcpStream> = (0..6).map(|_| connect(address)).collect();
    dispatcher.wait_status("one in flight", |status| status.in_flight == 6);
    workers[0].kill();
    dispatcher.wait_status("all to be queued", |status| status.queued == 6);
    for gone in streams.drain(..3) {
        rustix::net::sockopt::set_socket_linger(&gone, Some(Duration::ZERO)).unwrap();
    }
    for half in &mut streams {
        half.write_all(b"all I have to say\n").unwrap();
        half.shutdown(std::net::Shutdown::Write).unwrap();
    }
    let status = dispatcher.wait_status("three to be dropped", |status| status.queued == 3);
    assert_eq!(status.closed["client_gone"], 3);
    let _late = dispatcher.worker("tokio", "web", "late");
    for mut half in all_greeted(streams) {
        let mut text = String::new();
        half.stream.read_to_string(&mut text).unwrap();
        assert_eq!(text, "all I have to say\n");
    }
    let status = dispatcher.wait_status("all to be over", |status| loads(status, "web").0 == [0]);
    assert_eq!((status.taken, status.closed.values().sum()), (3, 3));
}

#[test]
fn a_worker_that_alters_its_channel_blocks_and_leaks_nothing() {
    let (dispatcher, address) = start_one_pool(QUICK);
    let _other = dispatcher.worker("blocking", "web", "other");
    dispatcher.wait_joined("web", 1);
    Client::connect(address).unwrap().finish();
    let held = Client::connect(address).unwrap();
    let before = dispatcher.fds();
    let (mut holding, stream) = Holding::join(&dispatcher, address);
    let channel = &holding.lane[0];
    // Two settings of the open socket, of which the dispatcher has a duplicate: blocking mode, and
    // credentials in front of the descriptors.
    rustix::io::ioctl_fionbio(channel, false).unwrap();
    rustix::net::sockopt::set_socket_passcred(channel, true).unwrap();
    assert_eq!(Client::greeted(stream).unwrap().served_by, "other");
    holding.find_it_revoked(&dispatcher);
    holding.answer_probe();
    // From here on it leaves records in the channel, to be purged.
    let streams = connect_at_once(&dispatcher, address, 8);
    assert_eq!(tally(&all_greeted(streams))["other"], 8);
    drop(holding);
    dispatcher.wait_status("it to be gone", |status| worker(status, "bad").is_none());
    wait_until("the descriptors to be closed", || dispatcher.fds() <= before);
    drop(held);
}

#[test]
fn what_was_sent_survives_the_dispatcher() {
    for flavour in ["blocking", "tokio", "mio"] {
        let (mut dispatcher, address) = start_one_pool(PATIENT);
        let workers = dispatcher.workers(flavour, "web", 2);
        workers.iter().for_each(|worker| worker.signal(Signal::SIGSTOP));
        let streams: Vec<TcpStream> = (0..60).map(|_| connect(address)).collect();
        dispatcher.wait_status("all to be sent", |status| status.in_flight == 60);
        dispatcher.process.kill();
        workers.iter().for_each(|worker| worker.signal(Signal::SIGCONT));
        let mut clients = all_greeted(streams);
        assert_eq!(tally(&clients).into_values().collect::<Vec<_>>(), [30, 30], "{flavour}");
        // The next dispatcher knows the connections from the start.
        let again = Dispatcher::start_in(&dispatcher.dir);
        again.wait_joined("web", 2);
        assert_eq!(loads(&again.status(), "web"), (vec![30, 30], 0), "{flavour}");
        clients.iter_mut().for_each(|client| client.echo("whole"));
    }
}

#[test]
fn a_stop_that_runs_out_of_time_sends_queued_clients_anywhere() {
    let body = one_pool("handoff_timeout = \"50ms\"");
    let mut dispatcher = Dispatcher::start(&format!("stop_timeout = \"300ms\"\n\n{body}"));
    let address = dispatcher.address("web");
    let workers = dispatcher.workers("tokio", "web", 1);
    workers[0].signal(Signal::SIGSTOP);
    let streams: Vec<TcpStream> = (0..10).map(|_| connect(address)).collect();
    dispatcher.wait_status("all to be queued again", |status| {
        status.queued + status.in_flight == status.accepted
            && worker(status, "w0").unwrap().state == "suspect"
    });
    assert!(dispatcher.stop().success());
    workers[0].signal(Signal::SIGCONT);
    assert_eq!(tally(&all_greeted(streams))["w0"], 10);
}

#[test]
fn with_no_worker_a_stop_counts_whom_it_had_to_close() {
    let body = one_pool("wait_for_worker = \"10m\"\nhandoff_timeout = \"10m\"");
    let mut dispatcher = Dispatcher::start(&format!("stop_timeout = \"100ms\"\n\n{body}"));
    let address = dispatcher.address("web");
    let mut workers = dispatcher.workers("blocking", "web", 1);
    workers[0].signal(Signal::SIGSTOP);
    let mut streams: Vec<TcpStream> = (0..5).map(|_| connect(address)).collect();
    dispatcher.wait_status("one in flight", |status| status.in_flight == 5);
    workers[0].kill();
    dispatcher.wait_status("all to be queued", |status| status.queued == 5);
    assert!(dispatcher.stop().success());
    for stream in &mut streams {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    }
    let log = dispatcher.log();
    let closed = |line: &&str| line.contains("client_closed") && line.contains("reason=shutdown");
    assert_eq!(log.lines().filter(closed).count(), 5, "{log}");
}

#[test]
fn a_forked_child_that_keeps_everything_open_hides_no_death() {
    let (dispatcher, address) = start_one_pool(PATIENT);
    let mut command = Command::new(example("test-worker"));
    command
        .arg("blocking")
        .env("TEST_WORKER", "fork")
        .env("DISPATCH_SOCKET", dispatcher.dispatch());
    command.env("DISPATCH_POOL", "web").env("DISPATCH_NAME", "parent");
    // The child lives until this pipe is closed.
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut parent = Process::start("parent", &mut command);
    let child = parent.child.stdin.take();
    dispatcher.wait_joined("web", 1);
    let mut first = Client::connect(address).unwrap();
    first.echo("with a child");
    let _other = dispatcher.worker("blocking", "web", "other");
    dispatcher.wait_joined("web", 2);
    parent.signal(Signal::SIGSTOP);
    let streams: Vec<TcpStream> = (0..21).map(|_| connect(address)).collect();
    dispatcher.wait_status("all to be placed", |status| {
        worker(status, "parent").unwrap().in_flight == 10
            && worker(status, "other").unwrap().taken == 11
    });
    parent.kill();
    // The control connection, the channel and the first connection are still open in the child.
    assert_eq!(tally(&all_greeted(streams))["other"], 21);
    wait_for_log(&dispatcher, "why=died resent=10 live=1");
    let status = dispatcher.status();
    assert_eq!((status.taken, loads(&status, "web").0.len()), (22, 1));
    drop(child);
    assert!(is_over(&mut first));
}

#[test]
fn the_status_tells_the_last_faults_and_who_came_when() {
    let keys = format!("{QUICK}\nmax_connections_per_worker = 2");
    let body = one_pool(&keys);
    let dispatcher = Dispatcher::start(&format!("fault_history = 5\n\n{body}"));
    let address = dispatcher.address("web");
    let told = |kind: &str, subject: &str, text: &str| {
        let status = dispatcher.wait_status(kind, |status| {
            status.faults.iter().any(|fault| fault.kind == kind && fault.subject == subject)
        });
        let fault = status.faults.iter().rev().find(|fault| fault.kind == kind).unwrap();
        assert!(fault.text.contains(text), "{fault:?}");
        assert!(humantime::parse_rfc3339(&fault.time).is_ok(), "{fault:?}");
        (fault.count, status)
    };
    assert_eq!(dispatcher.status().faults, []);

    // Refused twice, with one line each.
    for count in 1..=2 {
        let peer = Peer::connect(&dispatcher.dispatch());
        peer.send(&encode(&Hello { pool: "wbe".to_owned(), ..hello() }), &[]).unwrap();
        assert!(peer.refusal().reason.contains("wbe"));
        assert_eq!(told("worker_refused", "dispatch_socket", "wbe").0, count);
        assert_eq!(dispatcher.metric("dispatcher_workers_refused_total"), count as f64);
    }
    let mut workers = dispatcher.workers("tokio", "web", 1);
    let mut clients: Vec<Client> = (0..2).map(|_| Client::connect(address).unwrap()).collect();
    // Full, and one more waits.
    let waiting = connect(address);
    told("back_pressure", "web", "full or suspect");
    clients.pop().unwrap().finish();
    clients.push(Client::greeted(waiting).unwrap());
    clients.pop().unwrap().finish();
    dispatcher.wait_status("room", |status| loads(status, "web").0 == [1]);
    // The only worker is stopped and becomes suspect.
    workers[0].signal(Signal::SIGSTOP);
    let untaken = connect(address);
    told("worker_suspect", "web/w0", "took nothing for");
    workers[0].kill();
    told("worker_gone", "web/w0", "1 was being served");
    let (_, status) = told("no_worker", "web", "clients wait");
    let kinds: Vec<&str> = status.faults.iter().map(|fault| fault.kind.as_str()).collect();
    assert_eq!(kinds[0], "worker_refused", "{kinds:?}");
    // No more than configured: the oldest fault of the largest group is dropped.
    let mut second = dispatcher.worker("tokio", "web", "w1");
    let last = Client::greeted(untaken).unwrap();
    second.kill();
    let (_, status) = told("worker_gone", "web/w1", "process");
    assert_eq!(status.faults.len(), 5, "{:#?}", status.faults);
    assert!(!status.faults.iter().any(|f| f.kind == "worker_gone" && f.subject == "web/w0"));
    drop((clients, last));

    // Every client is counted in one of the seconds.
    let status = dispatcher.wait_status("the last second to be over", |status| {
        status.accepted_per_second.iter().sum::<u64>() == status.accepted
    });
    assert_eq!(status.accepted, 4);
    let seconds = status.accepted_per_second.len() as u64;
    assert!(seconds.abs_diff(status.uptime_seconds) <= 1, "{status:?}");
}
