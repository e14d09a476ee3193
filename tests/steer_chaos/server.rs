//! The servers of the chaos test: ordinary TCP servers that know nothing of the dispatcher. They
//! write down their process and port, and which connections they accepted.
//!
//! They differ by their number: quick, slow, serial, or stuck for a while now and then; SIGTERM
//! ends some at once, and others after their last connection.

use std::fs::File;
use std::io::{ErrorKind, Seek, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use signal_hook::consts::SIGTERM;
use signal_hook::iterator::Signals;
use simulator::Random;

use crate::chaos::place::ENTRY;
use crate::chaos::protocol::{self, id_from, now};

/// A client that says nothing for so long has vanished.
const IDLE: Duration = Duration::from_secs(4);

static LIVE: AtomicU32 = AtomicU32::new(0);
static TAKEN: LazyLock<File> = LazyLock::new(|| append("CHAOS_TAKEN"));
static GIVEN_UP: LazyLock<File> = LazyLock::new(|| append("CHAOS_GIVEN_UP"));

fn append(variable: &str) -> File {
    let path = std::env::var_os(variable).unwrap();
    File::options().append(true).open(Path::new(&path)).unwrap()
}

/// A number of its own: the place of its line in the register, with its pid, port and pool.
fn register(port: u16) -> u64 {
    let mut file = append("CHAOS_REGISTER");
    let pool = std::env::var("CHAOS_POOL").unwrap();
    let line = format!("{:<8}{port:<7}{pool:<7}{:<16}\n", std::process::id(), now());
    file.write_all(line.as_bytes()).unwrap();
    file.stream_position().unwrap() / ENTRY as u64 - 1
}

pub fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [address, port] = &arguments[..] else { panic!("an address and a port") };
    LazyLock::force(&TAKEN);
    let (listeners, port) = match address.as_str() {
        "inherits" => {
            let all = worker_sdk::inherited_listeners().unwrap();
            let port = all[0].local_addr().unwrap().port();
            (all, port)
        }
        address => {
            let address = (address.parse::<IpAddr>().unwrap(), port.parse().unwrap());
            (vec![TcpListener::bind(address).unwrap()], address.1)
        }
    };
    let number = register(port);
    // One thread accepts from all of them.
    let listener = Arc::new(Listeners(listeners));
    let name = format!("s{number}");
    let over = Arc::new(AtomicBool::new(false));
    if number.is_multiple_of(2) {
        let (listener, over) = (Arc::clone(&listener), Arc::clone(&over));
        let mut signals = Signals::new([SIGTERM]).unwrap();
        std::thread::spawn(move || {
            signals.forever().next();
            over.store(true, Ordering::SeqCst);
            for listener in &listener.0 {
                let _ = rustix::net::shutdown(listener, rustix::net::Shutdown::Read);
            }
        });
    }
    let mut random = Random::new(now() ^ number);
    while !over.load(Ordering::SeqCst) {
        let (client, peer) = match listener.accept() {
            Ok(accepted) => accepted,
            // The client may have gone.
            Err(error) if error.kind() == ErrorKind::InvalidInput => break,
            Err(_) => continue,
        };
        LIVE.fetch_add(1, Ordering::SeqCst);
        let id = id_from(peer.ip());
        // One write per line, so that lines of several processes do not mix.
        let line = format!("{name} {} {}\n", id.unwrap_or(u32::MAX), now());
        (&*TAKEN).write_all(line.as_bytes()).unwrap();
        match number % 6 {
            3 => serve(&client, &name, id),
            kind => {
                let name = name.clone();
                let thread = std::thread::Builder::new().stack_size(64 * 1024);
                thread.spawn(move || serve(&client, &name, id)).unwrap();
                pause(kind, &mut random);
            }
        }
    }
    // The listener is closed now, and with it what waits in its queue.
    drop(listener);
    while LIVE.load(Ordering::SeqCst) > 0 {
        std::thread::sleep(Duration::from_millis(5));
    }
}

struct Listeners(Vec<TcpListener>);

impl Listeners {
    fn accept(&self) -> std::io::Result<(TcpStream, std::net::SocketAddr)> {
        let [listener] = &self.0[..] else { return self.accept_from_any() };
        listener.accept()
    }

    fn accept_from_any(&self) -> std::io::Result<(TcpStream, std::net::SocketAddr)> {
        use rustix::event::{PollFd, PollFlags, poll};
        loop {
            let mut all: Vec<PollFd<'_>> =
                self.0.iter().map(|it| PollFd::new(it, PollFlags::IN)).collect();
            poll(&mut all, None)?;
            let ready = all.iter().zip(&self.0).find(|(fd, _)| !fd.revents().is_empty());
            if let Some((_, listener)) = ready {
                return listener.accept();
            }
        }
    }
}

fn pause(kind: u64, random: &mut Random) {
    let milliseconds = match kind {
        2 => random.below(20),
        4 if random.once_in(60) => 300 + random.below(2_000),
        _ => return,
    };
    std::thread::sleep(Duration::from_millis(milliseconds));
}

fn serve(client: &TcpStream, name: &str, id: Option<u32>) {
    client.set_read_timeout(Some(IDLE)).unwrap();
    let served = protocol::serve(client, name, id, || client.set_read_timeout(None).unwrap());
    if served.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
        && let Some(id) = id
    {
        (&*GIVEN_UP).write_all(format!("{id}\n").as_bytes()).unwrap();
    }
    LIVE.fetch_sub(1, Ordering::SeqCst);
}
