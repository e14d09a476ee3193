//! Two engines, a directory and a link of the test's own, which breaks at any byte.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

use std::collections::BTreeSet;

use dispatch_protocol::relay::{FromDirectory, Location};
use proptest::prelude::*;

use super::*;
use crate::relay::queue::{Budget, Capacity};
use crate::relay::slot::Pending;

pub(super) const A: u64 = 1;
pub(super) const B: u64 = 2;

pub(super) fn settings() -> Settings {
    Settings {
        window: 8,
        link_bytes: 4096,
        waiting: 4,
        recipient_bytes: 4096,
        waiting_bytes: 4096,
        routes: 16,
        requests: 16,
        group_ttl: 5000,
        timeout: 1000,
    }
}

/// The next record for the directory.
pub(super) fn told(engine: &mut Engine) -> Option<ToDirectory> {
    let record = ToDirectory::decode(engine.record()?).unwrap();
    engine.record_sent();
    Some(record)
}

pub(super) fn engine(own: u64) -> Engine {
    Engine::new(settings(), own, 1_000_000)
}

pub(super) fn queue<T: crate::relay::queue::Weigh>(items: usize) -> Arc<Queue<T>> {
    let budget = Arc::new(Budget::new(usize::MAX));
    Arc::new(Queue::new(Capacity { items, bytes: usize::MAX }, budget))
}

/// What is between two engines: bytes each way that have left one and not reached the other.
struct World {
    engines: [Engine; 2],
    /// To a, to b.
    wires: [Vec<u8>; 2],
    linked: bool,
    links: u64,
    stamp: u64,
    /// The registration at b: key, stamp, queue.
    registered: Option<(u32, u64, Arc<Queue<Message>>)>,
    old: Vec<Arc<Queue<Message>>>,
    sent: Vec<Pending<Outcome>>,
    now: u64,
}

impl World {
    fn new() -> World {
        let mut engines = [engine(A), engine(B)];
        engines.iter_mut().for_each(|engine| engine.welcomed(0, 7, 1 << 20, false));
        World {
            engines,
            wires: [Vec::new(), Vec::new()],
            linked: false,
            links: 0,
            stamp: 0,
            registered: None,
            old: Vec::new(),
            sent: Vec::new(),
            now: 0,
        }
    }

    /// The directory answers everything that it was asked.
    fn directory(&mut self) {
        for index in 0..2 {
            while let Some(record) = told(&mut self.engines[index]) {
                match record {
                    ToDirectory::Lookup { request, newest, ended, .. } => {
                        let later = |stamp| stamp > newest || (!ended && stamp == newest);
                        let places = self.registered.as_ref().filter(|one| later(one.1));
                        let location = |&(key, stamp, _): &(u32, u64, _)| Location {
                            host: 7,
                            member: B,
                            stamp,
                            key,
                        };
                        let places = places.map(location).into_iter().collect();
                        let found = FromDirectory::Found { request, places };
                        self.engines[index].directory_record(self.now, found);
                    }
                    ToDirectory::Register { request, .. } => {
                        self.stamp += 1;
                        let stamp = self.stamp;
                        let record = FromDirectory::Registered { request, stamp };
                        self.engines[index].directory_record(self.now, record);
                    }
                    ToDirectory::Connect { .. } => {
                        self.links += 1;
                        self.linked = true;
                        self.wires = [Vec::new(), Vec::new()];
                        self.engines[1].link_up(self.now, A, self.links, 1 << 20);
                        self.engines[0].link_up(self.now, B, self.links, 1 << 20);
                    }
                    _ => {}
                }
            }
            self.fire();
        }
    }

    fn fire(&mut self) {
        for engine in &mut self.engines {
            std::mem::take(&mut engine.fired).into_iter().for_each(Fired::fire);
        }
    }

    fn send(&mut self, size: usize) {
        let mut body = (self.sent.len() as u32).to_le_bytes().to_vec();
        body.resize(size + 4, 0);
        let (slot, pending) = Slot::new();
        let id = Id::new("x").unwrap();
        self.engines[0].send_to_id(self.now, &id, body.into(), Done::Send(slot));
        self.sent.push(pending);
    }

    /// An engine hands bytes to the kernel, and the other one receives some of what is on its way.
    fn pump(&mut self, from: usize, leave: usize, arrive: usize) {
        if !self.linked {
            return;
        }
        let (own, other) = if from == 0 { (A, B) } else { (B, A) };
        if let Some(peer) = self.engines[from].peers.get_mut(&other) {
            let count = peer.unsent().len().min(leave);
            self.wires[1 - from].extend_from_slice(&peer.unsent()[..count]);
            peer.advance(count);
        }
        use dispatch_protocol::relay::frame::Frame;
        let mut used = 0;
        while let Some(len) = Frame::len_of(&self.wires[1 - from][used..]) {
            if used + len > self.wires[1 - from].len() || used + len > arrive {
                break;
            }
            let frame = self.wires[1 - from][used..used + len].to_vec();
            used += len;
            self.engines[1 - from].frame(self.now, own, &frame).unwrap();
        }
        self.engines[1 - from].end_batch(own);
        self.wires[1 - from].drain(..used);
        self.fire();
    }

    fn break_link(&mut self) {
        if std::mem::take(&mut self.linked) {
            self.wires = [Vec::new(), Vec::new()];
            self.engines[0].link_down(self.now, B);
            self.engines[1].link_down(self.now, A);
            self.fire();
        }
    }

    fn register(&mut self) {
        self.unregister();
        let queue = queue(6);
        let (slot, _pending) = Slot::new();
        let id = Id::new("x").unwrap();
        let key = self.engines[1].register(&id, Arc::clone(&queue), slot);
        self.directory();
        self.registered = Some((key, self.stamp, queue));
    }

    fn unregister(&mut self) {
        if let Some((key, _, queue)) = self.registered.take() {
            self.engines[1].unregister(&Id::new("x").unwrap(), key);
            self.old.push(queue);
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Send(usize),
    Directory,
    Pump(usize, usize, usize),
    Break,
    Register,
    Unregister,
    Take,
    Tick(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let pump = || (0..2usize, 0..600usize, 0..600usize);
    prop_oneof![
        4 => (0..300usize).prop_map(Step::Send),
        3 => Just(Step::Directory),
        6 => pump().prop_map(|(from, leave, arrive)| Step::Pump(from, leave, arrive)),
        1 => Just(Step::Break),
        1 => Just(Step::Register),
        1 => Just(Step::Unregister),
        2 => Just(Step::Take),
        1 => (0..600u64).prop_map(Step::Tick),
    ]
}

proptest! {
    #[test]
    fn every_message_has_one_outcome_and_arrives_at_most_once(
        steps in proptest::collection::vec(step(), 1..200)
    ) {
        let mut world = World::new();
        let mut received: Vec<u32> = Vec::new();
        // Registrations in their order, so the order over all of them is checked.
        let mut take = |queue: &Queue<Message>| {
            while let Some(message) = queue.try_take() {
                received.push(u32::from_le_bytes(message.bytes()[..4].try_into().unwrap()));
            }
        };
        for step in steps {
            match step {
                Step::Send(size) => world.send(size),
                Step::Directory => world.directory(),
                Step::Pump(from, leave, arrive) => world.pump(from, leave, arrive),
                Step::Break => world.break_link(),
                Step::Register => world.register(),
                Step::Unregister => world.unregister(),
                Step::Take => {
                    world.old.drain(..).for_each(|queue| take(&queue));
                    if let Some((_, _, queue)) = &world.registered {
                        take(queue);
                    }
                }
                Step::Tick(time) => {
                    world.now += time;
                    let now = world.now;
                    world.engines.iter_mut().for_each(|engine| engine.tick(now));
                    world.fire();
                }
            }
        }
        // Everything comes to rest, by its timeout at the latest.
        for _ in 0..30 {
            world.directory();
            world.pump(0, usize::MAX, usize::MAX);
            world.pump(1, usize::MAX, usize::MAX);
        }
        world.now += 10_000;
        let now = world.now;
        world.engines.iter_mut().for_each(|engine| engine.tick(now));
        world.fire();
        world.old.drain(..).for_each(|queue| take(&queue));
        if let Some((_, _, queue)) = &world.registered {
            take(queue);
        }
        prop_assert!(received.windows(2).all(|pair| pair[0] < pair[1]), "{received:?}");
        let received: BTreeSet<u32> = received.into_iter().collect();
        let (mut delivered, mut others) = (0, 0);
        for (number, mut pending) in (0..).zip(std::mem::take(&mut world.sent)) {
            let outcome = pending.try_take();
            prop_assert!(outcome.is_some(), "message {} has no outcome", number);
            match outcome.unwrap() {
                Outcome::Delivered => {
                    delivered += 1;
                    prop_assert!(received.contains(&number), "message {} was acknowledged", number);
                }
                Outcome::Lost => others += 1,
                outcome => {
                    others += 1;
                    prop_assert!(!received.contains(&number), "message {} is {:?}", number, outcome);
                }
            }
        }
        let stats = world.engines[0].stats;
        prop_assert_eq!((stats.sent, stats.delivered), (delivered + others, delivered));
        // Nothing is left behind.
        prop_assert_eq!(world.engines[0].waiting_bytes, 0);
        prop_assert!(!world.engines[0].has_deadlines());
    }
}
