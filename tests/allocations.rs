//! A warm hot thread allocates nothing for a connection; the one exception is counted here as well.
//!
//! A test binary of its own, because it counts with the global allocator, and only in the thread
//! that runs the dispatcher. Workers and clients are other threads of this process. No check
//! depends on timing.
#![allow(unsafe_code, reason = "a global allocator is unsafe")]
#![allow(clippy::unwrap_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier, mpsc};
use std::thread;

use dispatcher::api::status::Status;
use dispatcher::config::Config;
use nix::sys::signal::{Signal, raise};
use worker_sdk::{Worker, WorkerConfig};

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static COUNTED: Cell<bool> = const { Cell::new(false) };
}

fn count() {
    // At a thread's end its variable is already gone; such a thread is not counted.
    if COUNTED.try_with(Cell::get).unwrap_or(false) {
        ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
    }
}

// SAFETY: every call is passed on unchanged to the system's allocator; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract of `alloc`, which is the same there.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above; the pointer came from `System`.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as above; the pointer came from `System`.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Untaken connections of the warm-up, more than ever later.
const BURST: usize = 200;
const CLIENTS: usize = 8;
const EACH: usize = 500;

/// The most that rustls allocates to read one ClientHello: 21 allocations for one that it made
/// itself, in version 0.23.
const SNI: u64 = 32;

/// A connection that sends this first.
fn connect(address: SocketAddr, request: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(request).unwrap();
    stream
}

/// One short connection, to its end.
fn visit(address: SocketAddr, request: &[u8]) {
    let mut bytes = Vec::new();
    connect(address, request).read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, b"x");
}

/// The first record of a TLS client.
fn client_hello() -> Vec<u8> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    let name = rustls::pki_types::ServerName::try_from("www.example.org").unwrap();
    let mut client = rustls::ClientConnection::new(config.into(), name).unwrap();
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).unwrap();
    bytes
}

#[test]
fn a_warm_hot_thread_allocates_nothing() {
    // Once for long, and with every other policy and the history of decisions. One after the other,
    // because a signal ends them.
    allocates_nothing("", b"", EACH);
    for policy in ["round-robin", "random", "two-choices", "hash", "failover"] {
        allocates_nothing(&format!("policy = \"{policy}\"\nhistory = 50\n"), b"", EACH / 10);
    }
    // Workers set the first of these gauges and not the other, so that both kinds of decisions
    // happen.
    for gauge in ["process_rss", "unheard_of"] {
        let scores = format!("[pool.web.scores]\nmultipliers = {{ {gauge} = 0.5 }}\n");
        let keys = format!("policy = \"least-score\"\nhistory = 50\n{scores}");
        allocates_nothing(&keys, b"", EACH / 10);
    }
    // Known clients, by each kind of key, with values that need decoding where possible.
    let form = "Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 22\r\n";
    for (key, request) in [
        ("client-ip", String::new()),
        ("cookie:ID", "GET / HTTP/1.1\r\nCookie: a=b; ID=\"one\"\r\n\r\n".to_owned()),
        ("header:X-User", "GET / HTTP/1.1\r\nx-user: one\r\n\r\n".to_owned()),
        ("url:id", "GET /x;a=%62;id=one?id=two HTTP/1.1\r\n\r\n".to_owned()),
        ("url:id", "GET /x?a=%62+c&id=one+and%20two HTTP/1.1\r\n\r\n".to_owned()),
        ("form:id", format!("POST / HTTP/1.1\r\n{form}\r\na=%62+c&id=one+and%20two")),
    ] {
        let keys = format!("affinity.key = \"{key}\"\nhistory = 50\n");
        allocates_nothing(&keys, request.as_bytes(), EACH / 10);
    }
    let allocations = allocations("affinity.key = \"sni\"\n", &client_hello(), EACH / 10);
    let each = allocations / (CLIENTS * EACH / 10) as u64;
    println!("{each} allocations to read a ClientHello");
    assert!((1..=SNI).contains(&each), "{each} allocations to read a ClientHello");
}

fn allocates_nothing(keys: &str, request: &[u8], each: usize) {
    let during = allocations(keys, request, each);
    let connections = CLIENTS * each;
    assert_eq!(during, 0, "allocations during {connections} connections, {keys}");
}

/// The allocations of the hot thread of a pool with these keys while `clients` connect repeatedly
/// and send this request.
fn allocations(keys: &str, request: &[u8], each: usize) -> u64 {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    // No worker becomes suspect while the burst waits.
    let config = format!(
        "dispatch_socket = {:?}\nadmin_socket = {:?}\n\
         [[listener]]\nname = \"web\"\naddress = \"127.0.0.1:0\"\npool = \"web\"\n\
         [pool.web]\nhandoff_timeout = \"10m\"\n{keys}",
        path("dispatch.sock"),
        path("admin.sock")
    );
    let config = Config::parse(&config, "test").unwrap();
    let (tell, told) = mpsc::channel();
    let hot = thread::spawn(move || {
        COUNTED.set(true);
        let ready = move |addresses: &[String]| tell.send(addresses[0].clone()).unwrap();
        dispatcher::event_loop::run(config, dispatcher::admin::start, ready)
    });
    let address: SocketAddr = told.recv().unwrap().parse().unwrap();

    let gate = Arc::new(Barrier::new(3));
    let workers: Vec<Worker> = (0..2)
        .map(|_| {
            let config = WorkerConfig::new().dispatch_socket(path("dispatch.sock")).pool("web");
            let worker = Worker::connect(config).unwrap();
            let (server, gate) = (worker.clone(), Arc::clone(&gate));
            let mut bytes = vec![0; request.len()];
            thread::spawn(move || {
                gate.wait();
                while let Some(mut connection) = server.accept().unwrap() {
                    // All bytes, or the close would be a reset.
                    connection.read_exact(&mut bytes).unwrap();
                    connection.write_all(b"x").unwrap();
                }
            });
            worker
        })
        .collect();

    // Every table grows to its largest size now: nothing is taken before all have been accepted and
    // sent.
    let burst: Vec<_> = (0..BURST).map(|_| connect(address, request)).collect();
    test_support::wait_until("the burst to be sent", || {
        let (_, body) = test_support::http_get(&path("admin.sock"), "/v1/status").unwrap();
        serde_json::from_str::<Status>(&body).unwrap().in_flight == BURST as u64
    });
    gate.wait();
    for mut client in burst {
        let mut byte = [0];
        client.read_exact(&mut byte).unwrap();
    }
    for _ in 0..BURST {
        visit(address, request);
    }

    let before = ALLOCATIONS.load(Ordering::SeqCst);
    assert!(before > 0, "the hot thread is counted");
    thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| (0..each).for_each(|_| visit(address, request)));
        }
    });
    let during = ALLOCATIONS.load(Ordering::SeqCst) - before;
    workers.iter().for_each(Worker::close);
    raise(Signal::SIGTERM).unwrap();
    hot.join().unwrap().unwrap();
    during
}
