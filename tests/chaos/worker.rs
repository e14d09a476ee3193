//! The worker of the chaos test, in several kinds: quick, slow, serial, stuck. It records each
//! connection when it has taken it, then answers line by line. Sometimes it hangs before it takes
//! the next connection. SIGTERM makes it say goodbye; it ends with its last connection.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use test_support::sigterm;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt};
use worker_sdk::mio::MioWorker;
use worker_sdk::{Connection, Error, PeerAddr, Worker, WorkerConfig};

use crate::chaos::protocol::{self, answer, asked, id_of, now};
use crate::hostile;
use simulator::Random;

static NAME: LazyLock<String> = LazyLock::new(|| match std::env::var("CHAOS_ROLE").as_deref() {
    Ok("spawned") => format!("x{}", std::process::id()),
    _ => std::env::var("DISPATCH_NAME").unwrap(),
});
static TAKEN: LazyLock<File> = LazyLock::new(|| {
    let path = std::env::var_os("CHAOS_TAKEN").unwrap();
    File::options().append(true).open(path).unwrap()
});

pub fn main(flavour: &str) {
    env_logger::init();
    sigterm::catch();
    // Both are read now: later there may be no descriptor left.
    LazyLock::force(&NAME);
    LazyLock::force(&TAKEN);
    let most = Duration::from_millis(500);
    let config = WorkerConfig::from_env().unwrap().reconnect(Duration::from_millis(10), most);
    match flavour {
        "blocking" => blocking(config, 2),
        "tokio" => tokio(config),
        "mio" => mio(config),
        "serial" => serial(config),
        "slow" => slow(config),
        "nothing" => nothing(config),
        "hostile" => hostile::work(),
        "spawned" => {
            // Without its dispatcher it has no clients, so it ends too.
            let with_parent = Some(rustix::process::Signal::TERM);
            rustix::process::set_parent_process_death_signal(with_parent).unwrap();
            blocking(config, 1);
        }
        other => panic!("no such flavour: {other}"),
    }
}

/// A busy application: connections received with this one wait, and may be revoked.
fn hang_sometimes() {
    thread_local!(static RANDOM: RefCell<Random> = RefCell::new(Random::new(now())));
    let pause = RANDOM.with_borrow_mut(|random| match random.below(200) {
        0 => random.below(600),
        _ => 0,
    });
    if pause > 0 {
        std::thread::sleep(Duration::from_millis(pause));
    }
}

/// One write per line, so that lines of several processes do not mix.
fn write_down(peer: PeerAddr) -> Option<u32> {
    let id = id_of(peer);
    let line = format!("{} {} {}\n", *NAME, id.map_or(u32::MAX, |id| id), now());
    (&*TAKEN).write_all(line.as_bytes()).unwrap();
    hang_sometimes();
    id
}

/// Processes of the dispatcher end when they are drained; other workers stay.
fn stays(worker: &Worker) -> bool {
    !NAME.starts_with('x') && worker.resumed().unwrap()
}

fn blocking(config: WorkerConfig, threads: u32) {
    let worker = Worker::connect(config).unwrap();
    let closer = worker.clone();
    sigterm::on(move || closer.close());
    // Where several threads take, the receiving thread shares with the others.
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    while let Some(connection) = worker.accept().unwrap() {
                        let id = write_down(connection.peer_addr());
                        let thread = std::thread::Builder::new().stack_size(64 * 1024);
                        thread.spawn(move || serve(connection, id)).unwrap();
                    }
                    if !stays(&worker) {
                        break;
                    }
                }
            });
        }
    });
    worker.close();
    // Connections that only this process can serve, because its dispatcher has died.
    while let Some(connection) = worker.accept().unwrap() {
        let id = write_down(connection.peer_addr());
        std::thread::spawn(move || serve(connection, id));
    }
    while worker.live() > 0 {
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// One connection at a time, from its beginning to its end.
fn serial(config: WorkerConfig) {
    let worker = Worker::connect(config).unwrap();
    let closer = worker.clone();
    sigterm::on(move || closer.close());
    loop {
        while let Some(connection) = worker.accept().unwrap() {
            let id = write_down(connection.peer_addr());
            // A client that stays must not block the others forever.
            connection.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
            serve(connection, id);
        }
        if !stays(&worker) {
            return;
        }
    }
}

/// An event loop with rounds of 320 ms.
fn slow(config: WorkerConfig) {
    let worker = Worker::connect(config).unwrap();
    let closed = Arc::new(AtomicBool::new(false));
    let asked = Arc::clone(&closed);
    sigterm::on(move || asked.store(true, Ordering::SeqCst));
    loop {
        if closed.load(Ordering::SeqCst) {
            worker.close();
        }
        loop {
            match worker.try_accept() {
                Ok(Some(connection)) => {
                    connection.set_nonblocking(false).unwrap();
                    let id = write_down(connection.peer_addr());
                    std::thread::spawn(move || serve(connection, id));
                }
                Ok(None) | Err(Error::Draining) => break,
                Err(Error::Closed) if worker.live() == 0 => return,
                Err(Error::Closed) => break,
                Err(error) => panic!("{error}"),
            }
        }
        std::thread::sleep(Duration::from_millis(320));
    }
}

/// Joins, and takes nothing.
fn nothing(config: WorkerConfig) {
    let worker = Worker::connect(config).unwrap();
    sigterm::wait();
    worker.close();
}

fn serve(connection: Connection, id: Option<u32>) {
    // The client may have gone.
    let _ = protocol::serve(&connection, &NAME, id, || {});
}

fn tokio(config: WorkerConfig) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let listener = worker_sdk::tokio::Listener::connect(config).await.unwrap();
        let closer = listener.clone();
        sigterm::on(move || closer.close());
        loop {
            let connection = match listener.accept().await {
                Ok(connection) => connection,
                Err(Error::Closed) => break,
                Err(Error::Draining) => match listener.resumed().await {
                    Ok(true) => continue,
                    Ok(false) | Err(Error::Closed) => break,
                    Err(error) => panic!("{error}"),
                },
                Err(error) => panic!("{error}"),
            };
            let id = write_down(connection.peer_addr());
            tokio::spawn(async move {
                let mut connection = tokio::io::BufReader::new(connection);
                let mut line = Vec::new();
                while connection.read_until(b'\n', &mut line).await.is_ok_and(|count| count > 0) {
                    if let Some(question) = asked(&line) {
                        let text = answer(&NAME, id, &question);
                        if connection.get_mut().write_all(text.as_bytes()).await.is_err() {
                            return;
                        }
                    }
                    line.clear();
                }
            });
        }
        while listener.live() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
}

const WORKER: Token = Token(usize::MAX);
const STOP: Token = Token(usize::MAX - 1);

struct Served {
    connection: Connection,
    id: Option<u32>,
    input: Vec<u8>,
}

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
    let mut connections: HashMap<Token, Served> = HashMap::new();
    let mut next = 0;
    let mut events = Events::with_capacity(256);
    let mut closed = false;
    while !(closed && connections.is_empty()) {
        match poll.poll(&mut events, None) {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            other => other.unwrap(),
        }
        for event in &events {
            match event.token() {
                WORKER => loop {
                    let mut connection = match worker.try_accept() {
                        Ok(Some(connection)) => connection,
                        Ok(None) => break,
                        // The descriptor is readable all the time now; a resume does not change
                        // that.
                        Err(Error::Draining) => {
                            std::thread::sleep(Duration::from_millis(5));
                            break;
                        }
                        Err(Error::Closed) => {
                            closed = true;
                            break;
                        }
                        Err(error) => panic!("{error}"),
                    };
                    let id = write_down(connection.peer_addr());
                    let token = Token(next);
                    next += 1;
                    poll.registry().register(&mut connection, token, Interest::READABLE).unwrap();
                    connections.insert(token, Served { connection, id, input: Vec::new() });
                },
                STOP => worker.close(),
                token => {
                    let over = connections.get_mut(&token).is_some_and(|served| !served.go_on());
                    if over && let Some(served) = connections.remove(&token) {
                        let raw = served.connection.as_raw_fd();
                        poll.registry().deregister(&mut SourceFd(&raw)).unwrap();
                    }
                }
            }
        }
    }
}

impl Served {
    /// False once the client is gone.
    fn go_on(&mut self) -> bool {
        let mut buffer = [0; 4096];
        loop {
            match self.connection.read(&mut buffer) {
                Ok(0) => return false,
                Ok(count) => self.input.extend_from_slice(&buffer[..count]),
                Err(error) => {
                    return error.kind() == ErrorKind::WouldBlock;
                }
            }
            while let Some(end) = self.input.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.input.drain(..=end).collect();
                let Some(question) = asked(&line) else { continue };
                let text = answer(&NAME, self.id, &question);
                // Clients wait for each answer, so it fits into the send buffer.
                if self.connection.write_all(text.as_bytes()).is_err() {
                    return false;
                }
            }
        }
    }
}
