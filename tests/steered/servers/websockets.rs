//! WebSockets to a Starlette application with four processes: steered, and shared by a listener.

use std::collections::BTreeMap;
use std::io::{Read, Result, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;

use dispatcher::api::status::Status;
use test_support::{Dispatcher, PATIENCE, Process, children_of, configure, wait_until};

use super::client::head;
use crate::place::*;

pub const CLIENTS: usize = 1_000;
/// Clients that connect at the same time, in a first and in a second round.
pub const AT_ONCE: [usize; 2] = [1, 16];
const PROCESSES: usize = 4;

/// Says its process id to each client, and keeps the connection.
const APPLICATION: &str = r#"
import contextlib, os, pathlib
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute

@contextlib.asynccontextmanager
async def lifespan(app):
    pathlib.Path("ready-%d" % os.getpid()).touch()
    yield

async def pid(websocket):
    await websocket.accept()
    await websocket.send_text(str(os.getpid()))
    async for _ in websocket.iter_text():
        pass

app = Starlette(routes=[WebSocketRoute("/", pid)], lifespan=lifespan)
"#;

/// How many connections each process has, the largest first.
pub type Counts = Vec<u64>;

pub fn evenness(counts: &Counts) -> f64 {
    counts[0] as f64 * counts.len() as f64 / CLIENTS as f64
}

/// The rounds of one contender.
pub struct Distribution {
    pub name: &'static str,
    pub command: &'static str,
    pub rounds: [Counts; 2],
}

/// All three, one after the other. `None`, after a notice, if that is not possible here.
pub fn compare(environment: &Path) -> Option<Vec<Distribution>> {
    if !enter() {
        return None;
    }
    let python = environment.join("bin/python").display().to_string();
    Some(vec![
        steered(&python),
        shared(
            &python,
            "uvicorn --workers 4",
            "uvicorn app:app --workers 4",
            "uvicorn app:app --workers 4 --host 127.0.0.1 --port 8001 --log-level warning",
            8001,
        ),
        shared(
            &python,
            "gunicorn, 4 uvicorn workers",
            "gunicorn app:app -w 4 -k uvicorn.workers.UvicornWorker",
            "gunicorn app:app -w 4 -k uvicorn.workers.UvicornWorker -b 127.0.0.1:8002 \
             --log-level warning --no-control-socket",
            8002,
        ),
    ])
}

fn steered(python: &str) -> Distribution {
    let command = format!(
        "[pool.web.spawn]\nprocesses = 4\ndirectory = \"DIR\"\ncommand = [\"{python}\", \"-m\", \
         \"uvicorn\", \"app:app\", \"--host\", \"{{addr}}\", \"--port\", \"{{port}}\", \
         \"--log-level\", \"warning\"]\n"
    );
    let folder = configure(&format!("{}[pool.web]\nmode = \"steer\"\n{command}", listener()));
    std::fs::write(folder.path().join("app.py"), APPLICATION).unwrap();
    let mut dispatcher = Dispatcher::start_in(folder.path());
    dispatcher.keep(folder);
    ready(&dispatcher, PROCESSES);
    let rounds = AT_ONCE.map(|at_once| {
        let (counts, held) = connect_all(PUBLIC, at_once);
        assert_eq!(loads(&dispatcher, CLIENTS), counts, "the kernel counts what clients see");
        drop(held);
        loads(&dispatcher, 0);
        counts
    });
    Distribution {
        name: "dispatcher, 4 × uvicorn",
        command: "dispatcher, mode = \"steer\"; uvicorn app:app --port {port}",
        rounds,
    }
}

/// The loads, the largest first, once this is their sum.
fn loads(dispatcher: &Dispatcher, total: usize) -> Counts {
    let loads = |status: &Status| -> Counts {
        status.pools[0].workers.iter().map(|worker| worker.load).collect()
    };
    let status = dispatcher.wait_status("all to be counted", |status| {
        loads(status).iter().sum::<u64>() == total as u64
    });
    let mut loads = loads(&status);
    loads.sort_by(|a, b| b.cmp(a));
    loads
}

fn shared(
    python: &str,
    name: &'static str,
    command: &'static str,
    words: &str,
    port: u16,
) -> Distribution {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("app.py"), APPLICATION).unwrap();
    let mut server = Command::new(python);
    server.arg("-m").args(words.split(' ').filter(|it| !it.is_empty()));
    server.current_dir(folder.path()).stdin(Stdio::null());
    let mut server = Group(Process::start(name, &mut server));
    wait_until("all its workers to be ready", || {
        assert!(server.0.running(), "{name} ended");
        let entries = std::fs::read_dir(folder.path()).unwrap().flatten();
        let ready = entries.filter(|it| it.file_name().to_string_lossy().starts_with("ready-"));
        ready.count() == PROCESSES
    });
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    // The workers listen already or do so next; these clients show that they accept.
    wait_until("it to accept", || websocket(address).is_ok());
    // What one round left has no influence on the next: the kernel does not count here.
    Distribution { name, command, rounds: AT_ONCE.map(|at_once| connect_all(address, at_once).0) }
}

/// A server with workers; all of them end with it.
struct Group(Process);

impl Drop for Group {
    fn drop(&mut self) {
        let workers = children_of(self.0.pid());
        self.0.signal(nix::sys::signal::Signal::SIGTERM);
        self.0.wait();
        for pid in workers {
            wait_until("its workers to end", || !is_alive(pid));
        }
    }
}

/// Connects all; returns how many each process has, the largest first, and the connections.
fn connect_all(address: SocketAddr, at_once: usize) -> (Counts, Vec<TcpStream>) {
    let all = Mutex::new((BTreeMap::<i32, u64>::new(), Vec::new()));
    let left = std::sync::atomic::AtomicUsize::new(CLIENTS);
    let take = || {
        use std::sync::atomic::Ordering::Relaxed;
        left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)).is_ok()
    };
    std::thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(|| {
                while take() {
                    let (pid, stream) = websocket(address).expect("a WebSocket");
                    let mut all = all.lock().unwrap();
                    *all.0.entry(pid).or_default() += 1;
                    all.1.push(stream);
                }
            });
        }
    });
    let (by_process, held) = all.into_inner().unwrap();
    let mut counts: Counts = by_process.into_values().collect();
    counts.resize(PROCESSES, 0);
    counts.sort_by(|a, b| b.cmp(a));
    assert_eq!(counts.iter().sum::<u64>(), CLIENTS as u64);
    (counts, held)
}

/// Opens a WebSocket; returns the process that has it.
fn websocket(address: SocketAddr) -> Result<(i32, TcpStream)> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(
        b"GET / HTTP/1.1\r\nHost: test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
          Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
    )?;
    let answer = head(&mut stream)?;
    assert!(answer.starts_with("HTTP/1.1 101"), "{answer}");
    // A text frame that fits in one, not masked.
    let mut start = [0; 2];
    stream.read_exact(&mut start)?;
    assert_eq!(start[0], 0x81);
    let mut text = vec![0; start[1].into()];
    stream.read_exact(&mut text)?;
    Ok((String::from_utf8(text).unwrap().parse().unwrap(), stream))
}
