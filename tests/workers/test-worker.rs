//! The worker of the whole-process tests: `test-worker blocking|tokio|mio`.
//!
//! It greets each client with `NAME PID LISTENER PEER`, then echoes. SIGTERM makes it say goodbye;
//! it ends with its last connection, and when it is drained, unless `TEST_WORKER=stays` (blocking
//! only). With `TEST_WORKER=never-take` it joins and takes nothing; with `TEST_WORKER=only-answer`
//! (mio) it answers probes and takes nothing. `TEST_WORKER_PAUSE=MS` is the duration of a round of
//! its event loop, or of the pause after an accept (blocking); `serial` serves one client at a
//! time, for this duration. With `TEST_WORKER=hoards` it opens files until it has no descriptors
//! left (blocking). With `TEST_WORKER=fork` it has a child, from its first connection on,
//! that keeps all its descriptors open until the child's standard input ends.
//!
//! `test-worker prefork KIND` loads a table of `TEST_TABLE=MIB` and is then the parent of workers
//! of this kind. `TEST_PREFORK=thread` has a second thread, `TEST_PREFORK=hang` never gets there,
//! `TEST_PREFORK=fails` and `TEST_PREFORK=panics` make each worker fail. `test-worker loaded KIND`
//! loads the same table and is a worker.
#![allow(unsafe_code, reason = "the test wraps system calls")]
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use test_support::sigterm;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use worker_sdk::mio::MioWorker;
use worker_sdk::{Connection, Error, PeerAddr, Worker, WorkerConfig};

fn main() {
    env_logger::init();
    let kind = std::env::args().nth(2);
    match std::env::args().nth(1).as_deref() {
        Some("prefork") => prefork(kind.as_deref()),
        Some("loaded") => {
            let table = table();
            work(kind.as_deref(), WorkerConfig::from_env().unwrap());
            std::hint::black_box(table);
        }
        kind => work(kind, WorkerConfig::from_env().unwrap()),
    }
}

/// What the application loads.
fn table() -> Vec<u8> {
    let mib = std::env::var("TEST_TABLE").ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    vec![7; mib << 20]
}

fn prefork(kind: Option<&str>) {
    let mode = std::env::var("TEST_PREFORK").unwrap_or_default();
    let table = table();
    match mode.as_str() {
        "thread" => drop(std::thread::spawn(std::thread::park)),
        "hang" => std::thread::park(),
        _ => {}
    }
    println!("loaded");
    let served = worker_sdk::prefork(|config| {
        if mode == "fails" {
            return Err("it was told to fail");
        }
        let variable = |name| std::env::var(name).unwrap_or_default();
        assert!(mode != "panics", "it was told to panic");
        println!("forked {} {}", variable("OWN"), variable("SAME"));
        work(kind, config);
        std::hint::black_box(&table);
        Ok(())
    });
    served.unwrap();
    println!("not needed any more");
}

fn work(kind: Option<&str>, config: WorkerConfig) {
    sigterm::catch();
    match kind {
        Some("blocking") => blocking(config),
        Some("tokio") => tokio(config),
        Some("mio") => mio(config),
        Some("serial") => serial(config),
        other => {
            panic!("usage: test-worker [prefork|loaded] blocking|tokio|mio|serial, not {other:?}")
        }
    }
}

/// The duration of a round, or of the service of one client; zero means no pause.
fn pause() -> Duration {
    let millis = std::env::var("TEST_WORKER_PAUSE").ok().and_then(|text| text.parse().ok());
    Duration::from_millis(millis.unwrap_or(0))
}

/// Like a framework with synchronous workers: the accepting thread serves the client to its end.
fn serial(config: WorkerConfig) {
    let worker = Worker::connect(config).unwrap();
    let closer = worker.clone();
    sigterm::on(move || closer.close());
    while let Ok(Some(connection)) = worker.accept() {
        std::thread::sleep(pause());
        echo(connection);
    }
}

fn greeting(listener: &str, peer: PeerAddr) -> String {
    let name = std::env::var("DISPATCH_NAME").unwrap_or_default();
    format!("{name} {} {listener} {peer}\n", std::process::id())
}

fn blocking(config: WorkerConfig) {
    let mut worker = Worker::connect(config).unwrap();
    if std::env::var("TEST_WORKER").is_ok_and(|mode| mode == "never-take") {
        sigterm::wait();
        worker.close();
        return;
    }
    let closer = worker.clone();
    sigterm::on(move || closer.close());
    let mut hoard = Vec::new();
    if std::env::var("TEST_WORKER").is_ok_and(|mode| mode == "hoards") {
        hoard.extend(std::iter::from_fn(|| std::fs::File::open("/dev/null").ok()));
    }
    let mut forks = std::env::var("TEST_WORKER").is_ok_and(|mode| mode == "fork");
    let stays = std::env::var("TEST_WORKER").is_ok_and(|mode| mode == "stays");
    loop {
        for connection in worker.incoming() {
            if std::mem::take(&mut forks) {
                fork();
            }
            // A small stack, so that thousands of threads fit.
            let thread = std::thread::Builder::new().stack_size(32 * 1024);
            thread.spawn(move || echo(connection)).unwrap();
            std::thread::sleep(pause());
        }
        if !stays || !worker.resumed().unwrap() {
            break;
        }
    }
    worker.wait_until_idle();
    drop(hoard);
}

/// Starts a child with a copy of every descriptor, including close-on-exec ones, because it
/// executes no other program.
fn fork() {
    // SAFETY: the child only makes system calls, which are safe after a fork in a program with
    // threads.
    unsafe {
        if nix::unistd::fork().unwrap().is_child() {
            let mut byte = [0u8; 1];
            while libc::read(0, byte.as_mut_ptr().cast(), 1) > 0 {}
            libc::_exit(0);
        }
    }
}

fn echo(mut connection: Connection) {
    let greeting = greeting(connection.listener(), connection.peer_addr());
    if connection.write_all(greeting.as_bytes()).is_err() {
        return;
    }
    let mut buffer = [0; 4096];
    while let Ok(count) = connection.read(&mut buffer) {
        if count == 0 || connection.write_all(&buffer[..count]).is_err() {
            return;
        }
    }
}

fn tokio(config: WorkerConfig) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let listener = worker_sdk::tokio::Listener::connect(config).await.unwrap();
        let closer = listener.clone();
        sigterm::on(move || closer.close());
        if !pause().is_zero() {
            // Four busy tasks in one thread.
            for _ in 0..4 {
                tokio::spawn(async {
                    loop {
                        std::thread::sleep(pause() / 4);
                        tokio::task::yield_now().await;
                    }
                });
            }
        }
        while let Ok(mut connection) = listener.accept().await {
            tokio::spawn(async move {
                let greeting = greeting(connection.listener(), connection.peer_addr());
                if connection.write_all(greeting.as_bytes()).await.is_err() {
                    return;
                }
                let mut buffer = [0; 4096];
                while let Ok(count) = connection.read(&mut buffer).await {
                    if count == 0 || connection.write_all(&buffer[..count]).await.is_err() {
                        return;
                    }
                }
            });
        }
        listener.wait_until_idle().await;
    });
}

const WORKER: Token = Token(usize::MAX);
const STOP: Token = Token(usize::MAX - 1);

fn mio(config: WorkerConfig) {
    let mut poll = Poll::new().unwrap();
    let mut worker = MioWorker::new(config).unwrap();
    poll.registry().register(&mut worker, WORKER, Interest::READABLE).unwrap();
    let waker = Waker::new(poll.registry(), STOP).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let asked = Arc::clone(&stop);
    sigterm::on(move || {
        asked.store(true, Ordering::SeqCst);
        waker.wake().unwrap();
    });
    let mut connections: HashMap<Token, Connection> = HashMap::new();
    let mut next = 0;
    let mut answered = false;
    let mut events = Events::with_capacity(256);
    let only_answers = std::env::var("TEST_WORKER").is_ok_and(|mode| mode == "only-answer");
    let timeout = (!pause().is_zero()).then_some(Duration::ZERO);
    loop {
        std::thread::sleep(pause());
        match poll.poll(&mut events, timeout) {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            other => other.unwrap(),
        }
        for event in &events {
            match event.token() {
                // It asks once, for its probe, and then never again.
                WORKER if only_answers => {
                    if !std::mem::replace(&mut answered, true) {
                        let _ = worker.try_accept();
                    }
                }
                WORKER => {
                    loop {
                        let mut connection = match worker.try_accept() {
                            Ok(Some(connection)) => connection,
                            Ok(None) | Err(Error::Closed | Error::Draining) => break,
                            Err(error) => panic!("{error}"),
                        };
                        let greeting = greeting(connection.listener(), connection.peer_addr());
                        // A greeting fits into an empty send buffer.
                        if connection.write_all(greeting.as_bytes()).is_err() {
                            continue;
                        }
                        let token = Token(next);
                        next += 1;
                        let raw = connection.as_raw_fd();
                        let registry = poll.registry();
                        registry.register(&mut SourceFd(&raw), token, Interest::READABLE).unwrap();
                        connections.insert(token, connection);
                    }
                }
                STOP => worker.close(),
                token => {
                    let over = connections.get_mut(&token).is_some_and(|c| !echo_what_is_there(c));
                    if over && let Some(connection) = connections.remove(&token) {
                        let raw = connection.as_raw_fd();
                        poll.registry().deregister(&mut SourceFd(&raw)).unwrap();
                    }
                }
            }
        }
        if (stop.load(Ordering::SeqCst) || worker.is_draining()) && connections.is_empty() {
            return;
        }
    }
}

/// False once the client is gone.
fn echo_what_is_there(connection: &mut Connection) -> bool {
    let mut buffer = [0; 4096];
    loop {
        match connection.read(&mut buffer) {
            Ok(0) => return false,
            // The tests send less than a send buffer holds.
            Ok(count) => {
                if connection.write_all(&buffer[..count]).is_err() {
                    return false;
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
            Err(_) => return false,
        }
    }
}
