//! Messages between two processes: the relay beside Redis pub/sub.
//!
//! ```text
//! relay-bench relay SOCKET SIZE SECONDS      a directory serves SOCKET
//! relay-bench redis SOCKET SIZE SECONDS      redis-server serves SOCKET (unixsocket)
//! relay-bench fan SOCKET MEMBERS             to a group whose members are in another process
//! ```
//!
//! It starts its receiver as a second process. Latency is one way, from just before the send to the
//! application's receive, at one message in about 150 µs; the rate is what the receiver gets.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a measurement has nothing to go on with"
)]
#![allow(clippy::print_stdout, reason = "it prints figures")]

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use worker_sdk::relay::{Id, Outcome, Relay, RelayConfig};

const LATENCIES: usize = 10_000;
const WINDOW: usize = 512;

/// The first byte of a message.
const TIMED: u8 = 1;
const FLOOD: u8 = 2;
const END_TIMED: u8 = 3;
const END_FLOOD: u8 = 4;
const STOP: u8 = 5;

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

/// Prints figures until it is told to stop.
fn measure(mut next: impl FnMut(&mut Vec<u8>)) {
    let mut bytes = Vec::new();
    let (mut times, mut count, mut first, mut last) = (Vec::new(), 0u64, 0, 0);
    loop {
        next(&mut bytes);
        match bytes[0] {
            TIMED => {
                let sent = u64::from_le_bytes(bytes[8..16].try_into().unwrap());
                times.push(now().saturating_sub(sent));
            }
            END_TIMED => {
                times.sort_unstable();
                let at = |part: usize| times[times.len() * part / 100] as f64 / 1000.0;
                println!("p50 {:.1} p99 {:.1} µs ({} messages)", at(50), at(99), times.len());
                times.clear();
            }
            FLOOD => {
                last = now();
                first = if count == 0 { last } else { first };
                count += 1;
            }
            END_FLOOD => {
                println!("{:.0} messages/s", count as f64 * 1e9 / (last - first).max(1) as f64);
                count = 0;
            }
            _ => return,
        }
    }
}

struct Receiver {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
}

impl Receiver {
    fn start(arguments: &[&str]) -> Receiver {
        let mut command = Command::new(std::env::current_exe().unwrap());
        let mut child = command.args(arguments).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        let mut receiver = Receiver { child, lines };
        assert_eq!(receiver.line(), "ready");
        receiver
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn connect(socket: &str) -> Relay {
    Relay::connect(RelayConfig::new().socket(socket).queue(65_536)).wait().unwrap()
}

fn relay(socket: &str, size: usize, seconds: u64) {
    let mut receiver = Receiver::start(&["receive-relay", socket]);
    let relay = connect(socket);
    let id = Id::new("receiver").unwrap();
    let delivered = |kind| while relay.send(&id, message(kind, 16)).wait() != Outcome::Delivered {};
    for acknowledged in [true, false] {
        for _ in 0..LATENCIES {
            if acknowledged {
                assert_eq!(relay.send(&id, message(TIMED, size)).wait(), Outcome::Delivered);
            } else {
                relay.post(&id, message(TIMED, size));
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        delivered(END_TIMED);
        let with = if acknowledged { "with" } else { "without" };
        println!("relay {size} B {with} acknowledgement: {}", receiver.line());
        let end = Instant::now() + Duration::from_secs(seconds);
        let mut pending = VecDeque::new();
        let mut refused = 0;
        while Instant::now() < end {
            if acknowledged {
                pending.push_back(relay.send(&id, message(FLOOD, size)));
                if pending.len() >= WINDOW {
                    refused +=
                        usize::from(pending.pop_front().unwrap().wait() != Outcome::Delivered);
                }
            } else {
                relay.post(&id, message(FLOOD, size));
            }
        }
        for one in pending {
            let _ = one.wait();
        }
        delivered(END_FLOOD);
        println!("relay {size} B {with} acknowledgement: {} ({refused} refused)", receiver.line());
    }
    delivered(STOP);
}

fn fan(socket: &str, members: usize) {
    let _receiver = Receiver::start(&["receive-fan", socket, &members.to_string()]);
    let relay = connect(socket);
    let group = Id::new("group").unwrap();
    while relay.publish(&group, [0; 64]).wait().delivered != members as u32 {}
    let mut times: Vec<u128> = (0..2000)
        .map(|_| {
            let start = Instant::now();
            assert_eq!(relay.publish(&group, [0; 64]).wait().delivered, members as u32);
            start.elapsed().as_nanos()
        })
        .collect();
    times.sort_unstable();
    let at = |part: usize| times[times.len() * part / 100] as f64 / 1000.0;
    println!("fan-out to {members}, all acknowledged: p50 {:.1} p99 {:.1} µs", at(50), at(99));
}

fn publish(out: &mut Vec<u8>, message: &[u8]) {
    out.extend_from_slice(b"*3\r\n$7\r\nPUBLISH\r\n$1\r\nc\r\n");
    out.extend_from_slice(format!("${}\r\n", message.len()).as_bytes());
    out.extend_from_slice(message);
    out.extend_from_slice(b"\r\n");
}

fn redis(socket: &str, size: usize, seconds: u64) {
    let mut receiver = Receiver::start(&["receive-redis", socket]);
    let stream = UnixStream::connect(socket).unwrap();
    let mut replies = BufReader::new(stream.try_clone().unwrap());
    let mut stream = stream;
    let mut reply = String::new();
    let mut read_replies = |count: usize| {
        for _ in 0..count {
            reply.clear();
            replies.read_line(&mut reply).unwrap();
        }
    };
    let mut out = Vec::new();
    for _ in 0..LATENCIES {
        out.clear();
        publish(&mut out, &message(TIMED, size));
        stream.write_all(&out).unwrap();
        read_replies(1);
        std::thread::sleep(Duration::from_micros(100));
    }
    let mut one = |kind, stream: &mut UnixStream| {
        out.clear();
        publish(&mut out, &message(kind, 16));
        stream.write_all(&out).unwrap();
    };
    one(END_TIMED, &mut stream);
    read_replies(1);
    println!("redis {size} B: {}", receiver.line());
    let end = Instant::now() + Duration::from_secs(seconds);
    // Batches, as a pipelining client makes them.
    let mut batch = Vec::new();
    while Instant::now() < end {
        batch.clear();
        (0..64).for_each(|_| publish(&mut batch, &message(FLOOD, size)));
        stream.write_all(&batch).unwrap();
        read_replies(64);
    }
    one(END_FLOOD, &mut stream);
    read_replies(1);
    println!("redis {size} B: {}", receiver.line());
    one(STOP, &mut stream);
}

fn receive_redis(socket: &str) {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.write_all(b"*2\r\n$9\r\nSUBSCRIBE\r\n$1\r\nc\r\n").unwrap();
    let mut input = BufReader::with_capacity(256 * 1024, stream);
    let mut line = String::new();
    let mut read_line = |input: &mut BufReader<UnixStream>| {
        line.clear();
        input.read_line(&mut line).unwrap();
        line.trim().to_owned()
    };
    (0..6).for_each(|_| drop(read_line(&mut input)));
    println!("ready");
    measure(|bytes| {
        // *3, $7, message, $1, c, $len, payload.
        (0..5).for_each(|_| drop(read_line(&mut input)));
        let len: usize = read_line(&mut input)[1..].parse().unwrap();
        bytes.resize(len + 2, 0);
        input.read_exact(bytes).unwrap();
    });
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["relay", socket, size, seconds] => {
            relay(socket, size.parse().unwrap(), seconds.parse().unwrap());
        }
        ["redis", socket, size, seconds] => {
            redis(socket, size.parse().unwrap(), seconds.parse().unwrap());
        }
        ["fan", socket, members] => fan(socket, members.parse().unwrap()),
        ["receive-redis", socket] => receive_redis(socket),
        ["receive-relay", socket] => {
            let relay = connect(socket);
            let inbox = relay.register(&Id::new("receiver").unwrap()).wait().unwrap();
            println!("ready");
            measure(|bytes| {
                let message = inbox.recv().wait().expect("a message");
                bytes.clear();
                bytes.extend_from_slice(message.bytes());
            });
        }
        ["receive-fan", socket, members] => {
            let relay = connect(socket);
            let group = Id::new("group").unwrap();
            let count: usize = members.parse().unwrap();
            let members: Vec<_> = (0..count).map(|_| relay.join(&group)).collect();
            println!("ready");
            loop {
                for member in &members {
                    member.recv().wait();
                }
            }
        }
        _ => println!("see the top of bench/relay.rs"),
    }
}
