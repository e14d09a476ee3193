//! `dispatcher run --take-over`: a new dispatcher takes the place of the running one.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use test_support::*;

use super::adoption::{Place, counts, free_address, pids, serving};

mod deaths;
mod refusals;

/// The command of a new dispatcher in this directory.
fn taking_over(dir: &Path, mut command: Command) -> Command {
    let log = std::fs::File::options().create(true).append(true).open(dir.join("log")).unwrap();
    command.args(["run", "--take-over", "--config"]).arg(dir.join("dispatcher.toml")).stderr(log);
    command.env_remove("NOTIFY_SOCKET").env("DISPATCHER_LOG", "debug");
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command
}

fn new_dispatcher(dir: &Path) -> Process {
    let mut command = taking_over(dir, Command::new(dispatcher_bin()));
    Process::start("the new dispatcher", &mut command)
}

/// A new dispatcher takes over; the former one ends by itself.
pub(super) fn replace(former: &mut Dispatcher) {
    let new = Dispatcher::start_by(
        &former.dir,
        &mut taking_over(&former.dir, Command::new(dispatcher_bin())),
    );
    let status = former.process.wait();
    assert!(status.success(), "{status}\n{}", new.log());
    *former = new;
}

/// Waits until a new dispatcher answers at the admin socket, beside the former one.
fn wait_for_the_answers_of(new: &Dispatcher) {
    wait_until("the new dispatcher to answer", || {
        let status = http_get(&new.admin(), "/v1/status");
        status.is_ok_and(|(_, body)| body.contains(&format!("\"pid\":{}", new.process.pid())))
    });
}

fn one_listener(address: std::net::SocketAddr, keys: &str) -> String {
    one_pool(keys).replace("127.0.0.1:0", &address.to_string())
}

/// How often a new dispatcher takes over under load.
fn take_overs() -> usize {
    std::env::var("TAKE_OVERS").ok().and_then(|text| text.parse().ok()).unwrap_or(5)
}

#[test]
fn under_load_no_client_is_refused_or_reset() {
    let address = free_address();
    let temp = configure(&one_listener(address, "wait_for_worker = \"60s\""));
    let mut dispatcher = Dispatcher::start_in(temp.path());
    let _workers = dispatcher.workers("blocking", "web", 2);
    let mut long: Vec<Client> = (0..8).map(|_| Client::connect(address).unwrap()).collect();
    let (over, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let clients: Vec<_> = (0..4)
        .map(|_| {
            let (over, served) = (Arc::clone(&over), Arc::clone(&served));
            std::thread::spawn(move || {
                while !over.load(Ordering::SeqCst) {
                    let mut client = Client::connect(address).expect("neither refused nor reset");
                    client.echo("a question");
                    client.finish();
                    served.fetch_add(1, Ordering::SeqCst);
                }
            })
        })
        .collect();
    let mut descriptors = Vec::new();
    for round in 0..take_overs() {
        let before = served.load(Ordering::SeqCst);
        replace(&mut dispatcher);
        dispatcher.wait_joined("web", 2);
        long.iter_mut().for_each(|client| client.echo("still there"));
        wait_until("more clients to be served", || served.load(Ordering::SeqCst) > before + 20);
        let status = dispatcher.status();
        let loads: u64 = pool(&status, "web").workers.iter().map(|worker| worker.load).sum();
        assert!(loads >= 8, "round {round}: the workers report their connections: {loads}");
        descriptors.push(dispatcher.fds());
    }
    over.store(true, Ordering::SeqCst);
    clients.into_iter().for_each(|client| client.join().unwrap());
    long.into_iter().for_each(Client::finish);
    // Each successor has what the first one has; clients come and go meanwhile.
    let (first, last) = (descriptors[0], descriptors[descriptors.len() - 1]);
    assert!(last <= first + 16, "{descriptors:?}");
    dispatcher.wait_status("no connections", |status| status.in_flight == 0);
    dispatcher.stop();
    assert!(TcpStream::connect(address).is_err(), "no copy of the listener is left");
    assert!(!dispatcher.dispatch().exists() && !dispatcher.admin().exists());
    assert!(!temp.path().join("dispatch.sock.take-over").exists());
}

#[test]
fn processes_that_serve_on_are_adopted() {
    if !nix::unistd::geteuid().is_root() {
        return skip("needs root: without it this take-over is refused");
    }
    rustix::process::set_child_subreaper(rustix::process::Pid::from_raw(1)).unwrap();
    let address = free_address();
    let place = Place::new(&serving(address, 2, ""));
    let mut dispatcher = Dispatcher::start_in(place.path());
    dispatcher.wait_joined("web", 2);
    let first = pids(&dispatcher.status());
    let mut clients: Vec<Client> = (0..4).map(|_| Client::connect(address).unwrap()).collect();
    for _ in 0..3 {
        replace(&mut dispatcher);
        let status =
            dispatcher.wait_status("both to be adopted", |status| counts(status) == (2, 2, 0, 0));
        assert_eq!(pids(&status), first, "{}", dispatcher.log());
        assert_eq!(place.processes(), first);
        clients.iter_mut().for_each(|client| client.echo("through it all"));
        assert!(first.contains(&Client::connect(address).unwrap().pid));
    }
    clients.into_iter().for_each(Client::finish);
    dispatcher.stop();
    wait_until("all processes to end", || place.processes().is_empty());
}

#[test]
fn processes_that_stop_end_with_their_connections() {
    if !nix::unistd::geteuid().is_root() {
        return skip("needs root: without it this take-over is refused");
    }
    let address = free_address();
    let body = serving(address, 2, "stop_timeout = \"60s\"")
        .replace("on_dispatcher_loss = \"serve\"\n", "");
    let place = Place::new(&body);
    let mut dispatcher = Dispatcher::start_in(place.path());
    dispatcher.wait_joined("web", 2);
    let first = pids(&dispatcher.status());
    let mut client = Client::connect(address).unwrap();
    let new = Dispatcher::start_by(
        place.path(),
        &mut taking_over(place.path(), Command::new(dispatcher_bin())),
    );
    let mut former = std::mem::replace(&mut dispatcher, new);
    wait_for_the_answers_of(&dispatcher);
    dispatcher.wait_joined("web", 2);
    assert!(pids(&dispatcher.status()).is_disjoint(&first));
    let new = Client::connect(address).unwrap();
    assert!(!first.contains(&new.pid));
    // Longer than from SIGTERM to SIGKILL: the process still has the rest of its stop_timeout.
    let began = Instant::now();
    wait_until("three seconds to pass", || {
        client.echo("its process has stop_timeout");
        began.elapsed() > Duration::from_secs(3)
    });
    client.finish();
    assert!(former.process.wait().success());
    wait_until("the former processes to end", || place.processes().is_disjoint(&first));
    drop(new);
    dispatcher.stop();
}

/// Clients that the dispatcher has accepted and no worker has: their worker was killed.
fn clients_without_a_worker(dispatcher: &Dispatcher, count: usize) -> Vec<TcpStream> {
    let mut hoarder =
        dispatcher.worker_with("blocking", "web", "hoarder", &[("TEST_WORKER", "never-take")]);
    dispatcher.wait_joined("web", 1);
    let address = dispatcher.address("web");
    let streams: Vec<TcpStream> = (0..count).map(|_| connect(address)).collect();
    let count = count as u64;
    dispatcher.wait_status("all at the worker", |status| status.in_flight == count);
    hoarder.kill();
    dispatcher.wait_status("all without a worker", |status| status.queued == count);
    streams
}

const PATIENT: &str =
    "wait_for_worker = \"60s\"\nhandoff_timeout = \"10m\"\nmax_handoff_timeout = \"10m\"";

#[test]
fn connections_without_a_worker_are_passed_on() {
    let address = free_address();
    let temp = configure(&one_listener(address, PATIENT));
    let mut dispatcher = Dispatcher::start_in(temp.path());
    // More than fit into one record.
    let streams = clients_without_a_worker(&dispatcher, 100);
    replace(&mut dispatcher);
    assert_eq!(dispatcher.status().queued, 100);
    assert!(dispatcher.log().contains("event=handed_over"), "{}", dispatcher.log());
    assert!(dispatcher.log().contains("connections=100"), "{}", dispatcher.log());
    let _worker = dispatcher.worker("blocking", "web", "late");
    let clients = all_greeted(streams);
    assert_eq!(tally(&clients)["late"], 100);
    clients.into_iter().for_each(Client::finish);
}

#[test]
fn a_new_configuration_opens_and_closes_listeners() {
    let (kept, gone) = (free_address(), free_address());
    let listener = |name: &str, address: &str| {
        format!("[[listener]]\nname = \"{name}\"\naddress = \"{address}\"\npool = \"web\"\n")
    };
    let pool = "[pool.web]\nwait_for_worker = \"60s\"\n";
    let (admin_http, advice) = (free_address(), free_address());
    let http = format!("admin_http = \"{admin_http}\"\nadvice_listen = \"{advice}\"\n");
    let before = format!(
        "{http}{}{}{}{pool}",
        listener("kept", &kept.to_string()),
        listener("local", "unix:DIR/local.sock"),
        listener("gone", &gone.to_string())
    );
    let temp = configure(&before);
    let mut dispatcher = Dispatcher::start_in(temp.path());
    let _workers = dispatcher.workers("blocking", "web", 1);
    let mut old = Client::connect(gone).unwrap();
    let local = temp.path().join("local.sock");
    let after = format!(
        "{http}{}{}{}{pool}",
        listener("renamed", &kept.to_string()),
        listener("local", "unix:DIR/local.sock"),
        listener("added", "127.0.0.1:0")
    );
    write_config(temp.path(), &after);
    replace(&mut dispatcher);
    dispatcher.wait_joined("web", 1);
    assert_eq!(dispatcher.address("renamed"), kept);
    Client::connect(kept).unwrap().finish();
    Client::connect(dispatcher.address("added")).unwrap().finish();
    for (address, path) in [(admin_http, "/healthz"), (advice, "/v1/pools/web/best")] {
        // Advice collects its figures once in a second.
        wait_until("an answer by the new dispatcher", || {
            let mut page = connect(address);
            let head = "Host: localhost\r\nConnection: close";
            write!(page, "GET {path} HTTP/1.1\r\n{head}\r\n\r\n").unwrap();
            let mut answer = String::new();
            page.read_to_string(&mut answer).unwrap();
            answer.starts_with("HTTP/1.1 200")
        });
    }
    old.echo("its listener has gone");
    assert!(TcpStream::connect(gone).is_err());
    assert!(std::os::unix::net::UnixStream::connect(&local).is_ok());
    dispatcher.stop();
    assert!(!local.exists());
}

#[test]
fn two_at_once_take_over_one_after_the_other() {
    let address = free_address();
    let temp = configure(&one_listener(address, "wait_for_worker = \"60s\""));
    let mut dispatcher = Dispatcher::start_in(temp.path());
    let _workers = dispatcher.workers("blocking", "web", 1);
    dispatcher.process.signal(Signal::SIGSTOP);
    let mut new: Vec<Process> = (0..2).map(|_| new_dispatcher(temp.path())).collect();
    dispatcher.process.signal(Signal::SIGCONT);
    assert!(dispatcher.process.wait().success());
    wait_until("one of two to be left", || {
        new.iter_mut().map(Process::running).filter(|running| !running).count() == 1
    });
    let last = new.iter_mut().position(Process::running).unwrap();
    let mut last = new.remove(last);
    assert!(new[0].wait().success(), "{}", dispatcher.log());
    std::mem::swap(&mut dispatcher.process, &mut last);
    wait_for_the_answers_of(&dispatcher);
    dispatcher.wait_joined("web", 1);
    Client::connect(address).unwrap().finish();
    assert!(dispatcher.stop().success());
}

#[test]
fn first_bytes_are_awaited_by_the_new_dispatcher() {
    let address = free_address();
    let keys = "affinity.key = \"cookie:ID\"\npeek_timeout = \"10m\"\nwait_for_worker = \"60s\"";
    let temp = configure(&one_listener(address, keys));
    let mut dispatcher = Dispatcher::start_in(temp.path());
    let _workers = dispatcher.workers("blocking", "web", 1);
    let mut silent: Vec<TcpStream> = (0..3).map(|_| connect(address)).collect();
    dispatcher.wait_status("all to be awaited", |status| status.queued == 3);
    replace(&mut dispatcher);
    dispatcher.wait_joined("web", 1);
    assert_eq!(dispatcher.status().queued, 3);
    for stream in &mut silent {
        stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\nCookie: ID=7\r\n\r\n").unwrap();
    }
    assert_eq!(all_greeted(silent).len(), 3);
}

#[test]
fn headers_of_proxies_are_awaited_or_known_by_the_new_dispatcher() {
    let address = free_address();
    let keys =
        "proxy_protocol = true\nproxy_protocol_from = ['127.0.0.1']\nproxy_timeout = '10m'\n";
    let body = one_listener(address, PATIENT).replace("[pool.web]", &format!("{keys}\n[pool.web]"));
    let temp = configure(&body);
    let mut dispatcher = Dispatcher::start_in(temp.path());
    let mut hoarder =
        dispatcher.worker_with("blocking", "web", "hoarder", &[("TEST_WORKER", "never-take")]);
    dispatcher.wait_joined("web", 1);
    let header = |n: usize| format!("PROXY TCP4 192.0.2.{n} 10.0.0.1 7000 443\r\n");
    // More than fit into one record, each of another client.
    let known: Vec<TcpStream> = (1..=30)
        .map(|n| {
            let mut stream = connect(address);
            stream.write_all(header(n).as_bytes()).unwrap();
            stream
        })
        .collect();
    dispatcher.wait_status("all at the worker", |status| status.in_flight == 30);
    hoarder.kill();
    dispatcher.wait_status("all without a worker", |status| status.queued == 30);
    // A worker must be there, or nothing is accepted.
    let mut busy =
        dispatcher.worker_with("blocking", "web", "hoarder", &[("TEST_WORKER", "never-take")]);
    dispatcher.wait_status("all at the next worker", |status| status.in_flight == 30);
    let half: Vec<TcpStream> = (31..=40)
        .map(|n| {
            let mut stream = connect(address);
            stream.write_all(&header(n).as_bytes()[..n % 20]).unwrap();
            stream
        })
        .collect();
    let awaited = |status: &dispatcher::api::status::Status| {
        status.listeners[0].proxy_headers.as_ref().is_some_and(|headers| headers.awaited == 10)
    };
    dispatcher.wait_status("headers to be awaited", awaited);
    busy.kill();
    dispatcher.wait_status("all without a worker", |status| status.queued == 40);
    replace(&mut dispatcher);
    let status = dispatcher.status();
    assert!(awaited(&status), "{status:?}");
    assert_eq!(status.queued, 40);
    for (n, mut stream) in (31..=40).zip(&half) {
        stream.write_all(&header(n).as_bytes()[n % 20..]).unwrap();
    }
    let _worker = dispatcher.worker("blocking", "web", "late");
    let clients = all_greeted(known.into_iter().chain(half).collect());
    let peers: Vec<String> = clients.iter().map(|client| client.peer.clone()).collect();
    let expected: Vec<String> = (1..=40).map(|n| format!("192.0.2.{n}:7000")).collect();
    assert_eq!(peers, expected);
    clients.into_iter().for_each(Client::finish);
    assert_eq!(dispatcher.status().listeners[0].proxy_headers.as_ref().unwrap().read, 10);
}
