//! The relay as a contender.

use std::collections::VecDeque;
use std::time::Instant;

use worker_sdk::relay::{Id, Outcome, Relay, RelayConfig};

use super::receiver::{Receiver, measure};
use super::{FLOOD, Sender, message};

/// Sends without an answer at a time.
const WINDOW: usize = 512;

fn connect(socket: &str) -> Relay {
    Relay::connect(RelayConfig::new().socket(socket).queue(65_536)).wait().unwrap()
}

fn id() -> Id {
    Id::new("receiver").unwrap()
}

/// Each message is acknowledged by the receiving worker's queue.
pub struct Acknowledged(Relay);

impl Acknowledged {
    pub fn new(socket: &str) -> Acknowledged {
        Acknowledged(connect(socket))
    }
}

impl Sender for Acknowledged {
    fn send(&mut self, message: &[u8]) {
        while self.0.send(&id(), message).wait() != Outcome::Delivered {}
    }

    fn flood(&mut self, size: usize, end: Instant) {
        let mut pending = VecDeque::new();
        // `link_bytes` is 8 MiB.
        let window = WINDOW.min(4 * 1024 * 1024 / size);
        while Instant::now() < end {
            pending.push_back(self.0.send(&id(), message(FLOOD, size)));
            if pending.len() >= window {
                let _ = pending.pop_front().unwrap().wait();
            }
        }
        for one in pending {
            let _ = one.wait();
        }
    }
}

/// The sender does not learn what became of a message.
pub struct Posted(Relay);

impl Posted {
    pub fn new(socket: &str) -> Posted {
        Posted(connect(socket))
    }
}

impl Sender for Posted {
    fn send(&mut self, message: &[u8]) {
        self.0.post(&id(), message);
    }

    fn flood(&mut self, size: usize, end: Instant) {
        while Instant::now() < end {
            self.0.post(&id(), message(FLOOD, size));
        }
    }

    fn send_surely(&mut self, message: &[u8]) {
        while self.0.send(&id(), message).wait() != Outcome::Delivered {}
    }
}

pub fn receive(socket: &str) {
    let relay = connect(socket);
    let inbox = relay.register(&id()).wait().unwrap();
    println!("ready");
    measure(|bytes| {
        let message = inbox.recv().wait().expect("a message");
        bytes.clear();
        bytes.extend_from_slice(message.bytes());
    });
}

/// Prints how long a publication to a group takes whose members are in another process.
pub fn fan(socket: &str, members: usize) {
    let _receiver = Receiver::start(&["receive", "fan", socket, &members.to_string()]);
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
    println!("  {members} members: p50 {:.1} µs, p99 {:.1} µs", at(50), at(99));
}

pub fn receive_fan(socket: &str, members: &str) {
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
