//! Draining the whole host: every worker of every pool, also those that join later.
//!
//! A drain of the host can be announced first: those that choose between hosts are told at once
//! (advice, HAProxy's agent check), and the workers get connections until the announcement is over.
//! From then on no worker is usable and no process is started, until [`Core::resume_host`]. A
//! change of the configuration does not end the drain; the end of the dispatcher does.

use std::time::Duration;

use super::types::*;
use super::{Core, Event};

/// A drain of the host in progress.
#[derive(Clone, Copy, Debug)]
pub(super) struct HostDrain {
    since: Time,
    /// When the workers drain.
    pub(super) begins: Time,
    /// Whether they do.
    pub(super) begun: bool,
    /// When the workers end the connections that remain.
    deadline: Option<Time>,
}

/// How far a drain of the host has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostState {
    /// Others are told, and the workers still get connections.
    Announced,
    /// The workers get no connections.
    Draining,
    /// No worker has a connection, and no client waits for one.
    Drained,
}

impl HostState {
    /// Every state.
    pub const ALL: [HostState; 3] = [HostState::Announced, HostState::Draining, HostState::Drained];

    /// The name in the status.
    pub fn name(self) -> &'static str {
        match self {
            HostState::Announced => "announced",
            HostState::Draining => "draining",
            HostState::Drained => "drained",
        }
    }
}

/// A drain of the host, for the status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostDrainSnapshot {
    /// How far it has come.
    pub state: HostState,
    /// When it was asked for.
    pub since: Time,
    /// When the workers get no more connections.
    pub begins: Time,
    /// When the workers end the connections that remain.
    pub deadline: Option<Time>,
    /// Live connections of all workers, and clients that wait for one.
    pub connections: u64,
}

impl Core {
    /// Drains the host after `announce`. `deadline` after that the workers end the connections that
    /// remain. A second call can only begin the drain earlier; it replaces the deadline, and
    /// without one it keeps the earlier.
    pub fn drain_host(&mut self, now: Time, announce: Duration, deadline: Option<Duration>) {
        let before = self.host_drain;
        let wanted = now + announce;
        let begins = before.map_or(wanted, |drain| drain.begins.min(wanted));
        let deadline = deadline.map(|wait| begins.max(now) + wait);
        let deadline = deadline.or(before.and_then(|drain| drain.deadline));
        let since = before.map_or(now, |drain| drain.since);
        let begun = before.is_some_and(|drain| drain.begun);
        self.host_drain = Some(HostDrain { since, begins, begun, deadline });
        self.event(Event::HostDraining {
            live: self.connections_here(),
            after: begins - now,
            deadline: deadline.map(|deadline| deadline - now),
        });
        if begins <= now {
            self.begin_host_drain(now);
        }
        self.after_all(now);
    }

    /// Ends the drain of the host, and resumes every worker that can be resumed. Processes that
    /// were not started meanwhile are started.
    pub fn resume_host(&mut self, now: Time) {
        if self.host_drain.take().is_some() {
            self.event(Event::HostResumed);
        }
        let workers: Vec<WorkerId> = self.workers().collect();
        for worker in workers {
            // Workers that leave or are surplus stay as they are.
            let _ = self.resume_worker(now, worker);
        }
        for p in 0..self.pools.len() {
            self.hold_processes(now, p, false);
        }
        self.after_all(now);
    }

    /// The drain of the host, if there is one.
    pub fn host_drain(&self) -> Option<HostDrainSnapshot> {
        let drain = self.host_drain?;
        let connections = self.connections_here();
        let state = match (drain.begun, connections) {
            (false, _) => HostState::Announced,
            (true, 0) => HostState::Drained,
            (true, _) => HostState::Draining,
        };
        let HostDrain { since, begins, deadline, .. } = drain;
        Some(HostDrainSnapshot { state, since, begins, deadline, connections })
    }

    fn connections_here(&self) -> u64 {
        let loads = self.workers.iter().filter(|worker| worker.state != State::Gone);
        let loads = loads.map(super::worker::Worker::load);
        loads.fold(self.totals.queued, u64::saturating_add)
    }

    /// Whether the workers drain because the host does.
    pub(super) fn host_drains(&self) -> bool {
        self.host_drain.is_some_and(|drain| drain.begun)
    }

    /// When the announcement is over.
    pub(super) fn host_due(&self) -> Option<Time> {
        self.host_drain.filter(|drain| !drain.begun).map(|drain| drain.begins)
    }

    /// Begins the drain of the workers when the announcement is over.
    pub(super) fn tick_host(&mut self, now: Time) {
        if self.host_due().is_some_and(|due| due <= now) {
            self.begin_host_drain(now);
        }
    }

    fn begin_host_drain(&mut self, now: Time) {
        for p in 0..self.pools.len() {
            self.hold_processes(now, p, true);
        }
        let deadline = self.host_drain.and_then(|drain| drain.deadline);
        let workers: Vec<WorkerId> = self.workers().collect();
        for worker in workers {
            match self.find(worker).is_some_and(|w| self.workers[w].is_usable()) {
                true => _ = self.drain_worker(now, worker, deadline),
                // It leaves already, or an operator drained it before: only the deadline is new.
                false => _ = self.begin_drain(now, worker, deadline),
            }
        }
        if let Some(drain) = &mut self.host_drain {
            drain.begun = true;
        }
    }

    /// A worker has just joined: it drains if the host does. One without connections gets no
    /// notice: it could end because of it, and its supervisor would start it again and again.
    pub(super) fn drain_with_host(&mut self, now: Time, worker: WorkerId) {
        let Some(drain) = self.host_drain.filter(|drain| drain.begun) else { return };
        let Some(w) = self.find(worker) else { return };
        if self.workers[w].load() > 0 {
            self.begin_drain(now, worker, drain.deadline);
            return;
        }
        self.drain(now, w);
        self.event(Event::Draining { worker, live: 0, deadline: None });
        self.refresh(w);
    }
}
