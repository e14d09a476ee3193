//! Policies with real processes: failover without a loss, weights at run time, history and explain
//! as text and JSON.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, Output, Stdio};

use nix::sys::signal::Signal;
use serde_json::Value;
use test_support::*;

/// Runs a command for this dispatcher.
fn dispatcher_cli(dispatcher: &Dispatcher, arguments: &[&str]) -> Output {
    Command::new(dispatcher_bin())
        .args(arguments)
        .arg("--admin")
        .arg(dispatcher.admin())
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// The output of a command that must succeed.
fn said(dispatcher: &Dispatcher, arguments: &[&str]) -> String {
    let output = dispatcher_cli(dispatcher, arguments);
    let text = String::from_utf8(output.stdout).unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{arguments:?}: {text}{errors}");
    text
}

fn json(dispatcher: &Dispatcher, arguments: &[&str]) -> Value {
    serde_json::from_str(&said(dispatcher, arguments)).unwrap()
}

/// Exit code and stderr of a command.
fn complaint(dispatcher: &Dispatcher, arguments: &[&str]) -> (i32, String) {
    let output = dispatcher_cli(dispatcher, arguments);
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

/// A POST over the admin socket: the whole answer.
fn post(dispatcher: &Dispatcher, path: &str, body: &str) -> String {
    let mut stream = UnixStream::connect(dispatcher.admin()).unwrap();
    write!(
        stream,
        "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

const PRIMARY: [(&str, &str); 1] = [("DISPATCH_PRIORITY", "10")];

#[test]
fn failover_to_the_standby_and_back() {
    let (dispatcher, address) = start_one_pool("policy = \"failover\"\nhandoff_timeout = \"10m\"");
    let mut primary = dispatcher.worker_with("blocking", "web", "primary", &PRIMARY);
    let _standby = dispatcher.worker("blocking", "web", "standby");
    dispatcher.wait_joined("web", 2);
    // The primary counts as up only after it has answered its first probe.
    let served = || Client::connect(address).unwrap().served_by;
    wait_until("the primary to be up", || served() == "primary");
    let clients: Vec<Client> = (0..20).map(|_| Client::connect(address).unwrap()).collect();
    assert_eq!(tally(&clients)["primary"], 20);

    // The primary is stopped with untaken connections and then killed: the standby serves all of
    // them.
    primary.signal(Signal::SIGSTOP);
    let waiting: Vec<_> = (0..100).map(|_| connect(address)).collect();
    dispatcher.wait_status("all to be on their way to the primary", |status| {
        worker(status, "primary").is_some_and(|w| w.in_flight == 100)
    });
    primary.kill();
    let mut moved = all_greeted(waiting);
    assert_eq!(tally(&moved)["standby"], 100);
    moved.iter_mut().for_each(|client| client.echo("all of it"));
    let later: Vec<Client> = (0..20).map(|_| Client::connect(address).unwrap()).collect();
    assert_eq!(tally(&later)["standby"], 20);

    let _primary = dispatcher.worker_with("blocking", "web", "primary", &PRIMARY);
    dispatcher.wait_joined("web", 2);
    wait_until("the primary to be up again", || served() == "primary");
    let again: Vec<Client> = (0..20).map(|_| Client::connect(address).unwrap()).collect();
    assert_eq!(tally(&again)["primary"], 20);
    // Connections of the standby stay there.
    moved.iter_mut().for_each(|client| client.echo("still here"));
    let status = dispatcher.status();
    assert_eq!(status.closed.values().sum::<u64>(), 0, "no client was refused");
    assert_eq!((status.queued, status.in_flight), (0, 0));
}

#[test]
fn a_key_keeps_its_worker_after_a_restart_of_everything() {
    let temp = configure(&one_pool("policy = \"hash\"\nhandoff_timeout = \"10m\""));
    let served_by = |address| Client::connect(address).unwrap().served_by.clone();
    let mut before = None;
    for _ in 0..2 {
        let mut dispatcher = Dispatcher::start_in(temp.path());
        let _workers = dispatcher.workers("blocking", "web", 4);
        let address = dispatcher.address("web");
        // All clients have the same address.
        let names: Vec<String> = (0..20).map(|_| served_by(address)).collect();
        assert!(names.iter().all(|name| *name == names[0]), "{names:?}");
        let explained = json(&dispatcher, &["explain", "web", "--from", "127.0.0.1", "--json"]);
        assert_eq!(explained["candidates"][0]["name"], names[0].as_str());
        assert_eq!(*before.get_or_insert(names[0].clone()), names[0]);
        dispatcher.stop();
    }
}

#[test]
fn a_weight_can_be_changed_at_run_time() {
    let (dispatcher, address) = start_one_pool("policy = \"round-robin\"");
    let _workers = dispatcher.workers("blocking", "web", 2);
    let id = |name: &str| worker(&dispatcher.status(), name).unwrap().id.to_string();
    let answer = said(&dispatcher, &["weight", "web/w0", "3"]);
    assert!(answer.contains("(web/w0)") && answer.contains('3'), "{answer}");
    let answer = json(&dispatcher, &["weight", &id("w1"), "1", "--json"]);
    assert_eq!(answer["workers"][0]["name"], "w1");
    assert_eq!(worker(&dispatcher.status(), "w0").unwrap().weight, 3);
    let clients: Vec<Client> = (0..40).map(|_| Client::connect(address).unwrap()).collect();
    let tally = tally(&clients);
    assert_eq!((tally["w0"], tally["w1"]), (30, 10));

    let (code, text) = complaint(&dispatcher, &["weight", "web/w0", "0"]);
    assert_eq!(code, 64);
    assert!(text.contains("to stop new connections, drain the worker"), "{text}");
    let (code, text) = complaint(&dispatcher, &["weight", "web/w7", "2"]);
    assert_eq!(code, 66);
    assert!(text.contains("there is no worker `web/w7`"), "{text}");
    let answer = post(&dispatcher, "/v1/workers/web%2Fw0", r#"{"action":"weight","weight":0}"#);
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    assert!(answer.contains("from 1 to 65535"), "{answer}");
}

#[test]
fn a_returning_worker_starts_slowly() {
    let keys = "handoff_timeout = \"10m\"";
    let (dispatcher, address) = start_one_pool(keys);
    let stays = [("TEST_WORKER", "stays")];
    let workers = ["w0", "w1"].map(|name| dispatcher.worker_with("blocking", "web", name, &stays));
    dispatcher.wait_joined("web", 2);
    let warm = || {
        let status = dispatcher.status();
        ["w0", "w1"].map(|name| worker(&status, name).unwrap().warm_percent)
    };
    // Earlier workers have their full weight; new ones do not reach it within this test.
    let keys = format!("{keys}\nslow_start = \"10h\"");
    write_config(&dispatcher.dir, &one_pool(&keys));
    said(&dispatcher, &["reload"]);
    assert_eq!(warm(), [100, 100]);
    let before: Vec<Client> = (0..4).map(|_| Client::connect(address).unwrap()).collect();
    assert_eq!(tally(&before).into_values().collect::<Vec<_>>(), [2, 2]);
    said(&dispatcher, &["drain", "web/w0"]);
    said(&dispatcher, &["resume", "web/w0"]);
    let [w0, w1] = warm();
    assert!((1..=2).contains(&w0) && w1 == 100, "{w0} {w1}");
    let clients: Vec<Client> = (0..20).map(|_| Client::connect(address).unwrap()).collect();
    assert_eq!(tally(&clients)["w1"], 20, "the other has next to no weight yet");
    // The same after the worker was suspect.
    write_config(&dispatcher.dir, &one_pool(&keys.replace("10m", "200ms")));
    said(&dispatcher, &["reload"]);
    workers[1].signal(Signal::SIGSTOP);
    let untaken = connect(address);
    assert_eq!(Client::greeted(untaken).unwrap().served_by, "w0", "once the first is suspect");
    assert_eq!(worker(&dispatcher.status(), "w1").unwrap().state, "suspect");
    workers[1].signal(Signal::SIGCONT);
    let mut more = Vec::new();
    dispatcher.wait_status("trust", |status| {
        more.push(Client::connect(address).unwrap());
        worker(status, "w1").unwrap().state == "active"
    });
    assert!(warm().iter().all(|percent| (1..=2).contains(percent)), "{:?}", warm());
}

#[test]
fn the_last_decisions_can_be_read() {
    let (dispatcher, address) = start_one_pool("history = 5");
    let _workers = dispatcher.workers("blocking", "web", 2);
    assert_eq!(said(&dispatcher, &["history", "web"]), "no decisions yet\n");
    let clients: Vec<Client> = (0..8).map(|_| Client::connect(address).unwrap()).collect();
    let history = json(&dispatcher, &["history", "web", "--json"]);
    assert_eq!(
        (&history["pool"], &history["policy"]),
        (&"web".into(), &"least-connections".into())
    );
    assert_eq!(history["size"], 5);
    let decisions = history["decisions"].as_array().unwrap();
    let numbers: Vec<u64> = decisions.iter().map(|d| d["number"].as_u64().unwrap()).collect();
    assert_eq!(numbers, [4, 5, 6, 7, 8]);
    let last = decisions.last().unwrap();
    assert_eq!(last["listener"], "web");
    assert!(last["from"].as_str().unwrap().starts_with("127.0.0.1:"));
    assert_eq!(last["candidates"][0]["name"], clients[7].served_by.as_str());
    assert_eq!(last["candidates"][0]["id"], last["chosen"]);
    assert_eq!(
        (&last["candidates"][0]["load"], &last["candidates"][0]["score"]),
        (&3.into(), &4.0.into())
    );
    assert_eq!(last["candidates"][1]["why"], "more-loaded");
    let age = std::time::SystemTime::now()
        .duration_since(humantime::parse_rfc3339(last["at"].as_str().unwrap()).unwrap());
    assert!(age.is_ok_and(|age| age < PATIENCE), "{last}");

    let text = said(&dispatcher, &["history", "web"]);
    assert_eq!(text.matches("-> worker ").count(), 5, "{text}");
    assert!(text.contains("load     3  weight      1  score     4.00  chosen"), "{text}");

    let (code, body) = http_get(&dispatcher.admin(), "/v1/pools/web/history?after=7").unwrap();
    let value: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((code, value["decisions"].as_array().unwrap().len()), (200, 1));
    assert_eq!(http_get(&dispatcher.admin(), "/v1/pools/wep/history").unwrap().0, 404);
    assert_eq!(http_get(&dispatcher.admin(), "/v1/pools/web/history?since=7").unwrap().0, 400);
    let (code, text) = complaint(&dispatcher, &["history", "wep"]);
    assert_eq!(code, 66);
    assert!(text.contains("did you mean `web`?"), "{text}");
}

#[test]
fn decisions_can_be_followed() {
    let (dispatcher, address) = start_one_pool("history = 100");
    let _worker = dispatcher.workers("blocking", "web", 1);
    let _first = Client::connect(address).unwrap();
    let mut command = Command::new(dispatcher_bin());
    command.args(["history", "web", "--follow", "--json", "--admin"]).arg(dispatcher.admin());
    let mut follower = Process::start("follower", command.stdout(Stdio::piped()));
    let mut lines = BufReader::new(follower.child.stdout.take().unwrap()).lines();
    let mut next = || -> u64 {
        let line: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        line["number"].as_u64().unwrap()
    };
    assert_eq!(next(), 1);
    let _more: Vec<Client> = (0..3).map(|_| Client::connect(address).unwrap()).collect();
    assert_eq!([next(), next(), next()], [2, 3, 4]);
}

#[test]
fn the_next_decision_is_explained() {
    let (dispatcher, address) = start_one_pool("max_connections_per_worker = 2");
    let explain =
        |arguments: &[&str]| said(&dispatcher, &[&["explain", "web"], arguments].concat());
    assert_eq!(
        explain(&[]),
        "the next connection of pool web waits: there is no worker, by least-connections\n"
    );
    let _workers = dispatcher.workers("blocking", "web", 2);
    let mut clients = Vec::new();
    for _ in 0..4 {
        let explained = json(&dispatcher, &["explain", "web", "--json"]);
        assert_eq!(explained["obstacle"], Value::Null);
        let twice = json(&dispatcher, &["explain", "web", "--json"]);
        assert_eq!(explained["chosen"], twice["chosen"], "asking changes nothing");
        clients.push(Client::connect(address).unwrap());
        assert_eq!(explained["candidates"][0]["name"], clients.last().unwrap().served_by.as_str());
    }
    let text = explain(&["--from", "192.0.2.7"]);
    assert!(
        text.starts_with("the next connection of pool web waits: no worker has room"),
        "{text}"
    );
    assert_eq!(text.matches("  full\n").count(), 2, "{text}");
    assert_eq!(complaint(&dispatcher, &["explain", "web", "--from", "nowhere"]).0, 64);
    let text = said(&dispatcher, &["history", "web"]);
    assert!(text.contains("set a number, such as history = 100, in [pool.web]"), "{text}");
}
