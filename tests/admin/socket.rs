//! The effect of admin requests on a running dispatcher: cost in the event loop, status after a
//! reload, and log.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use test_support::*;

fn run(dispatcher: &Dispatcher, arguments: &[&str]) -> Output {
    let mut command = Command::new(dispatcher_bin());
    command.args(arguments).env("DISPATCHER_ADMIN", dispatcher.admin()).stdin(Stdio::null());
    command.output().unwrap()
}

/// The output of a command that must succeed.
fn text(dispatcher: &Dispatcher, arguments: &[&str]) -> String {
    let output = run(dispatcher, arguments);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn reload(dispatcher: &Dispatcher, body: &str) -> String {
    write_config(&dispatcher.dir, body);
    text(dispatcher, &["reload"])
}

/// Number of simultaneous clients; below the limit of connections per user.
const AT_ONCE: usize = 45;

/// Number of rounds.
const WAVES: usize = 20;

/// The requests: the status in all its forms, and some requests that the event loop must answer one
/// by one.
fn question(number: usize) -> &'static str {
    match number {
        0 => "/v1/pools/web/history",
        1 => "/v1/pools/web/explain",
        n if n % 4 == 2 => "/metrics",
        n if n % 4 == 3 => "/v1/workers",
        n if n.is_multiple_of(2) => "/v1/status",
        _ => "/readyz",
    }
}

/// One round of requests: all are sent before the first answer is read.
fn ask_at_once(socket: &Path, connections: &mut Vec<BufReader<UnixStream>>) {
    while connections.len() < AT_ONCE {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        connections.push(BufReader::new(stream));
    }
    for (number, connection) in connections.iter_mut().enumerate() {
        let request = format!("GET {} HTTP/1.1\r\nHost: d\r\n\r\n", question(number));
        connection.get_mut().write_all(request.as_bytes()).unwrap();
    }
    for (number, connection) in connections.iter_mut().enumerate() {
        let mut length = 0;
        let mut first = String::new();
        loop {
            let mut line = String::new();
            connection.read_line(&mut line).unwrap();
            if first.is_empty() {
                first.clone_from(&line);
            }
            if let Some(value) = line.to_lowercase().strip_prefix("content-length: ") {
                length = value.trim().parse().unwrap();
            }
            if line == "\r\n" {
                break;
            }
        }
        assert!(first.starts_with("HTTP/1.1 200 "), "{}: {first}", question(number));
        let mut body = vec![0; length];
        connection.read_exact(&mut body).unwrap();
    }
}

#[test]
fn admin_traffic_costs_per_turn_and_not_per_request() {
    if Command::new("strace").arg("-V").output().is_err() {
        return skip("needs strace");
    }
    let temp = configure(&one_pool("history = 10"));
    let trace = temp.path().join("trace");
    let mut command = Command::new("strace");
    // strace follows only the event loop's thread.
    command.arg("-o").arg(&trace).arg(dispatcher_bin()).args(["run", "--config"]);
    command.arg(temp.path().join("dispatcher.toml"));
    command.stderr(std::fs::File::create(temp.path().join("log")).unwrap());
    let dispatcher = Dispatcher::start_by(temp.path(), &mut command);
    let address = dispatcher.address("web");
    let _worker = dispatcher.workers("blocking", "web", 1);
    // One client before and one after the requests: their ports mark the range in the trace.
    let mark = || {
        let client = Client::connect(address).unwrap();
        let port = client.stream.get_ref().local_addr().unwrap().port();
        client.finish();
        format!("htons({port})")
    };
    let first = mark();
    let mut connections = Vec::new();
    for _ in 0..WAVES {
        ask_at_once(&dispatcher.admin(), &mut connections);
    }
    let last = mark();
    let trace = wait_for("the trace to have the last client", || {
        Some(std::fs::read_to_string(&trace).unwrap()).filter(|text| text.contains(&last))
    });
    let calls: Vec<&str> = trace
        .lines()
        .skip_while(|line| !line.contains(&first))
        .take_while(|line| !line.contains(&last))
        .collect();
    let requests = AT_ONCE * WAVES;
    let of = |name: &str| calls.iter().filter(|line| line.starts_with(name)).count();
    let (polls, answers, each) = (of("epoll_wait("), of("write("), WAVES * 2);
    let shown: Vec<&&str> = calls.iter().take(60).collect();
    // Fewer than one call per two requests, although each history and explain request takes a turn
    // of its own.
    assert!(calls.len() < requests / 2, "{} for {requests} requests: {shown:#?}", calls.len());
    assert!(polls >= each, "{polls} turns for {each} answers that are not shared");
    // The event loop polls and answers once per turn. It wakes only the side thread, and only if
    // that thread sleeps.
    assert!(answers <= polls, "{answers} answers in {polls} turns");
    assert!(calls.len() < 4 * polls + 100, "{} in {polls} turns: {shown:#?}", calls.len());
}

#[test]
fn a_pool_removed_and_added_again_shows_its_workers() {
    let listener = |name: &str| {
        format!("[[listener]]\nname = \"{name}\"\naddress = \"127.0.0.1:0\"\npool = \"{name}\"\n")
    };
    let with = format!("{}{}[pool.web]\n[pool.chat]\n", listener("web"), listener("chat"));
    let without = format!("{}[pool.web]\n", listener("web"));
    let dispatcher = Dispatcher::start(&with);
    // A worker that keeps its connection after it was told to end.
    let _worker = dispatcher.workers("blocking", "chat", 1);
    let mut client = Client::connect(dispatcher.address("chat")).unwrap();
    assert!(reload(&dispatcher, &without).contains("gone: pool chat\n"));
    dispatcher.wait_status("its worker to be drained", |s| {
        worker(s, "w0").is_some_and(|worker| worker.state == "draining")
    });
    assert!(reload(&dispatcher, &with).contains("new: pool chat\n"));
    let status = dispatcher.status();
    let chat: Vec<_> = status.pools.iter().filter(|pool| pool.name == "chat").collect();
    assert_eq!((chat.len(), chat[0].state.as_str()), (1, "ready"), "as if it had never been gone");
    let old = &chat[0].workers[0];
    assert_eq!((old.name.as_str(), old.state.as_str(), old.load), ("w0", "active", 1));
    let metrics = http_get(&dispatcher.admin(), "/metrics").unwrap().1;
    assert!(metrics.contains("dispatcher_live_connections{pool=\"chat\"} 1\n"), "{metrics}");
    // The command waits while the worker has a connection.
    let id = old.id.to_string();
    let waited = run(&dispatcher, &["drain", &id, "--wait", "--timeout", "300ms"]);
    assert_eq!(waited.status.code(), Some(75), "{waited:?}");
    client.echo("and it goes on");
    client.finish();
    dispatcher.wait_status("it to leave with its last one", |s| worker(s, "w0").is_none());
    // New workers join the same pool.
    let _new = dispatcher.worker("blocking", "chat", "new");
    dispatcher.wait_joined("chat", 1);
    assert_eq!(Client::connect(dispatcher.address("chat")).unwrap().served_by, "new");
}

#[test]
fn a_reload_that_reverts_a_scaling_reports_it() {
    let worker = example("test-worker");
    let spawn = format!("[pool.web.spawn]\ncommand = [{worker:?}, \"blocking\"]\nprocesses = 1\n");
    let body = one_pool(&spawn);
    let dispatcher = Dispatcher::start(&body);
    dispatcher.wait_joined("web", 1);
    assert_eq!(
        text(&dispatcher, &["scale", "web", "2"]),
        "pool web: 2 processes wanted, 1 before: 1 active, 1 starting, 0 leaving\n"
    );
    dispatcher.wait_joined("web", 2);
    assert!(reload(&dispatcher, &body).ends_with(": in force\nchanged: pool web\n"));
    dispatcher.wait_joined("web", 1);
    assert!(reload(&dispatcher, &body).ends_with(": in force\nnothing has changed\n"));
}

#[test]
fn suppressed_log_lines_are_counted_after_a_pause() {
    let keys = "address = \"127.0.0.1:0\"\npool = \"web\"\ndeny = [\"127.0.0.0/8\"]\n";
    let body = format!("[[listener]]\nname = \"web\"\n{keys}[pool.web]\n");
    let dispatcher = Dispatcher::start(&body);
    let address = dispatcher.address("web");
    let _worker = dispatcher.workers("blocking", "web", 1);
    let mut came = 0;
    wait_for("a second with too many of them", || {
        (0..60).for_each(|_| drop(connect(address)));
        came += 60;
        Some(dispatcher.status().meters.log_lines_limited).filter(|&count| count > 0)
    });
    dispatcher.wait_status("all to be seen", |s| s.accepted == came);
    // From here on there are no requests and no clients. Each event is in the log or counted there.
    wait_until("the log to tell of all", || {
        let log = dispatcher.log();
        let lines = log.lines().filter(|line| line.contains("event=client_kept_out ")).count();
        let counted: u64 = log
            .lines()
            .filter(|line| {
                line.contains("event=client_kept_out ")
                    || line.contains("event=lines_suppressed kind=client_kept_out ")
            })
            .filter_map(|line| line.rsplit('=').next()?.parse::<u64>().ok())
            .sum();
        lines as u64 + counted == came
    });
    assert!(dispatcher.log().contains("event=lines_suppressed kind=client_kept_out "));
}

#[test]
fn output_of_processes_is_rate_limited() {
    let spawn = "[pool.web.spawn]\ncommand = [\"true\"]\nprocesses = 200\n";
    let dispatcher = Dispatcher::start(&one_pool(spawn));
    for kind in ["process_started", "process_ended"] {
        wait_until("suppressed lines", || {
            let log = dispatcher.log();
            let limited = |line: &str| {
                line.contains(&format!("event={kind} ")) && !line.ends_with("suppressed=0")
            };
            log.contains(&format!("event=lines_suppressed kind={kind} "))
                || log.lines().any(limited)
        });
    }
}
