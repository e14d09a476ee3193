//! Clients with sessions: half of them block, half of them are tasks of tokio.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use worker_sdk::connector::{self, ConnectorConfig};

use super::{Running, SLACK};

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
#[derive(Clone, Debug)]
pub struct Call {
    /// The number of the client.
    pub client: usize,
    pub from: Instant,
    pub to: Instant,
    pub reconnect: bool,
    /// None: there is a connection.
    pub problem: Option<String>,
}

#[derive(Clone)]
struct Record {
    client: usize,
    calls: Arc<Mutex<Vec<Call>>>,
    /// The calls that have not returned, by client.
    open: Arc<Mutex<BTreeMap<usize, (Instant, bool)>>>,
    running: Running,
    session: Duration,
}

impl Record {
    fn begin(&self, reconnect: bool) {
        self.open.lock().unwrap().insert(self.client, (Instant::now(), reconnect));
    }

    fn end(&self, result: Result<(), connector::Error>) -> bool {
        let (from, reconnect) = self.open.lock().unwrap().remove(&self.client).unwrap();
        let problem = result.err().map(|error| error.to_string());
        let succeeded = problem.is_none();
        let (client, to) = (self.client, Instant::now());
        self.calls.lock().unwrap().push(Call { client, from, to, reconnect, problem });
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
        let (calls, open) = (Arc::default(), Arc::default());
        let record = Record { client: 0, calls, open, running, session };
        let of = |client: usize| Record { client, ..record.clone() };
        let config = || {
            let config = config.clone();
            config
                .attempt_timeout(LIMITS.attempt)
                .total_timeout(LIMITS.total)
                .back_off(Duration::from_millis(50), Duration::from_millis(500))
                .set_aside(Duration::from_millis(500), Duration::from_secs(4))
        };
        let mut threads = Vec::new();
        for client in 0..EACH {
            let (config, record, first) = (config(), of(client), rng.f64());
            threads.push(thread::spawn(move || blocking_client(config, &record, first)));
        }
        let tasks: Vec<(ConnectorConfig, Record, f64)> =
            (EACH..2 * EACH).map(|client| (config(), of(client), rng.f64())).collect();
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

    /// Ends all clients; returns what they did. Calls that do not return are among it.
    pub fn stop(self) -> Vec<Call> {
        self.record.running.store(false, Ordering::SeqCst);
        let limit = Instant::now() + LIMITS.total + SLACK + ANSWER + SLACK;
        while !self.threads.iter().all(JoinHandle::is_finished) && Instant::now() < limit {
            thread::sleep(Duration::from_millis(10));
        }
        let mut calls = std::mem::take(&mut *self.record.calls.lock().unwrap());
        for (&client, &(from, reconnect)) in self.record.open.lock().unwrap().iter() {
            let problem = Some("it has not returned".to_owned());
            calls.push(Call { client, from, to: Instant::now(), reconnect, problem });
        }
        for thread in self.threads {
            if thread.is_finished() {
                thread.join().unwrap();
            }
        }
        calls
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
        record.begin(false);
        let (mut connection, result) = match connector.connect() {
            Ok(connection) => (Some(connection), Ok(())),
            Err(error) => (None, Err(error)),
        };
        record.end(result);
        let Some(connection) = &mut connection else { continue };
        let end = Instant::now() + std::mem::replace(&mut length, record.session);
        while record.goes_on() && Instant::now() < end {
            connection.stream().set_read_timeout(Some(ANSWER)).unwrap();
            if ask(connection.stream(), b"a word of the session\n").is_err() {
                record.begin(true);
                if !record.end(connection.reconnect()) {
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
        record.begin(false);
        let (connection, result) = match connector.connect().await {
            Ok(connection) => (Some(connection), Ok(())),
            Err(error) => (None, Err(error)),
        };
        record.end(result);
        let Some(mut connection) = connection else { continue };
        let end = Instant::now() + std::mem::replace(&mut length, record.session);
        while record.goes_on() && Instant::now() < end {
            let asked = ask_later(&mut connection, b"a word of the session\n");
            let answered = tokio::time::timeout(ANSWER, asked).await;
            if !matches!(answered, Ok(Ok(()))) {
                record.begin(true);
                if !record.end(connection.reconnect().await) {
                    break;
                }
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
}
