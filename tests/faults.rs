//! Faults of workers and of the machine, one at a time: who was not served yet is served, and nothing is counted twice.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;
use rustix::net::SocketType;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use support::peer::{Peer, hello, receive};
use support::*;
use worker_sdk::scoreboard::{Scoreboard, claim};
use worker_sdk::wire::{Channel, Entry};
use worker_sdk::{Worker, WorkerConfig};

fn config(pool: &str) -> String {
    format!(
        "[[listener]]\nname = \"web\"\naddress = \"127.0.0.1:0\"\npool = \"web\"\n\n[pool.web]\n{pool}\n"
    )
}

const QUICK: &str = "handoff_timeout = \"100ms\"\nprobation = \"0s\"";
const PATIENT: &str = "handoff_timeout = \"10m\"";

fn start(pool: &str) -> (Dispatcher, SocketAddr) {
    let dispatcher = Dispatcher::start(&config(pool));
    let address = dispatcher.address("web");
    (dispatcher, address)
}

/// A worker in this very process.
fn own_worker(dispatcher: &Dispatcher, name: &str) -> Worker {
    let config = WorkerConfig::new().dispatch_socket(dispatcher.dispatch()).pool("web").name(name);
    Worker::connect(config).unwrap()
}

fn greeted(streams: Vec<TcpStream>) -> Vec<Client> {
    streams.into_iter().map(|stream| Client::greeted(stream).unwrap()).collect()
}

fn wait_for_log(dispatcher: &Dispatcher, text: &str) {
    wait_until(&format!("the log to say {text}"), || dispatcher.log().contains(text));
}

/// Opens `count` connections that the dispatcher finds all at once.
fn connect_at_once(dispatcher: &Dispatcher, address: SocketAddr, count: usize) -> Vec<TcpStream> {
    dispatcher.process.signal(Signal::SIGSTOP);
    let streams = (0..count).map(|_| connect(address)).collect();
    dispatcher.process.signal(Signal::SIGCONT);
    streams
}

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
        let (dispatcher, address) = start(PATIENT);
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

/// A worker made by hand that has received a connection and not claimed it.
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
        let (welcome, mut lane) = peer.join(&hello());
        let board = Scoreboard::open(lane.remove(1), welcome.slots).unwrap();
        let stream = connect(address);
        let (record, mut fds) = receive(&lane[0]).unwrap();
        let Channel::Handoff(handoff) = Channel::decode(&record).unwrap() else {
            panic!("not a handoff")
        };
        let entry = handoff.entries[0];
        (Holding { peer, lane, board, entry, copy: fds.pop() }, stream)
    }

    /// Waits until the connection cannot be claimed any more, and makes sure of that.
    fn find_it_revoked(&mut self, dispatcher: &Dispatcher) {
        dispatcher.wait_status("suspicion", |status| {
            worker(status, "bad").is_some_and(|w| w.state == "suspect" && w.revoked == 1)
        });
        assert!(!claim::claim(self.board.slot(self.entry.slot).unwrap(), self.entry.seq));
        self.copy = None;
    }

    /// Takes the probe that follows.
    fn answer_probe(&self) {
        let (record, fds) = receive(&self.lane[0]).unwrap();
        let Channel::Probe(probe) = Channel::decode(&record).unwrap() else {
            panic!("not a probe")
        };
        assert!(fds.is_empty());
        assert!(claim::claim(self.board.slot(probe.slot).unwrap(), probe.seq));
        rustix::io::write(&self.lane[1], &1_u64.to_ne_bytes()).unwrap();
    }
}

#[test]
fn stopped_between_receiving_and_taking_then_continued() {
    let (dispatcher, address) = start(QUICK);
    let (mut holding, stream) = Holding::join(&dispatcher, address);
    let _other = dispatcher.worker("blocking", "web", "other");
    let mut client = Client::greeted(stream).unwrap();
    assert_eq!(client.served_by, "other");
    holding.find_it_revoked(&dispatcher);
    // Its copy is closed by now, and that has cut nobody off.
    client.echo("served exactly once");
    holding.answer_probe();
    let trusted = |status: &_| worker(status, "bad").is_some_and(|w| w.state == "active");
    let status = dispatcher.wait_status("trust", trusted);
    assert_eq!((status.taken, status.custody, status.held), (1, 0, 0));
    wait_for_log(&dispatcher, "event=worker_trusted");
    client.finish();
    drop(holding.peer);
}

#[test]
fn an_application_that_takes_one_of_many_and_hangs_gives_up_the_rest() {
    let (dispatcher, address) = start(QUICK);
    let slow = own_worker(&dispatcher, "slow");
    dispatcher.wait_joined("web", 1);
    let streams = connect_at_once(&dispatcher, address, 20);
    // They come in few records; the application takes one of them, and then is busy with it.
    let first = slow.accept().unwrap().unwrap();
    let suspect = |status: &_| worker(status, "slow").is_some_and(|w| w.state == "suspect");
    dispatcher.wait_status("suspicion", suspect);
    let _other = dispatcher.worker("blocking", "web", "other");
    dispatcher.wait_status("the others to be served", |status| {
        worker(status, "other").is_some_and(|w| w.taken == 19)
    });
    // It comes back to its queue: nothing there is its own any more, and it answers the probe.
    let back = std::thread::spawn(move || {
        let mut later = Vec::new();
        while let Some(mut connection) = slow.accept().unwrap() {
            connection.write_all(b"slow 0 web 127.0.0.1:0\n").unwrap();
            later.push(connection);
        }
        later.len()
    });
    let status = dispatcher.wait_status("trust", |status| !suspect(status));
    assert_eq!((status.taken, status.custody), (20, 0));
    let mut first = first;
    first.write_all(b"slow 0 web 127.0.0.1:0\n").unwrap();
    let clients = greeted(streams);
    assert_eq!((tally(&clients)["slow"], tally(&clients)["other"]), (1, 19));
    drop((clients, first, dispatcher));
    drop(back);
}

#[test]
fn a_stuck_thread_does_not_make_its_worker_suspect() {
    let (dispatcher, address) = start(QUICK);
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
    let (dispatcher, address) = start(QUICK);
    let _lazy = dispatcher.worker_with("blocking", "web", "lazy", &[("TEST_WORKER", "never-take")]);
    let _other = dispatcher.worker("blocking", "web", "other");
    dispatcher.wait_joined("web", 2);
    let clients = greeted((0..40).map(|_| connect(address)).collect());
    assert_eq!(tally(&clients)["other"], 40);
    let status = dispatcher.status();
    let lazy = worker(&status, "lazy").unwrap();
    assert_eq!((lazy.state.as_str(), lazy.load), ("suspect", 0));
    assert!(lazy.revoked > 0);
    assert_eq!(status.taken, 40);
}

/// Makes the channels of a dispatcher small. How large they are otherwise depends on the machine.
fn narrow_channels(dispatcher: &Dispatcher) {
    use rustix::net::sockopt::{set_socket_send_buffer_size, socket_send_buffer_size, socket_type};
    let pid = dispatcher.process.pid();
    let pidfd = pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()).unwrap();
    let mut narrowed = 0;
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
        let number = entry.unwrap().file_name().to_str().unwrap().parse().unwrap();
        // A child of ours lets us have a duplicate; some of them are closed by now.
        let Ok(fd) = pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty()) else { continue };
        if socket_type(&fd) == Ok(SocketType::SEQPACKET)
            && socket_send_buffer_size(&fd).is_ok_and(|size| size > 400_000)
        {
            set_socket_send_buffer_size(&fd, 64 * 1024).unwrap();
            narrowed += 1;
        }
    }
    assert_eq!(narrowed, 1, "the sending end of one channel");
}

#[test]
fn a_full_channel_sends_clients_to_the_next_worker() {
    if !descriptors(8_000) {
        return;
    }
    let (dispatcher, address) = start(&format!("{PATIENT}\nmax_untaken = 4096"));
    let environment = [
        ("TEST_WORKER", "never-take"),
        ("DISPATCH_WEIGHT", "10000"),
        ("DISPATCH_MAX_CONNECTIONS", "100000"),
    ];
    let mut lazy = dispatcher.worker_with("blocking", "web", "lazy", &environment);
    dispatcher.wait_joined("web", 1);
    narrow_channels(&dispatcher);
    let _other = dispatcher.worker("mio", "web", "other");
    dispatcher.wait_joined("web", 2);
    // By weight it would get all of them.
    let mut streams = Vec::new();
    while !dispatcher.log().contains("event=channel_full") {
        assert!(streams.len() < 4_000, "its channel has no end");
        streams.extend((0..20).map(|_| connect(address)));
        dispatcher
            .wait_status("all to be placed", |status| status.accepted == streams.len() as u64);
    }
    let status = dispatcher.status();
    let full = worker(&status, "lazy").unwrap();
    assert_eq!((full.state.as_str(), status.held), ("active", 0));
    assert!(full.custody > 100, "{full:?}");
    assert_eq!(Client::connect(address).unwrap().served_by, "other");
    // It goes without having taken any: the other serves them all.
    lazy.kill();
    let clients = greeted(streams);
    assert_eq!(tally(&clients)["other"], clients.len());
}

#[test]
fn a_worker_at_its_descriptor_limit_loses_nothing() {
    for flavour in ["blocking", "tokio", "mio"] {
        let (dispatcher, address) = start(&format!("{PATIENT}\nprobation = \"0s\""));
        let workers = dispatcher.workers(flavour, "web", 2);
        let warm: Vec<Client> = (0..4).map(|_| Client::connect(address).unwrap()).collect();
        assert_eq!(tally(&warm)["w0"], 2);
        workers[0].limit_descriptors(Some(3));
        // Three of this record arrive there, the others do not.
        let streams = connect_at_once(&dispatcher, address, 40);
        let clients = greeted(streams);
        assert_eq!(tally(&clients).get("w0"), Some(&3), "{flavour}");
        wait_for_log(&dispatcher, "event=connection_lost_by_worker");
        assert_eq!(dispatcher.status().taken, 44);
        workers[0].limit_descriptors(None);
        // It is tried again, and has the smaller load.
        wait_until("it to be given connections again", || {
            Client::connect(address).unwrap().served_by == "w0"
        });
    }
}

/// Processor time of a process, in clock ticks of ten milliseconds.
fn ticks(process: &Process) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.pid())).unwrap();
    let (_, rest) = stat.rsplit_once(") ").unwrap();
    let fields: Vec<&str> = rest.split(' ').collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[test]
fn a_dispatcher_at_its_descriptor_limit_waits_quietly() {
    let (dispatcher, address) = start(PATIENT);
    let _worker = dispatcher.worker("tokio", "web", "first");
    dispatcher.wait_joined("web", 1);
    Client::connect(address).unwrap().finish();
    dispatcher.wait_status("idleness", |status| loads(status, "web").0 == [0]);
    wait_until("all that was opened for our questions to be closed", || {
        let before = dispatcher.fds();
        std::thread::sleep(Duration::from_millis(50));
        dispatcher.fds() == before
    });
    dispatcher.process.limit_descriptors(Some(0));
    let streams: Vec<TcpStream> = (0..50).map(|_| connect(address)).collect();
    let late = dispatcher.worker("blocking", "web", "late");
    wait_for_log(&dispatcher, "event=accept_paused");
    // The worker's connection waits in its queue, too.
    wait_for_log(&dispatcher, "event=worker_not_accepted");
    let before = ticks(&dispatcher.process);
    std::thread::sleep(Duration::from_secs(2));
    let spent = ticks(&dispatcher.process) - before;
    assert!(spent <= 10, "{spent} ticks of 200: more than 5 %");
    dispatcher.process.limit_descriptors(None);
    assert_eq!(greeted(streams).len(), 50);
    dispatcher.wait_joined("web", 2);
    let status = dispatcher.status();
    assert_eq!((status.accepted, status.taken), (51, 51));
    drop(late);
}

#[test]
fn a_thousand_workers_come_and_go_at_once() {
    if !descriptors(16_000) {
        return;
    }
    let body = config(&format!("{PATIENT}\nmax_workers = 2000"));
    let dispatcher = Dispatcher::start(&format!("max_pending_hellos = 2000\n\n{body}"));
    let address = dispatcher.address("web");
    let crowd: Vec<Worker> = std::thread::scope(|scope| {
        let joining: Vec<_> = (0..20)
            .map(|part| {
                let dispatcher = &dispatcher;
                scope.spawn(move || {
                    let name = |number| format!("crowd-{part}-{number}");
                    (0..50).map(|n| own_worker(dispatcher, &name(n))).collect::<Vec<_>>()
                })
            })
            .collect();
        joining.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    dispatcher.wait_joined("web", 1000);
    let streams: Vec<TcpStream> = (0..2_500).map(|_| connect(address)).collect();
    let status =
        dispatcher.wait_status("all to be sent", |status| status.custody + status.taken == 2_500);
    let (loads, spread) = loads(&status, "web");
    assert_eq!((loads.len(), loads.iter().sum::<u64>(), spread), (1000, 2_500, 1));
    // They all leave without having taken any; one that came late serves the lot.
    let _last = dispatcher.worker_with(
        "mio",
        "web",
        "last",
        &[("DISPATCH_MAX_CONNECTIONS", "100000"), ("DISPATCH_WEIGHT", "1")],
    );
    dispatcher.wait_joined("web", 1001);
    drop(crowd);
    let clients = greeted(streams);
    assert_eq!(tally(&clients)["last"], 2_500);
    dispatcher.wait_status("the crowd to be gone", |status| pool(status, "web").workers.len() == 1);
}

#[test]
fn a_client_that_resets_in_custody_is_delivered_as_accept_would() {
    for flavour in ["blocking", "tokio", "mio"] {
        let (dispatcher, address) = start(PATIENT);
        let workers = dispatcher.workers(flavour, "web", 1);
        workers[0].signal(Signal::SIGSTOP);
        let mut streams: Vec<TcpStream> = (0..10).map(|_| connect(address)).collect();
        dispatcher.wait_status("custody", |status| status.custody == 10);
        for gone in streams.drain(..5) {
            rustix::net::sockopt::set_socket_linger(&gone, Some(Duration::ZERO)).unwrap();
        }
        for half in &mut streams {
            half.write_all(b"all I have to say\n").unwrap();
            half.shutdown(std::net::Shutdown::Write).unwrap();
        }
        workers[0].signal(Signal::SIGCONT);
        for mut half in greeted(streams) {
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
fn a_client_that_resets_while_held_is_dropped_and_one_that_half_closes_is_not() {
    let (dispatcher, address) = start("handoff_timeout = \"10m\"\nwait_for_worker = \"10m\"");
    let mut workers = dispatcher.workers("blocking", "web", 1);
    workers[0].signal(Signal::SIGSTOP);
    let mut streams: Vec<TcpStream> = (0..6).map(|_| connect(address)).collect();
    dispatcher.wait_status("custody", |status| status.custody == 6);
    workers[0].kill();
    dispatcher.wait_status("all to be held", |status| status.held == 6);
    for gone in streams.drain(..3) {
        rustix::net::sockopt::set_socket_linger(&gone, Some(Duration::ZERO)).unwrap();
    }
    for half in &mut streams {
        half.write_all(b"all I have to say\n").unwrap();
        half.shutdown(std::net::Shutdown::Write).unwrap();
    }
    let status = dispatcher.wait_status("three to be dropped", |status| status.held == 3);
    assert_eq!(status.closed["client_gone"], 3);
    let _late = dispatcher.worker("tokio", "web", "late");
    for mut half in greeted(streams) {
        let mut text = String::new();
        half.stream.read_to_string(&mut text).unwrap();
        assert_eq!(text, "all I have to say\n");
    }
    let status = dispatcher.wait_status("all to be over", |status| loads(status, "web").0 == [0]);
    assert_eq!((status.taken, status.closed.values().sum()), (3, 3));
}

#[test]
fn a_close_that_lingers_does_not_hold_up_the_dispatcher() {
    let (dispatcher, address) = start(PATIENT);
    let lingering = own_worker(&dispatcher, "lingering");
    dispatcher.wait_joined("web", 1);
    let unread = connect(address);
    dispatcher.wait_status("custody", |status| status.custody == 1);
    // While the dispatcher does not see it, the worker takes the connection, fills its send queue, asks for a
    // lingering close and closes its copy: the dispatcher's is the last.
    dispatcher.process.signal(Signal::SIGSTOP);
    let (mut stream, guard) = lingering.accept().unwrap().unwrap().into_parts().unwrap();
    stream.set_nonblocking(true).unwrap();
    let block = vec![0; 1 << 20];
    while stream.write(&block).is_ok() {}
    let longer_than_any_patience = Some(Duration::from_secs(3_000));
    rustix::net::sockopt::set_socket_linger(&stream, longer_than_any_patience).unwrap();
    drop(stream);
    drop(guard);
    dispatcher.process.signal(Signal::SIGCONT);
    dispatcher.wait_status("its end to be seen", |status| loads(status, "web").0 == [0]);
    lingering.close();
    let _other = dispatcher.worker("blocking", "web", "other");
    assert_eq!(Client::connect(address).unwrap().served_by, "other");
    drop(unread);
}

#[test]
fn a_worker_that_meddles_with_the_shared_channel_blocks_and_leaks_nothing() {
    let (dispatcher, address) = start(QUICK);
    let _other = dispatcher.worker("blocking", "web", "other");
    dispatcher.wait_joined("web", 1);
    Client::connect(address).unwrap().finish();
    let held = Client::connect(address).unwrap();
    let before = dispatcher.fds();
    let (mut holding, stream) = Holding::join(&dispatcher, address);
    let channel = &holding.lane[0];
    // These belong to the open socket, of which the dispatcher has a duplicate: a blocking one, with credentials in
    // front of the descriptors.
    rustix::io::ioctl_fionbio(channel, false).unwrap();
    rustix::net::sockopt::set_socket_passcred(channel, true).unwrap();
    assert_eq!(Client::greeted(stream).unwrap().served_by, "other");
    holding.find_it_revoked(&dispatcher);
    holding.answer_probe();
    dispatcher.wait_status("trust", |status| worker(status, "bad").unwrap().state == "active");
    // Now it leaves several where they are, to be purged from the channel.
    let streams = connect_at_once(&dispatcher, address, 8);
    assert_eq!(tally(&greeted(streams))["other"], 8);
    drop(holding);
    dispatcher.wait_status("it to be gone", |status| worker(status, "bad").is_none());
    wait_until("the descriptors to be closed", || dispatcher.fds() <= before);
    drop(held);
}

#[test]
fn what_was_sent_survives_the_dispatcher() {
    for flavour in ["blocking", "tokio", "mio"] {
        let (mut dispatcher, address) = start(PATIENT);
        let workers = dispatcher.workers(flavour, "web", 2);
        workers.iter().for_each(|worker| worker.signal(Signal::SIGSTOP));
        let streams: Vec<TcpStream> = (0..60).map(|_| connect(address)).collect();
        dispatcher.wait_status("all to be sent", |status| status.custody == 60);
        dispatcher.process.kill();
        workers.iter().for_each(|worker| worker.signal(Signal::SIGCONT));
        let mut clients = greeted(streams);
        assert_eq!(tally(&clients).into_values().collect::<Vec<_>>(), [30, 30], "{flavour}");
        // Its successor knows of them from the first moment.
        let again = Dispatcher::start_in(&dispatcher.dir);
        again.wait_joined("web", 2);
        assert_eq!(loads(&again.status(), "web"), (vec![30, 30], 0), "{flavour}");
        clients.iter_mut().for_each(|client| client.echo("whole"));
    }
}

#[test]
fn a_stop_that_runs_out_of_time_sends_what_it_holds_to_whoever_is_there() {
    let body = config("handoff_timeout = \"50ms\"");
    let mut dispatcher = Dispatcher::start(&format!("stop_timeout = \"300ms\"\n\n{body}"));
    let address = dispatcher.address("web");
    let workers = dispatcher.workers("tokio", "web", 1);
    workers[0].signal(Signal::SIGSTOP);
    let streams: Vec<TcpStream> = (0..10).map(|_| connect(address)).collect();
    dispatcher.wait_status("all to be held again", |status| {
        status.held + status.custody == status.accepted
            && worker(status, "w0").unwrap().state == "suspect"
    });
    assert!(dispatcher.stop().success());
    workers[0].signal(Signal::SIGCONT);
    assert_eq!(tally(&greeted(streams))["w0"], 10);
}

#[test]
fn with_no_worker_a_stop_counts_whom_it_had_to_close() {
    let body = config("wait_for_worker = \"10m\"\nhandoff_timeout = \"10m\"");
    let mut dispatcher = Dispatcher::start(&format!("stop_timeout = \"100ms\"\n\n{body}"));
    let address = dispatcher.address("web");
    let mut workers = dispatcher.workers("blocking", "web", 1);
    workers[0].signal(Signal::SIGSTOP);
    let mut streams: Vec<TcpStream> = (0..5).map(|_| connect(address)).collect();
    dispatcher.wait_status("custody", |status| status.custody == 5);
    workers[0].kill();
    dispatcher.wait_status("all to be held", |status| status.held == 5);
    assert!(dispatcher.stop().success());
    for stream in &mut streams {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    }
    assert_eq!(dispatcher.log().matches("reason=shutdown").count(), 5);
}

#[test]
fn a_forked_child_that_keeps_everything_open_hides_no_death() {
    let (dispatcher, address) = start(PATIENT);
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
        worker(status, "parent").unwrap().custody == 10
            && worker(status, "other").unwrap().taken == 11
    });
    parent.kill();
    // The control connection, the channel and the first connection are still open in the child.
    assert_eq!(tally(&greeted(streams))["other"], 21);
    wait_for_log(&dispatcher, "why=died resent=10 live=1");
    let status = dispatcher.status();
    assert_eq!((status.taken, loads(&status, "web").0.len()), (22, 1));
    drop(child);
    assert!(is_over(&mut first));
}

#[test]
fn a_log_that_nobody_reads_holds_up_nobody() {
    if !descriptors(4_000) {
        return;
    }
    let temp = configure(&config("wait_for_worker = \"0s\""));
    let (reader, writer) = std::io::pipe().unwrap();
    let mut command = Command::new(dispatcher_bin());
    let dispatcher = Dispatcher::start_logging_to(temp.path(), &mut command, writer.into());
    let address = dispatcher.address("web");
    // Each is refused with one line: more than the pipe and the queue before it hold.
    let dropped = wait_for("the log to fall behind", || {
        for _ in 0..200 {
            let mut rest = Vec::new();
            let _ = connect(address).read_to_end(&mut rest);
        }
        Some(dispatcher.status().log_lines_dropped).filter(|&dropped| dropped > 100)
    });
    let _worker = dispatcher.worker("mio", "web", "unimpressed");
    dispatcher.wait_joined("web", 1);
    assert_eq!(Client::connect(address).unwrap().served_by, "unimpressed");
    // As soon as somebody reads, it is said how many are missing.
    let mut text = String::new();
    let mut reader = reader;
    wait_until("the log to say so", || {
        let mut block = vec![0; 1 << 16];
        let count = reader.read(&mut block).unwrap();
        text.push_str(&String::from_utf8_lossy(&block[..count]));
        text.contains("log_lines_dropped count=")
    });
    assert!(dispatcher.status().log_lines_dropped >= dropped);
    drop(dispatcher);
}
