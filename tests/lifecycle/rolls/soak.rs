//! Rolls under load: long connections that check every byte, and as many short ones as the machine
//! carries. `ROLLS=20 ROLL_CONNECTIONS=1000` is the full size; a usual run is short.

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

const WORKERS: u64 = 4;
const DRAIN: Duration = Duration::from_secs(5);

/// Threads with short connections.
const SHORT: usize = 3;

fn number(variable: &str, usual: u64) -> u64 {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(usual)
}

/// What the long connections have met.
#[derive(Debug, Default)]
struct Tally {
    /// Connections of one to four seconds that came to their own end.
    ended: AtomicU64,
    /// Those that their worker ended before.
    cut: AtomicU64,
    /// Connections of minutes that their worker ended, after `drain_timeout` at the earliest.
    moved: AtomicU64,
    bytes: AtomicU64,
    /// Anything else.
    failures: Mutex<Vec<String>>,
}

fn add(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}

/// How a connection ended.
enum End {
    Own,
    Closed,
}

/// The next bytes of a stream, and its sum so far (FNV-1a).
struct Stream {
    state: u64,
    sum: u64,
}

impl Stream {
    fn next(&mut self) -> [u8; 64] {
        std::array::from_fn(|_| {
            self.state = self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (self.state >> 56) as u8
        })
    }
}

fn sum(sum: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(sum, |sum, &byte| (sum ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// One connection: sends, and reads the same bytes back, until `life` is over.
async fn talk(
    address: SocketAddr,
    life: Duration,
    seed: u64,
    tally: &Tally,
    over: &AtomicBool,
) -> Result<End, std::io::Error> {
    let begin = Instant::now();
    let mut socket = tokio::net::TcpStream::connect(address).await?;
    let mut byte = [0];
    while byte != *b"\n" {
        if socket.read(&mut byte).await? == 0 {
            return Err(std::io::Error::other("closed before the greeting"));
        }
    }
    let mut sent = Stream { state: seed, sum: 0 };
    let mut received = 0;
    while begin.elapsed() < life && !over.load(Ordering::Relaxed) {
        let bytes = sent.next();
        // The worker may have ended the connection; what it sent before is still there.
        let mut back = [0; 64];
        let written = socket.write_all(&bytes).await;
        let mut got = 0;
        while got < back.len() {
            match socket.read(&mut back[got..]).await {
                Ok(0) => break,
                Ok(count) => got += count,
                // It was closed while these bytes were on their way.
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => break,
                Err(error) => return Err(error),
            }
        }
        if back[..got] != bytes[..got] {
            return Err(std::io::Error::other("other bytes came back"));
        }
        add(&tally.bytes, got as u64);
        if got < back.len() {
            return Ok(End::Closed);
        }
        written?;
        sent.sum = sum(sent.sum, &bytes);
        received = sum(received, &back);
        if sent.sum != received {
            return Err(std::io::Error::other("another sum"));
        }
        // The end of the connection is noticed at once.
        let pause = Duration::from_millis(500).min(life.saturating_sub(begin.elapsed()));
        if let Ok(read) = tokio::time::timeout(pause, socket.read(&mut byte)).await {
            return match read? {
                0 => Ok(End::Closed),
                _ => Err(std::io::Error::other("bytes that were not asked for")),
            };
        }
    }
    socket.shutdown().await?;
    match socket.read(&mut byte).await? {
        0 => Ok(End::Own),
        _ => Err(std::io::Error::other("bytes after the end")),
    }
}

/// A client that connects again and again.
async fn long(address: SocketAddr, number: u64, tally: &Tally, over: &AtomicBool) {
    let short = number.is_multiple_of(2);
    for round in 0u64.. {
        if over.load(Ordering::Relaxed) {
            return;
        }
        let seed = number << 20 | round;
        let life = match short {
            true => Duration::from_millis(1000 + seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) % 3000),
            false => Duration::from_secs(600),
        };
        let begin = Instant::now();
        match talk(address, life, seed, tally, over).await {
            Ok(End::Own) if short => add(&tally.ended, 1),
            Ok(End::Own) => {}
            Ok(End::Closed) if short => add(&tally.cut, 1),
            // A millisecond for the clocks of two processes.
            Ok(End::Closed) if begin.elapsed() + Duration::from_millis(1) >= DRAIN => {
                add(&tally.moved, 1);
            }
            Ok(End::Closed) => {
                let text = format!("a connection was ended after {:?}", begin.elapsed());
                tally.failures.lock().unwrap().push(text);
            }
            Err(error) => tally.failures.lock().unwrap().push(error.to_string()),
        }
    }
}

/// Runs so many long clients until `over`.
fn run_long(address: SocketAddr, count: u64, tally: &Arc<Tally>, over: &Arc<AtomicBool>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut all = tokio::task::JoinSet::new();
        for number in 0..count {
            let (tally, over) = (Arc::clone(tally), Arc::clone(over));
            all.spawn(async move { long(address, number, &tally, &over).await });
        }
        while let Some(ended) = all.join_next().await {
            ended.unwrap();
        }
    });
}

/// Short connections, one after another.
fn run_short(address: SocketAddr, served: &AtomicU64, tally: &Tally, over: &AtomicBool) {
    while !over.load(Ordering::Relaxed) {
        match Client::connect(address) {
            Ok(mut client) => {
                client.echo("short");
                client.finish();
                add(served, 1);
            }
            Err(error) => tally.failures.lock().unwrap().push(format!("short: {error}")),
        }
    }
}

/// The memory of these processes in KiB: what they share counts once.
fn memory(pids: &BTreeSet<i32>) -> u64 {
    let of = |pid: &i32| -> Option<u64> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix("Pss:"))?;
        line.split_whitespace().next()?.parse().ok()
    };
    pids.iter().filter_map(of).sum()
}

/// The most of everything at one time.
#[derive(Debug, Default)]
struct Peak {
    workers: usize,
    memory: u64,
}

impl Peak {
    fn see(&mut self, status: &Status) {
        let pids = pids(status);
        self.workers = self.workers.max(pids.len());
        self.memory = self.memory.max(memory(&pids));
    }
}

#[test]
fn rolls_under_load_cut_nobody_off() {
    let (rolls, each) = (number("ROLLS", 2), number("ROLL_CONNECTIONS", 100));
    let connections = each * WORKERS;
    // Both ends of what the workers hold, and some more while they are replaced.
    if !descriptors(connections + 1000) {
        return;
    }
    let keys = format!(
        "processes = {WORKERS}\ndrain_timeout = \"5s\"\nlimits = {{ nofile = {} }}",
        2 * connections + 1000
    );
    let dispatcher = Dispatcher::start(&spawning(&good("tokio"), &keys));
    let address = dispatcher.address("web");
    dispatcher.wait_joined("web", WORKERS as usize);
    let (tally, over) = (Arc::new(Tally::default()), Arc::new(AtomicBool::new(false)));
    let served = AtomicU64::new(0);
    let (mut peak, mut durations) = (Peak::default(), Vec::new());
    let usual = std::thread::scope(|scope| {
        let _over = Over(&over);
        scope.spawn(|| run_long(address, connections, &tally, &over));
        for _ in 0..SHORT {
            scope.spawn(|| run_short(address, &served, &tally, &over));
        }
        let status = dispatcher.wait_status("all long connections", |status| {
            loads(status, "web").0.iter().sum::<u64>() >= connections * 9 / 10
        });
        let mut usual = Peak::default();
        usual.see(&status);
        for _ in 0..rolls {
            let before = pids(&dispatcher.status());
            let begin = Instant::now();
            order(&dispatcher, &["restart", "web"]);
            dispatcher.wait_status("all to be new", |status| {
                peak.see(status);
                is("done")(status)
            });
            let replaced = begin.elapsed();
            dispatcher.wait_status("the old ones to end", |status| {
                peak.see(status);
                processes(status).leaving == 0 && pids(status).is_disjoint(&before)
            });
            durations.push((replaced, begin.elapsed()));
        }
        usual
    });
    let most = |of: fn(&(Duration, Duration)) -> Duration| durations.iter().map(of).max().unwrap();
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let _ = writeln!(
        std::io::stderr(),
        "{rolls} rolls of {WORKERS} workers with {each} long connections each: {} short connections, \
         {} of 1 to 4 s ended by themselves, {} cut off; {} of minutes moved after drain_timeout; \
         {} kB checked; failures: {}; workers: {} usually, {} at most; memory (Pss of all workers): \
         {} MiB usually, {} MiB at most; a roll: at most {:.2?} until all were new, {:.2?} until the \
         last old one had ended",
        count(&served),
        count(&tally.ended),
        count(&tally.cut),
        count(&tally.moved),
        count(&tally.bytes) / 1000,
        tally.failures.lock().unwrap().len(),
        usual.workers,
        peak.workers,
        usual.memory >> 10,
        peak.memory >> 10,
        most(|it| it.0),
        most(|it| it.1),
    );
    assert_eq!(*tally.failures.lock().unwrap(), Vec::<String>::new());
    assert_eq!(count(&tally.cut), 0, "of those that end within drain_timeout");
    assert!(count(&served) > 0 && count(&tally.ended) > 0);
    // Every old worker had some, and each was told when its time was over.
    assert!(count(&tally.moved) >= connections / 2);
    let status = dispatcher.status();
    assert_eq!(status.closed.values().sum::<u64>(), 0);
    assert_eq!(processes(&status).ready_checks_passed, rolls * WORKERS);
    assert_eq!((processes(&status).restarts, processes(&status).ended_late), (0, 0));
}
