//! Clients with sessions: half of them block, half of them are tasks of tokio.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use worker_sdk::connector::{self, ConnectorConfig};

use super::Running;

const EACH: usize = 100;

/// How often a session says something.
const PAUSE: Duration = Duration::from_millis(200);

/// After this time without an answer the server is lost.
const ANSWER: Duration = Duration::from_secs(2);

/// The limits of a client.
pub struct Limits {
    pub attempt: Duration,
    pub total: Duration,
}

pub const LIMITS: Limits =
    Limits { attempt: Duration::from_secs(2), total: Duration::from_secs(15) };

/// A connect or reconnect.
#[derive(Debug)]
pub struct Call {
    pub from: Instant,
    pub to: Instant,
    pub reconnect: bool,
    /// None: there is a connection.
    pub problem: Option<String>,
}

#[derive(Clone)]
struct Record {
    calls: Arc<Mutex<Vec<Call>>>,
    running: Running,
    session: Duration,
}

impl Record {
    fn note(&self, from: Instant, reconnect: bool, result: Result<(), connector::Error>) -> bool {
        let problem = result.err().map(|error| error.to_string());
        let succeeded = problem.is_none();
        self.calls.lock().unwrap().push(Call { from, to: Instant::now(), reconnect, problem });
        succeeded
    }

    fn goes_on(&self) -> bool {
        self.running.load(Ordering::SeqCst)
    }
}

pub struct Clients {
    record: Record,
    threads: Vec<JoinHandle<()>>,
}

impl Clients {
    /// `config` has the addresses.
    pub fn start(config: &ConnectorConfig, session: Duration, rng: &mut fastrand::Rng) -> Clients {
        let running = Arc::new(AtomicBool::new(true));
        let record = Record { calls: Arc::default(), running, session };
        let config = || {
            let config = config.clone();
            config
                .attempt_timeout(LIMITS.attempt)
                .total_timeout(LIMITS.total)
                .back_off(Duration::from_millis(50), Duration::from_millis(500))
                .set_aside(Duration::from_millis(500), Duration::from_secs(4))
        };
        let mut threads = Vec::new();
        for _ in 0..EACH {
            let (config, record, first) = (config(), record.clone(), rng.f64());
            threads.push(thread::spawn(move || blocking_client(config, &record, first)));
        }
        let tasks: Vec<(ConnectorConfig, Record, f64)> =
            (0..EACH).map(|_| (config(), record.clone(), rng.f64())).collect();
        threads.push(thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(async {
                let mut set = tokio::task::JoinSet::new();
                for (config, record, first) in tasks {
                    set.spawn(task_client(config, record, first));
                }
                while let Some(ended) = set.join_next().await {
                    ended.unwrap();
                }
            });
        }));
        Clients { record, threads }
    }

    /// Ends all clients; returns what they did.
    pub fn stop(self) -> Vec<Call> {
        self.record.running.store(false, Ordering::SeqCst);
        for thread in self.threads {
            thread.join().unwrap();
        }
        std::mem::take(&mut *self.record.calls.lock().unwrap())
    }
}

/// Any line comes back.
fn ask(mut stream: &TcpStream, line: &[u8]) -> io::Result<()> {
    stream.write_all(line)?;
    let mut answer = vec![0; line.len()];
    stream.read_exact(&mut answer)?;
    if answer == line { Ok(()) } else { Err(io::Error::other("another answer")) }
}

/// The first session ends at any part of its time, so that not all end together.
fn blocking_client(config: ConnectorConfig, record: &Record, first: f64) {
    let connector =
        connector::Connector::new(config).unwrap().on_connect(|stream| ask(stream, b"\n"));
    let mut length = record.session.mul_f64(first);
    while record.goes_on() {
        let from = Instant::now();
        let connected = connector.connect();
        let (mut connection, result) = match connected {
            Ok(connection) => (Some(connection), Ok(())),
            Err(error) => (None, Err(error)),
        };
        record.note(from, false, result);
        let Some(connection) = &mut connection else { continue };
        let end = Instant::now() + std::mem::replace(&mut length, record.session);
        while record.goes_on() && Instant::now() < end {
            connection.stream().set_read_timeout(Some(ANSWER)).unwrap();
            if ask(connection.stream(), b"a word of the session\n").is_err() {
                let from = Instant::now();
                if !record.note(from, true, connection.reconnect()) {
                    break;
                }
            }
            thread::sleep(PAUSE);
        }
    }
}

async fn ask_later<S>(stream: &mut S, line: &[u8]) -> io::Result<()>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    stream.write_all(line).await?;
    let mut answer = vec![0; line.len()];
    stream.read_exact(&mut answer).await?;
    if answer == line { Ok(()) } else { Err(io::Error::other("another answer")) }
}

async fn task_client(config: ConnectorConfig, record: Record, first: f64) {
    let connector = connector::tokio::Connector::new(config).unwrap();
    let connector = connector.on_connect(|mut stream| async move {
        ask_later(&mut stream, b"\n").await.map(|()| stream)
    });
    let mut length = record.session.mul_f64(first);
    while record.goes_on() {
        let from = Instant::now();
        let (connection, result) = match connector.connect().await {
            Ok(connection) => (Some(connection), Ok(())),
            Err(error) => (None, Err(error)),
        };
        record.note(from, false, result);
        let Some(mut connection) = connection else { continue };
        let end = Instant::now() + std::mem::replace(&mut length, record.session);
        while record.goes_on() && Instant::now() < end {
            let asked = ask_later(&mut connection, b"a word of the session\n");
            let answered = tokio::time::timeout(ANSWER, asked).await;
            if !matches!(answered, Ok(Ok(()))) {
                let from = Instant::now();
                if !record.note(from, true, connection.reconnect().await) {
                    break;
                }
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
}
