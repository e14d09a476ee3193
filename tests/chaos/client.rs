//! Clients: each connects again and again, and records the result of every connection.

use std::collections::HashSet;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::socket::sockopt::TcpRepair;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket,
};
use simulator::Random;

use super::protocol::{STAY, checksum, now, number_of, question, source_of};

/// A client that waits this long has been forgotten.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a client does with a connection once it is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// Asks, reads the answer, closes properly.
    Plain,
    /// Stays for a while and asks more.
    Hold,
    /// Sends everything before it reads.
    HalfClose,
    /// One of many connections that are opened before the first is read from.
    Crowd,
    /// Asks and resets.
    Reset,
    /// Asks and closes without reading.
    CloseUnread,
    /// Resets without sending.
    Silent,
    /// Stays for as long as the test wants.
    Stay,
    /// Vanishes without a segment, asked or not: the worker has to give it up.
    Vanish,
}

/// How a connection ended, as its client saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// Answered, and complete to its end.
    Served,
    /// Given up by the client before an answer.
    Abandoned,
    /// Answered, then cut by another party.
    Cut(String),
    /// Cut by another party before an answer.
    Lost(String),
    /// Not connected.
    Refused(String),
    /// A result that must never happen.
    Wrong(String),
}

/// One connection, as its client saw it.
#[derive(Clone, Debug)]
pub struct Story {
    pub id: u32,
    pub kind: Kind,
    pub to: SocketAddr,
    pub began: u64,
    pub ended: u64,
    /// The worker that answered.
    pub answered_by: Option<u32>,
    pub end: End,
}

/// What it means if a client is not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// A fault of the test.
    Never,
    /// The listener is not always there: it is counted.
    Counted,
    /// The checker must find a reason.
    Told,
}

/// An address to which clients connect.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    pub address: SocketAddr,
    pub refusal: Refusal,
}

/// What all clients share.
pub struct Clients {
    /// Each is as likely as the others.
    pub targets: Vec<Target>,
    /// Some clients vanish.
    pub vanish: bool,
    pub stop: Arc<AtomicBool>,
    /// No client begins anything.
    pub paused: AtomicBool,
    /// Clients that are not idle.
    pub busy: AtomicU32,
    next: AtomicU32,
    told: Mutex<Told>,
}

/// The results of all clients. A usual connection takes eight bytes, so that a run of hours fits.
#[derive(Default)]
pub struct Told {
    /// By id: the number of the worker that answered, plus one. Only for served connections.
    pub served: Vec<u32>,
    pub abandoned: u64,
    /// Refused by a listener that was absent at the moment.
    pub refused: u64,
    /// Everything else.
    pub broken: Vec<Story>,
    /// Workers that have answered a client.
    pub answering: HashSet<u32>,
    pub kinds: std::collections::BTreeMap<Kind, u64>,
}

struct Open {
    id: u32,
    kind: Kind,
    to: SocketAddr,
    began: u64,
    text: String,
    stream: TcpStream,
    /// The result, if it has asked already.
    asked: Option<std::io::Result<()>>,
}

impl Clients {
    pub fn new(targets: Vec<Target>) -> Clients {
        Clients {
            targets,
            vanish: false,
            stop: Arc::default(),
            paused: AtomicBool::new(false),
            busy: AtomicU32::new(0),
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

    /// Resets the counts.
    pub fn forget(&self) {
        *self.told() = Told::default();
        self.next.store(0, Ordering::SeqCst);
    }

    /// One client, until told to stop.
    pub fn work(&self, seed: u64) {
        let mut random = Random::new(seed);
        while !self.stop.load(Ordering::SeqCst) {
            self.busy.fetch_add(1, Ordering::SeqCst);
            if !self.paused.load(Ordering::SeqCst) {
                self.once(&mut random);
            }
            self.busy.fetch_sub(1, Ordering::SeqCst);
            pause(&mut random, 30);
        }
    }

    fn once(&self, random: &mut Random) {
        match random.below(100) {
            0 | 1 if self.vanish => self.visit(Kind::Vanish, random),
            0..55 => self.visit(Kind::Plain, random),
            55..68 => self.visit(Kind::Hold, random),
            68..79 => self.visit(Kind::HalfClose, random),
            79..81 => self.crowd(random),
            81..88 => self.visit(Kind::Reset, random),
            88..94 => self.visit(Kind::CloseUnread, random),
            _ => self.visit(Kind::Silent, random),
        }
    }

    fn visit(&self, kind: Kind, random: &mut Random) {
        if let Some(open) = self.open(kind, self.any(random), random) {
            self.finish(open, random);
        }
    }

    fn any(&self, random: &mut Random) -> Target {
        self.targets[random.below(self.targets.len() as u64) as usize]
    }

    fn crowd(&self, random: &mut Random) {
        let count = 2 + random.below(30);
        let to = self.steady(random);
        let crowd: Vec<Open> =
            (0..count).filter_map(|_| self.open(Kind::Crowd, to, random)).collect();
        // A serial worker serves one of them to its end before it takes the next: each must end
        // without the others.
        let mut crowd = crowd;
        for open in &mut crowd {
            let asked = ask(&open.stream, open.id, &open.text, random);
            open.asked = Some(asked.and_then(|()| open.stream.shutdown(Shutdown::Write)));
        }
        crowd.into_iter().for_each(|open| self.finish(open, random));
    }

    /// A listener that is always there.
    fn steady(&self, random: &mut Random) -> Target {
        loop {
            let target = self.any(random);
            if target.refusal != Refusal::Counted {
                return target;
            }
        }
    }

    /// A connection that must be answered.
    pub fn must_be_served(&self, random: &mut Random) {
        let to = self.steady(random).address;
        self.must_be_served_at(to, random);
    }

    /// Opens a connection that stays until it is dropped. It may be in an accept queue.
    pub fn hold(&self, target: Target, random: &mut Random) -> Result<TcpStream, String> {
        let Some(open) = self.open(Kind::Stay, target, random) else {
            return Err(format!("{} let no client in", target.address));
        };
        let Open { id, kind, to, began, mut stream, .. } = open;
        let asked = stream.write_all(question(id, STAY).as_bytes());
        let end = match &asked {
            Ok(()) => End::Abandoned,
            Err(error) => End::Lost(format!("while asking: {error}")),
        };
        self.tell(Story { id, kind, to, began, ended: now(), answered_by: None, end });
        asked.map(|()| stream).map_err(|error| format!("connection {id}: {error}"))
    }

    /// A connection that must be answered, at this address.
    pub fn must_be_served_at(&self, address: SocketAddr, random: &mut Random) {
        let to = Target { address, refusal: Refusal::Never };
        if let Some(open) = self.open(Kind::Plain, to, random) {
            self.finish(open, random);
        }
    }

    fn open(&self, kind: Kind, target: Target, random: &mut Random) -> Option<Open> {
        let Target { address: to, refusal } = target;
        let id = self.next.fetch_add(1, Ordering::SeqCst);
        let text = (0..random.below(12)).map(|_| format!("{:x}", random.number())).collect();
        let began = now();
        let stream = match (connect_from(id, to), refusal) {
            (Ok(stream), _) => stream,
            (Err(_), Refusal::Counted) => {
                self.told().refused += 1;
                return None;
            }
            (Err(error), Refusal::Told) => {
                let end = End::Refused(error.to_string());
                self.tell(Story { id, kind, to, began, ended: now(), answered_by: None, end });
                return None;
            }
            (Err(error), Refusal::Never) => panic!("connection {id} to {to}: {error}"),
        };
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Some(Open { id, kind, to, began, text, stream, asked: None })
    }

    fn finish(&self, open: Open, random: &mut Random) {
        let Open { id, kind, to, began, .. } = open;
        let mut answered_by = None;
        let end = converse(open, &mut answered_by, random).err().unwrap_or(End::Served);
        self.tell(Story { id, kind, to, began, ended: now(), answered_by, end });
    }

    fn tell(&self, story: Story) {
        let mut told = self.told();
        *told.kinds.entry(story.kind).or_default() += 1;
        told.answering.extend(story.answered_by);
        match (&story.end, story.answered_by) {
            (End::Served, Some(worker)) => {
                let index = story.id as usize;
                if told.served.len() <= index {
                    told.served.resize(index + 1, 0);
                }
                told.served[index] = worker + 1;
            }
            (End::Abandoned, _) => told.abandoned += 1,
            _ => {
                if matches!(story.end, End::Wrong(_)) {
                    // Later results add no information.
                    self.stop.store(true, Ordering::SeqCst);
                }
                told.broken.push(story);
            }
        }
    }
}

/// `Err` is the result if it is not a proper end.
fn converse(open: Open, answered_by: &mut Option<u32>, random: &mut Random) -> Result<(), End> {
    let Open { id, kind, text, stream, asked, .. } = open;
    if kind == Kind::Silent {
        reset(stream);
        return Err(End::Abandoned);
    }
    if kind == Kind::Vanish {
        if random.below(2) == 0 {
            let _ = ask(&stream, id, &text, random);
        }
        vanish(stream);
        return Err(End::Abandoned);
    }
    let asked = asked.unwrap_or_else(|| ask(&stream, id, &text, random));
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
            reader.get_mut().write_all(question(id, &text).as_bytes()).map_err(cut)?;
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
    number_of(name).ok_or_else(wrong)
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

/// Sends the introduction, perhaps in pieces, then asks.
fn ask(mut stream: &TcpStream, id: u32, text: &str, random: &mut Random) -> std::io::Result<()> {
    let mut bytes = introduction(random);
    bytes.extend_from_slice(question(id, text).as_bytes());
    if random.below(8) == 0 {
        let half = bytes.len() / 2;
        stream.write_all(&bytes[..half])?;
        pause(random, 100);
        bytes.drain(..half);
    }
    stream.write_all(&bytes)
}

/// What identifies a client: nothing, a request head with all kinds of keys, or a TLS greeting with
/// a name.
fn introduction(random: &mut Random) -> Vec<u8> {
    let key = random.below(50);
    let headers = format!("Host: h{key}.example\r\nCookie: a=b; sid=k{key}\r\nX-Key: k{key}\r\n");
    match random.below(10) {
        0..5 => Vec::new(),
        5..7 => format!("GET /a;sid=k{key}?q=1&sid=k{key} HTTP/1.1\r\n{headers}\r\n").into_bytes(),
        7 => {
            let body = format!("x=1&sid=k{key}&y=2\n");
            let kind = "Content-Type: application/x-www-form-urlencoded\r\nContent-Length:";
            format!("POST /a HTTP/1.1\r\n{headers}{kind} {}\r\n\r\n{body}", body.len()).into_bytes()
        }
        _ => client_hello(&format!("h{key}.example")),
    }
}

fn client_hello(host: &str) -> Vec<u8> {
    let size = |length: usize| (length as u16).to_be_bytes();
    let mut extensions = vec![0, 0];
    extensions.extend(size(host.len() + 5));
    extensions.extend(size(host.len() + 3));
    extensions.push(0);
    extensions.extend(size(host.len()));
    extensions.extend(host.as_bytes());
    extensions.extend([0, 10, 0, 4, 0, 2, 0, 0x1d]);
    extensions.extend([0, 13, 0, 4, 0, 2, 4, 3]);
    extensions.extend([0, 43, 0, 3, 2, 3, 4]);
    let mut hello = vec![3, 3];
    hello.extend([7; 32]);
    hello.extend([0, 0, 2, 0x13, 1, 1, 0]);
    hello.extend(size(extensions.len()));
    hello.extend(extensions);
    let mut record = vec![22, 3, 1];
    record.extend(size(hello.len() + 4));
    record.push(1);
    record.extend(&(hello.len() as u32).to_be_bytes()[1..]);
    record.extend(hello);
    record
}

fn connect_from(id: u32, address: SocketAddr) -> std::io::Result<TcpStream> {
    let family = if address.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet };
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    let from = SocketAddr::new(source_of(id, address.is_ipv6()), 0);
    bind(std::os::fd::AsRawFd::as_raw_fd(&socket), &SockaddrStorage::from(from)).unwrap();
    connect(std::os::fd::AsRawFd::as_raw_fd(&socket), &SockaddrStorage::from(address))?;
    Ok(TcpStream::from(socket))
}

fn reset(stream: TcpStream) {
    let now = Some(Duration::ZERO);
    let _ = rustix::net::sockopt::set_socket_linger(&stream, now);
}

/// Closes without a segment, as a machine that is switched off. Needs `CAP_NET_ADMIN`.
fn vanish(stream: TcpStream) {
    setsockopt(&stream, TcpRepair, &1).unwrap();
}
