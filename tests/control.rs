//! What an operator tells a running dispatcher: drain and resume, by the CLI and over HTTP.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the report")]

mod support;

use std::io::Read;
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use support::*;

fn cli(dispatcher: &Dispatcher, arguments: &[&str]) -> Command {
    let mut command = Command::new(dispatcher_bin());
    command.args(arguments).env("DISPATCHER_ADMIN", dispatcher.admin()).stdin(Stdio::null());
    command
}

fn run(dispatcher: &Dispatcher, arguments: &[&str]) -> Output {
    cli(dispatcher, arguments).output().unwrap()
}

/// The output of a command that must work.
fn done(dispatcher: &Dispatcher, arguments: &[&str]) -> String {
    let output = run(dispatcher, arguments);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// The exit code and words of a command that must not.
fn failed(dispatcher: &Dispatcher, arguments: &[&str]) -> (i32, String) {
    let output = run(dispatcher, arguments);
    assert!(!output.status.success(), "{arguments:?}");
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

fn state(dispatcher: &Dispatcher, name: &str) -> Option<String> {
    worker(&dispatcher.status(), name).map(|worker| worker.state.clone())
}

#[test]
fn a_drained_worker_gets_nothing_new_and_is_waited_for() {
    for flavour in ["blocking", "tokio", "mio"] {
        let (dispatcher, address) = start_one_pool("");
        let mut workers = dispatcher.workers(flavour, "web", 2);
        let mut before: Vec<Client> = (0..4).map(|_| Client::connect(address).unwrap()).collect();
        let at_w0 = |clients: &[Client]| clients.iter().filter(|c| c.served_by == "w0").count();
        assert_eq!(at_w0(&before), 2);

        let said = done(&dispatcher, &["drain", "web/w0"]);
        assert!(said.contains("(web/w0): draining, 2 connections"), "{said}");
        assert_eq!(state(&dispatcher, "w0").as_deref(), Some("draining"));
        let after: Vec<Client> = (0..4).map(|_| Client::connect(address).unwrap()).collect();
        assert_eq!(at_w0(&after), 0, "{flavour}: no new connections");
        before.iter_mut().for_each(|client| client.echo("live ones go on"));

        // Waiting says how far it is, and ends when the worker has nothing left.
        let mut waiting = cli(&dispatcher, &["drain", "web/w0", "--wait"]);
        let mut waiting = waiting.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut progress = waiting.stderr.take().unwrap();
        let mut said = String::new();
        wait_until("progress", || {
            let mut bytes = [0; 256];
            let n = progress.read(&mut bytes).unwrap();
            said.push_str(&String::from_utf8_lossy(&bytes[..n]));
            said.contains("0 of 1 workers drained, 2 connections left")
        });
        assert!(waiting.try_wait().unwrap().is_none(), "it waits");
        before.into_iter().for_each(Client::finish);
        assert!(waiting.wait().unwrap().success());
        progress.read_to_string(&mut said).unwrap();
        assert!(said.trim_end().ends_with("1 of 1 workers drained, 0 connections left"), "{said}");
        // Told by the dispatcher, it has ended by itself.
        assert!(workers[0].wait().success(), "{flavour}");
        dispatcher.wait_status("w0 to be gone", |status| worker(status, "w0").is_none());
        after.into_iter().for_each(Client::finish);
    }
}

#[test]
fn at_the_deadline_what_is_left_is_closed_and_counted() {
    for flavour in ["blocking", "tokio", "mio"] {
        let (dispatcher, address) = start_one_pool("");
        let mut workers = dispatcher.workers(flavour, "web", 1);
        let mut clients: Vec<Client> = (0..3).map(|_| Client::connect(address).unwrap()).collect();
        let arguments = ["drain", "--all", "--deadline", "100ms", "--wait"];
        done(&dispatcher, &arguments);
        for client in &mut clients {
            let mut rest = Vec::new();
            assert_eq!(client.stream.read_to_end(&mut rest).unwrap(), 0, "{flavour}: ended");
        }
        assert!(workers[0].wait().success());
        assert_eq!(dispatcher.status().ended_at_deadline, 3);
        wait_for_log(&dispatcher, "event=drain_over");
        assert!(dispatcher.log().contains("ended=3"), "{}", dispatcher.log());
    }
}

#[test]
fn a_worker_that_stays_is_resumed() {
    let (dispatcher, address) = start_one_pool("wait_for_worker = \"1h\"");
    let _worker = dispatcher.worker_with("blocking", "web", "w0", &[("TEST_WORKER", "stays")]);
    dispatcher.wait_joined("web", 1);
    let first = Client::connect(address).unwrap();
    done(&dispatcher, &["drain", "--pool", "web"]);
    assert_eq!(http_get(&dispatcher.admin(), "/readyz").unwrap().0, 503, "no usable worker");
    assert_eq!(http_get(&dispatcher.admin(), "/healthz").unwrap().0, 200, "and yet healthy");
    let waiting = connect(address);
    // Who waits for it to be drained hears that it is active again.
    let mut wait = cli(&dispatcher, &["drain", "web/w0", "--wait"]);
    let mut wait = wait.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut word = [0; 1];
    wait.stderr.as_mut().unwrap().read_exact(&mut word).unwrap();
    let answer: Value =
        serde_json::from_str(&done(&dispatcher, &["resume", "web/w0", "--json"])).unwrap();
    assert_eq!(answer["workers"][0]["state"], "active");
    let mut served = Client::greeted(waiting).unwrap();
    served.echo("again");
    let ended = wait.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(65), "{}", String::from_utf8_lossy(&ended.stderr));
    assert_eq!(http_get(&dispatcher.admin(), "/readyz").unwrap().0, 200);
    first.finish();
    served.finish();
}

#[test]
fn waiting_ends_after_its_timeout() {
    let (dispatcher, address) = start_one_pool("");
    let _worker = dispatcher.workers("blocking", "web", 1);
    let client = Client::connect(address).unwrap();
    let (code, error) = failed(&dispatcher, &["drain", "web/w0", "--wait", "--timeout", "50ms"]);
    assert_eq!(code, 75, "{error}");
    assert!(error.contains("1 connections are left") && error.contains("--deadline"), "{error}");
    client.finish();
}

#[test]
fn names_that_do_not_work_say_which_would() {
    let (dispatcher, _) = start_one_pool("");
    let _workers = dispatcher.workers("blocking", "web", 2);
    let (code, error) = failed(&dispatcher, &["drain", "web/w3"]);
    assert_eq!(code, 66);
    assert!(error.contains("did you mean `web/w"), "{error}");
    let (code, error) = failed(&dispatcher, &["drain", "--pool", "wep"]);
    assert_eq!((code, error.contains("did you mean `web`?")), (66, true), "{error}");
    let (code, error) = failed(&dispatcher, &["resume", "web"]);
    assert_eq!((code, error.contains("POOL/NAME")), (64, true), "{error}");
    let _twin = dispatcher.worker("blocking", "web", "w1");
    dispatcher.wait_joined("web", 3);
    let (code, error) = failed(&dispatcher, &["drain", "web/w1"]);
    assert_eq!((code, error.contains("name one by its id: ")), (64, true), "{error}");
    for arguments in [&["drain"][..], &["drain", "1", "--all"], &["drain", "1", "--timeout", "1s"]]
    {
        assert_eq!(failed(&dispatcher, arguments).0, 64, "{arguments:?}");
    }

    let table = done(&dispatcher, &["workers"]);
    assert!(table.starts_with("WORKER") && table.matches("web/w1").count() == 2, "{table}");
    let json: Value =
        serde_json::from_str(&done(&dispatcher, &["workers", "--pool", "web", "--json"])).unwrap();
    assert_eq!(json["workers"].as_array().map(Vec::len), Some(3));
    assert_eq!(failed(&dispatcher, &["workers", "--pool", "wep"]).0, 66);
    let nobody = Command::new(dispatcher_bin())
        .args(["drain", "1", "--admin", "/nonexistent/admin.sock"])
        .output()
        .unwrap();
    assert_eq!(nobody.status.code(), Some(69));
    let error = String::from_utf8_lossy(&nobody.stderr);
    assert!(error.contains("is the dispatcher running?"), "{error}");
}

#[test]
fn the_status_is_shown_again_until_nobody_reads() {
    let (dispatcher, _) = start_one_pool("");
    let mut watching = cli(&dispatcher, &["status", "--watch", "100ms", "--json"]);
    let mut watching = watching.stdout(Stdio::piped()).spawn().unwrap();
    let mut out = std::io::BufReader::new(watching.stdout.take().unwrap());
    for _ in 0..3 {
        let mut line = String::new();
        std::io::BufRead::read_line(&mut out, &mut line).unwrap();
        let status: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(status["pools"][0]["name"], "web");
    }
    drop(out);
    assert!(watching.wait().unwrap().success());
}

#[test]
fn over_tcp_one_can_read_and_change_nothing() {
    let config = format!("admin_http = \"127.0.0.1:0\"\n{}", one_pool(""));
    let dispatcher = Dispatcher::start(&config);
    let _worker = dispatcher.workers("blocking", "web", 1);
    wait_for_log(&dispatcher, "event=admin_http address=");
    let log = dispatcher.log();
    let address = log.split("event=admin_http address=").nth(1).unwrap().lines().next().unwrap();
    let ask = |request: &str| {
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let head = format!("{request} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        std::io::Write::write_all(&mut stream, head.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    for path in [
        "/v1/status",
        "/v1/workers/web%2Fw0",
        "/v1/pools/web",
        "/healthz",
        "/readyz",
        "/metrics",
        "/",
    ] {
        let answer = ask(&format!("GET {path}"));
        assert!(answer.starts_with("HTTP/1.1 200 "), "{path}: {answer}");
    }
    let answer = ask("POST /v1/workers/web%2Fw0");
    assert!(answer.starts_with("HTTP/1.1 403 ") && answer.contains("admin socket"), "{answer}");
    assert_eq!(state(&dispatcher, "w0").as_deref(), Some("active"));
}

#[test]
fn other_machines_are_refused_unless_wanted() {
    let config = format!("admin_http = \"0.0.0.0:0\"\n{}", one_pool(""));
    let check = |config: &str| {
        let dir = configure(config);
        let file = dir.path().join("dispatcher.toml");
        let output = Command::new(dispatcher_bin()).arg("check").arg("--config").arg(file).output();
        let output = output.unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, error) = check(&config);
    assert_eq!(code, Some(78));
    assert!(error.contains("admin_http_allow_remote") && error.contains("^^^"), "{error}");
    assert_eq!(check(&format!("admin_http_allow_remote = true\n{config}")).0, Some(0));
}
