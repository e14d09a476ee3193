//! The hot thread's part for one worker: its process, its slot, and the worker that the core has
//! for it.

use std::net::SocketAddr;
use std::time::Duration;

use super::super::EventLoop;
use super::{Connected, Holder, Slot, SlotIo, SteerCommand};
use crate::background::logger::{quoted, value};
use dispatcher_core::{Departure, ProcessId, SteerCounts, SteerJoin, SteerSettings, WorkerId};

impl EventLoop {
    // --- processes -------------------------------------------------------------------------

    /// A process of a steered pool is to be started: it gets an address or listeners first. False
    /// if the pool is not steered.
    pub(in crate::event_loop) fn prepare_process(&mut self, process: ProcessId) -> bool {
        let resources = self.pools.get(usize::from(process.pool.0));
        if resources.is_none_or(|pool| pool.steer.is_none()) {
            return false;
        }
        if !self.is_steered(process.pool) {
            self.not_started(process, "the kernel cannot choose the workers of its pool");
            return true;
        }
        let (pool, holder) = (process.pool, Holder::Process(process));
        self.steers.send(SteerCommand::Prepare { pool, holder, address: None, adopt: None });
        true
    }

    /// Where a process of a steered pool listens.
    pub(in crate::event_loop) fn steered_address(&self, process: ProcessId) -> Option<SocketAddr> {
        let slot = self.steers.of_process(process)?;
        self.steers.slots.get(&slot).map(|io| io.address)
    }

    /// Makes a connection to the worker of a process that shares its port.
    pub(in crate::event_loop) fn connect_directed(
        &mut self,
        process: ProcessId,
        connected: Connected,
    ) {
        if let Some(slot) = self.steers.of_process(process) {
            self.steers.send(SteerCommand::Connect(slot, connected));
        }
    }

    /// A process runs.
    pub(in crate::event_loop) fn steered_process_runs(&mut self, process: ProcessId, pid: i32) {
        let Some(slot) = self.steers.of_process(process) else { return };
        if let Some(io) = self.steers.slots.get_mut(&slot) {
            io.pid = Some(pid);
        }
        self.steers.send(SteerCommand::Runs(slot, pid));
        self.join_slot(slot);
    }

    /// A process has ended, or could not be started.
    pub(in crate::event_loop) fn steered_process_ended(&mut self, process: ProcessId) {
        self.steers.expected.remove(&Holder::Process(process));
        if let Some(slot) = self.steers.of_process(process) {
            self.lose_slot(slot, Departure::Died);
        }
    }

    // --- workers ---------------------------------------------------------------------------

    /// Nothing holds a slot any more.
    pub(super) fn lose_slot(&mut self, slot: Slot, why: Departure) {
        let Some(io) = self.steers.slots.remove(&slot) else { return };
        if let Some(worker) = io.worker {
            self.core.leave(self.now, worker, why);
        }
        let returns = match io.holder {
            Holder::Process(process) => self.returns(process),
            Holder::Member(..) => false,
        };
        self.steers.send(SteerCommand::Free { slot, returns });
        if self.core.is_pool_retired(slot.pool) {
            self.close_pool(slot.pool);
        }
    }

    /// Whether another process follows in the place of one that has ended.
    fn returns(&self, process: ProcessId) -> bool {
        let wanted = self.core.pool_settings(process.pool).map_or(0, |it| it.processes);
        !self.core.is_pool_retired(process.pool) && process.place < wanted
    }

    /// The core has forgotten a worker.
    pub(in crate::event_loop) fn forget_steered(&mut self, worker: WorkerId) {
        let Some(slot) = self.steers.workers.remove(&worker) else { return };
        if let Some(io) = self.steers.slots.get_mut(&slot)
            && io.worker == Some(worker)
        {
            io.worker = None;
        }
    }

    /// The core has decided how the kernel is to treat a worker.
    pub(in crate::event_loop) fn steer(&mut self, worker: WorkerId, settings: SteerSettings) {
        let Some(&slot) = self.steers.workers.get(&worker) else { return };
        // Decided before the slot was freed, or before another worker got it: what is written now
        // would stay, or would be about that one.
        let io = self.steers.slots.get(&slot);
        if io.is_none_or(|io| io.worker != Some(worker)) {
            return;
        }
        let pool = self.steers.pools.get_mut(&slot.pool);
        let Some(opened) = pool.and_then(|pool| pool.opened.as_mut()) else { return };
        if let Some(io) = self.steers.slots.get_mut(&slot) {
            io.settings = Some(settings);
        }
        if opened.hashed.is_some() {
            return self.end_hashed(slot);
        }
        if let Err(error) = opened.set(slot.number, settings) {
            self.pool_failed(slot.pool, error);
        }
    }

    /// Ends a process that is not wanted any more, and that the kernel's hash would go on to give
    /// connections: only the process itself can close its listener. It finishes its connections.
    fn end_hashed(&self, slot: Slot) {
        let Some(io) = self.steers.slots.get(&slot) else { return };
        let Holder::Process(process) = io.holder else { return };
        if self.core.wants_process(process) || self.leaves(slot.pool) {
            return;
        }
        let Some(settings) = self.core.pool_settings(slot.pool) else { return };
        let supervision = &settings.supervision;
        let drain = supervision.drain_timeout.unwrap_or_default();
        let timeout = supervision.stop_timeout.max(drain);
        self.side.spawner.stop_process(process, Duration::ZERO, timeout);
    }

    /// The core has decided that the queue of a worker is to be moved.
    pub(in crate::event_loop) fn move_queue(&mut self, worker: WorkerId) {
        if let Some(&slot) = self.steers.workers.get(&worker)
            && self.steers.hashed(slot.pool).is_none()
        {
            self.steers.send(SteerCommand::MoveQueue(slot));
        }
    }

    /// The thread has written settings of a worker, maybe older ones.
    pub(super) fn steer_again(&mut self, slot: Slot) {
        let Some(io) = self.steers.slots.get(&slot) else { return };
        if let (Some(worker), Some(settings)) = (io.worker, io.settings) {
            self.steer(worker, settings);
        }
    }

    /// The worker of a slot joins, if it listens and its process is known.
    pub(super) fn join_slot(&mut self, slot: Slot) {
        let Some(io) = self.steers.slots.get(&slot) else { return };
        let (Some(counts), Some(pid), None) = (io.listens, io.pid, io.worker) else { return };
        let Some(join) = self.steer_join(slot, io, pid, counts) else { return };
        match self.core.join_steered(self.now, &join) {
            Ok(worker) => {
                self.steers.workers.insert(worker, slot);
                if let Some(io) = self.steers.slots.get_mut(&slot) {
                    io.worker = Some(worker);
                }
            }
            Err(refusal) => {
                log::warn!(
                    "event=worker_refused pool={} name={} pid={pid} reason={}",
                    self.core.pool_name(slot.pool),
                    value(&join.name),
                    quoted(&refusal.reason)
                );
            }
        }
    }

    fn steer_join(
        &self,
        slot: Slot,
        io: &SlotIo,
        pid: i32,
        counts: SteerCounts,
    ) -> Option<SteerJoin> {
        let pool = slot.pool;
        let join = match io.holder {
            Holder::Process(process) => SteerJoin {
                pool,
                name: format!("{}-{}", self.core.pool_name(pool), process.place + 1),
                pid,
                process: Some(process),
                weight: 1,
                priority: 0,
                counts,
            },
            Holder::Member(_, position) => {
                let steer = self.pools.get(usize::from(pool.0))?.steer.as_ref()?;
                let member = steer.members.get(position as usize)?;
                SteerJoin {
                    pool,
                    name: member.name.clone(),
                    pid,
                    process: None,
                    weight: member.weight,
                    priority: member.priority,
                    counts,
                }
            }
        };
        Some(join)
    }
}
