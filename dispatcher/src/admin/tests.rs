//! HTTP over a real Unix socket, with a thread in place of the event loop.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use dispatch_protocol::wire::Token;

use std::thread::JoinHandle;

use super::client::{self, ClientError};
use super::*;
use crate::api::action::{Outcome, WorkersChanged};
use crate::api::command::{self, Answer, Command, Problem, Target};
use crate::api::status::{PoolStatus, Status, WorkerStatus};
use crate::background::spawner::Report;
use crate::mailbox::{DeferredStatus, Request};

mod refusals;

const PATIENCE: Duration = Duration::from_secs(30);

/// A side thread, and an event-loop thread that answers only while `answering` is set.
struct Bench {
    directory: tempfile::TempDir,
    port: u16,
    answering: Arc<AtomicBool>,
    asked: Arc<AtomicUsize>,
    /// Number of wake-ups of the event loop.
    woken: Arc<AtomicUsize>,
    end: Arc<AtomicBool>,
    hosts: Hosts,
    hot: Option<JoinHandle<()>>,
}

impl Bench {
    fn new() -> Bench {
        let directory = tempfile::tempdir().expect("a directory");
        let listener = UnixListener::bind(directory.path().join("admin.sock")).expect("a socket");
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = tcp.local_addr().expect("bound").port();
        let answering = Arc::new(AtomicBool::new(true));
        let asked = Arc::new(AtomicUsize::new(0));
        let end = Arc::new(AtomicBool::new(false));
        let (wake, sleep) = mpsc::channel();
        let woken = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&woken);
        let admin = start(
            listener,
            TcpListeners { admin_http: Some(tcp), advice: None },
            Arc::new(move || {
                count.fetch_add(1, Ordering::SeqCst);
                let _ = wake.send(());
            }),
            false,
        )
        .expect("a side thread");
        admin.admin_rate.store(10_000, Ordering::SeqCst);
        let hosts = admin.hosts.clone();
        let hot = std::thread::spawn({
            let (answering, asked, end) = (answering.clone(), asked.clone(), end.clone());
            move || {
                while !end.load(Ordering::SeqCst) {
                    let _ = sleep.recv_timeout(Duration::from_millis(5));
                    if !answering.load(Ordering::SeqCst) {
                        continue;
                    }
                    while let Some(request) = admin.request() {
                        let turn = asked.fetch_add(1, Ordering::SeqCst) as u64;
                        match request {
                            Request::Status(answer) => {
                                let _ = answer.send(DeferredStatus(Box::new(move || status(turn))));
                            }
                            Request::Alive(answer) => drop(answer.send(())),
                            Request::Command { command, answer } => {
                                let _ = answer.send(carried_out(&command));
                            }
                            // These tests do not send the other requests.
                            Request::History { .. }
                            | Request::Explain { .. }
                            | Request::Loads(_)
                            | Request::Reload { .. } => {}
                        }
                    }
                }
                admin.finish();
            }
        });
        Bench { directory, port, answering, asked, woken, end, hosts, hot: Some(hot) }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("admin.sock")
    }

    /// Sends bytes and reads until the server closes.
    fn raw(&self, request: &str) -> String {
        let mut stream = self.open();
        stream.write_all(request.as_bytes()).expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        answer
    }

    fn open(&self) -> UnixStream {
        let stream = UnixStream::connect(self.path()).expect("connected");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.end.store(true, Ordering::SeqCst);
        if let Some(hot) = self.hot.take() {
            hot.join().expect("the hot thread");
        }
    }
}

fn status(accepted: u64) -> Status {
    let worker =
        |id, name: &str| WorkerStatus { id, name: name.to_owned(), ..WorkerStatus::default() };
    let pool = PoolStatus {
        name: "web".to_owned(),
        state: "ready".to_owned(),
        workers: vec![worker(1, "a"), worker(2, "b")],
        ..PoolStatus::default()
    };
    Status { version: "test".to_owned(), accepted, pools: vec![pool], ..Status::default() }
}

/// The commands of this event loop: it returns the command as text, and has no pool called `none`.
fn carried_out(command: &Command) -> Answer {
    match command {
        Command::Drain { target: Target::Pool(name), .. } if name == "none" => {
            Err(command::unknown_pool(name, ["web"].into_iter()))
        }
        command => Ok(Outcome::Workers(WorkersChanged {
            host: None,
            instance: format!("{command:?}"),
            workers: Vec::new(),
        })),
    }
}

#[test]
fn commands() {
    let bench = Bench::new();
    let post = |target: &str, body: serde_json::Value| {
        client::post(&bench.path(), target, &body, PATIENCE)
            .map(|body| String::from_utf8(body).expect("UTF-8"))
    };
    let rejected = |target: &str, body: serde_json::Value| match post(target, body) {
        Err(ClientError::Rejected(error)) => error,
        other => panic!("{target}: {other:?}"),
    };
    let drain = serde_json::json!({ "action": "drain", "deadline": "30s" });
    let heard = post("/v1/workers/7", drain.clone()).expect("done");
    assert!(
        heard.contains("Drain { target: Worker(Id(7)), deadline: Some(30s), announce: 0ns }"),
        "{heard}"
    );
    let heard =
        post("/v1/workers/web%2Fa", serde_json::json!({ "action": "resume" })).expect("done");
    assert!(heard.contains("Resume { target: Worker(Named"), "{heard}");
    let heard = post("/v1/pools/web", drain.clone()).expect("done");
    assert!(heard.contains("Pool(") && heard.contains("web"), "{heard}");
    assert!(post("/v1/workers", drain.clone()).expect("done").contains("target: All"));

    let host = serde_json::json!({ "action": "drain", "announce": "5s" });
    assert!(post("/v1/workers", host.clone()).expect("done").contains("announce: 5s"));
    let error = rejected("/v1/pools/web", host);
    assert_eq!(error.message, "only a drain of the whole host can be announced");

    let error = rejected("/v1/pools/none", drain.clone());
    assert_eq!(error.problem, Problem::NotFound);
    assert_eq!(error.hint.as_deref(), Some("the pools are web"));
    assert_eq!(rejected("/v1/workers/web", drain).problem, Problem::Invalid);
    let error =
        rejected("/v1/workers/1", serde_json::json!({ "action": "drain", "deadline": "soon" }));
    assert_eq!(error.problem, Problem::Invalid);
    for body in [serde_json::json!({}), serde_json::json!({ "action": "explode" })] {
        assert_eq!(rejected("/v1/workers/1", body).problem, Problem::Invalid);
    }
    let answer = bench.raw(
        "POST /v1/workers/1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}",
    );
    assert!(answer.starts_with("HTTP/1.1 415 ") && answer.contains("content-type"), "{answer}");
}

#[test]
fn parts_of_the_status() {
    let bench = Bench::new();
    let get = |target: &str| {
        let body = client::get(&bench.path(), target, PATIENCE)?;
        Ok::<serde_json::Value, ClientError>(serde_json::from_slice(&body).expect("JSON"))
    };
    assert_eq!(get("/v1/workers/2").expect("there")["name"], "b");
    assert_eq!(get("/v1/workers/web%2Fa").expect("there")["id"], 1);
    assert_eq!(get("/v1/workers/web%2Fa").expect("there")["pool"], "web");
    assert_eq!(get("/v1/pools/web").expect("there")["workers"][1]["name"], "b");
    assert_eq!(get("/v1/workers").expect("there")["workers"].as_array().map(Vec::len), Some(2));
    for target in ["/v1/workers/3", "/v1/workers/web%2Fc", "/v1/pools/wep"] {
        let error = get(target).expect_err("not there");
        assert!(
            matches!(&error, ClientError::Rejected(e) if e.problem == Problem::NotFound && e.hint.is_some()),
            "{target}: {error}"
        );
    }
}

#[test]
fn the_status() {
    let bench = Bench::new();
    let body = client::get(&bench.path(), "/v1/status", PATIENCE).expect("a status");
    let status: Status = serde_json::from_slice(&body).expect("valid");
    assert_eq!(status.version, "test");
    assert_eq!(client::get(&bench.path(), "/healthz", PATIENCE).expect("healthy"), b"ok\n");
    let answer = bench.raw("GET /v1/status HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!(answer.contains("content-type: application/json"), "{answer}");
}

#[test]
fn paths_and_methods_that_do_not_exist() {
    let bench = Bench::new();
    let answer = bench.raw("GET /nope HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 404 "), "{answer}");
    assert!(answer.contains("\"/v1/status\""), "{answer}");
    let answer = bench.raw("POST /v1/status HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 405 "), "{answer}");
    assert!(answer.contains("allow: GET"), "{answer}");
    let answer = bench.raw("GET /v1/status HTTP/1.1\r\nHost: x\r\nContent-Length: 65537\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    assert!(bench.raw("what is this\r\n\r\n").starts_with("HTTP/1.1 400 "));
    let error = client::get(&bench.path(), "/nope", PATIENCE).expect_err("404");
    assert!(
        matches!(&error, ClientError::Rejected(error) if error.problem == Problem::NotFound),
        "{error}"
    );
}

#[test]
fn all_reads_share_one_status_request() {
    let bench = Bench::new();
    bench.answering.store(false, Ordering::SeqCst);
    let targets = ["/v1/status", "/v1/pools/web", "/v1/workers", "/v1/workers/1", "/readyz"];
    let clients: Vec<_> = (0..40)
        .map(|n| {
            let mut stream = bench.open();
            let target = targets[n % targets.len()];
            write!(stream, "GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                .expect("sent");
            stream
        })
        .collect();
    // A further request on a new connection gets a timeout: all others are waiting by then.
    let error = client::get(&bench.path(), "/healthz", PATIENCE).expect_err("not healthy");
    assert!(matches!(error, ClientError::Busy(_)), "{error}");
    bench.answering.store(true, Ordering::SeqCst);
    for mut client in clients {
        let mut answer = String::new();
        client.read_to_string(&mut answer).expect("an answer");
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    }
    // One status request for all clients, and one request of the other kind.
    assert_eq!(bench.asked.load(Ordering::SeqCst), 2);
    // The next request is answered again.
    client::get(&bench.path(), "/healthz", PATIENCE).expect("healthy");
}

#[test]
fn many_requests_cause_few_event_loop_requests() {
    let bench = Bench::new();
    let start = Instant::now();
    let floods: Vec<_> = (0..8)
        .map(|n| {
            let path = bench.path();
            std::thread::spawn(move || {
                let target = ["/healthz", "/v1/status", "/metrics", "/readyz"][n % 4];
                let mut count = 0;
                while start.elapsed() < Duration::from_millis(600) {
                    client::get(&path, target, PATIENCE).expect("an answer");
                    count += 1;
                }
                count
            })
        })
        .collect();
    let answered: usize = floods.into_iter().map(|flood| flood.join().expect("no panic")).sum();
    let took = start.elapsed().as_millis() as usize;
    // At most ten status requests and fifty liveness requests per second; one more of each at both
    // ends of the interval.
    let most = took / 100 + took / 20 + 4;
    let asked = bench.asked.load(Ordering::SeqCst);
    assert!(asked <= most, "{asked} questions in {took} ms, {answered} answers");
    assert!(answered > 8);
}

#[test]
fn late_and_abandoned_requests_are_dropped() {
    let bench = Bench::new();
    bench.answering.store(false, Ordering::SeqCst);
    let until_woken = |count: usize| {
        let start = Instant::now();
        while bench.woken.load(Ordering::SeqCst) < count {
            assert!(start.elapsed() < PATIENCE, "{count} requests did not come through");
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    // Each client disconnects before the answer; the server notices at the next request.
    for n in 0..10 {
        let mut stream = bench.open();
        let head = match n % 2 {
            0 => "GET /v1/pools/web/explain HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(),
            _ => {
                let body = "{\"action\":\"drain\"}";
                let length = body.len();
                format!(
                    "POST /v1/workers HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n\
                     Content-Length: {length}\r\n\r\n{body}"
                )
            }
        };
        stream.write_all(head.as_bytes()).expect("sent");
        until_woken(n + 1);
    }
    let mut last = bench.open();
    let head = "POST /v1/workers/7 HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n";
    let body = "{\"action\":\"resume\"}";
    write!(last, "{head}Content-Length: {}\r\n\r\n{body}", body.len()).expect("sent");
    until_woken(11);
    bench.answering.store(true, Ordering::SeqCst);
    let mut answer = String::new();
    last.read_to_string(&mut answer).expect("an answer");
    assert!(answer.contains("Resume"), "{answer}");
    assert_eq!(bench.asked.load(Ordering::SeqCst), 1, "only the waiting client is answered");
}

#[test]
fn tcp_allows_only_reads() {
    let bench = Bench::new();
    let ask = |head: &str| {
        let mut stream =
            std::net::TcpStream::connect(("127.0.0.1", bench.port)).expect("connected");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        write!(stream, "{head}\r\nConnection: close\r\n\r\n").expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        answer
    };
    for host in ["localhost", "127.0.0.1:9900", "[::1]"] {
        let answer = ask(&format!("GET /v1/status HTTP/1.1\r\nHost: {host}"));
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        assert!(!answer.to_ascii_lowercase().contains("access-control"), "{answer}");
    }
    assert!(ask("HEAD /healthz HTTP/1.1\r\nHost: localhost").starts_with("HTTP/1.1 200 "));
    assert!(ask("GET /nope HTTP/1.1\r\nHost: localhost").starts_with("HTTP/1.1 404 "));
    for method in ["POST", "PUT", "DELETE", "OPTIONS"] {
        let answer = ask(&format!("{method} /v1/workers/1 HTTP/1.1\r\nHost: localhost"));
        assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
        assert!(answer.contains("admin socket"), "{answer}");
    }
    // A foreign web page whose name resolves to an address of this machine.
    for head in [
        "GET /v1/status HTTP/1.1\r\nHost: evil.example:9900",
        "GET /v1/status HTTP/1.1\r\nHost: localhost\r\nHost: evil.example",
        "GET http://evil.example/v1/status HTTP/1.1\r\nHost: localhost",
    ] {
        let answer = ask(head);
        assert!(
            answer.starts_with("HTTP/1.1 403 ") && answer.contains("admin_http_hosts"),
            "{answer}"
        );
    }
    // A health check without a `Host` header.
    for path in ["/healthz", "/v1/status", "/metrics"] {
        let answer = bench_without_host(bench.port, path);
        assert!(answer.starts_with("HTTP/1.0 200 "), "{path}: {answer}");
    }
    bench.hosts.set(vec!["good.example".to_owned()]);
    let answer = ask("GET /v1/status HTTP/1.1\r\nHost: good.example:9900");
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

fn bench_without_host(port: u16, path: &str) -> String {
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).expect("connected");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n").expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    answer
}

#[test]
fn foreign_web_pages_are_refused_on_the_admin_socket() {
    let bench = Bench::new();
    let ask = |method: &str, path: &str, headers: &str| {
        let body = "{\"action\":\"drain\"}";
        bench.raw(&format!(
            "{method} {path} HTTP/1.1\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n{headers}\r\n{body}",
            body.len()
        ))
    };
    let here = "Host: 127.0.0.1:9900\r\n";
    // A form or a no-cors fetch of a foreign page through a tunnel, and of a page of this machine.
    for by in [
        "Origin: https://evil.example\r\n",
        "Origin: null\r\n",
        "Origin: http://127.0.0.1:9900\r\n",
        "Sec-Fetch-Site: cross-site\r\n",
        "Sec-Fetch-Site: none\r\n",
    ] {
        for path in ["/v1/reload", "/v1/workers", "/v1/pools/web", "/v1/log_level"] {
            let answer = ask("POST", path, &format!("{here}{by}"));
            assert!(answer.starts_with("HTTP/1.1 403 "), "{by}{path}: {answer}");
            assert!(answer.contains("browser"), "{answer}");
        }
        let answer = ask("GET", "/v1/status", &format!("{here}{by}"));
        assert!(answer.starts_with("HTTP/1.1 200 "), "the page itself asks so: {answer}");
    }
    for method in ["GET", "POST"] {
        let answer = ask(method, "/v1/workers", "Host: evil.example:9900\r\n");
        assert!(answer.starts_with("HTTP/1.1 403 ") && answer.contains("Host"), "{answer}");
    }
    // Any host name without a dot, and no host name.
    for host in
        ["Host: d\r\n", "Host: localhost\r\n", "Host: dispatcher\r\n", "Host: 10.0.0.7:80\r\n"]
    {
        let answer = ask("POST", "/v1/workers", host);
        assert!(answer.starts_with("HTTP/1.1 200 "), "{host}{answer}");
    }
    let answer = bench.raw("GET /healthz HTTP/1.0\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.0 200 "), "{answer}");
}

#[test]
fn idle_clients_are_closed_and_make_room() {
    let bench = Bench::new();
    // The most connections of one client, and more, which are closed at once.
    let idle: Vec<UnixStream> = (0..http::MAX_CONNECTIONS).map(|_| bench.open()).collect();
    // Until the server closes the idle connections.
    let start = Instant::now();
    while client::get(&bench.path(), "/healthz", PATIENCE).is_err() {
        assert!(start.elapsed() < PATIENCE, "they are cut off");
        std::thread::sleep(Duration::from_millis(10));
    }
    drop(idle);
}

#[test]
fn no_process_listens() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("admin.sock");
    let error = client::get(&path, "/healthz", PATIENCE).expect_err("no file");
    assert!(matches!(error, ClientError::NotRunning(..)), "{error}");
    // A socket file that a dead process has left.
    drop(UnixListener::bind(&path).expect("a socket"));
    let error = client::get(&path, "/healthz", PATIENCE).expect_err("a stale file");
    assert!(matches!(error, ClientError::NotRunning(..)), "{error}");
}

#[test]
fn another_program_at_the_admin_socket() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("admin.sock");
    let listener = UnixListener::bind(&path).expect("a socket");
    // The kernel accepts the connection, but no process answers.
    let error = client::get(&path, "/healthz", Duration::from_millis(50)).expect_err("no answer");
    assert!(matches!(error, ClientError::Timeout(_)), "{error}");
    let other = std::thread::spawn(move || {
        let _ = listener.accept();
        let (mut stream, _) = listener.accept().expect("a client");
        let _ = stream.write_all(b"220 mail.example ESMTP\r\n");
    });
    let error = client::get(&path, "/healthz", PATIENCE).expect_err("no HTTP");
    assert!(matches!(error, ClientError::Unexpected(_)), "{error}");
    other.join().expect("the other");
}

#[test]
fn stopping_ends_the_processes_first() {
    let directory = tempfile::tempdir().expect("a directory");
    let listener = UnixListener::bind(directory.path().join("admin.sock")).expect("a socket");
    let admin =
        start(listener, TcpListeners::default(), Arc::new(|| {}), false).expect("a side thread");
    let request = spawner::SpawnRequest {
        process: dispatcher_core::ProcessId {
            pool: dispatcher_core::PoolId(0),
            place: 0,
            start: 1,
        },
        command: vec!["sleep".to_owned(), "1000".to_owned()],
        environment: Vec::new(),
        directory: None,
        dispatch_socket: "/x".into(),
        pool: "web".to_owned(),
        name: "web-1".to_owned(),
        token: Token([0; 16]),
        generation: 1,
        on_dispatcher_loss: crate::config::OnDispatcherLoss::Drain,
        max_memory: None,
        fork: None,
        address: None,
        listeners: spawner::Listeners::default(),
        patience: PATIENCE,
        descriptors: None,
        setup: crate::config::ProcessSetup::default(),
    };
    admin.spawner.spawn(request).expect("room");
    let Ok(Report::Spawned { pid, .. }) = admin.reports.recv_timeout(PATIENCE) else {
        panic!("it did not start");
    };
    admin.stop(PATIENCE, PATIENCE, || false);
    let gone = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), None);
    assert_eq!(gone, Err(nix::Error::ESRCH));
}
