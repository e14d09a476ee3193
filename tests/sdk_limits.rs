//! Workers at the limits of their process: few file descriptors, wrong ones, inherited ones, forks.
//! Each in a separate process.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the report")]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread;

use dispatch_protocol::scoreboard::slot::SlotState;
use test_support::fake_dispatcher::{FakeDispatcher, Peer, accept, eventually, is_open, join};
use worker_sdk::PeerAddr;

#[test]
fn many_clients_leave_no_descriptors_open() {
    // In a separate process, because other tests open descriptors at the same time.
    in_child("fds_child");
}

#[test]
fn fds_child() {
    if !is_child("fds_child") {
        return;
    }
    let fake = FakeDispatcher::new();
    let before = test_support::fake_dispatcher::open_fds();
    for _ in 0..3 {
        let (worker, mut peer) = join(&fake);
        for _ in 0..50 {
            let (client, ours) = fake.client();
            let (_client, revoked) = fake.client();
            peer.send_one(&ours);
            let entry = peer.send_one(&revoked);
            drop(accept(&worker));
            peer.revoke(&entry);
            drop((client, ours));
        }
        let unasked = fake.client();
        peer.send_one(&unasked.1);
        drop(worker);
    }
    assert_eq!(test_support::fake_dispatcher::open_fds(), before);
}

#[test]
fn at_the_descriptor_limit_missing_connections_are_declined() {
    in_child("lost_child");
}

#[test]
fn lost_child() {
    if !is_child("lost_child") {
        return;
    }
    let fake = FakeDispatcher::new();
    let (worker, mut peer) = join(&fake);
    let pairs: Vec<_> = (0..8).map(|_| fake.client()).collect();
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    // The next descriptors are the lowest free numbers; the loop finds the first that leaves room
    // for exactly three.
    let mut probe = Vec::new();
    for _ in 0..3 {
        probe.push(pairs[0].0.try_clone().unwrap());
    }
    let highest = probe.iter().map(std::os::fd::AsRawFd::as_raw_fd).max();
    drop(probe);
    let low = rustix::process::Rlimit { current: Some(highest.unwrap() as u64 + 1), ..limit };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, low).unwrap();
    let entries = peer.send(&pairs.iter().map(|(_, ours)| ours).collect::<Vec<_>>());
    let held: Vec<_> = (0..3).map(|_| accept(&worker)).collect();
    rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
    for (i, entry) in entries.iter().enumerate() {
        let expected = if i < 3 { SlotState::Taken } else { SlotState::Lost };
        assert_eq!(peer.state(entry), expected, "entry {i}");
    }
    for (i, connection) in held.iter().enumerate() {
        let address = pairs[i].0.local_addr().unwrap();
        assert_eq!(connection.peer_addr(), PeerAddr::from(address));
    }
    assert!(pairs.iter().all(|(client, _)| is_open(client)));
    assert!(worker.is_joined(), "the session continues");
}

#[test]
fn a_record_with_wrong_descriptors_ends_the_session() {
    in_child("wrong_fds_child");
}

#[test]
fn wrong_fds_child() {
    if !is_child("wrong_fds_child") {
        return;
    }
    let fake = FakeDispatcher::new();
    let (worker, mut peer) = join(&fake);
    let worker = Arc::new(worker);
    let waiting = {
        let worker = Arc::clone(&worker);
        thread::spawn(move || drop(accept(&worker)))
    };
    let (client, ours) = fake.client();
    let before = test_support::fake_dispatcher::open_fds();
    let breaks: [&dyn Fn(&mut Peer); 4] = [
        &|peer| {
            let entry = peer.offer(&ours);
            peer.send_raw(&[entry], &[ours.as_fd(), ours.as_fd()]);
        },
        &|peer| peer.send_bytes(b"nonsense", &[ours.as_fd()]),
        &|peer| peer.send_bytes(&vec![0; 8000], &[ours.as_fd()]),
        &|peer| {
            let entries: Vec<_> = (0..64).map(|_| peer.offer(&ours)).collect();
            peer.send_raw(&entries, &vec![ours.as_fd(); 253]);
        },
    ];
    for broken in breaks {
        broken(&mut peer);
        assert!(peer.control_record().is_none(), "the worker closes the connection");
        let next = fake.welcome();
        assert_eq!((next.hello.base, next.hello.finished), (0, 0));
        peer = next;
        eventually("descriptors are closed", || {
            test_support::fake_dispatcher::open_fds() <= before
        });
    }
    assert!(is_open(&client));
    peer.send_one(&ours);
    waiting.join().unwrap();
    assert_eq!(worker.live(), 0);
}

#[test]
fn a_client_without_free_descriptors_sets_no_server_aside() {
    in_child("client_child");
}

#[test]
fn client_child() {
    use std::time::Duration;
    use worker_sdk::connector::{self, Addresses, ConnectorConfig, Error, Selection};

    if !is_child("client_child") {
        return;
    }
    let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    let addresses = listeners.each_ref().map(|listener| listener.local_addr().unwrap());
    let list = Addresses::list(addresses.map(|address| address.to_string())).unwrap();
    let pause = Duration::from_secs(3_600);
    let config = ConnectorConfig::new(list)
        .selection(Selection::InOrder)
        .back_off(Duration::from_millis(1), Duration::from_millis(1))
        .set_aside(pause, pause);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let blocks = connector::Connector::new(config.clone()).unwrap();
    let tasks = connector::tokio::Connector::new(config).unwrap();
    let connect = |with_tokio: bool| match with_tokio {
        false => blocks.connect().map(|connection| connection.peer()),
        true => runtime.block_on(tasks.connect()).map(|connection| connection.peer()),
    };
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    for with_tokio in [false, true] {
        let low = rustix::process::Rlimit { current: Some(0), ..limit };
        rustix::process::setrlimit(rustix::process::Resource::Nofile, low).unwrap();
        let failed = connect(with_tokio);
        rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
        let Err(Error::ConnectionLost(lost)) = failed else { panic!("{failed:?}") };
        assert_eq!(lost.attempts.len(), 5);
        assert!(lost.attempts.iter().all(|outcome| outcome.local), "{lost:?}");
        assert_eq!(connect(with_tokio), Ok(addresses[0]), "tokio: {with_tokio}");
    }
}

/// Runs one test of this program again, alone in a process.
#[test]
fn a_server_inherits_its_listeners() {
    let listeners = [0, 1].map(|_| TcpListener::bind("127.0.0.1:0").unwrap());
    let addresses = [0, 1].map(|number: usize| listeners[number].local_addr().unwrap());
    let greetings = thread::spawn(move || {
        addresses.map(|address| {
            let mut client = TcpStream::connect(address).unwrap();
            client.set_read_timeout(Some(std::time::Duration::from_secs(30))).unwrap();
            let mut text = String::new();
            client.read_to_string(&mut text).map(|_| text).unwrap_or_else(|e| e.to_string())
        })
    });
    let [first, second] = listeners;
    inheriting("inherits_child", "exec 3<&0 4<&2", [first.into(), second.into()]);
    assert_eq!(greetings.join().unwrap(), ["listener 0", "listener 1"]);
}

#[test]
fn inherits_child() {
    if !is_child("inherits_child") {
        return;
    }
    let listeners = worker_sdk::inherited_listeners().unwrap();
    assert_eq!(listeners.len(), 2);
    for (number, listener) in listeners.iter().enumerate() {
        let flags = rustix::io::fcntl_getfd(listener).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        let (mut client, _) = listener.accept().unwrap();
        write!(client, "listener {number}").unwrap();
    }
    worker_sdk::inherited_listeners().expect_err("they have an owner");
    drop(listeners);
    worker_sdk::inherited_listeners().expect_err("they had an owner");
}

#[test]
fn what_is_no_listener_is_named() {
    let listener = || OwnedFd::from(TcpListener::bind("127.0.0.1:0").unwrap());
    inheriting("no_listener_child", "exec 3<&0 4</dev/null", [listener(), listener()]);
    let directory = tempfile::tempdir().unwrap();
    let unix = std::os::unix::net::UnixListener::bind(directory.path().join("socket"));
    inheriting("no_listener_child", "exec 3<&0 4<&2", [listener(), unix.unwrap().into()]);
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let connected = TcpStream::connect(server.local_addr().unwrap()).unwrap();
    inheriting("no_listener_child", "exec 3<&0 4<&2", [listener(), connected.into()]);
    inheriting("no_listener_child", "exec 3<&0 4<&-", [listener(), listener()]);
}

#[test]
fn no_listener_child() {
    if !is_child("no_listener_child") {
        return;
    }
    // None is taken over, so it is the same again.
    for _ in 0..2 {
        let error = worker_sdk::inherited_listeners().unwrap_err().to_string();
        assert!(error.starts_with("descriptor 4 of LISTEN_FDS=2 is no TCP listener: "), "{error}");
    }
}

#[test]
fn listeners_of_others_are_not_taken_over() {
    assert!(worker_sdk::inherited_listeners().unwrap().is_empty());
    let listener = || OwnedFd::from(TcpListener::bind("127.0.0.1:0").unwrap());
    let script = "exec 3<&0 4<&2; others=1";
    inheriting("others_child", script, [listener(), listener()]);
}

#[test]
fn others_child() {
    if !is_child("others_child") {
        return;
    }
    assert!(worker_sdk::inherited_listeners().unwrap().is_empty());
}

/// Runs a test in a process that inherits two descriptors, which the script puts in their places.
fn inheriting(name: &str, script: &str, [first, second]: [OwnedFd; 2]) {
    let run = "exec 0</dev/null 2>&1; export LISTEN_PID=$(($$ + ${others:-0})) LISTEN_FDS=2; \
               exec \"$0\" --exact \"$1\" --nocapture --test-threads=1";
    let output = std::process::Command::new("sh")
        .args(["-c", &format!("{script}; {run}")])
        .args([std::env::current_exe().unwrap().as_os_str(), name.as_ref()])
        .env("SDK_TEST_CHILD", name)
        .stdin(first)
        .stderr(second)
        .output()
        .unwrap();
    has_passed(&output);
}

fn in_child(name: &str) {
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env("SDK_TEST_CHILD", name)
        .output()
        .unwrap();
    has_passed(&output);
}

fn has_passed(output: &std::process::Output) {
    let (stdout, stderr) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    // A name without a test would be a success, too.
    let passed = output.status.success() && stdout.contains("1 passed");
    assert!(passed, "{stdout}{stderr}");
}

fn is_child(name: &str) -> bool {
    std::env::var("SDK_TEST_CHILD").is_ok_and(|child| child == name)
}
