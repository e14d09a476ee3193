//! The queues of the slow lane, one for each owner: calls that block for one owner hold one thread
//! and delay no other owner.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use dispatch_protocol::scoreboard::{Scoreboard, slot};

use super::{Owner, Rubbish};
use dispatcher_core::WorkerId;

/// A job that may block.
#[derive(Debug)]
pub(super) enum Job {
    /// A close that may linger, and the slot to mark RELEASED afterwards.
    Close(OwnedFd, Option<Slot>),
    End(OwnedFd, Option<Arc<[u8]>>),
    Purge(WorkerId, Arc<OwnedFd>, u32),
    Drop(Box<dyn Rubbish>),
}

/// A slot of a scoreboard, and its sequence number.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) board: Arc<Scoreboard>,
    pub(super) slot: u32,
    pub(super) seq: u64,
}

impl Slot {
    /// Marks the slot RELEASED after the close.
    pub(super) fn release(&self) {
        if let Some(slot) = self.board.slot(self.slot) {
            slot::release(slot, self.seq);
        }
    }
}

/// A position in the order of service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Turn(u8, u64);

#[derive(Debug, Default)]
struct Queue {
    jobs: VecDeque<Job>,
    /// A thread works for this owner.
    engaged: bool,
}

/// All queues.
#[derive(Debug, Default)]
pub(super) struct Slow {
    queues: BTreeMap<Turn, Queue>,
    /// The owner that was served last.
    last: Option<Turn>,
    others: u64,
    /// Jobs waiting.
    waiting: usize,
    pub(super) threads: usize,
    pub(super) idle: usize,
}

impl Slow {
    pub(super) fn push(&mut self, owner: Owner, job: Job) {
        let turn = match owner {
            Owner::Worker(serial) => Turn(0, serial),
            Owner::Other => {
                self.others += 1;
                Turn(1, self.others)
            }
        };
        self.queues.entry(turn).or_default().jobs.push_back(job);
        self.waiting += 1;
    }

    /// The next job of an owner without a thread; the owners take turns.
    pub(super) fn take(&mut self) -> Option<(Turn, Job)> {
        let after = self.last.map_or(std::ops::Bound::Unbounded, std::ops::Bound::Excluded);
        let later = self.queues.range((after, std::ops::Bound::Unbounded));
        let turn = later
            .chain(self.queues.iter())
            .find(|(_, queue)| !queue.engaged && !queue.jobs.is_empty())
            .map(|(turn, _)| *turn)?;
        let queue = self.queues.get_mut(&turn)?;
        let job = queue.jobs.pop_front()?;
        queue.engaged = true;
        self.last = Some(turn);
        self.waiting -= 1;
        Some((turn, job))
    }

    /// The thread for this owner is free again.
    pub(super) fn done(&mut self, turn: Turn) {
        if let Some(queue) = self.queues.get_mut(&turn) {
            queue.engaged = false;
            if queue.jobs.is_empty() {
                self.queues.remove(&turn);
            }
        }
    }

    /// Whether a thread could begin a job.
    pub(super) fn is_ready(&self) -> bool {
        self.waiting > 0 && self.queues.values().any(|q| !q.engaged && !q.jobs.is_empty())
    }

    pub(super) fn has_work(&self) -> bool {
        self.waiting > 0
    }

    /// All jobs that no thread has begun.
    pub(super) fn take_all(&mut self) -> Vec<Job> {
        self.waiting = 0;
        let mut all = Vec::new();
        for queue in self.queues.values_mut() {
            all.extend(queue.jobs.drain(..));
        }
        self.queues.retain(|_, queue| queue.engaged);
        all
    }
}
