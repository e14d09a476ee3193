//! The worker of the chaos test, in three flavours. It writes down each connection the moment it has taken it, then
//! answers line by line. Now and then it hangs for a while before it takes the next. SIGTERM makes it say goodbye; it ends when its last connection does.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use signal_hook::consts::SIGTERM;
use signal_hook::iterator::Signals;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt};
use worker_sdk::mio::MioWorker;
use worker_sdk::{Connection, Error, PeerAddr, Worker, WorkerConfig};

use crate::chaos::protocol::{answer, id_of, now};
use dispatcher::sim::Random;

static NAME: LazyLock<String> = LazyLock::new(|| std::env::var("DISPATCH_NAME").unwrap());
static TAKEN: LazyLock<File> = LazyLock::new(|| {
    let path = std::env::var_os("CHAOS_TAKEN").unwrap();
    File::options().append(true).open(path).unwrap()
});

pub fn main(flavour: &str) {
    env_logger::init();
    // Both are read now: later there may be no descriptor to spare.
    LazyLock::force(&NAME);
    LazyLock::force(&TAKEN);
    let most = Duration::from_millis(500);
    let config = WorkerConfig::from_env().unwrap().reconnect(Duration::from_millis(10), most);
    match flavour {
        "blocking" => blocking(config),
        "tokio" => tokio(config),
        "mio" => mio(config),
        other => panic!("no such flavour: {other}"),
    }
}

/// An application that is busy with something else: what was received with this one waits, and may be revoked.
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

/// One write per line, so that lines of many processes do not mix.
fn write_down(peer: PeerAddr) -> Option<u32> {
    let id = id_of(peer);
    let line = format!("{} {} {}\n", *NAME, id.map_or(u32::MAX, |id| id), now());
    (&*TAKEN).write_all(line.as_bytes()).unwrap();
    hang_sometimes();
    id
}

fn on_sigterm(action: impl Fn() + Send + 'static) {
    let mut signals = Signals::new([SIGTERM]).unwrap();
    std::thread::spawn(move || signals.forever().for_each(|_| action()));
}

fn blocking(config: WorkerConfig) {
    let worker = Worker::connect(config).unwrap();
    let closer = worker.clone();
    on_sigterm(move || closer.close());
    // Two threads take: the one that received shares with the other.
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(connection) = worker.accept().unwrap() {
                    let id = write_down(connection.peer_addr());
                    let thread = std::thread::Builder::new().stack_size(64 * 1024);
                    thread.spawn(move || serve(connection, id)).unwrap();
                }
            });
        }
    });
    while worker.live() > 0 {
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn serve(connection: Connection, id: Option<u32>) {
    let mut reader = BufReader::new(&connection);
    let mut line = String::new();
    while reader.read_line(&mut line).is_ok_and(|count| count > 0) {
        let text = answer(&NAME, id, line.trim_end());
        if (&connection).write_all(text.as_bytes()).is_err() {
            return;
        }
        line.clear();
    }
}

fn tokio(config: WorkerConfig) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let listener = worker_sdk::tokio::Listener::connect(config).await.unwrap();
        let closer = listener.clone();
        on_sigterm(move || closer.close());
        loop {
            let connection = match listener.accept().await {
                Ok(connection) => connection,
                Err(Error::Closed) => break,
                Err(error) => panic!("{error}"),
            };
            let id = write_down(connection.peer_addr());
            tokio::spawn(async move {
                let mut connection = tokio::io::BufReader::new(connection);
                let mut line = String::new();
                while connection.read_line(&mut line).await.is_ok_and(|count| count > 0) {
                    let text = answer(&NAME, id, line.trim_end());
                    if connection.get_mut().write_all(text.as_bytes()).await.is_err() {
                        return;
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
    on_sigterm(move || {
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
                let line = String::from_utf8_lossy(&line);
                let text = answer(&NAME, self.id, line.trim_end());
                // Clients wait for each answer, so it fits into the send buffer.
                if self.connection.write_all(text.as_bytes()).is_err() {
                    return false;
                }
            }
        }
    }
}
