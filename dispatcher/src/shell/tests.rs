//! Turns of the shell, one by one, over real sockets.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::time::Instant;

use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use worker_sdk::wire::{Features, Hello, Own, VERSION};

use super::*;

const PATIENCE: Duration = Duration::from_secs(20);

fn started(dir: &Path, pool: &str) -> Shell {
    let dir = dir.display();
    let text = format!(
        "dispatch_socket = \"{dir}/dispatch.sock\"\nadmin_socket = \"{dir}/admin.sock\"\n\
         [[listener]]\nname = \"web\"\naddress = \"127.0.0.1:0\"\npool = \"web\"\n[pool.web]\n{pool}\n"
    );
    Shell::start(Config::parse(&text, "test").unwrap()).unwrap()
}

/// One turn, without clients.
fn turn(shell: &mut Shell, events: &mut Events) {
    let timeout = shell.before_sleep().unwrap_or(PATIENCE);
    shell.poll_events(events, Some(timeout.min(Duration::from_millis(10)))).unwrap();
    shell.now = clock();
    shell.handle_all(events);
    shell.core.tick(shell.now);
    shell.perform();
}

fn connected(dir: &Path) -> OwnedFd {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    let address = SocketAddrUnix::new(dir.join("dispatch.sock")).unwrap();
    rustix::net::connect(&socket, &address).unwrap();
    socket
}

fn claim(socket: &OwnedFd, number: u64) -> bool {
    let mut record = Vec::new();
    Own::new(format!("client-{number}").as_bytes()).unwrap().encode(&mut record);
    rustix::net::send(socket, &record, SendFlags::NOSIGNAL).is_ok()
}

fn claimed(shell: &Shell) -> u64 {
    let status = shell.core.status();
    status.pools[0].affinity.as_ref().unwrap().claimed
}

#[test]
fn a_worker_that_floods_its_control_connection_gets_its_share_of_a_turn() {
    let dir = tempfile::tempdir().unwrap();
    let mut shell = started(dir.path(), "affinity.key = \"cookie:ID\"");
    let mut events = Events::with_capacity(64);
    let worker = connected(dir.path());
    let mut hello = Vec::new();
    Hello {
        version: VERSION,
        features: Features::OWN,
        pool: "web".to_owned(),
        name: "w".to_owned(),
        weight: 1,
        max_connections: 1,
        ..Hello::default()
    }
    .encode(&mut hello);
    rustix::net::send(&worker, &hello, SendFlags::NOSIGNAL).unwrap();
    let end = Instant::now() + PATIENCE;
    while !shell.workers.iter().any(Option::is_some) {
        assert!(Instant::now() < end, "it joins");
        turn(&mut shell, &mut events);
    }

    // More is always waiting, and every turn has an event for it.
    let mut sent = 0;
    for number in 0..30 {
        for _ in 0..150 {
            sent += u64::from(claim(&worker, sent));
        }
        let before = claimed(&shell);
        turn(&mut shell, &mut events);
        let read = claimed(&shell) - before;
        assert_eq!(read, 16, "records read in turn {number}");
        assert_eq!(shell.again.len(), 1);
    }
    // None is forgotten once it has stopped.
    while claimed(&shell) < sent {
        assert!(Instant::now() < end, "all are read");
        turn(&mut shell, &mut events);
    }
    assert!(shell.again.len() <= 1);
    shell.finish();
}
