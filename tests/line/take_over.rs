//! A new dispatcher takes over: line workers find it at the same socket.

use std::io::{Read, Write};
use std::process::{Command, Stdio};

use test_support::*;

use super::worker::*;

#[test]
fn line_workers_join_the_next_dispatcher_and_serve_meanwhile() {
    let (mut first, address) = start("");
    let mut worker = c_worker(&first, "echo");
    first.wait_joined("web", 1);
    let mut client = connect(address);
    let echo = |client: &mut std::net::TcpStream| {
        client.write_all(b"hello").unwrap();
        client.read_exact(&mut [0; 5]).unwrap();
    };
    echo(&mut client);
    let log = std::fs::File::options().append(true).open(first.dir.join("log")).unwrap();
    // With port 0, the listener is found by its name.
    let mut command = Command::new(dispatcher_bin());
    command.args(["run", "--take-over", "--config"]).arg(first.dir.join("dispatcher.toml"));
    command.env_remove("NOTIFY_SOCKET").stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    let next = Process::start("the next dispatcher", &mut command);
    assert!(first.process.wait().success(), "{}", first.log());
    let next = std::mem::replace(&mut first.process, next);
    drop(next);
    first.wait_joined("web", 1);
    wait_load(&first, "echo-1", 1);
    echo(&mut client);
    let mut new = connect(address);
    echo(&mut new);
    wait_load(&first, "echo-1", 2);
    assert!(worker.running());
    assert!(first.stop().success());
    assert!(!first.dir.join("line.sock").exists(), "the last one removes the file");
}
