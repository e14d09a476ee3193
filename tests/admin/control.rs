//! Operator commands to a running dispatcher, over the command line and over HTTP.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the report")]

mod instance;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::process::{Child, ChildStderr, Command, Output, Stdio};

use serde_json::Value;
use test_support::*;

fn cli(dispatcher: &Dispatcher, arguments: &[&str]) -> Command {
    let mut command = Command::new(dispatcher_bin());
    command.args(arguments).env("DISPATCHER_ADMIN", dispatcher.admin()).stdin(Stdio::null());
    command
}

fn run(dispatcher: &Dispatcher, arguments: &[&str]) -> Output {
    cli(dispatcher, arguments).output().unwrap()
}

/// The output of a command that must succeed.
fn done(dispatcher: &Dispatcher, arguments: &[&str]) -> String {
    let output = run(dispatcher, arguments);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// Exit code and output of a command that must fail.
fn failed(dispatcher: &Dispatcher, arguments: &[&str]) -> (i32, String) {
    let output = run(dispatcher, arguments);
    assert!(!output.status.success(), "{arguments:?}");
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

/// A waiting command, after its first message, and its further output.
fn waits(dispatcher: &Dispatcher, arguments: &[&str], words: &str) -> (Child, ChildStderr) {
    let mut waiting = cli(dispatcher, arguments);
    let mut waiting = waiting.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut progress = waiting.stderr.take().unwrap();
    let mut said = String::new();
    wait_until("progress", || {
        let mut bytes = [0; 256];
        let n = progress.read(&mut bytes).unwrap();
        said.push_str(&String::from_utf8_lossy(&bytes[..n]));
        said.contains(words)
    });
    (waiting, progress)
}

fn rest(progress: &mut ChildStderr) -> String {
    let mut said = String::new();
    progress.read_to_string(&mut said).unwrap();
    said
}

fn state(dispatcher: &Dispatcher, name: &str) -> Option<String> {
    worker(&dispatcher.status(), name).map(|worker| worker.state.clone())
}

#[test]
fn a_drained_worker_gets_no_new_connections() {
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

        // The command shows progress and ends when the worker has no connections.
        let (mut waiting, mut progress) = waits(
            &dispatcher,
            &["drain", "web/w0", "--wait"],
            "0 of 1 worker drained, 2 connections left",
        );
        assert!(waiting.try_wait().unwrap().is_none(), "it waits");
        before.into_iter().for_each(Client::finish);
        assert!(waiting.wait().unwrap().success());
        let said = rest(&mut progress);
        assert!(said.trim_end().ends_with("1 of 1 worker drained, 0 connections left"), "{said}");
        // After the drain the worker ends by itself.
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
fn a_draining_worker_can_be_resumed() {
    let (dispatcher, address) = start_one_pool("wait_for_worker = \"1h\"");
    let _worker = dispatcher.worker_with("blocking", "web", "w0", &[("TEST_WORKER", "stays")]);
    dispatcher.wait_joined("web", 1);
    let first = Client::connect(address).unwrap();
    done(&dispatcher, &["drain", "--pool", "web"]);
    assert_eq!(http_get(&dispatcher.admin(), "/readyz").unwrap().0, 503, "no usable worker");
    assert_eq!(http_get(&dispatcher.admin(), "/healthz").unwrap().0, 200, "and yet healthy");
    let waiting = connect(address);
    // The waiting command reports that the worker was resumed.
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
fn drain_and_resume_apply_to_a_pool_and_to_all() {
    let other = "[[listener]]\nname = \"other\"\naddress = \"127.0.0.1:0\"\npool = \"other\"\n[pool.other]\n";
    let dispatcher = Dispatcher::start(&format!("{other}{}", one_pool("wait_for_worker = \"1h\"")));
    let start = |pool: &str, name: &str| {
        dispatcher.worker_with("blocking", pool, name, &[("TEST_WORKER", "stays")])
    };
    let _workers = ["w0", "w1", "w2"].map(|name| start("web", name));
    let _other = start("other", "o0");
    dispatcher.wait_joined("web", 3);
    dispatcher.wait_joined("other", 1);
    let (web, elsewhere) = (dispatcher.address("web"), dispatcher.address("other"));
    let mut live: Vec<Client> = (0..6).map(|_| Client::connect(web).unwrap()).collect();
    live.push(Client::connect(elsewhere).unwrap());
    let states = || -> Vec<String> {
        let status = dispatcher.status();
        let mut workers: Vec<_> = status.pools.iter().flat_map(|pool| &pool.workers).collect();
        workers.sort_by_key(|worker| worker.name.clone());
        workers.into_iter().map(|worker| worker.state.clone()).collect()
    };
    // In the order of names: the other pool comes first.
    for (target, first, lines) in
        [(&["--pool", "web"][..], "active", 3), (&["--all"], "draining", 4)]
    {
        let said = done(&dispatcher, &[&["drain"], target].concat());
        assert_eq!(said.matches("): draining, ").count(), lines, "{said}");
        assert_eq!(said.starts_with("host: draining, "), target == ["--all"], "{said}");
        assert_eq!(states(), [first, "draining", "draining", "draining"], "{target:?}");
        if first == "active" {
            Client::connect(elsewhere).unwrap().finish();
        }
        let waiting: Vec<_> = (0..3).map(|_| connect(web)).collect();
        live.iter_mut().for_each(|client| client.echo("live ones go on"));
        let taken = dispatcher.status().taken;
        let said = done(&dispatcher, &[&["resume"], target].concat());
        assert_eq!(said.matches(": active, ").count(), lines, "{said}");
        assert_eq!(states(), ["active"; 4], "{target:?}");
        // All workers served the waiting clients, and none before the resume.
        let served = all_greeted(waiting);
        assert_eq!(tally(&served).len(), 3);
        dispatcher.wait_status("them to be counted", |status| status.taken == taken + 3);
        served.into_iter().for_each(Client::finish);
        dispatcher.wait_status("their end", |status| loads(status, "web").0 == [2; 3]);
    }
    // The command waits for all workers together.
    let (mut waiting, mut progress) = waits(
        &dispatcher,
        &["drain", "--pool", "web", "--wait"],
        "0 of 3 workers drained, 6 connections left",
    );
    let last = live.remove(0);
    live.into_iter().for_each(Client::finish);
    dispatcher.wait_status("all but one to end", |s| loads(s, "web").0.iter().sum::<u64>() == 1);
    assert!(waiting.try_wait().unwrap().is_none(), "one is left");
    last.finish();
    let said = rest(&mut progress);
    assert!(waiting.wait().unwrap().success());
    assert!(said.contains("3 of 3 workers drained, 0 connections left"), "{said}");
}

#[test]
fn waiting_ends_at_its_timeout() {
    let (dispatcher, address) = start_one_pool("");
    let _worker = dispatcher.workers("blocking", "web", 1);
    let client = Client::connect(address).unwrap();
    let (code, error) = failed(&dispatcher, &["drain", "web/w0", "--wait", "--timeout", "50ms"]);
    assert_eq!(code, 75, "{error}");
    assert!(error.contains("1 connection left") && error.contains("--deadline"), "{error}");
    client.finish();
}

#[test]
fn a_wrong_name_gets_the_nearest_one() {
    let (dispatcher, _) = start_one_pool("");
    let _workers = dispatcher.workers("blocking", "web", 2);
    let (code, error) = failed(&dispatcher, &["drain", "web/w3"]);
    assert_eq!(code, 66);
    assert!(error.contains("did you mean `web/w"), "{error}");
    let (code, error) = failed(&dispatcher, &["drain", "--pool", "wep"]);
    assert_eq!((code, error.contains("did you mean `web`?")), (66, true), "{error}");
    let (code, error) = failed(&dispatcher, &["resume", "web"]);
    assert_eq!((code, error.contains("POOL/NAME")), (64, true), "{error}");
    let _same_name = dispatcher.worker("blocking", "web", "w1");
    dispatcher.wait_joined("web", 3);
    let (code, error) = failed(&dispatcher, &["drain", "web/w1"]);
    assert_eq!((code, error.contains("use an id: ")), (64, true), "{error}");
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
    let missing = Command::new(dispatcher_bin())
        .args(["drain", "1", "--admin", "/nonexistent/admin.sock"])
        .output()
        .unwrap();
    assert_eq!(missing.status.code(), Some(69));
    let error = String::from_utf8_lossy(&missing.stderr);
    assert!(error.contains("is the dispatcher running?"), "{error}");
}

#[test]
fn watched_status_ends_without_a_reader() {
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

/// One request; the code, the head and the body of the answer.
fn ask(
    mut stream: impl Read + Write,
    request: &str,
    host: &str,
    body: &str,
) -> (u16, String, String) {
    let head = format!("{request} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n");
    let kind = "Content-Type: application/json\r\nContent-Length: ";
    write!(stream, "{head}{kind}{}\r\n\r\n{body}", body.len()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let code = head.split(' ').nth(1).unwrap().parse().unwrap();
    (code, head.to_ascii_lowercase(), body.to_owned())
}

/// All paths, with their methods.
const ROUTES: [(&str, &str, &str); 14] = [
    ("/", "GET, HEAD", ""),
    ("/v1/status", "GET, HEAD", ""),
    ("/v1/pools/web", "GET, HEAD, POST", r#"{"action": "drain"}"#),
    ("/v1/pools/web/history", "GET, HEAD", ""),
    ("/v1/pools/web/explain", "GET, HEAD", ""),
    ("/v1/pools/web/advice", "GET, HEAD", ""),
    ("/v1/pools/web/advice/history", "GET, HEAD", ""),
    ("/v1/workers", "GET, HEAD, POST", r#"{"action": "weight", "weight": 7}"#),
    ("/v1/workers/web%2Fweb-1", "GET, HEAD, POST", r#"{"action": "drain"}"#),
    ("/v1/log_level", "GET, HEAD, POST", r#"{"level": "error"}"#),
    ("/v1/reload", "POST", ""),
    ("/metrics", "GET, HEAD", ""),
    ("/healthz", "GET, HEAD", ""),
    ("/readyz", "GET, HEAD", ""),
];

/// The part of an answer that does not change between requests.
fn lasting(path: &str, body: &str) -> Value {
    match path {
        "/v1/status" => {
            let status: Value = serde_json::from_str(body).unwrap();
            serde_json::json!([
                status["pid"],
                status["accepted"],
                status["pools"],
                status["listeners"]
            ])
        }
        "/metrics" => {
            let series = body.lines().filter(|line| !line.starts_with('#'));
            let names: Vec<&str> = series.map(|line| line.rsplit_once(' ').unwrap().0).collect();
            assert!(names.len() > 50);
            serde_json::json!(names)
        }
        "/v1/pools/web/explain" => {
            let mut next: Value = serde_json::from_str(body).unwrap();
            assert!(next.as_object_mut().unwrap().remove("at").is_some());
            next
        }
        // Its figures have an age.
        "/v1/pools/web/advice" => {
            let advice: Value = serde_json::from_str(body).unwrap();
            serde_json::json!([
                advice["mode"],
                advice["multiplier"],
                advice["addresses"][0]["address"]
            ])
        }
        // Each page has its own nonce of constant length.
        "/" => body.len().into(),
        _ => serde_json::from_str(body).unwrap_or_else(|_| body.into()),
    }
}

/// A pool with a spawned process and history.
fn spawned() -> String {
    let program = example("test-worker");
    let command = format!("command = [{:?}, \"blocking\"]", program.to_str().unwrap());
    let pool = one_pool("history = 5");
    format!("{pool}\n[pool.web.spawn]\n{command}\nprocesses = 1\n")
}

#[test]
fn tcp_reads_everything_and_changes_nothing() {
    let http = "admin_http = \"127.0.0.1:0\"\nadvice_listen = \"127.0.0.1:0\"\n";
    let config = format!("{http}{}", spawned());
    let dispatcher = Dispatcher::start(&config);
    dispatcher.wait_joined("web", 1);
    Client::connect(dispatcher.address("web")).unwrap().finish();
    dispatcher.wait_status("its end", |s| s.taken == 1 && loads(s, "web").0 == [0]);
    let address = admin_http(&dispatcher);
    let socket = || UnixStream::connect(dispatcher.admin()).unwrap();
    let tcp = || TcpStream::connect(&address).unwrap();
    let before = lasting("/v1/status", &ask(socket(), "GET /v1/status", "d", "").2);
    // A reload would apply this change.
    write_config(&dispatcher.dir, &config.replace("history = 5", "policy = \"random\""));

    for (path, possible, body) in ROUTES {
        for method in ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"] {
            let request = format!("{method} {path}");
            let reads = ["GET", "HEAD"].contains(&method);
            let is_possible = possible.split(", ").any(|one| one == method);
            let there = ask(tcp(), &request, &address, if reads { "" } else { body });
            if !reads {
                assert_eq!(there.0, 403, "{request}: {there:?}");
                let said: Value = serde_json::from_str(&there.2).unwrap();
                assert!(said["hint"].as_str().unwrap().contains("admin socket"), "{said}");
            }
            // The next test covers the effect of the command.
            if is_possible && !reads {
                continue;
            }
            let here = ask(socket(), &request, "d", "");
            assert_eq!(here.0, if is_possible { 200 } else { 405 }, "{request}: {here:?}");
            if !is_possible {
                let allow = format!("allow: {}", possible.to_ascii_lowercase());
                assert!(here.1.contains(&allow), "{request}: {here:?}");
            }
            if !reads {
                continue;
            }
            assert_eq!(there.0, here.0, "{request}: {there:?}");
            match method {
                "GET" if is_possible => {
                    assert_eq!(lasting(path, &there.2), lasting(path, &here.2), "{path}");
                }
                "GET" => assert_eq!(there.2, here.2, "{path}"),
                _ => assert_eq!((there.2.as_str(), here.2.as_str()), ("", ""), "{path}"),
            }
        }
    }
    for stranger in ["/v2", "/v1/pools/wep", "/v1/workers/99"] {
        assert_eq!(ask(tcp(), &format!("GET {stranger}"), &address, "").0, 404, "{stranger}");
    }
    let history = ask(tcp(), "GET /v1/pools/web/history", &address, "").2;
    let history: Value = serde_json::from_str(&history).unwrap();
    assert_eq!(history["decisions"].as_array().map(Vec::len), Some(1), "{history}");
    let after = lasting("/v1/status", &ask(socket(), "GET /v1/status", "d", "").2);
    assert_eq!(before, after, "nothing has changed");
    let level = ask(socket(), "GET /v1/log_level", "d", "").2;
    assert!(level.contains("debug"), "{level}");
}

#[test]
fn every_command_works_over_plain_http() {
    let dispatcher = Dispatcher::start(&spawned());
    dispatcher.wait_joined("web", 1);
    let post = |path: &str, body: &str| {
        let stream = UnixStream::connect(dispatcher.admin()).unwrap();
        let (code, _, answer) = ask(stream, &format!("POST {path}"), "d", body);
        (code, serde_json::from_str::<Value>(&answer).unwrap())
    };
    let weights = || -> Vec<u32> {
        pool(&dispatcher.status(), "web").workers.iter().map(|worker| worker.weight).collect()
    };
    let (code, scaled) = post("/v1/pools/web", r#"{"action": "scale", "processes": 3}"#);
    assert_eq!((code, &scaled["processes"], &scaled["before"]), (200, &3.into(), &1.into()));
    dispatcher.wait_joined("web", 3);
    let one = r#"{"action": "weight", "weight": 3}"#;
    let (code, said) = post("/v1/workers/1", one);
    assert_eq!((code, &said["workers"][0]["id"]), (200, &1.into()), "{said}");
    assert_eq!(weights(), [3, 1, 1]);
    assert_eq!(post("/v1/workers/web%2Fweb-1", &one.replace('3', "5")).0, 200);
    assert_eq!(weights(), [5, 1, 1]);
    assert_eq!(post("/v1/pools/web", &one.replace('3', "8")).0, 200);
    assert_eq!(weights(), [8; 3]);
    assert_eq!(post("/v1/workers", &one.replace('3', "9")).0, 200);
    assert_eq!(weights(), [9; 3]);
    assert_eq!(post("/v1/pools/web", r#"{"action": "scale", "by": -2}"#).0, 200);
    dispatcher.wait_joined("web", 1);
    let (code, level) = post("/v1/log_level", r#"{"level": "error"}"#);
    assert_eq!((code, level), (200, serde_json::json!({"level": "error", "previous": "debug"})));

    for (path, body, code) in [
        ("/v1/workers/1", r#"{"action": "weight", "weight": 0}"#, 400),
        ("/v1/workers/1", r#"{"action": "weight", "weight": 65536}"#, 400),
        ("/v1/workers/1", r#"{"action": "scale", "processes": 2}"#, 400),
        ("/v1/workers", r#"{"action": "scale", "processes": 2}"#, 400),
        ("/v1/pools/web", r#"{"action": "scale"}"#, 400),
        ("/v1/pools/web", r#"{"action": "scale", "processes": 2, "by": 1}"#, 400),
        ("/v1/pools/web", r#"{"action": "drain", "deadline": "soon"}"#, 400),
        ("/v1/pools/wep", r#"{"action": "drain"}"#, 404),
        ("/v1/workers/77", one, 404),
        ("/v1/workers/1", r#"{"action": "explode"}"#, 422),
        ("/v1/workers/1", r#"{"action": "drain", "dedline": "1s"}"#, 422),
        ("/v1/log_level", r#"{"level": "loud"}"#, 400),
        ("/v1/log_level", "debug", 400),
    ] {
        let (got, said) = post(path, body);
        assert_eq!(got, code, "{path} {body}: {said}");
        assert!(said["error"].is_string() && said["hint"].is_string(), "{path} {body}: {said}");
    }
    assert_eq!(weights(), [9]);
}

/// The address of HTTP over TCP.
fn admin_http(dispatcher: &Dispatcher) -> String {
    wait_for_log(dispatcher, "event=admin_http address=");
    let log = dispatcher.log();
    log.split("event=admin_http address=").nth(1).unwrap().lines().next().unwrap().to_owned()
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

    // The listed names are accepted, still read-only.
    let mut listed = format!(
        "admin_http_allow_remote = true\nadmin_http_hosts = [\"dispatcher.example.com\"]\n{config}"
    );
    let dispatcher = Dispatcher::start(&listed);
    let address = admin_http(&dispatcher);
    let port = address.strip_prefix("0.0.0.0:").expect(&address).parse::<u16>().unwrap();
    let tcp = || TcpStream::connect(("127.0.0.1", port)).unwrap();
    let host = "dispatcher.example.com:9900";
    assert_eq!(ask(tcp(), "GET /v1/status", host, "").0, 200);
    assert_eq!(ask(tcp(), "POST /v1/reload", host, "").0, 403);
    assert_eq!(ask(tcp(), "GET /v1/status", "other.example.com", "").0, 403);
    assert_eq!(ask(tcp(), "GET /v1/status", "192.0.2.7:9900", "").0, 200);
    let own = rustix::system::uname();
    assert_eq!(ask(tcp(), "GET /v1/status", own.nodename().to_str().unwrap(), "").0, 200);
    // A reload changes the names.
    listed = listed.replace("dispatcher.example.com", "other.example.com");
    let done = reloading::reload(&dispatcher, &listed);
    assert_eq!(reloading::names(&done["changed"]), ["admin_http_hosts"]);
    assert_eq!(ask(tcp(), "GET /v1/status", host, "").0, 403);
    assert_eq!(ask(tcp(), "GET /v1/status", "other.example.com", "").0, 200);
    // On a loopback address only names of this machine are accepted.
    let dispatcher = Dispatcher::start(&config.replace("0.0.0.0", "127.0.0.1"));
    let address = admin_http(&dispatcher);
    let tcp = || TcpStream::connect(&address).unwrap();
    assert_eq!(ask(tcp(), "GET /v1/status", host, "").0, 403);
    assert_eq!(ask(tcp(), "GET /v1/status", "localhost", "").0, 200);
}

/// Programs as in the documentation: `main` returns when the last connection has ended, and not
/// before.
#[test]
fn example_workers_end_after_a_drain_with_their_connections() {
    for program in ["echo", "mio-echo"] {
        let (dispatcher, address) = start_one_pool("");
        let mut command = Command::new(example(program));
        command.env("DISPATCH_SOCKET", dispatcher.dispatch()).env("DISPATCH_POOL", "web");
        let mut drained = Process::start(program, command.env("DISPATCH_NAME", "w0"));
        dispatcher.wait_joined("web", 1);
        let mut clients = [connect(address), connect(address)];
        let echo = |client: &mut TcpStream, text: &[u8]| {
            client.set_read_timeout(Some(PATIENCE)).unwrap();
            client.write_all(text).unwrap();
            let mut back = vec![0; text.len()];
            client.read_exact(&mut back).unwrap();
            assert_eq!(back, text, "{program}");
        };
        clients.iter_mut().for_each(|client| echo(client, b"before"));
        done(&dispatcher, &["drain", "web/w0"]);
        // The worker has said goodbye and lives only as long as its connections.
        wait_for_log(&dispatcher, "event=worker_goodbye");
        clients.iter_mut().for_each(|client| echo(client, b"they go on"));
        let [mut last, first] = clients;
        drop(first);
        let one = |status: &_| worker(status, "w0").is_some_and(|worker| worker.load == 1);
        dispatcher.wait_status("one to be left", one);
        echo(&mut last, b"the last one, too");
        assert!(drained.running(), "{program}");
        drop(last);
        assert!(drained.wait().success(), "{program} ends with its last connection");
        let status =
            dispatcher.wait_status("it to be gone", |status| worker(status, "w0").is_none());
        assert_eq!((status.taken, status.closed.values().sum::<u64>()), (2, 0));
    }
}
