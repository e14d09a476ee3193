//! Affinity with real processes: clients with the same key reach the same worker, which gets every
//! byte they sent. Clients without a key do not affect others.
#![allow(clippy::unwrap_used)]

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use dispatcher::api::status::AffinityStatus;
use rustix::net::{AddressFamily, SocketType};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use test_support::*;
use worker_sdk::{ClaimError, Worker};

/// A client that sends these bytes first.
fn ask(address: SocketAddr, bytes: impl AsRef<[u8]>) -> Client {
    let mut stream = connect(address);
    stream.write_all(bytes.as_ref()).unwrap();
    Client::greeted(stream).unwrap()
}

fn affinity(dispatcher: &Dispatcher) -> AffinityStatus {
    pool(&dispatcher.status(), "web").affinity.clone().unwrap()
}

/// Waits until the pool has so many workers. A slow one may be suspect: without clients it stays
/// so.
fn wait_listed(dispatcher: &Dispatcher, count: usize) {
    dispatcher.wait_status("the workers", |status| pool(status, "web").workers.len() == count);
}

/// The client with `request("me")` connects a hundred times while other clients and workers come
/// and go.
fn always_the_same(key: &str, request: impl Fn(&str) -> String) {
    let (dispatcher, address) = start_one_pool(&format!("affinity.key = \"{key}\""));
    let mut workers = dispatcher.workers("tokio", "web", 3);
    let first = ask(address, request("me")).served_by;
    let mut others = VecDeque::new();
    let mut tally = std::collections::BTreeMap::new();
    for n in 0..100 {
        if n == 33 {
            workers.push(dispatcher.worker("tokio", "web", "late"));
            wait_listed(&dispatcher, 4);
        }
        if n == 66 {
            let goes = workers.iter_mut().find(|worker| worker.name != first).unwrap();
            goes.kill();
            others.retain(|other: &Client| other.served_by != goes.name);
            wait_listed(&dispatcher, 3);
        }
        let other = ask(address, request(&format!("other{n}")));
        *tally.entry(other.served_by.clone()).or_insert(0) += 1;
        others.push_back(other);
        if others.len() > 7 {
            others.pop_front().unwrap().finish();
        }
        let mut me = ask(address, request("me"));
        assert_eq!(me.served_by, first, "{key}, connection {n}");
        // The worker gets every byte and sends it back.
        let mut echo = vec![0; request("me").len()];
        me.stream.read_exact(&mut echo).unwrap();
        assert_eq!(echo, request("me").into_bytes());
        me.finish();
    }
    assert!(tally.len() == 4, "{key}: all other clients follow the policy: {tally:?}");
    let status = affinity(&dispatcher);
    assert_eq!((status.hits, status.misses, status.moved), (100, 101, 0), "{key}");
    assert_eq!((status.entries, status.unknown, status.awaiting), (101, 0, 0), "{key}");
}

/// A kind of key, and a request with such a key.
type KeyedRequest = (&'static str, fn(&str) -> String);

const COOKIE: KeyedRequest =
    ("cookie:ID", |id| format!("GET / HTTP/1.1\r\nHost: a\r\nCookie: x=y; ID={id}\r\n\r\n"));
const PATH: KeyedRequest =
    ("url:jsessionid", |id| format!("GET /x;jsessionid={id}?a=b HTTP/1.1\r\nHost: a\r\n\r\n"));
const QUERY: KeyedRequest =
    ("url:id", |id| format!("GET /x?a=b&id={id} HTTP/1.1\r\nHost: a\r\n\r\n"));
const FORM: KeyedRequest = ("form:user", |id| {
    let body = format!("a=b&user={id}&c=d");
    format!(
        "POST /login HTTP/1.1\r\nHost: a\r\nContent-Type: application/x-www-form-urlencoded\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
});
const HEADER: KeyedRequest =
    ("header:X-User", |id| format!("GET / HTTP/1.1\r\nHost: a\r\nx-user: {id}\r\n\r\n"));

#[test]
fn by_cookie() {
    always_the_same(COOKIE.0, COOKIE.1);
}

#[test]
fn by_path_and_query() {
    always_the_same(PATH.0, PATH.1);
    always_the_same(QUERY.0, QUERY.1);
}

#[test]
fn by_form() {
    always_the_same(FORM.0, FORM.1);
}

#[test]
fn by_header() {
    always_the_same(HEADER.0, HEADER.1);
}

/// A client with this address.
fn connect_from(ip: IpAddr, address: SocketAddr) -> TcpStream {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    rustix::net::bind(&socket, &SocketAddr::new(ip, 0)).unwrap();
    rustix::net::connect(&socket, &address).unwrap();
    TcpStream::from(socket)
}

#[test]
fn by_address() {
    let (dispatcher, address) =
        start_one_pool("affinity.key = \"client-ip\"\naffinity.ipv4_prefix = 24");
    let _workers = dispatcher.workers("tokio", "web", 3);
    let from = |c, d| {
        let stream = connect_from(IpAddr::V4(Ipv4Addr::new(127, 0, c, d)), address);
        Client::greeted(stream).unwrap()
    };
    let mut others = Vec::new();
    let first = from(1, 1).served_by;
    for n in 2..52 {
        others.push(from(n, 1));
        assert_eq!(from(1, n).served_by, first, "the same network");
    }
    assert_eq!(tally(&others).len(), 3);
    assert_eq!(affinity(&dispatcher).hits, 50);
}

/// A worker in this process that sends its name to TLS clients.
fn serve_tls(worker: &Worker, name: &'static str) -> std::thread::JoinHandle<()> {
    let certificate = CertificateDer::from(include_bytes!("tls/cert.der").as_slice());
    let key = PrivateKeyDer::try_from(include_bytes!("tls/key.der").as_slice()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .unwrap();
    let (config, worker) = (Arc::new(config), worker.clone());
    std::thread::spawn(move || {
        while let Some(connection) = worker.accept().unwrap() {
            let tls = rustls::ServerConnection::new(Arc::clone(&config)).unwrap();
            let mut stream = rustls::StreamOwned::new(tls, connection);
            // One of the clients only disconnects.
            if stream.write_all(name.as_bytes()).is_ok() {
                stream.conn.send_close_notify();
                stream.flush().unwrap();
            }
        }
    })
}

/// The worker that a TLS client for `name` reaches.
fn tls_client(address: SocketAddr, name: &str) -> String {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from(include_bytes!("tls/cert.der").as_slice())).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let tls = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let mut text = String::new();
    rustls::StreamOwned::new(tls, connect(address)).read_to_string(&mut text).unwrap();
    text
}

#[test]
fn by_tls_server_name() {
    let (dispatcher, address) = start_one_pool("affinity.key = \"sni\"");
    let workers = ["w0", "w1"].map(|name| (own_worker(&dispatcher, name), name));
    let threads = workers.iter().map(|(worker, name)| serve_tls(worker, name));
    let threads: Vec<_> = threads.collect();
    let a = tls_client(address, "a.example.test");
    // The loads are equal at first; the worker with one connection does not get the next one.
    let held = connect(address);
    held.shutdown(Shutdown::Write).unwrap();
    for n in 0..50 {
        assert_eq!(tls_client(address, "a.example.test"), a);
        tls_client(address, &format!("other{n}.example.test"));
    }
    let status = affinity(&dispatcher);
    assert_eq!((status.hits, status.misses), (50, 51), "{status:?}");
    drop(held);
    workers.iter().for_each(|(worker, _)| worker.close());
    drop(workers);
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

fn with_cookie(id: &str) -> String {
    format!("GET / HTTP/1.1\r\nCookie: ID={id}\r\n\r\n")
}

#[test]
fn a_session_id_names_its_worker_in_every_kind_of_key() {
    for (key, request) in [PATH, QUERY, FORM, HEADER] {
        let (dispatcher, address) = start_one_pool(&format!("affinity.key = \"{key}\""));
        let _workers = dispatcher.workers("tokio", "web", 3);
        let ids = (0..6).map(|n| request(&format!("s{n}.w1")));
        let clients: Vec<Client> = ids.map(|request| ask(address, request)).collect();
        assert_eq!(tally(&clients).get("w1"), Some(&6), "{key}: although it has the most");
        // An unknown worker name is part of the id.
        assert_ne!(ask(address, request("s0.w7")).served_by, "w1", "{key}");
        let status = affinity(&dispatcher);
        assert_eq!((status.routed, status.misses), (6, 1), "{key}: {status:?}");
    }
}

#[test]
fn a_session_id_names_its_worker() {
    let (dispatcher, address) = start_one_pool("affinity.key = \"cookie:ID\"");
    let mut workers = dispatcher.workers("tokio", "web", 3);
    let mut clients = Vec::new();
    for n in 0..30 {
        let client = ask(address, with_cookie(&format!("s{n}.w1")));
        assert_eq!(client.served_by, "w1", "although it has the most");
        clients.push(client);
    }
    assert_eq!(affinity(&dispatcher).routed, 30);
    // Its worker is gone: another worker gets the session and keeps it.
    workers[1].kill();
    dispatcher.wait_joined("web", 2);
    let successor = ask(address, with_cookie("s0.w1")).served_by;
    assert_ne!(successor, "w1");
    for _ in 0..5 {
        assert_eq!(ask(address, with_cookie("s0.w1")).served_by, successor);
    }
    // A new worker with the same name gets the session.
    let _back = dispatcher.worker("mio", "web", "w1");
    dispatcher.wait_joined("web", 3);
    assert_eq!(ask(address, with_cookie("s0.w1")).served_by, "w1");
}

#[test]
fn a_worker_owns_what_it_claims() {
    let (dispatcher, address) = start_one_pool("affinity.key = \"cookie:ID\"");
    let workers = dispatcher.workers("tokio", "web", 2);
    let mine = own_worker(&dispatcher, "mine");
    mine.claim("issued").unwrap();
    assert_eq!(mine.claim(""), Err(ClaimError::Key));
    wait_until("the claim to be noted", || affinity(&dispatcher).claimed == 1);
    for n in 1..=5 {
        let mut client = connect(address);
        client.write_all(with_cookie("issued").as_bytes()).unwrap();
        let connection = mine.accept().unwrap().unwrap();
        assert_eq!(mine.live(), 1, "connection {n}");
        drop(connection);
    }
    // The same from an event loop and from tasks.
    let config = || worker_sdk::WorkerConfig::new().dispatch_socket(dispatcher.dispatch());
    let mio = worker_sdk::mio::MioWorker::new(config().pool("web").name("mio")).unwrap();
    assert_eq!(mio.claim("mio"), Err(ClaimError::NotJoined));
    wait_until("it to join", || {
        assert!(mio.try_accept().unwrap().is_none());
        mio.is_joined()
    });
    mio.claim("mio").unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let task = worker_sdk::tokio::Listener::connect(config().pool("web").name("task"));
    let task = runtime.block_on(task).unwrap();
    task.claim("task").unwrap();
    wait_until("their claims to be noted", || affinity(&dispatcher).claimed == 3);
    let mut clients = [connect(address), connect(address)];
    clients[0].write_all(with_cookie("mio").as_bytes()).unwrap();
    clients[1].write_all(with_cookie("task").as_bytes()).unwrap();
    wait_until("one to come to the event loop", || mio.try_accept().unwrap().is_some());
    runtime.block_on(task.accept()).unwrap();
    // More than the dispatcher reads at a time: the worker does not wait, and other workers are not
    // affected.
    let claims = (0..5_000).filter(|n| mine.claim(format!("burst{n}")).is_ok()).count() as u64;
    wait_until("them to be noted", || affinity(&dispatcher).claimed == 3 + claims);
    assert!(affinity(&dispatcher).entries >= claims);
    mine.close();
    assert_eq!(mine.claim("late"), Err(ClaimError::NotJoined));
    drop(workers);

    let (plain, _) = start_one_pool("");
    assert_eq!(own_worker(&plain, "w").claim("x"), Err(ClaimError::NoAffinity));
}

#[test]
fn every_byte_arrives_however_it_is_sent() {
    let (dispatcher, address) = start_one_pool("affinity.key = \"form:id\"\npeek_max_bytes = 4096");
    let _workers = dispatcher.workers("blocking", "web", 2);
    let body: Vec<u8> =
        (0..3_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let head = format!(
        "POST / HTTP/1.1\r\nContent-Type: application/x-www-form-urlencoded\r\n\
         Content-Length: {}\r\n\r\nid=me&x=",
        8 + body.len()
    );
    let mut first = None;
    for sizes in [&[1][..], &[7, 50], &[usize::MAX]] {
        let stream = connect(address);
        stream.set_nodelay(true).unwrap();
        let mut writer = stream.try_clone().unwrap();
        let (head, body) = (&head, &body);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let mut rest = head.as_bytes();
                for &size in sizes.iter().cycle() {
                    let (part, more) = rest.split_at(size.min(rest.len()));
                    writer.write_all(part).unwrap();
                    rest = more;
                    if rest.is_empty() {
                        break;
                    }
                }
                writer.write_all(body).unwrap();
                writer.shutdown(Shutdown::Write).unwrap();
            });
            let mut client = Client::greeted(stream).unwrap();
            assert_eq!(*first.get_or_insert(client.served_by.clone()), client.served_by);
            let mut echo = Vec::new();
            client.stream.read_to_end(&mut echo).unwrap();
            assert!(
                echo == [head.as_bytes(), &body[..]].concat(),
                "{} bytes came back",
                echo.len()
            );
        });
    }
    let status = affinity(&dispatcher);
    assert_eq!((status.hits, status.misses, status.unknown), (2, 1, 0));
}

#[test]
fn clients_without_a_key_follow_the_policy() {
    let (dispatcher, address) = start_one_pool(
        "affinity.key = \"cookie:ID\"\npeek_timeout = \"100ms\"\npeek_max_bytes = 1024",
    );
    let _workers = dispatcher.workers("tokio", "web", 2);
    let mut clients = vec![
        ask(address, "GET / HTTP/1.1\r\nHost: a\r\n\r\n"),
        ask(address, "hello\r\n"),
        ask(address, "\x16\x03\x01\x00\x05hello"),
        ask(address, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        ask(address, format!("GET /{} HTTP/1.1\r\nCookie: ID=far\r\n\r\n", "x".repeat(1_100))),
    ];
    assert_eq!(affinity(&dispatcher).timed_out, 0);
    // Half a request and no bytes: until the timeout. An end of input: at once.
    clients.push(ask(address, "GET / HTTP/1.1\r\nCookie: ID=h"));
    clients.push(Client::greeted(connect(address)).unwrap());
    let status = affinity(&dispatcher);
    assert_eq!((status.unknown, status.timed_out, status.entries), (7, 2, 0));
    let ended = connect(address);
    ended.shutdown(Shutdown::Write).unwrap();
    clients.push(Client::greeted(ended).unwrap());
    let tally = tally(&clients);
    assert_eq!((tally["w0"], tally["w1"]), (4, 4), "each got its share");
}

#[test]
fn a_client_that_leaves_before_its_key_is_forgotten() {
    let (mut dispatcher, address) =
        start_one_pool("affinity.key = \"cookie:ID\"\npeek_timeout = \"10m\"");
    let _worker = dispatcher.workers("tokio", "web", 1);
    let before = dispatcher.fds();
    let streams: Vec<_> = (0..50).map(|_| connect(address)).collect();
    dispatcher.wait_status("all to be awaited", |status| status.queued == 50);
    for stream in streams {
        // A reset instead of an end of input.
        rustix::net::sockopt::set_socket_linger(&stream, Some(std::time::Duration::ZERO)).unwrap();
    }
    let status = dispatcher.wait_status("all to be gone", |status| status.queued == 0);
    assert_eq!(status.closed["client_gone"], 50);
    wait_until("their descriptors to be closed", || dispatcher.fds() <= before);
    // A stop does not wait longer for silent clients than for others, and they are served.
    let silent = connect(address);
    dispatcher.wait_status("it to be awaited", |status| status.queued == 1);
    dispatcher.process.signal(nix::sys::signal::Signal::SIGTERM);
    wait_for_log(&dispatcher, "event=stopping");
    // The timeout ends.
    dispatcher.process.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(Client::greeted(silent).is_ok());
    assert!(dispatcher.process.wait().success());
}

/// Resident memory of a process, in bytes.
fn memory(process: &Process) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// The other threads must end when the test fails.
struct SetAtEnd<'a>(&'a AtomicBool);

impl Drop for SetAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn the_wait_for_a_key_is_bounded() {
    let keys = "affinity.key = \"cookie:ID\"\npeek_timeout = \"10m\"\npeek_max_bytes = 4096";
    let (dispatcher, address) = start_one_pool(keys);
    let _worker = dispatcher.workers("blocking", "web", 1);
    let mut dripping = connect(address);
    dripping.set_nodelay(true).unwrap();
    let mut sent = b"GET / HTTP/1.1\r\nX: ".to_vec();
    dripping.write_all(&sent).unwrap();
    // Every new byte starts a search over all bytes so far; the budget is 4 * 4096 bytes.
    while affinity(&dispatcher).unknown == 0 {
        assert!(sent.len() < 1_000, "far from 4096 bytes, but looked at again and again");
        dripping.write_all(b"z").unwrap();
        sent.push(b'z');
    }
    assert!(sent.len() > 50, "not at once either: {}", sent.len());
    let status = affinity(&dispatcher);
    assert_eq!((status.unknown, status.timed_out, status.awaiting), (1, 0, 0));
    // The policy chooses a worker, which gets every byte.
    let mut client = Client::greeted(dripping).unwrap();
    let mut echo = vec![0; sent.len()];
    client.stream.read_exact(&mut echo).unwrap();
    assert_eq!(echo, sent);
}

#[test]
fn decisions_tell_the_key() {
    let said = |dispatcher: &Dispatcher, arguments: &[&str]| -> serde_json::Value {
        let mut command = std::process::Command::new(dispatcher_bin());
        let output = command.args(arguments).arg("--json").arg("--admin").arg(dispatcher.admin());
        let output = output.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let (dispatcher, address) = start_one_pool("affinity.key = \"cookie:ID\"\nhistory = 9");
    let _workers = dispatcher.workers("tokio", "web", 2);
    let clients = ["me", "you", "me", "me"].map(|id| ask(address, with_cookie(id)));
    let plain = ask(address, "GET / HTTP/1.1\r\n\r\n");
    let history = said(&dispatcher, &["history", "web"]);
    let decisions = history["decisions"].as_array().unwrap();
    let keys: Vec<Option<&str>> = decisions.iter().map(|d| d["key"].as_str()).collect();
    let [me, you, third, fourth, none] = keys[..] else { panic!("{history}") };
    assert!(me.is_some_and(|key| key.len() == 16 && key.chars().all(|c| c.is_ascii_hexdigit())));
    assert_eq!((third, fourth, none), (me, me, None));
    assert!(you.is_some() && you != me);
    // The key sent it to the worker with more connections; the other worker was a candidate.
    for decision in &decisions[2..4] {
        let [chosen, passed] = &decision["candidates"].as_array().unwrap()[..] else { panic!() };
        assert_eq!(chosen["name"], clients[0].served_by.as_str());
        assert_eq!(
            (&chosen["id"], chosen["why"].as_str()),
            (&decision["chosen"], Some("remembered"))
        );
        assert_eq!(passed["name"], clients[1].served_by.as_str());
    }
    assert_eq!(decisions[3]["candidates"][0]["load"], 2);
    assert_eq!(decisions[4]["candidates"][0]["name"], plain.served_by.as_str());
    assert_eq!(plain.served_by, clients[1].served_by, "without a key the least loaded");

    // The decision for an address can be requested before the client connects.
    let keys = "affinity.key = \"client-ip\"\naffinity.ipv4_prefix = 24\nhistory = 9";
    let (dispatcher, address) = start_one_pool(keys);
    let _workers = dispatcher.workers("tokio", "web", 2);
    let from = |c, d| {
        Client::greeted(connect_from(IpAddr::V4(Ipv4Addr::new(127, 0, c, d)), address)).unwrap()
    };
    let mine: Vec<Client> = (1..4).map(|d| from(1, d)).collect();
    let explained = said(&dispatcher, &["explain", "web", "--from", "127.0.1.99"]);
    let history = said(&dispatcher, &["history", "web"]);
    assert_eq!(explained["key"], history["decisions"][0]["key"], "{explained}");
    let chosen = &explained["candidates"][0];
    assert_eq!(
        (chosen["name"].as_str(), chosen["why"].as_str()),
        (Some(&*mine[0].served_by), Some("remembered"))
    );
    let stranger = said(&dispatcher, &["explain", "web", "--from", "127.0.2.1"]);
    assert_ne!(stranger["key"], explained["key"]);
    assert_ne!(stranger["candidates"][0]["name"], chosen["name"]);
    // The client reaches the announced worker.
    assert_eq!(stranger["candidates"][0]["name"], from(2, 1).served_by.as_str());
    assert_eq!(from(1, 99).served_by, mine[0].served_by);
}

#[test]
fn ten_thousand_silent_clients_do_not_affect_others() {
    const CLIENTS: usize = 10_000;
    const AWAITED: usize = 9_000;
    const DRIPPING: usize = 2_000;
    // The same number of descriptors is needed here and in the dispatcher.
    if !descriptors(CLIENTS as u64 + 2_000) {
        return;
    }
    let dispatcher = Dispatcher::start(&format!(
        "[[listener]]\nname = \"web\"\naddress = \"127.0.0.1:0\"\npool = \"web\"\n\
         [[listener]]\nname = \"plain\"\naddress = \"127.0.0.1:0\"\npool = \"plain\"\n\
         [pool.web]\naffinity.key = \"cookie:ID\"\npeek_timeout = \"10m\"\nmax_awaiting = {AWAITED}\n\
         [pool.plain]\n"
    ));
    let (address, plain) = (dispatcher.address("web"), dispatcher.address("plain"));
    let _other = dispatcher.worker("mio", "plain", "other");
    dispatcher.wait_joined("plain", 1);
    let _worker = dispatcher.worker("mio", "web", "w0");
    dispatcher.wait_joined("web", 1);
    let (fds, before) = (dispatcher.fds(), memory(&dispatcher.process));
    // Clients of the other listener come and go meanwhile, and one stays.
    let (rounds, over) = (AtomicU64::new(0), AtomicBool::new(false));
    let mut staying = Client::connect(plain).unwrap();
    let silent = std::thread::scope(|scope| {
        let _over = SetAtEnd(&over);
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                let mut client = Client::connect(plain).unwrap();
                client.echo("others are served meanwhile");
                client.finish();
                staying.echo("and so are earlier clients");
                rounds.fetch_add(1, Ordering::SeqCst);
            }
        });
        let three_more = |what: &str| {
            let before = rounds.load(Ordering::SeqCst);
            // Two rounds may have begun earlier; the third has not.
            wait_until(what, || rounds.load(Ordering::SeqCst) >= before + 3);
        };
        let mut silent: Vec<TcpStream> = Vec::with_capacity(CLIENTS);
        while silent.len() < CLIENTS {
            silent.extend((0..CLIENTS / 10).map(|_| connect(address)));
            three_more("others to be served while they come");
        }
        dispatcher.wait_status("all to be accepted", |s| {
            s.listeners.iter().any(|l| l.name == "web" && l.accepted == CLIENTS as u64)
        });
        let status = affinity(&dispatcher);
        let expected = (AWAITED as u64, (CLIENTS - AWAITED) as u64);
        assert_eq!((status.awaiting, status.not_awaited), expected);
        three_more("others to be served while they are silent");
        // Single bytes from many clients, without an end.
        for byte in b"GET / HTTP/1.1\r\nX: y" {
            for stream in &mut silent[..DRIPPING] {
                stream.write_all(&[*byte]).unwrap();
            }
            three_more("others to be served while they drip");
        }
        assert_eq!(affinity(&dispatcher).awaiting, AWAITED as u64, "they have all they had");
        silent
    });
    let more = memory(&dispatcher.process).saturating_sub(before);
    assert!(more < 20_000_000, "{more} bytes for {CLIENTS} clients");
    // A client beyond the limit is served without its key.
    assert_eq!(ask(address, with_cookie("x")).served_by, "w0");
    for stream in silent {
        // A reset: a client that only closes its sending side is still served.
        rustix::net::sockopt::set_socket_linger(&stream, Some(std::time::Duration::ZERO)).unwrap();
    }
    drop(staying);
    let status = dispatcher
        .wait_status("all to be gone", |status| status.queued == 0 && status.in_flight == 0);
    assert_eq!(status.closed["client_gone"], AWAITED as u64);
    wait_until("their descriptors to be closed", || dispatcher.fds() <= fds);
}
