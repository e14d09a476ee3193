//! The workers that have joined: their sockets and scoreboards, and which of them the loop has to
//! look at.
//!
//! The counters `muted` and `gauge_readers` always agree with the table; only this module changes
//! them.

use std::collections::HashMap;
use std::os::fd::AsRawFd;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use dispatch_protocol::scoreboard::slot::SlotState;
use dispatch_protocol::wire::Token;
use mio::unix::SourceFd;
use mio::{Interest, Registry};

use super::gauges::Gauges;
use super::join::forget;
use super::token::{Key, Source};
use super::worker_io::WorkerIo;
use dispatcher_core::{Core, PoolId, ProcessId, Ticket, Time, WorkerId};

/// The longest time between two scans of all scoreboards. In between, the loop reads the
/// scoreboards of workers that the core expects changes from.
const SCAN_ALL: Duration = Duration::from_millis(10);

/// All workers, by `WorkerId::index`. The entries are side by side in memory, because every turn
/// reads all of them.
#[derive(Debug)]
pub(super) struct Workers {
    pub(super) table: Vec<Option<WorkerIo>>,
    /// Workers whose doorbells are out of the poll for a while.
    muted: usize,
    /// Workers of pools that score by gauges.
    gauge_readers: usize,
    /// The last scan of all scoreboards.
    scanned_all: Time,
    /// The last scan left some scoreboards out.
    scan_due: bool,
    /// Workers with connections gathered for them in this turn.
    pub(super) dirty: Vec<u32>,
    /// Reports of the closers: the channels of these workers are empty.
    pub(super) purged: Receiver<WorkerId>,
    /// The tokens of the processes that the dispatcher started.
    pub(super) tokens: HashMap<Token, ProcessId>,
    /// Buffers that are reused.
    pub(super) gauges_due: Vec<bool>,
    pub(super) seen: Vec<(Ticket, SlotState, Time)>,
}

impl Workers {
    pub(super) fn new(purged: Receiver<WorkerId>, tokens: HashMap<Token, ProcessId>) -> Workers {
        Workers {
            table: Vec::new(),
            muted: 0,
            gauge_readers: 0,
            scanned_all: Time(0),
            scan_due: false,
            dirty: Vec::new(),
            purged,
            tokens,
            gauges_due: Vec::new(),
            seen: Vec::new(),
        }
    }

    /// A process has ended: no worker can join with its token any more.
    pub(super) fn forget_tokens(&mut self, process: ProcessId) {
        self.tokens.retain(|_, other| *other != process);
    }

    /// One more than the highest index.
    pub(super) fn len(&self) -> u32 {
        self.table.len() as u32
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &WorkerIo> {
        self.table.iter().flatten()
    }

    pub(super) fn at(&self, index: u32) -> Option<&WorkerIo> {
        self.table.get(index as usize)?.as_ref()
    }

    pub(super) fn at_mut(&mut self, index: u32) -> Option<&mut WorkerIo> {
        self.table.get_mut(index as usize)?.as_mut()
    }

    pub(super) fn get(&self, worker: WorkerId) -> Option<&WorkerIo> {
        self.at(worker.index).filter(|io| io.id == worker)
    }

    pub(super) fn get_mut(&mut self, worker: WorkerId) -> Option<&mut WorkerIo> {
        self.at_mut(worker.index).filter(|io| io.id == worker)
    }

    /// The worker of a key, unless it has gone since.
    pub(super) fn by_key(&mut self, key: Key) -> Option<&mut WorkerIo> {
        self.at_mut(key.index).filter(|io| key.is(io.id.serial))
    }

    pub(super) fn insert(&mut self, io: WorkerIo) {
        let index = io.id.index as usize;
        if self.table.len() <= index {
            self.table.resize_with(index + 1, || None);
        }
        self.gauge_readers += usize::from(io.gauges.is_some());
        self.table[index] = Some(io);
    }

    /// Takes a worker out of the table, and its doorbell out of the poll.
    pub(super) fn remove(&mut self, registry: &Registry, worker: WorkerId) -> Option<WorkerIo> {
        let place = self.table.get_mut(worker.index as usize)?;
        let io = place.take_if(|io| io.id == worker)?;
        forget(registry, &io.lane.doorbell);
        self.muted -= usize::from(io.doorbell_limit.muted_until.is_some());
        self.gauge_readers -= usize::from(io.gauges.is_some());
        Some(io)
    }

    /// Whether any worker belongs to a pool that scores by gauges.
    pub(super) fn any_gauges(&self) -> bool {
        self.gauge_readers > 0
    }

    /// The gauges that this pool scores by may have changed.
    pub(super) fn replace_gauges(&mut self, core: &Core, pool: PoolId) {
        for io in self.table.iter_mut().flatten() {
            if core.pool_of_worker(io.id) == Some(pool) {
                io.gauges = Gauges::new(core, pool);
            }
        }
        self.gauge_readers = self.iter().filter(|io| io.gauges.is_some()).count();
    }

    /// Whether this turn scans all scoreboards, instead of those that the core expects changes
    /// from.
    pub(super) fn begin_scan(&mut self, now: Time) -> bool {
        let all = now - self.scanned_all >= SCAN_ALL;
        if all {
            self.scanned_all = now;
        }
        self.scan_due = !all;
        all
    }

    /// Notes that a worker has rung. A worker that has rung too often without a change of its
    /// scoreboard is muted: its doorbell leaves the poll, and the worker is returned.
    pub(super) fn rang(&mut self, registry: &Registry, key: Key, now: Time) -> Option<WorkerId> {
        let io = self.by_key(key)?;
        if !io.doorbell_limit.rang(now) {
            return None;
        }
        let id = io.id;
        forget(registry, &io.lane.doorbell);
        self.muted += 1;
        Some(id)
    }

    /// Puts the doorbells whose time has come back into the poll.
    pub(super) fn unmute(&mut self, registry: &Registry, now: Time) {
        if self.muted == 0 {
            return;
        }
        for io in self.table.iter_mut().flatten() {
            if io.doorbell_limit.unmute(now) {
                self.muted -= 1;
                let token = Source::Doorbell(Key::from(io.id)).token();
                let raw = io.lane.doorbell.as_raw_fd();
                // If this fails, the next turn for another reason reads the scoreboard.
                let _ = registry.register(&mut SourceFd(&raw), token, Interest::READABLE);
            }
        }
    }

    /// When the loop must wake for a muted doorbell or the scoreboards that the last scan left out.
    pub(super) fn deadline(&self, now: Time) -> Option<Time> {
        let unmute = (self.muted > 0).then(|| {
            let times = self.iter().filter_map(|io| io.doorbell_limit.muted_until);
            times.min().unwrap_or(now)
        });
        let scan = self.scan_due.then(|| self.scanned_all + SCAN_ALL);
        [unmute, scan].into_iter().flatten().min()
    }
}
