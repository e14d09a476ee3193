//! The examples in C and in Python, as they are.

use std::io::{Read, Write};
use std::process::{Command, Stdio};

use test_support::*;

use super::worker::*;

/// Clients are served, the counts come, and the worker joins the next dispatcher too.
fn check(dispatcher: &mut Dispatcher, mut worker: Process, name: &str) {
    dispatcher.wait_joined("web", 1);
    let address = dispatcher.address("web");
    let mut clients: Vec<_> = (0..5).map(|_| connect(address)).collect();
    for client in &mut clients {
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client.write_all(b"hello").unwrap();
        let mut five = [0; 5];
        client.read_exact(&mut five).unwrap();
        assert_eq!(&five, b"hello");
    }
    let pid = worker.pid();
    dispatcher.wait_status("its report", |status| {
        let found = test_support::worker(status, name).expect(name);
        let line = found.line.as_ref().unwrap();
        assert_eq!(found.pid, pid);
        (line.count, line.used, found.load) == (5, Some(5), 5)
    });
    drop(clients.pop());
    dispatcher.wait_status("the end of one", |status| {
        let found = test_support::worker(status, name).expect(name);
        found.load == 4 && found.line.as_ref().unwrap().count == 4
    });
    // It serves on without a dispatcher, and joins the next one with what it has.
    assert!(dispatcher.stop().success());
    clients[0].write_all(b"still").unwrap();
    clients[0].read_exact(&mut [0; 5]).unwrap();
    let next = Dispatcher::start_in(&dispatcher.dir);
    wait_load(&next, name, 4);
    assert!(worker.running());
}

fn dispatcher() -> Dispatcher {
    start("").0
}

#[test]
fn the_worker_in_c_serves() {
    let mut dispatcher = dispatcher();
    let worker = c_worker(&dispatcher, "echo");
    check(&mut dispatcher, worker, "echo-1");
}

#[test]
fn the_worker_in_python_serves() {
    let version = "import sys; sys.exit(sys.version_info < (3, 9))";
    let new = Command::new("python3").args(["-c", version]).status();
    if !new.is_ok_and(|status| status.success()) {
        return skip("no Python 3.9");
    }
    let mut dispatcher = dispatcher();
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/line/worker.py");
    let mut command = Command::new("python3");
    command.arg(source).arg(dispatcher.dir.join("line.sock")).arg("echo").stdin(Stdio::null());
    let worker = Process::start("worker in Python", &mut command);
    check(&mut dispatcher, worker, "echo-1");
}

#[test]
fn each_has_fewer_than_sixty_lines() {
    for name in ["worker.c", "worker.py"] {
        let path = format!("{}/../examples/line/{name}", env!("CARGO_MANIFEST_DIR"));
        let lines = std::fs::read_to_string(path).unwrap().lines().count();
        assert!(lines < 60, "{name} has {lines} lines");
    }
}
