//! Clients: each connects again and again, and writes down what became of every connection.

use std::collections::HashSet;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dispatcher::sim::Random;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, socket};

use super::protocol::{address_of, checksum, now};

/// A client that waits this long for anything has been forgotten by somebody.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a client does with a connection once it is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// Asks, reads the answer, ends politely.
    Plain,
    /// Stays for a while and asks more.
    Hold,
    /// Says all it has to say before it reads.
    HalfClose,
    /// One of many opened before the first is read from.
    Crowd,
    /// Asks and resets.
    Reset,
    /// Asks and closes without reading.
    CloseUnread,
    /// Resets without a word.
    Silent,
}

/// How a connection ended, as its client saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// Answered, and whole to its end.
    Served,
    /// The client itself gave it up before an answer.
    Abandoned,
    /// Answered, then broken off by somebody else.
    Cut(String),
    /// Broken off by somebody else before an answer.
    Lost(String),
    /// What must never be.
    Wrong(String),
}

/// One connection, as its client saw it.
#[derive(Clone, Debug)]
pub struct Story {
    pub id: u32,
    pub kind: Kind,
    pub began: u64,
    pub ended: u64,
    /// The worker that answered.
    pub answered_by: Option<u32>,
    pub end: End,
}

/// What all clients share.
pub struct Clients {
    pub address: SocketAddr,
    pub stop: AtomicBool,
    next: AtomicU32,
    told: Mutex<Told>,
}

/// What the clients have told. Ordinary connections take eight bytes each, so that a run of hours fits.
#[derive(Default)]
pub struct Told {
    /// By id: the number of the worker that answered, plus one. Only of connections that went well.
    pub served: Vec<u32>,
    pub abandoned: u64,
    /// Everything else.
    pub broken: Vec<Story>,
    /// Workers that have answered somebody.
    pub answering: HashSet<u32>,
    pub kinds: std::collections::BTreeMap<Kind, u64>,
}

struct Open {
    id: u32,
    kind: Kind,
    began: u64,
    text: String,
    stream: TcpStream,
}

impl Clients {
    pub fn new(address: SocketAddr) -> Clients {
        Clients {
            address,
            stop: AtomicBool::new(false),
            next: AtomicU32::new(0),
            told: Mutex::default(),
        }
    }

    pub fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Connections opened so far.
    pub fn count(&self) -> u32 {
        self.next.load(Ordering::SeqCst)
    }

    /// Starts counting anew.
    pub fn forget(&self) {
        *self.told() = Told::default();
        self.next.store(0, Ordering::SeqCst);
    }

    /// One client, until told to stop.
    pub fn work(&self, seed: u64) {
        let mut random = Random::new(seed);
        while !self.stop.load(Ordering::SeqCst) {
            match random.below(100) {
                0..55 => self.visit(Kind::Plain, &mut random),
                55..68 => self.visit(Kind::Hold, &mut random),
                68..79 => self.visit(Kind::HalfClose, &mut random),
                79..81 => self.crowd(&mut random),
                81..88 => self.visit(Kind::Reset, &mut random),
                88..94 => self.visit(Kind::CloseUnread, &mut random),
                _ => self.visit(Kind::Silent, &mut random),
            }
            pause(&mut random, 30);
        }
    }

    fn visit(&self, kind: Kind, random: &mut Random) {
        let open = self.open(kind, random);
        self.finish(open, random);
    }

    fn crowd(&self, random: &mut Random) {
        let count = 2 + random.below(30);
        let crowd: Vec<Open> = (0..count).map(|_| self.open(Kind::Crowd, random)).collect();
        crowd.into_iter().for_each(|open| self.finish(open, random));
    }

    /// One that must be answered.
    pub fn must_be_served(&self, random: &mut Random) {
        self.visit(Kind::Plain, random);
    }

    fn open(&self, kind: Kind, random: &mut Random) -> Open {
        let id = self.next.fetch_add(1, Ordering::SeqCst);
        let text = (0..random.below(12)).map(|_| format!("{:x}", random.number())).collect();
        let began = now();
        let stream = connect_from(id, self.address);
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Open { id, kind, began, text, stream }
    }

    fn finish(&self, open: Open, random: &mut Random) {
        let Open { id, kind, began, .. } = open;
        let mut answered_by = None;
        let end = converse(open, &mut answered_by, random).err().unwrap_or(End::Served);
        let story = Story { id, kind, began, ended: now(), answered_by, end };
        let mut told = self.told();
        *told.kinds.entry(kind).or_default() += 1;
        told.answering.extend(answered_by);
        match (&story.end, answered_by) {
            (End::Served, Some(worker)) => {
                let index = id as usize;
                if told.served.len() <= index {
                    told.served.resize(index + 1, 0);
                }
                told.served[index] = worker + 1;
            }
            (End::Abandoned, _) => told.abandoned += 1,
            _ => {
                if matches!(story.end, End::Wrong(_)) {
                    // Nothing that follows could tell more.
                    self.stop.store(true, Ordering::SeqCst);
                }
                told.broken.push(story);
            }
        }
    }
}

/// `Err` is how it ended, if not well.
fn converse(open: Open, answered_by: &mut Option<u32>, random: &mut Random) -> Result<(), End> {
    let Open { id, kind, text, stream, .. } = open;
    if kind == Kind::Silent {
        reset(stream);
        return Err(End::Abandoned);
    }
    let asked = (&stream).write_all(format!("{id} {text}\n").as_bytes());
    match kind {
        Kind::Reset => {
            pause(random, 10);
            reset(stream);
            return Err(End::Abandoned);
        }
        Kind::CloseUnread => {
            pause(random, 10);
            return Err(End::Abandoned);
        }
        _ => asked.map_err(|error| End::Lost(format!("while asking: {error}")))?,
    }
    if kind == Kind::HalfClose {
        stream
            .shutdown(Shutdown::Write)
            .map_err(|error| End::Lost(format!("half-closing: {error}")))?;
    }
    let mut reader = BufReader::new(stream);
    *answered_by = Some(answer(&mut reader, id, &text, End::Lost)?);
    if kind == Kind::Hold {
        for _ in 0..random.below(5) {
            pause(random, 300);
            let text = format!("{:x}", random.number());
            let cut = |error| End::Cut(format!("while asking again: {error}"));
            reader.get_mut().write_all(format!("{id} {text}\n").as_bytes()).map_err(cut)?;
            let again = answer(&mut reader, id, &text, End::Cut)?;
            if Some(again) != *answered_by {
                return Err(End::Wrong(format!("then answered by worker {again}")));
            }
        }
    }
    if kind != Kind::HalfClose {
        let _ = reader.get_mut().shutdown(Shutdown::Write);
    }
    let mut rest = String::new();
    match reader.read_to_string(&mut rest) {
        Ok(0) => Ok(()),
        Ok(_) => Err(End::Wrong(format!("more than one answer: {rest:?}"))),
        Err(error) => Err(broken(&error, End::Cut)),
    }
}

/// Reads one answer and checks it; the number of the worker that gave it.
fn answer(
    reader: &mut BufReader<TcpStream>,
    id: u32,
    text: &str,
    end: fn(String) -> End,
) -> Result<u32, End> {
    let mut line = String::new();
    reader.read_line(&mut line).map_err(|error| broken(&error, end))?;
    if line.is_empty() {
        return Err(end("closed".to_owned()));
    }
    let wrong = || End::Wrong(format!("answered {line:?} to \"{id} {text}\""));
    let (name, rest) = line.split_once(' ').ok_or_else(wrong)?;
    if rest != format!("{id} {:08x}\n", checksum(text)) {
        return Err(wrong());
    }
    name.get(1..).and_then(|number| number.parse().ok()).ok_or_else(wrong)
}

fn broken(error: &std::io::Error, end: fn(String) -> End) -> End {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => {
            End::Wrong(format!("nothing for {PATIENCE:?}"))
        }
        _ => end(error.to_string()),
    }
}

fn pause(random: &mut Random, milliseconds: u64) {
    std::thread::sleep(Duration::from_micros(random.below(milliseconds * 1000)));
}

fn connect_from(id: u32, address: SocketAddr) -> TcpStream {
    let SocketAddr::V4(address) = address else { panic!("an IPv4 listener") };
    let socket =
        socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    let from = std::net::SocketAddrV4::new(address_of(id), 0);
    bind(std::os::fd::AsRawFd::as_raw_fd(&socket), &SockaddrIn::from(from)).unwrap();
    connect(std::os::fd::AsRawFd::as_raw_fd(&socket), &SockaddrIn::from(address))
        .unwrap_or_else(|error| panic!("connection {id}: {error}"));
    TcpStream::from(socket)
}

fn reset(stream: TcpStream) {
    let now = Some(Duration::ZERO);
    let _ = rustix::net::sockopt::set_socket_linger(&stream, now);
}
