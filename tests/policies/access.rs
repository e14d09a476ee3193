//! Access rules of a listener: lists, rates, and queued connections per client. Refused clients are
//! closed, counted by reason, and logged at a bounded rate.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, socket};
use test_support::*;

fn config(address: &str, rules: &str) -> String {
    format!(
        "[[listener]]\nname = \"web\"\naddress = \"{address}\"\npool = \"web\"\n{rules}\n\
         [pool.web]\nhandoff_timeout = \"10m\"\n"
    )
}

/// Connects from this address of the loopback network.
fn from(ip: [u8; 4], to: SocketAddr) -> TcpStream {
    let socket =
        socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    use std::os::fd::AsRawFd;
    let own = SockaddrIn::new(ip[0], ip[1], ip[2], ip[3], 0);
    bind(socket.as_raw_fd(), &own).unwrap();
    let SocketAddr::V4(to) = to else { panic!("an IPv4 address") };
    connect(socket.as_raw_fd(), &SockaddrIn::from(to)).unwrap();
    TcpStream::from(socket)
}

/// Waits for the end of a refused connection.
fn is_closed(mut stream: TcpStream) {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut byte = [0];
    match stream.read(&mut byte) {
        Ok(0) => {}
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
        other => panic!("it should be closed: {other:?}"),
    }
}

fn log_lines(dispatcher: &Dispatcher, parts: &[&str]) -> usize {
    let log = dispatcher.log();
    log.lines().filter(|line| parts.iter().all(|part| line.contains(part))).count()
}

#[test]
fn allow_and_deny() {
    let rules = "allow = ['127.0.0.0/24', '::1']\ndeny = ['127.0.0.9']";
    // IPv4 clients of an IPv6 socket count as IPv4 clients.
    for address in ["127.0.0.1:0", "[::]:0"] {
        let dispatcher = Dispatcher::start(&config(address, rules));
        let _worker = dispatcher.workers("blocking", "web", 1);
        let port = dispatcher.address("web").port();
        let to: SocketAddr = ([127, 0, 0, 1], port).into();
        let good = Client::greeted(from([127, 0, 0, 7], to)).unwrap();
        assert_eq!(good.served_by, "w0");
        is_closed(from([127, 0, 0, 9], to));
        is_closed(from([127, 0, 1, 1], to));
        if address.starts_with('[') {
            Client::connect(SocketAddr::new("::1".parse().unwrap(), port)).unwrap();
        }
        let status = dispatcher.wait_status("two to be denied", |s| s.closed["denied"] == 2);
        assert_eq!(status.listeners[0].closed["denied"], 2);
        wait_until("both to be named", || {
            log_lines(&dispatcher, &["event=client_kept_out", "listener=web", "reason=denied"]) == 2
        });
        assert_eq!(
            log_lines(
                &dispatcher,
                &["event=client_kept_out", "peer=127.0.0.9:", "reason=denied", "pool=web"]
            ),
            1
        );
    }
}

#[test]
fn the_rate_limit_is_per_client() {
    // The rate is so low that the bucket is not refilled during the test.
    let rules = "rate_limit = '1/h'\nrate_burst = 5";
    let dispatcher = Dispatcher::start(&config("127.0.0.1:0", rules));
    let _worker = dispatcher.workers("blocking", "web", 1);
    let to = dispatcher.address("web");
    let clients: Vec<Client> =
        (0..5).map(|_| Client::greeted(from([127, 0, 0, 2], to)).unwrap()).collect();
    // 95 connections of one client are over the limit; another client is not affected.
    (0..95).for_each(|_| is_closed(from([127, 0, 0, 2], to)));
    Client::greeted(from([127, 0, 0, 3], to)).unwrap();
    let status = dispatcher.status();
    assert_eq!((status.accepted, status.closed["rate_limited"]), (101, 95));
    assert_eq!(status.listeners[0].tracked_clients, 2);
    // Existing connections stay open: the rate applies only to new ones.
    clients.into_iter().for_each(Client::finish);
    wait_until("some to be named", || log_lines(&dispatcher, &["reason=rate_limited"]) > 0);
}

/// Refused clients in the log: those with a line, and those that are counted as suppressed.
fn told_of(dispatcher: &Dispatcher) -> usize {
    let log = dispatcher.log();
    let number = |line: &str, key| {
        line.split(key).nth(1).map_or(0, |rest| rest.split(' ').next().unwrap().parse().unwrap())
    };
    let count = |line: &str| -> usize {
        if line.contains("event=client_kept_out ") {
            1 + number(line, " suppressed=")
        } else if line.contains("event=lines_suppressed kind=client_kept_out ") {
            number(line, " count=")
        } else {
            0
        }
    };
    log.lines().map(count).sum()
}

#[test]
fn a_flood_is_logged_at_a_bounded_rate_and_counted() {
    let dispatcher = Dispatcher::start(&config("127.0.0.1:0", "deny = ['127.0.0.0/8']"));
    let _worker = dispatcher.workers("blocking", "web", 1);
    let to = dispatcher.address("web");
    let start = std::time::Instant::now();
    let mut all = 300;
    (0..all).for_each(|_| is_closed(from([127, 0, 0, 1], to)));
    let status = dispatcher.status();
    assert_eq!(status.closed["denied"], 300);
    let limited = dispatcher.metric("dispatcher_log_lines_limited_total");
    // Twenty lines per second; windows begin with their first line.
    let most = 20 * (start.elapsed().as_secs() as usize + 2);
    let written = wait_for("those of the first second", || {
        Some(log_lines(&dispatcher, &["event=client_kept_out"])).filter(|&lines| lines >= 20)
    });
    assert!(written <= most, "{written} lines, at most {most}");
    assert!(limited >= 300.0 - most as f64, "{limited} suppressed");
    // The first line of the next second has the number of suppressed lines.
    wait_until("all to be told of", || {
        is_closed(from([127, 0, 0, 1], to));
        all += 1;
        // Lines appear after a short delay.
        (0..50).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(2));
            told_of(&dispatcher) == all
        })
    });
    assert!(log_lines(&dispatcher, &["event=client_kept_out"]) < all, "{all}");
}

#[test]
fn queued_connections_per_client_are_limited() {
    let rules = "max_queued_per_client = 4\nclient_prefix_ipv4 = 24";
    let dispatcher = Dispatcher::start(&config("127.0.0.1:0", rules));
    let idle = dispatcher.worker_with("blocking", "web", "idle", &[("TEST_WORKER", "never-take")]);
    dispatcher.wait_joined("web", 1);
    let to = dispatcher.address("web");
    // Addresses with the same 24 bits are one client.
    let waiting: Vec<TcpStream> = (1..=4).map(|n| from([127, 0, 0, n], to)).collect();
    dispatcher.wait_status("four in flight", |s| s.in_flight == 4);
    is_closed(from([127, 0, 0, 5], to));
    let other = from([127, 0, 1, 1], to);
    let status = dispatcher.wait_status("another client", |s| s.in_flight == 5);
    assert_eq!(status.closed["too_many_queued"], 1);
    // A worker serves all waiting clients, and more can be queued.
    let _worker = dispatcher.worker("blocking", "web", "busy");
    dispatcher.wait_joined("web", 2);
    drop(idle);
    for stream in waiting.into_iter().chain([other]) {
        assert_eq!(Client::greeted(stream).unwrap().served_by, "busy");
    }
    Client::greeted(from([127, 0, 0, 6], to)).unwrap();
    assert_eq!(dispatcher.status().closed["too_many_queued"], 1);
}

#[test]
fn clients_of_a_unix_listener_pass() {
    let rules = "allow = ['192.0.2.0/24']\nrate_limit = '1/h'\nmax_queued_per_client = 1";
    let dispatcher = Dispatcher::start(&config("unix:DIR/web.sock", rules));
    let _worker = dispatcher.workers("blocking", "web", 1);
    let clients: Vec<UnixStream> =
        (0..5).map(|_| UnixStream::connect(dispatcher.dir.join("web.sock")).unwrap()).collect();
    dispatcher.wait_status("all to be taken", |s| s.taken == 5);
    assert_eq!(dispatcher.status().closed.values().sum::<u64>(), 0);
    drop(clients);
}
