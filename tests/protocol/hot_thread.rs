//! No other process can block the hot thread: sockets with a lingering close, floods, and closes on
//! the dispatcher's behalf.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the report")]

mod stuck_page;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use dispatch_protocol::scoreboard::{Scoreboard, slot};
use dispatch_protocol::wire::{Channel, Entry, Goodbye, Hello};
use rustix::io::Errno;
use rustix::net::sockopt::set_socket_linger;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use test_support::peer::{Peer, encode, hello, receive, receive_with};
use test_support::*;

/// Hand-made workers are slow.
const NEVER_SUSPECT: &str = "handoff_timeout = \"1h\"";

/// Far above the noise of the machine, and far below the time of a trap.
const SLOW: Duration = Duration::from_secs(20);

/// Makes the close of this socket take an hour.
fn set_trap(fd: impl AsFd) {
    let fd = fd.as_fd();
    set_socket_linger(fd, Some(Duration::from_secs(3_600))).unwrap();
    let junk = vec![b'x'; 1 << 16];
    while rustix::net::send(fd, &junk, SendFlags::NOSIGNAL | SendFlags::DONTWAIT).is_ok() {}
}

/// A socket with a trap, and its other end, which never reads.
fn trap() -> (OwnedFd, TcpStream) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let theirs = connect(listener.local_addr().unwrap());
    let ours = OwnedFd::from(listener.accept().unwrap().0);
    set_trap(&ours);
    (ours, theirs)
}

/// Requests the status and clients for a while; the longest turn must stay short.
fn stays_quick(dispatcher: &Dispatcher) {
    for _ in 0..20 {
        assert_eq!(http_get(&dispatcher.admin(), "/healthz").unwrap().0, 200);
    }
    let longest = Duration::from_micros(dispatcher.status().longest_turn_microseconds);
    assert!(longest < SLOW, "a turn took {longest:?}");
}

fn send_with(socket: impl AsFd, fd: &OwnedFd) -> rustix::io::Result<usize> {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds = [fd.as_fd()];
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
    let parts = [std::io::IoSlice::new(b"x")];
    rustix::net::sendmsg(socket, &parts, &mut ancillary, SendFlags::NOSIGNAL)
}

#[test]
fn a_record_with_a_descriptor_that_lingers_holds_nothing_up() {
    let dispatcher = Dispatcher::start(&one_pool("allow_users = []"));
    let mut others = Vec::new();
    for _ in 0..8 {
        let (fd, theirs) = trap();
        let peer = Peer::connect(&dispatcher.dispatch());
        // Linux 6.16 and later refuse the descriptor here; before, it is received and closed on
        // another thread.
        match send_with(&peer.socket, &fd) {
            Ok(_) | Err(Errno::PERM) => {}
            Err(errno) => panic!("{errno}"),
        }
        // If it was sent, this is not the last reference.
        std::thread::spawn(move || drop(fd));
        others.push((peer, theirs));
    }
    stays_quick(&dispatcher);
}

#[test]
fn traps_in_the_queue_of_a_unix_client_hold_nothing_up() {
    let local = "[[listener]]\nname = \"local\"\naddress = \"unix:DIR/local.sock\"\npool = \"local\"\n\
                 [pool.local]\nwait_for_worker = \"0s\"\nunavailable_response = \"DIR/sorry\"\n";
    let temp = configure(&format!("{local}{}", one_pool("")));
    std::fs::write(temp.path().join("sorry"), "sorry").unwrap();
    let dispatcher = Dispatcher::start_in(temp.path());
    let before = dispatcher.fds();
    let mut others = Vec::new();
    for _ in 0..8 {
        let (fd, theirs) = trap();
        let mut client = UnixStream::connect(temp.path().join("local.sock")).unwrap();
        let _ = send_with(&client, &fd);
        std::thread::spawn(move || drop(fd));
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut text = String::new();
        // The client may be closed before it has sent; a client of another listener is not
        // affected.
        let _ = client.read_to_string(&mut text);
        others.push(theirs);
    }
    stays_quick(&dispatcher);
    wait_until("all to be closed", || dispatcher.fds() <= before);
}

/// A hand-made worker with one connection that it has not taken: its channel, scoreboard and
/// eventfd.
struct Mallory {
    peer: Peer,
    lane: Vec<OwnedFd>,
    board: Scoreboard,
}

impl Mallory {
    fn join(dispatcher: &Dispatcher) -> Mallory {
        let peer = Peer::connect(&dispatcher.dispatch());
        // It states earlier service, and gets every client by its weight.
        let (welcome, mut lane) =
            peer.join(&Hello { weight: 10_000, base: 1, finished: 1, ..hello() });
        let board = Scoreboard::open(lane.remove(1), welcome.slots).unwrap();
        Mallory { peer, lane, board }
    }

    fn ring(&self) {
        rustix::io::write(&self.lane[1], &1_u64.to_ne_bytes()).unwrap();
    }

    /// The next connections, received or peeked at; probes before them are answered.
    fn next(&self, flags: RecvFlags) -> (Vec<Entry>, Vec<OwnedFd>) {
        loop {
            let (record, fds) = receive_with(&self.lane[0], flags).expect("a record");
            match Channel::decode(&record).unwrap() {
                Channel::Handoff(handoff) => return (handoff.entries, fds),
                Channel::Probe(probe) => {
                    if flags.contains(RecvFlags::PEEK) {
                        receive(&self.lane[0]).expect("the probe");
                    }
                    assert!(slot::take(self.board.slot(probe.slot).unwrap(), probe.seq));
                    self.ring();
                }
                _ => {}
            }
        }
    }

    /// Receives a connection, or peeks at it in the queue, and takes it.
    fn take(&self, flags: RecvFlags) -> (u32, u64, OwnedFd) {
        let (entries, mut fds) = self.next(flags);
        let entry = entries[0];
        assert!(slot::take(self.board.slot(entry.slot).unwrap(), entry.seq));
        self.ring();
        (entry.slot, entry.seq, fds.remove(0))
    }
}

#[test]
fn a_trap_in_the_channel_of_a_worker_holds_nothing_up() {
    for goodbye in [true, false] {
        let (dispatcher, address) = start_one_pool(NEVER_SUSPECT);
        let mallory = Mallory::join(&dispatcher);
        let victim = connect(address);
        let (slot, seq, fd) = mallory.take(RecvFlags::PEEK);
        set_trap(&fd);
        drop(fd);
        let word = mallory.board.slot(slot).unwrap();
        wait_until("the release", || !slot::dispatcher_has_copy(word, seq));
        // The queue now has the last reference.
        if goodbye {
            let mut record = Vec::new();
            Goodbye.encode(&mut record);
            mallory.peer.send(&record, &[]).unwrap();
            wait_for_log(&dispatcher, "event=worker_goodbye");
        } else {
            drop(mallory);
            wait_for_log(&dispatcher, "event=worker_gone");
        }
        stays_quick(&dispatcher);
        drop(victim);
    }
}

#[test]
fn turning_away_a_trapped_client_holds_nothing_up() {
    let keys = format!("wait_for_worker = \"100ms\"\n{NEVER_SUSPECT}");
    let (dispatcher, address) = start_one_pool(&keys);
    let mallory = Mallory::join(&dispatcher);
    let mut victim = connect(address);
    let (_, mut fds) = mallory.next(RecvFlags::empty());
    set_trap(fds.remove(0));
    // The worker has not claimed the connection, so it is revoked and then refused.
    drop(mallory);
    dispatcher.wait_status("it to be refused", |status| status.closed["no_worker"] == 1);
    stays_quick(&dispatcher);
    let mut rest = Vec::new();
    victim.set_read_timeout(Some(PATIENCE)).unwrap();
    let _ = victim.read_to_end(&mut rest);
}

/// Pool `other` with a worker in this process that greets, sets SO_LINGER, and closes.
fn start_with_other() -> Dispatcher {
    let other = "[[listener]]\nname = \"other\"\naddress = \"127.0.0.1:0\"\npool = \"other\"\n[pool.other]\n";
    Dispatcher::start(&format!("{other}{}", one_pool(NEVER_SUSPECT)))
}

fn serve_other(dispatcher: &Dispatcher, linger: Option<Duration>, takes: Duration) {
    let config = worker_sdk::WorkerConfig::new().dispatch_socket(dispatcher.dispatch());
    let worker = worker_sdk::Worker::connect(config.pool("other").name("honest")).unwrap();
    std::thread::spawn(move || {
        while let Ok(Some(mut connection)) = worker.accept() {
            set_socket_linger(&connection, linger).unwrap();
            std::thread::spawn(move || {
                let _ = connection.write_all(b"hello");
                // Enough time for the release, or too little.
                std::thread::sleep(takes);
            });
        }
    });
    dispatcher.wait_joined("other", 1);
}

/// How long a client of `other` waits for the end after the greeting.
fn time_to_end(dispatcher: &Dispatcher) -> Duration {
    let mut client = connect(dispatcher.address("other"));
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut text = [0; 5];
    client.read_exact(&mut text).unwrap();
    let begun = Instant::now();
    assert_eq!(client.read(&mut text).unwrap(), 0, "the end, and no reset");
    begun.elapsed()
}

#[test]
fn a_stuck_close_delays_no_other_close() {
    for (linger, takes) in [
        (None, Duration::ZERO),
        (None, Duration::from_millis(5)),
        (Some(Duration::from_secs(1)), Duration::from_millis(5)),
    ] {
        let dispatcher = start_with_other();
        serve_other(&dispatcher, linger, takes);
        time_to_end(&dispatcher);
        let before = dispatcher.fds();
        let mallory = Mallory::join(&dispatcher);
        let victims: Vec<_> = (0..20).map(|_| connect(dispatcher.address("web"))).collect();
        let mut trapped = 0;
        while trapped < victims.len() {
            // Its own copy goes without lingering: with the one in flight it is not the last.
            let (entries, fds) = mallory.next(RecvFlags::empty());
            for (entry, fd) in entries.iter().zip(fds) {
                set_trap(&fd);
                drop(fd);
                assert!(slot::take(mallory.board.slot(entry.slot).unwrap(), entry.seq));
                trapped += 1;
            }
            mallory.ring();
        }
        let longest = (0..100).map(|_| time_to_end(&dispatcher)).max().unwrap();
        assert!(longest < SLOW, "{longest:?} with linger {linger:?}");
        // The traps of one worker are interrupted one after the other.
        drop(mallory);
        wait_until("the descriptors to be closed", || dispatcher.fds() <= before + 1);
        stays_quick(&dispatcher);
        drop(victims);
    }
}

#[test]
fn ends_come_promptly_at_idle_and_under_load() {
    let dispatcher = start_with_other();
    serve_other(&dispatcher, None, Duration::ZERO);
    // One after the other: each finds the dispatcher asleep.
    let idle = (0..100).map(|_| time_to_end(&dispatcher)).max().unwrap();
    let address = dispatcher.address("other");
    let clients: Vec<_> = (0..8)
        .map(|_| {
            std::thread::spawn(move || {
                for _ in 0..200 {
                    let mut client = connect(address);
                    client.set_read_timeout(Some(PATIENCE)).unwrap();
                    let mut text = Vec::new();
                    client.read_to_end(&mut text).unwrap();
                    assert_eq!(text, b"hello");
                }
            })
        })
        .collect();
    let loaded = (0..50).map(|_| time_to_end(&dispatcher)).max().unwrap();
    clients.into_iter().for_each(|client| client.join().unwrap());
    assert!(idle < SLOW && loaded < SLOW, "{idle:?} at idle, {loaded:?} under load");
    dispatcher.wait_status("all to be taken", |status| status.in_flight == 0);
}

/// Seconds of processor time of the hot thread.
fn busy(dispatcher: &Dispatcher) -> Duration {
    let pid = dispatcher.process.pid();
    let path = format!("/proc/{pid}/task/{pid}/schedstat");
    let text = std::fs::read_to_string(path).unwrap();
    Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
}

/// The processor share of the hot thread while another thread repeats `flood`.
fn share_during(dispatcher: &Dispatcher, flood: impl Fn() + Send + 'static) -> f64 {
    let over = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&over);
    let flooding = std::thread::spawn(move || {
        let mut count = 0_u64;
        while !flag.load(Ordering::Relaxed) {
            flood();
            count += 1;
        }
        count
    });
    // The long-term cost, without the beginning.
    let lasts = |time: Duration| {
        let (before, begun) = (busy(dispatcher), Instant::now());
        while begun.elapsed() < time {
            assert_eq!(http_get(&dispatcher.admin(), "/healthz").unwrap().0, 200);
            std::thread::sleep(Duration::from_millis(50));
        }
        (busy(dispatcher) - before).as_secs_f64() / begun.elapsed().as_secs_f64()
    };
    lasts(Duration::from_secs(1));
    let share = lasts(Duration::from_secs(3));
    over.store(true, Ordering::Relaxed);
    assert!(flooding.join().unwrap() > 0);
    share
}

#[test]
fn a_worker_that_only_rings_costs_the_hot_thread_little() {
    let (dispatcher, address) = start_one_pool(NEVER_SUSPECT);
    let mallory = Mallory::join(&dispatcher);
    let _honest = dispatcher.worker("blocking", "web", "honest");
    dispatcher.wait_joined("web", 2);
    let eventfd = mallory.lane[1].try_clone().unwrap();
    let share = share_during(&dispatcher, move || {
        rustix::io::write(&eventfd, &1_u64.to_ne_bytes()).unwrap();
    });
    assert!(share < 0.3, "{share}");
    wait_for_log(&dispatcher, "event=worker_rings_idly");
    // The worker is heard again when its scoreboard changes.
    let _waits = connect(address);
    let (slot, seq, _fd) = mallory.take(RecvFlags::empty());
    let word = mallory.board.slot(slot).unwrap();
    wait_until("the release", || !slot::dispatcher_has_copy(word, seq));
}

#[test]
fn joining_in_a_loop_costs_the_hot_thread_little() {
    let other = "[[listener]]\nname = \"other\"\naddress = \"127.0.0.1:0\"\npool = \"other\"\n[pool.other]\n";
    let config = format!("join_burst = 200\n{other}{}", one_pool(""));
    let dispatcher = Dispatcher::start(&config);
    let mut others: Vec<_> =
        (0..5).map(|n| dispatcher.worker("blocking", "other", &format!("o{n}"))).collect();
    dispatcher.wait_joined("other", 5);
    let path = dispatcher.dispatch();
    let over = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&over);
    let loop_of_joins = std::thread::spawn({
        let path = path.clone();
        move || {
            while !flag.load(Ordering::Relaxed) {
                let peer = Peer::connect(&path);
                let _ = peer.send(&encode(&hello()), &[]);
                let _ = peer.receive();
            }
        }
    });
    let log = |text: &str| dispatcher.log().matches(text).count();
    wait_until("the loop to be limited", || log("key=join_rate") > 0);
    for other in &mut others {
        other.kill();
    }
    let gone = |log: &str| {
        let lines = log.lines().filter(|line| line.contains("event=worker_gone"));
        lines.filter(|line| line.contains("pool=other")).count()
    };
    wait_until("their ends to be told", || gone(&dispatcher.log()) == 5);
    // Many more come and go afterwards.
    let before = log("event=worker_refused");
    wait_until("more of the loop", || log("event=worker_refused") > before + 40);
    let faults = dispatcher.status().faults;
    let named = |what: &str| faults.iter().filter(|fault| fault.subject.starts_with(what)).count();
    assert_eq!(named("other/o"), 5, "{faults:#?}");
    over.store(true, Ordering::Relaxed);
    loop_of_joins.join().unwrap();

    let share = share_during(&dispatcher, move || {
        let peer = Peer::connect(&path);
        let _ = peer.send(&encode(&hello()), &[]);
    });
    assert!(share < 0.3, "{share}");
}

#[test]
fn a_user_with_many_silent_connections_keeps_no_other_out() {
    if !nix::unistd::geteuid().is_root() {
        return skip("needs root, to connect as another user");
    }
    let config = format!(
        "max_handshakes = 8\nhello_timeout = \"1h\"\n{}",
        one_pool("handoff_timeout = \"1h\"")
    );
    let temp = configure(&config);
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(temp.path(), open).unwrap();
    let dispatcher = Dispatcher::start_in(temp.path());
    // As many as allowed for one user: the user of this thread, for a while.
    let path = dispatcher.dispatch();
    let silent = std::thread::spawn(move || {
        // The system call changes only the calling thread.
        let user = rustix::process::Uid::from_raw(65_534);
        rustix::thread::set_thread_res_uid(user, user, user).unwrap();
        (0..8).map(|_| Peer::connect(&path)).collect::<Vec<_>>()
    });
    let silent = silent.join().unwrap();
    let _worker = dispatcher.workers("blocking", "web", 1);
    wait_for_log(&dispatcher, "key=max_handshakes");
    drop(silent);
}

/// The system calls of the hot thread while workers and clients of all kinds come and go.
#[test]
fn the_hot_thread_makes_no_call_on_sockets_of_other_processes() {
    if Command::new("strace").arg("-V").output().is_err() {
        return skip("needs strace");
    }
    let keys = "handoff_timeout = \"100ms\"\nwait_for_worker = \"5s\"\nunavailable_response = \"DIR/sorry\"";
    let local =
        "[[listener]]\nname = \"local\"\naddress = \"unix:DIR/local.sock\"\npool = \"web\"\n";
    let temp = configure(&format!("{local}{}", one_pool(keys)));
    std::fs::write(temp.path().join("sorry"), "sorry").unwrap();
    let trace = temp.path().join("trace");
    let mut command = Command::new("strace");
    // Only the hot thread: strace follows no other.
    command.arg("-o").arg(&trace).arg(dispatcher_bin()).args(["run", "--config"]);
    command.arg(temp.path().join("dispatcher.toml"));
    command.stderr(std::fs::File::create(temp.path().join("log")).unwrap());
    let dispatcher = Dispatcher::start_by(temp.path(), &mut command);
    let address = dispatcher.address("web");
    let started = std::fs::read_to_string(&trace).unwrap().lines().count();

    // Served by a worker that is suspect for a while, and one that says goodbye; then turned away;
    // then served again.
    let mallory = Mallory::join(&dispatcher);
    let left = connect(address);
    dispatcher.wait_status("a suspect", |s| worker(s, "bad").is_some_and(|w| w.state == "suspect"));
    let honest = own_worker(&dispatcher, "honest");
    let serving = std::thread::spawn({
        let honest = honest.clone();
        move || while let Ok(Some(_served)) = honest.accept() {}
    });
    let end = |mut client: TcpStream| {
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut text = String::new();
        client.read_to_string(&mut text).unwrap();
        text
    };
    assert_eq!(end(left), "");
    (0..20).for_each(|_| assert_eq!(end(connect(address)), ""));
    honest.close();
    serving.join().unwrap();
    drop(mallory);
    dispatcher.wait_status("to refuse", |status| pool(status, "web").state == "refusing");
    assert_eq!(end(connect(address)), "sorry");
    let mut client = UnixStream::connect(temp.path().join("local.sock")).unwrap();
    let mut text = String::new();
    client.read_to_string(&mut text).unwrap();
    assert_eq!(text, "sorry");
    dispatcher.wait_status("their end", |status| status.closed["no_worker"] >= 2);

    let text = std::fs::read_to_string(&trace).unwrap();
    // strace may be writing another line.
    let (text, _) = text.rsplit_once('\n').unwrap();
    let calls: Vec<&str> = text.lines().skip(started).collect();
    assert!(calls.iter().any(|call| call.starts_with("accept4(")), "the trace has all of it");
    for call in calls {
        let name = call.split('(').next().unwrap();
        let other =
            ["close", "read", "recv", "getsockopt", "setsockopt", "sendto", "send", "write"]
                .iter()
                .any(|other| name.starts_with(other));
        // Records to workers; wake-ups of other threads; signals, which no other process can send
        // here.
        let own = name == "sendmsg" || name == "write" && call.contains(", 8)");
        assert!(!other || own, "{call}");
    }
}
