//! Affinity, whole processes: clients that are known by whatever a pool goes by reach the same worker, and it gets every
//! byte they sent. Clients that say nothing harm nobody.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;

use dispatcher::status::AffinityStatus;
use rustix::net::{AddressFamily, SocketType};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use support::*;
use worker_sdk::{OwnError, Worker};

/// A client that says this first.
fn ask(address: SocketAddr, bytes: impl AsRef<[u8]>) -> Client {
    let mut stream = connect(address);
    stream.write_all(bytes.as_ref()).unwrap();
    Client::greeted(stream).unwrap()
}

fn affinity(dispatcher: &Dispatcher) -> AffinityStatus {
    pool(&dispatcher.status(), "web").affinity.clone().unwrap()
}

/// The client with `request("me")` comes a hundred times while others come and go.
fn always_the_same(key: &str, request: impl Fn(&str) -> String) {
    let (dispatcher, address) = start_one_pool(&format!("affinity.key = \"{key}\""));
    let _workers = dispatcher.workers("tokio", "web", 3);
    let first = ask(address, request("me")).served_by;
    let mut others = VecDeque::new();
    let mut tally = std::collections::BTreeMap::new();
    for n in 0..100 {
        let other = ask(address, request(&format!("other{n}")));
        *tally.entry(other.served_by.clone()).or_insert(0) += 1;
        others.push_back(other);
        if others.len() > 7 {
            others.pop_front().unwrap().finish();
        }
        let mut me = ask(address, request("me"));
        assert_eq!(me.served_by, first, "{key}, connection {n}");
        // Every byte is still there for the worker, which sends it back.
        let mut echo = vec![0; request("me").len()];
        me.stream.read_exact(&mut echo).unwrap();
        assert_eq!(echo, request("me").into_bytes());
        me.finish();
    }
    assert!(tally.len() == 3, "{key}: everybody else goes by the policy: {tally:?}");
    let status = affinity(&dispatcher);
    assert_eq!((status.hits, status.misses, status.moved), (100, 101, 0), "{key}");
    assert_eq!((status.entries, status.unknown, status.awaiting), (101, 0, 0), "{key}");
}

#[test]
fn by_cookie() {
    always_the_same("cookie:ID", |id| {
        format!("GET / HTTP/1.1\r\nHost: a\r\nCookie: x=y; ID={id}\r\n\r\n")
    });
}

#[test]
fn by_path_and_query() {
    always_the_same("url:jsessionid", |id| {
        format!("GET /x;jsessionid={id}?a=b HTTP/1.1\r\nHost: a\r\n\r\n")
    });
    always_the_same("url:id", |id| format!("GET /x?a=b&id={id} HTTP/1.1\r\nHost: a\r\n\r\n"));
}

#[test]
fn by_form() {
    always_the_same("form:user", |id| {
        let body = format!("a=b&user={id}&c=d");
        format!(
            "POST /login HTTP/1.1\r\nHost: a\r\nContent-Type: application/x-www-form-urlencoded\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        )
    });
}

#[test]
fn by_header() {
    always_the_same("header:X-User", |id| {
        format!("GET / HTTP/1.1\r\nHost: a\r\nx-user: {id}\r\n\r\n")
    });
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

/// A worker of this process that greets TLS clients with its name.
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
            // One of them only hangs up.
            if stream.write_all(name.as_bytes()).is_ok() {
                stream.conn.send_close_notify();
                stream.flush().unwrap();
            }
        }
    })
}

/// Which worker a TLS client that asks for `name` talks to.
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
    // It is a tie at first; whoever holds one connection gets no stranger.
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
    // Its worker is gone: another one has the session from now on, and it stays there.
    workers[1].kill();
    dispatcher.wait_joined("web", 2);
    let successor = ask(address, with_cookie("s0.w1")).served_by;
    assert_ne!(successor, "w1");
    for _ in 0..5 {
        assert_eq!(ask(address, with_cookie("s0.w1")).served_by, successor);
    }
    // Somebody with its name is as good.
    let _back = dispatcher.worker("mio", "web", "w1");
    dispatcher.wait_joined("web", 3);
    assert_eq!(ask(address, with_cookie("s0.w1")).served_by, "w1");
}

#[test]
fn a_worker_owns_what_it_claims() {
    let (dispatcher, address) = start_one_pool("affinity.key = \"cookie:ID\"");
    let workers = dispatcher.workers("tokio", "web", 2);
    let mine = own_worker(&dispatcher, "mine");
    mine.own("issued").unwrap();
    assert_eq!(mine.own(""), Err(OwnError::Key));
    wait_until("the claim to be noted", || affinity(&dispatcher).claimed == 1);
    for n in 1..=5 {
        let mut client = connect(address);
        client.write_all(with_cookie("issued").as_bytes()).unwrap();
        let connection = mine.accept().unwrap().unwrap();
        assert_eq!(mine.live(), 1, "connection {n}");
        drop(connection);
    }
    // From an event loop and from tasks as well.
    let config = || worker_sdk::WorkerConfig::new().dispatch_socket(dispatcher.dispatch());
    let mio = worker_sdk::mio::MioWorker::new(config().pool("web").name("mio")).unwrap();
    assert_eq!(mio.own("mio"), Err(OwnError::NotJoined));
    wait_until("it to join", || {
        assert!(mio.try_accept().unwrap().is_none());
        mio.is_joined()
    });
    mio.own("mio").unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let task = worker_sdk::tokio::Listener::connect(config().pool("web").name("task"));
    let task = runtime.block_on(task).unwrap();
    task.own("task").unwrap();
    wait_until("their claims to be noted", || affinity(&dispatcher).claimed == 3);
    let mut clients = [connect(address), connect(address)];
    clients[0].write_all(with_cookie("mio").as_bytes()).unwrap();
    clients[1].write_all(with_cookie("task").as_bytes()).unwrap();
    wait_until("one to come to the event loop", || mio.try_accept().unwrap().is_some());
    runtime.block_on(task.accept()).unwrap();
    // More than the dispatcher reads at a time: it does not wait, and nobody is the worse for it.
    let claims = (0..5_000).filter(|n| mine.own(format!("burst{n}")).is_ok()).count() as u64;
    wait_until("them to be noted", || affinity(&dispatcher).claimed == 3 + claims);
    assert!(affinity(&dispatcher).entries >= claims);
    mine.close();
    assert_eq!(mine.own("late"), Err(OwnError::NotJoined));
    drop(workers);

    let (plain, _) = start_one_pool("");
    assert_eq!(own_worker(&plain, "w").own("x"), Err(OwnError::NoAffinity));
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
fn who_tells_nothing_goes_by_the_policy() {
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
    // Half a request and nothing at all: until time is up. An end: at once.
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
fn a_client_that_goes_away_while_it_is_awaited_is_forgotten() {
    let (mut dispatcher, address) =
        start_one_pool("affinity.key = \"cookie:ID\"\npeek_timeout = \"10m\"");
    let _worker = dispatcher.workers("tokio", "web", 1);
    let before = dispatcher.fds();
    let streams: Vec<_> = (0..50).map(|_| connect(address)).collect();
    dispatcher.wait_status("all to be awaited", |status| status.held == 50);
    for stream in streams {
        // A reset, not an end.
        rustix::net::sockopt::set_socket_linger(&stream, Some(std::time::Duration::ZERO)).unwrap();
    }
    let status = dispatcher.wait_status("all to be gone", |status| status.held == 0);
    assert_eq!(status.closed["client_gone"], 50);
    wait_until("their descriptors to be closed", || dispatcher.fds() <= before);
    // A stop does not wait for those who say nothing longer than for others, and they are served.
    let silent = connect(address);
    dispatcher.wait_status("it to be awaited", |status| status.held == 1);
    dispatcher.process.signal(nix::sys::signal::Signal::SIGTERM);
    wait_for_log(&dispatcher, "event=stopping");
    // Patience ends.
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

#[test]
fn ten_thousand_that_say_nothing_harm_nobody() {
    const CLIENTS: usize = 10_000;
    const AWAITED: usize = 9_000;
    // Here as many, and in the dispatcher.
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
    let mut silent: Vec<TcpStream> = (0..CLIENTS).map(|_| connect(address)).collect();
    dispatcher.wait_status("all to be accepted", |s| s.accepted == CLIENTS as u64);
    let status = affinity(&dispatcher);
    assert_eq!((status.awaiting, status.not_awaited), (AWAITED as u64, (CLIENTS - AWAITED) as u64));
    // A byte at a time, from many, and never the end of anything.
    for byte in b"GET / HTTP/1.1\r\nX: y" {
        for stream in &mut silent[..500] {
            stream.write_all(&[*byte]).unwrap();
        }
        Client::connect(plain).unwrap().echo("others are served meanwhile");
    }
    // One of them for very long: nobody looks at it all the time.
    let mut dripping = silent.swap_remove(0);
    dripping.set_nodelay(true).unwrap();
    for _ in 0..2_000 {
        if dripping.write_all(b"z").is_err() {
            break;
        }
    }
    let more = memory(&dispatcher.process).saturating_sub(before);
    assert!(more < 20_000_000, "{more} bytes for {CLIENTS} clients");
    // Who is beyond the cap is served, if not known.
    assert_eq!(ask(address, with_cookie("x")).served_by, "w0");
    drop((silent, dripping));
    dispatcher.wait_status("all to be gone", |status| status.held == 0 && status.custody == 0);
    wait_until("their descriptors to be closed", || dispatcher.fds() <= fds);
}
