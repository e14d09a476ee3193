//! A worker of the chaos test: registers ids, sends, receives, and writes down everything.
//!
//! Arguments: the directory's socket, the log, a name that no other run has, a seed, how many ids
//! there are. It runs until SIGTERM, and then receives what has arrived and ends. A line of the log
//! is one write, so a kill loses no line that was written:
//!
//! ```text
//! try ID                  asks to be registered; messages may come from now on
//! reg ID STAMP            registered
//! end ID                  the registration has ended here, and its queue is empty
//! out ID SEQUENCE OUTCOME what became of a message
//! in ID SENDER SEQUENCE   received
//! any SEQUENCE OUTCOME    what became of a message to one member of the group
//! job SENDER SEQUENCE     received as a member of the group
//! ```
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the report")]

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use worker_sdk::relay::{
    Ended, Id, Membership, Message, Options, Outcome, Pending, Pick, Registration, Relay,
    RelayConfig,
};

static STOP: AtomicBool = AtomicBool::new(false);

extern "C" fn stop(_: i32) {
    STOP.store(true, Ordering::SeqCst);
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

struct Log(File);

impl Log {
    fn line(&mut self, text: &str) {
        self.0.write_all(format!("{text}\n").as_bytes()).unwrap();
    }
}

fn received(log: &mut Log, what: &str, message: &Message) {
    // The text ends at the first zero byte; the rest is filling.
    let text = message.bytes().split(|byte| *byte == 0).next().unwrap();
    log.line(&format!("{what} {}", str::from_utf8(text).unwrap()));
}

/// Messages without an outcome, by recipient; outcomes may come in another order than the sends.
type Waiting<T> = VecDeque<(T, u64, Pending<Outcome>)>;

fn outcomes<T: std::fmt::Display>(log: &mut Log, what: &str, waiting: &mut Waiting<T>) {
    waiting.retain_mut(|(to, sequence, pending)| match pending.try_take() {
        Some(outcome) => {
            log.line(&format!("{what} {to}{sequence} {outcome:?}"));
            false
        }
        None => true,
    });
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, socket, log, name, seed, ids] = &arguments[..] else { panic!("five arguments") };
    let action = nix::sys::signal::SigHandler::Handler(stop);
    // SAFETY: the handler only stores to an atomic.
    #[allow(unsafe_code, reason = "a signal handler")]
    unsafe {
        nix::sys::signal::signal(nix::sys::signal::SIGTERM, action).unwrap();
    }
    let mut random = Random(seed.parse::<u64>().unwrap() | 1);
    let ids: u64 = ids.parse().unwrap();
    let mut log = Log(File::options().create(true).append(true).open(log).unwrap());
    let config = RelayConfig::new()
        .socket(socket)
        .name(name)
        .queue(64)
        .timeout(Duration::from_secs(3))
        .join_timeout(Duration::from_secs(60));
    let relay = Relay::connect(config).wait().unwrap();
    let group = Id::new("jobs").unwrap();
    let membership: Membership = relay.join(&group);
    let mut own: BTreeMap<u64, Registration> = BTreeMap::new();
    let mut sequences: BTreeMap<u64, u64> = BTreeMap::new();
    let mut jobs = 0;
    let mut waiting: Waiting<String> = VecDeque::new();
    let mut waiting_jobs: Waiting<&str> = VecDeque::new();
    let mut slow_until = Instant::now();
    while !STOP.load(Ordering::SeqCst) {
        match random.below(100) {
            // A client comes, perhaps from another worker.
            0..3 => {
                let id = random.below(ids);
                if let Entry::Vacant(place) = own.entry(id) {
                    log.line(&format!("try {id}"));
                    let registering = relay.register(&Id::new(id.to_string()).unwrap());
                    if let Ok(registration) = registering.wait() {
                        log.line(&format!("reg {id} {}", registration.stamp()));
                        place.insert(registration);
                    }
                }
            }
            // A client leaves.
            3..5 => {
                let index = random.below(own.len().max(1) as u64) as usize;
                if let Some(&id) = own.keys().nth(index) {
                    own[&id].close();
                }
            }
            // The application is busy elsewhere and does not read.
            5 => slow_until = Instant::now() + Duration::from_millis(random.below(60)),
            // A flood to one recipient.
            6 => {
                let id = random.below(ids);
                for _ in 0..random.below(200) {
                    send(&relay, name, id, 0, &mut sequences, &mut waiting);
                }
            }
            7..20 => {
                jobs += 1;
                let options = Options::new().pick(match random.below(3) {
                    0 => Pick::RoundRobin,
                    1 => Pick::Random,
                    _ => Pick::Weighted,
                });
                let body = format!("{name} {jobs}");
                waiting_jobs.push_back(("", jobs, relay.send_any(&group, body, options)));
            }
            _ => {
                let filling = if random.below(40) == 0 { 100_000 } else { random.below(300) };
                send(&relay, name, random.below(ids), filling, &mut sequences, &mut waiting);
            }
        }
        outcomes(&mut log, "out", &mut waiting);
        outcomes(&mut log, "any", &mut waiting_jobs);
        if Instant::now() < slow_until {
            std::thread::sleep(Duration::from_micros(300));
            continue;
        }
        while let Some(message) = membership.try_recv() {
            received(&mut log, "job", &message);
        }
        own.retain(|id, registration| drain(&mut log, *id, registration));
        std::thread::sleep(Duration::from_micros(random.below(500)));
    }
    // What was acknowledged is received; nothing more is accepted.
    own.values().for_each(Registration::close);
    membership.leave();
    own.retain(|id, registration| drain(&mut log, *id, registration));
    assert!(own.is_empty());
    while let Some(message) = membership.try_recv() {
        received(&mut log, "job", &message);
    }
    for (to, sequence, pending) in waiting {
        log.line(&format!("out {to}{sequence} {:?}", pending.wait()));
    }
    for (to, sequence, pending) in waiting_jobs {
        log.line(&format!("any {to}{sequence} {:?}", pending.wait()));
    }
    log.line("bye");
}

fn send(
    relay: &Relay,
    name: &str,
    id: u64,
    filling: u64,
    sequences: &mut BTreeMap<u64, u64>,
    waiting: &mut Waiting<String>,
) {
    let sequence = sequences.entry(id).or_insert(0);
    *sequence += 1;
    let mut body = format!("{name} {sequence}").into_bytes();
    body.resize(body.len() + filling as usize, 0);
    let pending = relay.send(&Id::new(id.to_string()).unwrap(), body);
    waiting.push_back((format!("{id} "), *sequence, pending));
}

/// Receives what has arrived; false if the registration has ended.
fn drain(log: &mut Log, id: u64, registration: &Registration) -> bool {
    // Before the queue is emptied: what arrives after the end does not exist.
    let ended: Option<Ended> = registration.ended();
    while let Some(message) = registration.try_recv() {
        received(log, &format!("in {id}"), &message);
    }
    if ended.is_some() {
        log.line(&format!("end {id}"));
    }
    ended.is_none()
}
