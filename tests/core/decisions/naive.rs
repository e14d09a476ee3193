//! The naive model's worker, and the operations on workers.

use proptest::prelude::*;

use super::*;

/// Slots of each worker.
pub(super) const SLOTS: usize = 3;

/// The worker's change of a slot.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Word {
    Sent,
    Taken,
    Lost,
    Bad,
}

#[derive(Clone, Debug)]
pub(super) struct Out {
    pub(super) ticket: Ticket,
    pub(super) conn: Option<u64>,
    pub(super) word: Word,
    pub(super) revoking: bool,
}

#[derive(Clone, Debug)]
pub(super) struct Naive {
    pub(super) id: WorkerId,
    pub(super) weight: u64,
    /// By an operator.
    pub(super) weight_set: bool,
    /// By the worker itself.
    pub(super) paused: bool,
    pub(super) max: u64,
    pub(super) base: u64,
    pub(super) taken: u64,
    pub(super) finished: u64,
    pub(super) out: Vec<Out>,
    pub(super) draining: bool,
    pub(super) gone: bool,
    pub(super) blocked: Option<Time>,
    pub(super) starved: Option<Time>,
}

impl Naive {
    pub(super) fn untaken(&self) -> u64 {
        self.out.iter().filter(|out| out.conn.is_some()).count() as u64
    }

    pub(super) fn load(&self) -> u64 {
        self.base + self.taken + self.untaken() - self.finished
    }

    pub(super) fn usable(&self) -> bool {
        !self.draining && !self.gone
    }

    pub(super) fn update(&mut self, weight: u16, max: u32, paused: bool) -> WorkerId {
        if self.usable() {
            if !self.weight_set {
                self.weight = u64::from(weight);
            }
            (self.max, self.paused) = (u64::from(max), paused);
        }
        self.id
    }

    /// Whether a connection may be sent to it.
    pub(super) fn is_open(&self) -> bool {
        self.usable()
            && !self.paused
            && self.load() < self.max
            && self.out.len() < SLOTS
            && self.blocked.is_none()
            && self.starved.is_none()
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum At {
    Queued,
    InFlight(u64),
    Served,
    Closed,
}

#[derive(Clone, Debug)]
pub(super) enum Op {
    Join {
        weight: u16,
        max: u32,
        priority: u16,
    },
    Weight(usize, u16),
    /// The worker's update: weight, maximum, pause.
    Update(usize, u16, u32, bool),
    Goodbye(usize),
    Leave(usize),
    Accept(u8),
    ClientGone(usize),
    /// The worker changes one of its slots; the flag says whether the core reads it at once.
    Touch(usize, usize, Word, bool),
    Scan(usize),
    Finish(usize, u64),
    Fail(usize, usize, SendFailure),
    Outcome,
    Wait(u64),
}

pub(super) fn op() -> impl Strategy<Value = Op> {
    let worker = 0..6usize;
    let word = prop_oneof![
        12 => Just(Word::Taken),
        2 => Just(Word::Lost),
        1 => Just(Word::Bad)
    ];
    let failure = prop_oneof![
        4 => Just(SendFailure::Full),
        1 => Just(SendFailure::Closed),
        1 => Just(SendFailure::Resources)
    ];
    prop_oneof![
        3 => (1..5u16, 1..7u32, 0..3u16)
            .prop_map(|(weight, max, priority)| Op::Join { weight, max, priority }),
        1 => (worker.clone(), 1..5u16).prop_map(|(w, weight)| Op::Weight(w, weight)),
        2 => (worker.clone(), 1..5u16, 1..7u32, any::<bool>())
            .prop_map(|(w, weight, max, paused)| Op::Update(w, weight, max, paused)),
        1 => worker.clone().prop_map(Op::Goodbye),
        1 => worker.clone().prop_map(Op::Leave),
        16 => (0..4u8).prop_map(Op::Accept),
        1 => (0..50usize).prop_map(Op::ClientGone),
        12 => (worker.clone(), 0..SLOTS, word, any::<bool>())
            .prop_map(|(w, slot, word, read)| Op::Touch(w, slot, word, read)),
        4 => worker.clone().prop_map(Op::Scan),
        8 => (worker.clone(), 0..6u64).prop_map(|(w, n)| Op::Finish(w, n)),
        2 => (worker, 0..SLOTS, failure).prop_map(|(w, slot, why)| Op::Fail(w, slot, why)),
        8 => Just(Op::Outcome),
        4 => (1..150u64).prop_map(Op::Wait),
    ]
}
