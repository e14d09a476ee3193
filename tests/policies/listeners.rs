//! Every kind of listener with every kind of worker: IPv4, IPv6, dual stack, Unix; two pools; two
//! listeners on one pool.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use nix::sys::signal::Signal;
use test_support::*;

fn has_ipv6() -> bool {
    let has = TcpListener::bind("[::1]:0").is_ok();
    if !has {
        skip("this machine has no IPv6");
    }
    has
}

fn all_listeners(flavour: &str) {
    if !has_ipv6() {
        return;
    }
    let dispatcher = Dispatcher::start(
        r#"
[[listener]]
name = "four"
address = "127.0.0.1:0"
pool = "web"

[[listener]]
name = "six"
address = "[::1]:0"
pool = "web"

[[listener]]
name = "dual"
address = "[::]:0"
pool = "web"

[[listener]]
name = "unix"
address = "unix:DIR/app.sock"
pool = "other"

[pool.web]
[pool.other]
"#,
    );
    let _web = dispatcher.worker(flavour, "web", "web-worker");
    let _other = dispatcher.worker(flavour, "other", "other-worker");
    dispatcher.wait_joined("web", 1);
    dispatcher.wait_joined("other", 1);

    let dual = dispatcher.address("dual").port();
    let expected = [
        (dispatcher.address("four"), "four", "127.0.0.1"),
        (dispatcher.address("six"), "six", "::1"),
        (SocketAddr::from(([127, 0, 0, 1], dual)), "dual", "127.0.0.1"),
        (SocketAddr::from((std::net::Ipv6Addr::LOCALHOST, dual)), "dual", "::1"),
    ];
    for (address, listener, ip) in expected {
        let stream = connect(address);
        let peer = stream.local_addr().unwrap();
        let mut client = Client::greeted(stream).unwrap();
        assert_eq!(client.served_by, "web-worker");
        assert_eq!(client.listener, listener);
        // The address that the client itself has; IPv4 addresses are not mapped.
        assert_eq!(client.peer, peer.to_string());
        assert_eq!(peer.ip().to_string(), ip);
        client.echo("over any address");
        client.finish();
    }

    let mut unix = BufReader::new(UnixStream::connect(dispatcher.dir.join("app.sock")).unwrap());
    let mut line = String::new();
    unix.read_line(&mut line).unwrap();
    assert!(line.starts_with("other-worker ") && line.trim_end().ends_with(" unix unix"), "{line}");
    unix.get_mut().write_all(b"ping\n").unwrap();
    line.clear();
    unix.read_line(&mut line).unwrap();
    assert_eq!(line, "ping\n");

    let status = dispatcher.status();
    let accepted: Vec<u64> = status.listeners.iter().map(|l| l.accepted).collect();
    assert_eq!(accepted, [1, 1, 2, 1]);
    let taken = |name| worker(&status, name).unwrap().taken;
    assert_eq!((taken("web-worker"), taken("other-worker")), (4, 1));
}

#[test]
fn all_listeners_blocking() {
    all_listeners("blocking");
}

#[test]
fn all_listeners_tokio() {
    all_listeners("tokio");
}

#[test]
fn all_listeners_mio() {
    all_listeners("mio");
}

#[test]
fn two_listeners_share_one_count() {
    let dispatcher = Dispatcher::start(
        r#"
[[listener]]
name = "a"
address = "127.0.0.1:0"
pool = "web"

[[listener]]
name = "b"
address = "127.0.0.1:0"
pool = "web"

[pool.web]
"#,
    );
    let _workers = dispatcher.workers("blocking", "web", 3);
    let (a, b) = (dispatcher.address("a"), dispatcher.address("b"));
    let mut clients = Vec::new();
    for _ in 0..50 {
        clients.extend([a, a, b, b, b, a].map(|address| Client::connect(address).unwrap()));
        assert!(loads(&dispatcher.status(), "web").1 <= 1);
    }
    assert!(tally(&clients).values().all(|&count| count == 100));
}

#[test]
fn weights_and_maxima_are_kept() {
    let dispatcher = Dispatcher::start(
        r#"
[[listener]]
name = "web"
address = "127.0.0.1:0"
pool = "web"

[pool.web]
max_connections_per_worker = 100
"#,
    );
    let weigh = |name: &str, weight: &str, most: &str| {
        let environment = [("DISPATCH_WEIGHT", weight), ("DISPATCH_MAX_CONNECTIONS", most)];
        dispatcher.worker_with("blocking", "web", name, &environment)
    };
    let _workers =
        [weigh("one", "1", "1000"), weigh("two", "2", "1000"), weigh("small", "5", "10")];
    dispatcher.wait_joined("web", 3);
    let address = dispatcher.address("web");
    let clients: Vec<Client> = (0..100).map(|_| Client::connect(address).unwrap()).collect();
    let tally = tally(&clients);
    assert_eq!((tally["one"], tally["two"], tally["small"]), (30, 60, 10));
    // The maximum of the pool limits the larger maximum of a worker.
    assert_eq!(worker(&dispatcher.status(), "one").unwrap().max_connections, 100);
}

#[test]
fn spawned_processes_serve_and_are_replaced() {
    let dispatcher = Dispatcher::start(&format!(
        r#"
[[listener]]
name = "web"
address = "127.0.0.1:0"
pool = "web"

[pool.web]
allow_users = []

[pool.web.spawn]
command = ["{}", "blocking"]
processes = 3
"#,
        example("test-worker").display()
    ));
    dispatcher.wait_joined("web", 3);
    let address = dispatcher.address("web");
    let clients: Vec<Client> = (0..9).map(|_| Client::connect(address).unwrap()).collect();
    let served = tally(&clients);
    assert_eq!(served.values().copied().collect::<Vec<_>>(), [3, 3, 3], "{served:?}");
    let victim = worker(&dispatcher.status(), "web-2").unwrap().pid;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(victim), Signal::SIGKILL).unwrap();
    dispatcher.wait_status("a successor", |status| {
        worker(status, "web-2").is_some_and(|w| w.pid != victim && w.state == "active")
    });
    let pids: Vec<i32> = pool(&dispatcher.status(), "web").workers.iter().map(|w| w.pid).collect();
    drop(clients);
    let mut dispatcher = dispatcher;
    assert!(dispatcher.stop().success());
    // A stop ends the processes that the dispatcher started.
    for pid in pids {
        wait_until("its processes to end", || {
            !std::path::Path::new(&format!("/proc/{pid}")).exists()
        });
    }
}

/// `LISTEN_FDS` is set but no socket was passed, so the numbers are descriptors that the dispatcher
/// opens itself.
#[test]
fn announced_but_missing_sockets_are_harmless() {
    for count in ["1", "2", "100000", "-1"] {
        let temp = configure(
            r#"
[[listener]]
name = "web"
address = "127.0.0.1:0"
pool = "web"

[pool.web]
"#,
        );
        let log = temp.path().join("log");
        let mut command = Command::new("sh");
        // The variables apply only to the process id that they contain; `exec` keeps the process
        // id.
        command.arg("-c").arg(
            "exec 3<&- 4<&- 5<&- 6<&- 7<&- 8<&- 9<&-; export LISTEN_PID=$$; exec \"$0\" run --config \"$1\"",
        );
        command.arg(dispatcher_bin()).arg(temp.path().join("dispatcher.toml"));
        command.env("LISTEN_FDS", count).env_remove("LISTEN_FDNAMES").env_remove("NOTIFY_SOCKET");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&log).unwrap());
        let mut process = Process::start("dispatcher", &mut command);
        let log = || std::fs::read_to_string(&log).unwrap();
        wait_until("the dispatcher to serve", || {
            assert!(process.running(), "LISTEN_FDS={count}: it ended:\n{}", log());
            let health = http_get(&temp.path().join("admin.sock"), "/healthz");
            health.is_ok_and(|(status, _)| status == 200)
        });
        process.signal(Signal::SIGTERM);
        assert!(process.wait().success());
        assert!(log().contains("event=sockets_not_inherited"), "LISTEN_FDS={count}: {}", log());
    }
}
