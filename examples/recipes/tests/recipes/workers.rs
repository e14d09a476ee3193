//! Workers in the process of the test, as in the documentation of `worker_sdk::testing`.

use worker_sdk::{Error, Worker};

use super::*;

fn connect(dispatcher: &worker_sdk::testing::Dispatcher) -> TcpStream {
    let client = TcpStream::connect(dispatcher.address()).unwrap();
    client.set_read_timeout(Some(support::PATIENCE)).unwrap();
    client
}

fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + support::PATIENCE;
    while !condition() {
        assert!(Instant::now() < end, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The status of the worker with this name.
fn row(dispatcher: &worker_sdk::testing::Dispatcher, name: &str, key: &str) -> String {
    let text = dispatcher.command(&["status", "--json"]).unwrap();
    let status: serde_json::Value = serde_json::from_str(&text).unwrap();
    let workers = status["pools"][0]["workers"].as_array().unwrap();
    let found = workers.iter().find(|worker| worker["name"] == name);
    found.map_or("gone".to_owned(), |worker| worker[key].to_string())
}

#[test]
fn a_connection_has_the_number_of_the_log() {
    let Some(dispatcher) = dispatcher() else { return };
    let first = Worker::connect(dispatcher.config().name("first")).unwrap();
    let client = connect(&dispatcher);
    let address = client.local_addr().unwrap();
    eventually("it was sent", || row(&dispatcher, "first", "in_flight") == "1");
    // The connection goes to another worker, and the dispatcher logs that.
    first.close();
    let second = Worker::connect(dispatcher.config().name("second")).unwrap();
    let connection = second.accept().unwrap().unwrap();
    let line = format!("conn={} peer={address}", connection.number().unwrap());
    eventually("the line is written", || dispatcher.log().contains(&line));
}

#[test]
fn a_worker_changes_its_settings_and_pauses() {
    let Some(dispatcher) = dispatcher() else { return };
    let worker = Worker::connect(dispatcher.config().name("w")).unwrap();
    let is = |key: &str, value: &str| {
        eventually(&format!("{key} is {value}"), || row(&dispatcher, "w", key) == value);
    };
    worker.set_weight(7).unwrap();
    is("weight", "7");
    worker.set_max_connections(9).unwrap();
    is("max_connections", "9");
    // A weight set by an operator has priority.
    dispatcher.command(&["weight", "default/w", "3"]).unwrap();
    worker.set_weight(5).unwrap();
    worker.set_max_connections(11).unwrap();
    is("max_connections", "11");
    is("weight", "3");

    let before = connect(&dispatcher);
    is("in_flight", "1");
    worker.pause_accepting().unwrap();
    is("paused", "true");
    is("in_flight", "0");
    let after = connect(&dispatcher);
    let short = Duration::from_millis(100);
    assert!(matches!(worker.accept_timeout(short), Err(Error::TimedOut)));
    is("state", "\"active\"");
    let other = Worker::connect(dispatcher.config().name("other")).unwrap();
    let mut oldest = Duration::ZERO;
    for _ in [&before, &after] {
        let mut connection = other.accept_timeout(support::PATIENCE).unwrap().unwrap();
        let (age, since) = (connection.age(), connection.accepted_at().elapsed().unwrap());
        assert!(age < support::PATIENCE && since < support::PATIENCE, "{age:?} {since:?}");
        oldest = oldest.max(age.min(since));
        connection.write_all(b"x").unwrap();
    }
    assert!(oldest >= short, "one was accepted before the pause: {oldest:?}");
    other.close();
    let last = connect(&dispatcher);
    worker.resume_accepting().unwrap();
    worker.accept_timeout(support::PATIENCE).unwrap().unwrap().write_all(b"x").unwrap();
    for mut client in [before, after, last] {
        client.read_exact(&mut [0]).unwrap();
    }
}

#[test]
fn a_drain_deadline_holds_in_a_time_namespace() {
    let Some(mut dispatcher) = dispatcher() else { return };
    let unshare = ["--time", "--monotonic", "1000000", "--fork", "--kill-child"];
    let mut probe = std::process::Command::new("unshare");
    let probed = probe.args(unshare).arg("true").output();
    if !probed.is_ok_and(|output| output.status.success()) {
        return support::skip("needs unshare and the right to make a time namespace");
    }
    // The clock of the worker is eleven days ahead; by that clock the deadline has passed.
    let mut command = support::command("inetd", &["cat"]);
    let program = command.get_program().to_owned();
    command = std::process::Command::new("unshare");
    command.args(unshare).arg(program).arg("cat").envs(dispatcher.environment());
    let _server = Server::start(&mut command);
    dispatcher.wait_for_workers(1).unwrap();
    let mut client = connect(&dispatcher);
    let mut echoed = || {
        client.write_all(b"x").unwrap();
        client.read_exact(&mut [0])
    };
    echoed().unwrap();
    dispatcher.command(&["drain", "--pool", "default", "--deadline", "1h"]).unwrap();
    // The worker notices the drain immediately and is still served.
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(25));
        echoed().unwrap();
    }
}
