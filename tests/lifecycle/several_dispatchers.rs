//! Workers that know the sockets of two dispatchers.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::Path;
use std::process::{Command, Stdio};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use test_support::*;

const POOL: &str = r#"
[[listener]]
name = "web"
address = "127.0.0.1:0"
pool = "web"

[pool.web]
"#;

fn has(dispatcher: &Dispatcher, worker_name: &str) -> bool {
    worker(&dispatcher.status(), worker_name).is_some()
}

fn start_worker(sockets: &str, name: &str) -> Process {
    let mut command = Command::new(example("test-worker"));
    command.arg("blocking").env("DISPATCH_SOCKET", sockets);
    command.env("DISPATCH_POOL", "web").env("DISPATCH_NAME", name);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    Process::start(name, &mut command)
}

#[test]
fn a_worker_tries_them_in_order_and_stays_until_it_loses_the_one_it_has_joined() {
    let (first_dir, second_dir) = (configure(POOL), configure(POOL));
    let sockets =
        [&first_dir, &second_dir].map(|dir| dir.path().join("dispatch.sock").display().to_string());
    let sockets = sockets.join(":");

    // Only the second is there.
    let mut second = Dispatcher::start_in(second_dir.path());
    let _worker = start_worker(&sockets, "w");
    second.wait_joined("web", 1);
    let mut client = Client::connect(second.address("web")).unwrap();
    client.echo("one");

    // The first appears. A worker that starts now joins it; the other one stays where it is.
    let mut first = Dispatcher::start_in(first_dir.path());
    let _late = start_worker(&sockets, "late");
    first.wait_joined("web", 1);
    assert!(has(&first, "late") && !has(&first, "w"));
    assert!(has(&second, "w") && !has(&second, "late"));

    // The second is lost: the worker joins the first, with the connection that it still serves.
    second.process.kill();
    first.wait_joined("web", 2);
    let status = first.status();
    let moved = worker(&status, "w").unwrap();
    assert_eq!((moved.base, moved.load), (1, 1));
    client.echo("two");

    // The second returns: no worker leaves the first for it.
    let second = Dispatcher::start_in(second_dir.path());
    for _ in 0..4 {
        Client::connect(first.address("web")).unwrap().echo("three");
    }
    assert_eq!(pool(&second.status(), "web").workers.len(), 0);
    assert_eq!(pool(&first.status(), "web").workers.len(), 2);

    // The first is lost: both go to the second.
    first.process.kill();
    second.wait_joined("web", 2);
    client.echo("four");
    let mut served: Vec<Client> =
        (0..4).map(|_| Client::connect(second.address("web")).unwrap()).collect();
    served.iter_mut().for_each(|client| client.echo("five"));
    let shares = tally(&served);
    // The worker with the old connection has one less of the new ones at first.
    assert!(shares.len() == 2 && shares["late"] >= shares["w"], "{shares:?}");
}

#[test]
fn a_dispatcher_that_refuses_the_worker_does_not_keep_it_from_the_other() {
    let refuses = Dispatcher::start(&POOL.replace("web", "other"));
    let serves = Dispatcher::start(POOL);
    let sockets = format!("{}:{}", refuses.dispatch().display(), serves.dispatch().display());
    let _worker = start_worker(&sockets, "w");
    serves.wait_joined("web", 1);
    let client = Client::connect(serves.address("web")).unwrap();
    assert_eq!(client.served_by, "w");
}

/// A socket that accepts, of a process that answers nothing.
fn hanging(path: &Path) -> rustix::fd::OwnedFd {
    let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    let socket = rustix::net::socket_with(family, kind, SocketFlags::CLOEXEC, None).unwrap();
    rustix::net::bind(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    rustix::net::listen(&socket, 128).unwrap();
    socket
}

/// Each attempt at one that hangs takes its time limit, so this takes twice that.
#[test]
fn dispatchers_that_hang_do_not_keep_the_worker_from_the_third() {
    let temp = tempfile::tempdir().unwrap();
    let paths = ["one.sock", "two.sock"].map(|name| temp.path().join(name));
    let _hanging = paths.each_ref().map(|path| hanging(path));
    let serves = Dispatcher::start(POOL);
    let [one, two] = paths.each_ref().map(|path| path.display());
    let sockets = format!("{one}:{two}:{}", serves.dispatch().display());
    let _worker = start_worker(&sockets, "w");
    serves.wait_joined("web", 1);
    let client = Client::connect(serves.address("web")).unwrap();
    assert_eq!(client.served_by, "w");
}
