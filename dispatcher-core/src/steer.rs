//! Workers whose connections the kernel chooses: it counts them, and they know nothing of the
//! dispatcher.
//!
//! The core decides weights, drains, suspicion and slow starts ([`Effect::Steer`]); the kernel
//! applies them to the next connection. What the kernel counts comes back through
//! [`Core::steer_counts`]: a worker's load is exactly `live + pending` of its last counts. Each
//! connection counts as accepted and taken when its handshake is complete.
//!
//! A worker is suspect if connections wait in its accept queue and it has accepted none for longer
//! than its patience, as a worker that leaves connections untaken. Where queues can be moved, what
//! waits goes to trusted workers then, and it has to accept before it is trusted again.

use dispatch_protocol::wire::{Features, Hello, RefusedCode, VERSION};

use super::admit::{MOST_LIVE, MOST_TAKEN};
use super::types::*;
use super::worker::{Peer, Worker};
use super::{Core, Effect};

/// A worker begins to listen.
#[derive(Clone, Debug)]
pub struct SteerJoin {
    /// Its pool.
    pub pool: PoolId,
    /// Its name.
    pub name: String,
    /// Its process; 0 if unknown.
    pub pid: i32,
    /// Its process, if the dispatcher started it.
    pub process: Option<ProcessId>,
    /// Its share relative to others.
    pub weight: u16,
    /// For `failover`.
    pub priority: u16,
    /// What the kernel counts for it now.
    pub counts: SteerCounts,
}

/// What the kernel counts for a worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SteerCounts {
    /// Connections that are open.
    pub live: u64,
    /// Handshakes under way.
    pub pending: u64,
    /// Handshakes completed, ever.
    pub total: u64,
    /// Connections in its accept queue: it has not accepted them.
    pub queued: u64,
    /// Connections that came from the queue of another worker, ever.
    pub moved_in: u64,
    /// Connections that went from its queue to another worker, ever.
    pub moved_out: u64,
}

impl SteerCounts {
    /// Connections that the worker has accepted, ever.
    fn accepted(&self) -> u64 {
        let arrived = self.total.saturating_add(self.moved_in);
        arrived.saturating_sub(self.moved_out).saturating_sub(self.queued)
    }

    /// No sum of possible counts overflows.
    fn possible(self) -> SteerCounts {
        let live = self.live.min(MOST_LIVE);
        SteerCounts {
            live,
            pending: self.pending.min(MOST_LIVE - live),
            total: self.total.min(MOST_TAKEN),
            queued: self.queued.min(MOST_LIVE),
            moved_in: self.moved_in.min(MOST_TAKEN),
            moved_out: self.moved_out.min(MOST_TAKEN),
        }
    }
}

/// How the kernel is to treat a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SteerSettings {
    /// 1 to 65,535.
    pub weight: u32,
    /// The part of its weight that it has now, in thousandths: 1 to 1,000.
    pub slow_start: u32,
    /// Most connections, pending ones included.
    pub maximum: u32,
    /// It gets no new connections.
    pub draining: bool,
    /// It gets new connections only if no other worker has room.
    pub suspect: bool,
    /// For `failover`.
    pub priority: u16,
    /// Its identity for `hash`.
    pub node: u64,
}

/// A steered worker's part that other workers do not have.
#[derive(Clone, Debug)]
pub(super) struct Steered {
    counts: SteerCounts,
    /// Live connections at its join.
    joined_live: u64,
    /// The most connections that it is known to have accepted, ever.
    accepted: u64,
    /// Connections wait since then, and it has accepted none.
    waits_since: Option<Time>,
    /// Its queue is empty because it was moved, not because it accepts.
    must_accept: bool,
    /// The last [`Effect::Steer`].
    told: Option<SteerSettings>,
}

impl Steered {
    /// The state for the status.
    pub(super) fn snapshot(&self) -> SteerCounts {
        self.counts
    }
}

impl Worker {
    /// How the kernel is to treat it.
    fn steer_settings(&self) -> SteerSettings {
        SteerSettings {
            weight: self.weight,
            slow_start: self.warm_thousandths(),
            maximum: self.max,
            draining: !self.is_usable() || self.paused || self.checking,
            suspect: self.state == State::Suspect,
            priority: self.priority,
            node: self.node(),
        }
    }
}

impl Core {
    /// A worker listens, and the kernel may choose it from now on: its settings follow as
    /// [`Effect::Steer`].
    ///
    /// # Errors
    /// Why it may not.
    pub fn join_steered(&mut self, now: Time, join: &SteerJoin) -> Result<WorkerId, Refusal> {
        let p = usize::from(join.pool.0);
        self.may_hold_one_more(p)?;
        let pool = &self.pools[p];
        // A process outlives its pool: its worker joins to be drained.
        if pool.retired && join.process.is_none() {
            return Err(Refusal {
                code: RefusedCode::UnknownPool,
                key: None,
                reason: format!("pool `{}` was removed from the configuration", pool.settings.name),
            });
        }
        let counts = join.counts.possible();
        let hello = Hello {
            version: VERSION,
            features: Features::NONE,
            pool: self.pools[p].settings.name.clone(),
            name: join.name.clone(),
            weight: join.weight,
            priority: join.priority,
            max_connections: u32::MAX,
            base: counts.live.saturating_add(counts.pending),
            finished: 0,
            ..Hello::default()
        };
        let steered = Box::new(Steered {
            counts,
            joined_live: counts.live,
            accepted: counts.accepted(),
            waits_since: None,
            must_accept: false,
            told: None,
        });
        let (pid, process) = (join.pid, join.process);
        let joins = Join { pid, uid: 0, gids: Vec::new(), hello, spawned: process };
        let id = self.add_worker(now, p, &joins, Peer::Steered(steered));
        self.drain_with_host(now, id);
        self.settle_join(now, id);
        Ok(id)
    }

    /// The kernel's counts of a worker. To be called often while connections wait in its accept
    /// queue, also if nothing has changed.
    pub fn steer_counts(&mut self, now: Time, worker: WorkerId, counts: SteerCounts) {
        let Some(w) = self.find(worker).filter(|&w| self.workers[w].state != State::Gone) else {
            return;
        };
        let state = &mut self.workers[w];
        let Some(steered) = &mut state.steered else { return };
        let counts = counts.possible();
        let new = counts.total.saturating_sub(steered.counts.total);
        if counts.total < steered.counts.total {
            // New programs count from zero.
            steered.accepted = counts.accepted();
        }
        let arrived = counts.moved_in.saturating_sub(steered.counts.moved_in);
        steered.must_accept |= counts.moved_out > steered.counts.moved_out;
        steered.counts = counts;
        // What moves between workers has arrived at the pool once.
        state.sent += new + arrived;
        state.taken += new + arrived;
        // The counts of one moment are not read at once, so a difference may seem to shrink.
        let ended = (steered.joined_live + state.taken).saturating_sub(counts.live);
        state.finished = state.finished.max(ended);
        // So the load is what the kernel says.
        let load = counts.live.saturating_add(counts.pending);
        state.base = load.saturating_add(state.finished).saturating_sub(state.taken);
        let p = state.pool;
        self.totals.accepted += new;
        self.totals.taken += new;
        self.pools[p].counts.steered += new;
        self.pools[p].counts.taken += new;
        self.refresh(w);
        self.watch_queue(now, w);
        self.after(now, p);
    }

    /// The kernel cannot choose the workers of a pool: connections are accepted and passed.
    pub fn pass_instead(&mut self, pool: PoolId) {
        if let Some(pool) = self.pools.get_mut(usize::from(pool.0)) {
            pool.settings.steered = false;
        }
    }

    /// The worker has closed its listener: it gets no more connections, and keeps those that it
    /// has.
    pub fn steer_closed(&mut self, now: Time, worker: WorkerId) {
        self.goodbye(now, worker);
    }

    /// Trusts a worker that accepts, and suspects one that does not.
    fn watch_queue(&mut self, now: Time, w: usize) {
        let worker = &mut self.workers[w];
        let settings = &self.pools[worker.pool].settings;
        let (timeout, longest) = (settings.handoff_timeout, settings.max_handoff_timeout);
        let Some(steered) = &mut worker.steered else { return };
        let accepted = steered.counts.accepted();
        let accepts = accepted > steered.accepted;
        steered.accepted = steered.accepted.max(accepted);
        steered.must_accept &= !accepts;
        let must_accept = steered.must_accept;
        let since = steered.waits_since;
        let waits = steered.counts.queued > 0;
        steered.waits_since = match (waits, accepts, since) {
            (false, _, _) => None,
            (true, false, Some(since)) => Some(since),
            (true, _, _) => Some(now),
        };
        let waits_since = steered.waits_since;
        if accepts && let Some(since) = since {
            worker.trust.took(since, now, timeout);
        }
        if accepts || !(waits || must_accept) {
            worker.trust.proven = true;
            if worker.state == State::Suspect || worker.unproven {
                self.trust(now, w);
                self.refresh(w);
            }
        }
        let worker = &self.workers[w];
        let patience = worker.trust.patience(timeout, longest, 0);
        let waited = |since: Time| Some((since, now - since)).filter(|it| it.1 > patience);
        if let Some((since, waited)) = waits_since.and_then(waited)
            && (worker.state == State::Active
                || (worker.state == State::Draining && !worker.unproven))
        {
            self.suspect(now, w, since, waited);
            self.end_round(now, w);
        }
        self.relieve(w);
    }

    /// Has the queue of a worker that is not trusted moved, if trusted ones have room for it.
    fn relieve(&mut self, w: usize) {
        let worker = &self.workers[w];
        let waits = worker.steered.as_ref().map_or(0, |steered| steered.counts.queued);
        let distrusted =
            worker.state == State::Suspect || (worker.state == State::Draining && worker.unproven);
        let pool = &self.pools[worker.pool];
        if waits == 0 || !distrusted || !pool.settings.queues_move {
            return;
        }
        let takes = |other: &Worker| {
            other.pool == worker.pool
                && other.steered.is_some()
                && other.state == State::Active
                && !other.unproven
                && !other.steer_settings().draining
        };
        let room = |other: &Worker| u64::from(other.max).saturating_sub(other.load());
        let rooms = self.workers.iter().filter(|other| takes(other)).map(room);
        if rooms.fold(0, u64::saturating_add) >= waits {
            let worker = worker.id;
            self.effects.push_back(Effect::MoveQueue { worker });
        }
    }

    /// Has the kernel told if the settings of a worker have changed. What was its number may be
    /// another worker's when it is gone.
    pub(super) fn steer(&mut self, w: usize) {
        let worker = &self.workers[w];
        let Some(steered) = worker.steered.as_ref().filter(|_| worker.state != State::Gone) else {
            return;
        };
        let settings = worker.steer_settings();
        if steered.told != Some(settings) {
            let worker = worker.id;
            if let Some(steered) = &mut self.workers[w].steered {
                steered.told = Some(settings);
            }
            // Only the last settings of a turn count: a worker that joins and is checked first gets
            // no connection between the two.
            let queued = self.effects.iter_mut().rev().find_map(|effect| match effect {
                Effect::Steer { worker: of, settings } if *of == worker => Some(settings),
                _ => None,
            });
            match queued {
                Some(queued) => *queued = settings,
                None => self.effects.push_back(Effect::Steer { worker, settings }),
            }
        }
    }

    /// The invariants of steered workers.
    pub(super) fn check_steered(&self) {
        for worker in self.workers.iter().filter(|worker| worker.state != State::Gone) {
            let Some(steered) = &worker.steered else { continue };
            assert_eq!(worker.load(), steered.counts.live + steered.counts.pending);
            assert_eq!(worker.untaken(), 0, "{} is sent nothing", worker.name);
            assert_eq!(steered.told, Some(worker.steer_settings()), "{}", worker.name);
        }
    }
}
