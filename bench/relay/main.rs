//! Messages between two processes: the relay beside Redis pub/sub and NATS, and what carries them.
//!
//! ```text
//! relay-bench compare [ROUNDS] [SECONDS]    starts the servers itself; all contenders in turn
//! relay-bench transports [ROUNDS]           socket pairs beside a ring in shared memory
//! ```
//!
//! Each contender has its receiver in a second process. Latency is one way, from just before the
//! send to the application's receive, of single messages with a pause of 100 µs between them. The
//! rate is what the receiver gets from one sender that does not pause. Ratios are made in each
//! round, because other programs on the machine change both.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a measurement has nothing to go on with"
)]
#![allow(clippy::print_stdout, reason = "it prints figures")]

#[cfg(feature = "nats")]
mod nats;
mod receiver;
mod redis;
mod relay;
mod servers;
mod table;
mod transports;

use std::time::{Duration, Instant};

use receiver::Receiver;
use servers::Servers;
use table::{Figures, Samples};

/// Messages of which the latency is measured.
const LATENCIES: usize = 5_000;

const SIZES: [usize; 3] = [64, 1024, 65_536];

/// The first byte of a message.
const TIMED: u8 = 1;
const FLOOD: u8 = 2;
const END_TIMED: u8 = 3;
const END_FLOOD: u8 = 4;
const STOP: u8 = 5;

/// Nanoseconds of a clock that all processes share.
fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

fn message(kind: u8, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size.max(16)];
    bytes[0] = kind;
    bytes[8..16].copy_from_slice(&now().to_le_bytes());
    bytes
}

/// The sending end of a contender.
trait Sender {
    /// Sends one message, and waits for the answer that the contender gives, if it gives one.
    fn send(&mut self, message: &[u8]);

    /// Sends messages of this size without pauses until `end`, and has handed over all of them.
    fn flood(&mut self, size: usize, end: Instant);

    /// Sends until it has certainly arrived.
    fn send_surely(&mut self, message: &[u8]) {
        self.send(message);
    }
}

fn measure(
    sender: &mut dyn Sender,
    receiver: &mut Receiver,
    size: usize,
    time: Duration,
) -> Figures {
    for _ in 0..LATENCIES {
        sender.send(&message(TIMED, size));
        std::thread::sleep(Duration::from_micros(100));
    }
    sender.send_surely(&message(END_TIMED, 16));
    let [p50, p99] = receiver.numbers();
    sender.flood(size, Instant::now() + time);
    sender.send_surely(&message(END_FLOOD, 16));
    let [rate] = receiver.numbers();
    sender.send_surely(&message(STOP, 16));
    Figures { p50, p99, rate }
}

fn one(name: &str, servers: &Servers, size: usize, time: Duration) -> Figures {
    let (kind, address) = servers.of(name);
    let mut receiver = Receiver::start(&["receive", kind, &address]);
    let mut sender: Box<dyn Sender> = match name {
        "relay" => Box::new(relay::Acknowledged::new(&address)),
        "relay-post" => Box::new(relay::Posted::new(&address)),
        "redis" => Box::new(redis::Redis::new(&address)),
        #[cfg(feature = "nats")]
        "nats" => Box::new(nats::Nats::new(&address, false)),
        #[cfg(feature = "nats")]
        "nats-request" => Box::new(nats::Nats::new(&address, true)),
        other => panic!("no contender {other}"),
    };
    measure(&mut *sender, &mut receiver, size, time)
}

/// What they are called in the table, and whether the sender learns of the arrival.
const CONTENDERS: &[(&str, &str)] = &[
    ("relay", "relay, acknowledged"),
    ("relay-post", "relay, `post`"),
    ("redis", "Redis pub/sub"),
    #[cfg(feature = "nats")]
    ("nats", "NATS publish"),
    #[cfg(feature = "nats")]
    ("nats-request", "NATS request, acknowledged"),
];

fn compare(rounds: usize, seconds: f64) {
    let servers = Servers::start();
    for size in SIZES {
        let mut samples: Vec<Samples> = CONTENDERS.iter().map(|_| Samples::default()).collect();
        for round in 0..rounds {
            // Each goes first as often as the others.
            for turn in 0..CONTENDERS.len() {
                let index = (round + turn) % CONTENDERS.len();
                let time = Duration::from_secs_f64(seconds);
                samples[index].0.push(one(CONTENDERS[index].0, &servers, size, time));
            }
        }
        let redis = CONTENDERS.iter().position(|(name, _)| *name == "redis").unwrap();
        table::print(size, CONTENDERS, &samples, redis);
    }
    println!("\nfan-out of 64 B, until all members have acknowledged:");
    for members in [1, 10, 1000] {
        relay::fan(&servers.of("relay").1, members);
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let number = |index: usize, default: &str| -> f64 {
        arguments.get(index).unwrap_or(&default).parse().expect("a number")
    };
    match arguments[..] {
        ["compare", ..] => compare(number(1, "5") as usize, number(2, "1")),
        ["transports", ..] => transports::compare(number(1, "5") as usize),
        ["receive", "relay", socket] => relay::receive(socket),
        ["receive", "redis", socket] => redis::receive(socket),
        #[cfg(feature = "nats")]
        ["receive", "nats", address] => nats::receive(address),
        ["receive", "fan", socket, members] => relay::receive_fan(socket, members),
        ["receive", "transport", name] => transports::receive(name),
        _ => println!("see the top of bench/relay/main.rs"),
    }
}
