//! Placement of connections: sent to a worker, queued in the pool, or closed. Also detects
//! back-pressure and pools without service, and refuses clients after `wait_for_worker`.

use std::time::Duration;

use dispatch_protocol::wire::EntryFlags;

use super::affinity::Recall;
use super::handoff::Shares;
use super::ledger::{Conn, Place, Redispatch};
use super::policy::{By, Choice, NEVER, Standing};
use super::redispatch::burden;
use super::ring::Item;
use super::supervise::PREFERRED_LOAD;
use super::types::*;
use super::worker::{Round, Worker};
use super::{Core, Effect, Event, Pool};
use crate::affinity::key::ClientIdentity;

/// Minimum time between two events about back-pressure of a pool.
const PRESSURE_EVENTS: Duration = Duration::from_secs(1);

/// Limits of the interval after which the log repeats that clients are refused; the interval
/// doubles each time.
const REFUSAL_EVENTS_MIN: Duration = Duration::from_secs(10);
const REFUSAL_EVENTS_MAX: Duration = Duration::from_secs(3600);

/// Whether a pool's clients wait for a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WorkerWait {
    /// There is a usable worker.
    Off,
    /// The pool has had no usable worker since then.
    Since(Time),
    /// No worker joined in time, or no connection was taken.
    Refusing,
}

impl Core {
    /// Places a connection that has no place. `returned`: a worker had it before, so it precedes
    /// new ones.
    pub(super) fn put(&mut self, now: Time, pool: usize, conn: u32, returned: bool) {
        let over = self.stop.is_some_and(|stop| stop.over);
        if self.pools[pool].settings.steered {
            // Its workers can be sent nothing. Such a client came before the kernel chose for it.
            self.close(conn, CloseReason::NoWorker);
        } else if over {
            match self.choose_last(now, pool, conn) {
                Some(worker) => self.send(now, worker, conn),
                None => self.close(conn, CloseReason::Shutdown),
            }
        } else if self.pools[pool].worker_wait == WorkerWait::Refusing {
            match self.choose_tested(now, pool, conn) {
                Some(worker) => self.send(now, worker, conn),
                None => self.close(conn, CloseReason::NoWorker),
            }
        } else if !returned
            && self.pools[pool].queued.is_empty()
            && let Some(worker) = self.choose(now, pool, conn)
        {
            self.send(now, worker, conn);
        } else {
            // A returned connection is placed at the end of the mutator, when the state of the
            // worker that had it is settled.
            self.ledger.enqueue(&mut self.pools[pool].queued, conn, returned);
            self.totals.queued += 1;
        }
    }

    /// Places queued connections while a worker is eligible.
    pub(super) fn place_queued(&mut self, now: Time, pool: usize) {
        while let Some(conn) = self.pools[pool].queued.first()
            && let Some(worker) = self.choose(now, pool, conn)
        {
            self.dequeue(pool, conn);
            self.send(now, worker, conn);
        }
    }

    /// The worker for this connection; `None` if the connection should be queued.
    fn choose(&mut self, now: Time, p: usize, conn: u32) -> Option<usize> {
        if self.out_of_resources.is_some() {
            return None;
        }
        let chosen = match self.ledger.get(conn).redispatch {
            Redispatch::New => self.choose_by_policy(now, p, conn),
            Redispatch::Busy
            | Redispatch::Idle
            | Redispatch::Slow { .. }
            | Redispatch::Failed { .. } => self.choose_redispatch(now, p, conn),
        };
        chosen.or_else(|| self.choose_any(now, p, conn))
    }

    /// The worker that the client's key or the policy selects.
    fn choose_by_policy(&mut self, now: Time, p: usize, conn: u32) -> Option<usize> {
        let Conn { key, identity, .. } = *self.ledger.get(conn);
        let (choice, recall) = self.pick(now, p, key, identity)?;
        if choice.by == By::Policy && self.awaits_first_takes(now, p, choice.at) {
            return None;
        }
        if self.pools[p].history.is_on() {
            self.record(now, p, conn, &choice);
        }
        let pool = &mut self.pools[p];
        let bound = choice.by == By::Memory || (pool.is_keyed() && key.is_some());
        self.ledger.get_mut(conn).bound = bound;
        let worker = pool.candidates.commit(choice) as usize;
        if let (Some(memory), Some(identity)) = (&mut pool.memory, identity) {
            memory.note(now, identity.key, self.workers[worker].binding, recall);
        }
        Some(worker)
    }

    /// The worker that a client would be sent to: the one that its key is bound to, or else the
    /// policy's choice.
    pub(super) fn pick(
        &self,
        now: Time,
        p: usize,
        key: Option<AffinityKey>,
        identity: Option<ClientIdentity>,
    ) -> Option<(Choice, Recall)> {
        let pool = &self.pools[p];
        let Pool { candidates, memory, .. } = pool;
        if candidates.opens() == 0 {
            return None;
        }
        let recall = match (memory, identity) {
            (Some(memory), Some(identity)) => memory.recall(now, identity, |worker| {
                let worker = &self.workers[worker as usize];
                // A bound client waits for its worker even if that is busy.
                candidates.is_open(worker.at)
                    && (worker.state == State::Active || worker.is_trialable(pool.is_spaced()))
            }),
            _ => Recall::New,
        };
        let choice = match recall {
            Recall::Routed(worker) | Recall::Here(worker) => {
                candidates.choice(now, self.workers[worker as usize].at, By::Memory)
            }
            Recall::Away | Recall::New => {
                let choice = candidates.pick(now, key)?;
                self.newer(now, p, key, &choice).unwrap_or(choice)
            }
        };
        Some((choice, recall))
    }

    /// During a roll, a worker of the new generation instead of an older one, so that clients that
    /// connect again do not come to workers that will be drained. `None` if the choice is of the
    /// new generation, a key decides, or each new worker has more than [`PREFERRED_LOAD`] percent
    /// of the pool's mean load for its weight. Scans every worker, but only during a roll.
    fn newer(
        &self,
        now: Time,
        p: usize,
        key: Option<AffinityKey>,
        choice: &Choice,
    ) -> Option<Choice> {
        let pool = &self.pools[p];
        let preferred = pool.processes.preferred()?;
        let candidates = &pool.candidates;
        let is_new = |worker: &Worker| {
            let process = worker.process.filter(|process| usize::from(process.pool.0) == p);
            process.and_then(|process| pool.processes.generation_of(process)) == Some(preferred)
        };
        let keyed = pool.is_keyed() && key.is_some();
        if keyed || is_new(&self.workers[candidates.get(choice.at).worker as usize]) {
            return None;
        }
        let (mut load, mut weight) = (0u64, 0u64);
        for worker in candidates.workers().map(|w| &self.workers[w as usize]) {
            if worker.is_usable() {
                load = load.saturating_add(worker.load());
                weight += u64::from(worker.effective_weight());
            }
        }
        // load ÷ weight of the worker ≤ 1.25 × load ÷ weight of the pool, without division.
        let fits = |worker: &Worker| {
            let own = u128::from(worker.load()) * u128::from(weight) * 100;
            let mean = u128::from(load) * u128::from(worker.effective_weight());
            own <= mean * u128::from(PREFERRED_LOAD)
        };
        let new = self.open_workers(p).filter(|&w| {
            let worker = &self.workers[w];
            worker.is_trusted() && candidates.is_available(worker.at) && is_new(worker)
        });
        let best = new
            .filter(|&w| fits(&self.workers[w]))
            .min_by(|&a, &b| burden(&self.workers[a]).total_cmp(&burden(&self.workers[b])))?;
        Some(candidates.choice(now, self.workers[best].at, By::Generation))
    }

    /// While clients are refused: a worker that may be tested with this connection.
    fn choose_tested(&mut self, now: Time, p: usize, conn: u32) -> Option<usize> {
        let pool = &self.pools[p];
        // A connection that was at a worker before has waited long enough.
        if pool.usable == 0 || self.ledger.get(conn).resent || self.out_of_resources.is_some() {
            return None;
        }
        let spaced = pool.is_spaced();
        let fit = |worker: &Worker| {
            worker.is_open()
                && worker.untaken() == 0
                && (worker.is_trialable(spaced) || (worker.is_trusted() && worker.has_room()))
        };
        let workers = pool.candidates.workers().map(|w| w as usize);
        let chosen =
            workers.filter(|&w| fit(&self.workers[w])).min_by_key(|&w| self.workers[w].load())?;
        self.commit_handoff(now, p, conn, chosen);
        Some(chosen)
    }

    /// At the end of a stop: any worker whose channel may have room, trusted workers first.
    fn choose_last(&mut self, now: Time, pool: usize, conn: u32) -> Option<usize> {
        if self.out_of_resources.is_some() {
            return None;
        }
        self.choose(now, pool, conn).or_else(|| {
            self.pools[pool]
                .candidates
                .workers()
                .map(|worker| worker as usize)
                .filter(|&w| self.workers[w].can_be_sent_to())
                .min_by_key(|&w| {
                    let worker = &self.workers[w];
                    (!worker.is_trusted(), worker.load())
                })
        })
    }

    fn send(&mut self, now: Time, w: usize, conn: u32) {
        // Moves because of busy or idle threads are ordinary and not logged.
        let log = !matches!(self.ledger.get(conn).redispatch, Redispatch::Busy | Redispatch::Idle);
        let due = self.begin_patience(now, w, conn);
        let worker = &mut self.workers[w];
        let ticket = worker.ring.issue(now, Item::Conn(conn), due);
        worker.sent += 1;
        self.totals.in_flight += 1;
        self.pools[worker.pool].untaken += 1;
        let id = self.ledger.id(conn);
        let entry = self.ledger.get_mut(conn);
        entry.place = Place::InFlight(worker.id.index);
        let flags = if entry.resent { EntryFlags::RESENT } else { EntryFlags::NONE };
        self.effects.push_back(Effect::Send {
            worker: worker.id,
            conn: id,
            ticket,
            listener: entry.listener,
            flags,
            log: log && entry.resent,
        });
        self.refresh(w);
    }

    /// Closes a connection that is neither queued nor in flight.
    pub(super) fn close(&mut self, conn: u32, reason: CloseReason) {
        self.uncount(conn);
        let entry = self.ledger.get_mut(conn);
        entry.place = Place::Leaving;
        self.listeners[usize::from(entry.listener.0)].closed[reason as usize] += 1;
        self.totals.closed[reason as usize] += 1;
        let shared = entry.resent;
        let conn = self.ledger.id(conn);
        self.effects.push_back(Effect::Close { conn, reason, shared });
    }

    pub(super) fn dequeue(&mut self, pool: usize, conn: u32) {
        self.ledger.dequeue(&mut self.pools[pool].queued, conn);
        self.totals.queued -= 1;
    }

    /// At the deadline of a stop: nothing stays queued.
    pub(super) fn empty_queues(&mut self, now: Time) {
        for pool in 0..self.pools.len() {
            self.empty_awaiting(now, pool);
            while let Some(conn) = self.ledger.pop(&mut self.pools[pool].queued) {
                self.totals.queued -= 1;
                self.put(now, pool, conn, true);
            }
        }
        // Handoff timeouts no longer matter.
        for w in 0..self.workers.len() {
            self.refresh(w);
        }
    }

    /// Updates everything cached about a worker. Called after every change of a worker.
    pub(super) fn refresh(&mut self, w: usize) {
        self.steer(w);
        let timeouts = self.has_timeouts();
        let worker = &mut self.workers[w];
        self.out[w] = worker.ring.len();
        self.live[w] = worker.load() > 0 || worker.threads.is_some_and(|threads| threads.idle == 0);
        let pool = &mut self.pools[worker.pool];
        let shares = match worker.state {
            State::Gone => Shares::default(),
            _ => Shares::of(worker),
        };
        pool.share(std::mem::replace(&mut worker.shares, shares), shares);
        if worker.state == State::Gone {
            return;
        }
        let spaced = pool.is_spaced();
        let standing = Standing {
            available: worker.availability(pool.is_keyed(), spaced),
            open: worker.is_open(),
            up: worker.is_up(spaced),
            due: worker.due(timeouts),
        };
        pool.candidates.set(worker.at, standing);
    }

    /// Whether handoffs have timeouts: they have none after the deadline of a stop.
    pub(super) fn has_timeouts(&self) -> bool {
        self.stop.is_none_or(|stop| !stop.over)
    }

    /// Whether clients wait because no worker can be given a connection.
    fn has_pressure(&self, now: Time, p: usize) -> bool {
        let pool = &self.pools[p];
        let timeout = pool.settings.handoff_timeout;
        let waits = |conn| now - self.ledger.get(conn).accepted >= timeout;
        pool.usable > 0 && (pool.candidates.opens() == 0 || pool.queued.first().is_some_and(waits))
    }

    /// Reports that back-pressure began or ended.
    pub(super) fn report_pressure(&mut self, now: Time, p: usize) {
        let pressure = self.has_pressure(now, p);
        let pool = &mut self.pools[p];
        pool.pressure = pressure;
        let id = PoolId(p as u16);
        if pool.pressure_reported && !pressure {
            pool.pressure_reported = false;
            if pool.usable > 0 {
                self.event(Event::Relieved { pool: id });
            }
        } else if !pool.pressure_reported
            && pressure
            && pool.pressure_at.is_none_or(|at| now - at >= PRESSURE_EVENTS)
        {
            pool.pressure_reported = true;
            pool.pressure_at = Some(now);
            self.event(Event::BackPressure { pool: id });
        }
    }

    /// A worker became usable.
    pub(super) fn add_usable(&mut self, p: usize) {
        let pool = &mut self.pools[p];
        pool.usable += 1;
        pool.worker_wait = WorkerWait::Off;
        // The new worker gets a full `wait_for_worker` before the pool counts as not served.
        pool.unserved = None;
    }

    /// A worker is no longer usable.
    pub(super) fn remove_usable(&mut self, now: Time, p: usize) {
        let pool = &mut self.pools[p];
        pool.usable -= 1;
        if pool.usable == 0 {
            pool.worker_wait = WorkerWait::Since(now);
            // A removed or released pool needs no worker.
            if pool.retired || pool.released {
                return;
            }
            self.event(Event::NoUsableWorker { pool: PoolId(p as u16) });
        }
    }

    /// Records since when the pool's connections have waited without any being taken.
    pub(super) fn note_waiting(&mut self, now: Time, p: usize) {
        let pool = &mut self.pools[p];
        // If every worker is full, queued connections wait like those in the kernel's queue: that
        // is back-pressure.
        let waits = pool.untaken > 0 || (!pool.queued.is_empty() && pool.candidates.opens() > 0);
        match waits {
            true => _ = pool.unserved.get_or_insert(now),
            false => pool.unserved = None,
        }
    }

    /// When the pool begins to refuse clients, or the log repeats that it does.
    pub(super) fn refusal_due(&self, pool: &Pool) -> Time {
        if !self.has_timeouts() {
            return NEVER;
        }
        let wait = pool.settings.wait_for_worker;
        match pool.worker_wait {
            WorkerWait::Since(since) => since + wait,
            WorkerWait::Off => pool.unserved.map_or(NEVER, |since| since + wait),
            // A removed pool is not expected to serve.
            WorkerWait::Refusing if pool.retired => NEVER,
            WorkerWait::Refusing => pool.refusal_logged_at,
        }
    }

    /// Refuses clients once the pool has had no usable worker, or no take, for `wait_for_worker`.
    pub(super) fn tick_worker_wait(&mut self, now: Time, p: usize) {
        if now < self.refusal_due(&self.pools[p]) {
            return;
        }
        let wait = self.pools[p].settings.wait_for_worker;
        let unserved = self.pools[p].usable > 0;
        if unserved && self.pools[p].worker_wait == WorkerWait::Off {
            let until = self.usual_takes_until(p);
            if now < until {
                self.pools[p].unserved = Some(Time(until.0.saturating_sub((Time(0) + wait).0)));
                return;
            }
        }
        let pool = &mut self.pools[p];
        let id = PoolId(p as u16);
        let lacking_since = match pool.worker_wait {
            WorkerWait::Since(since) => since,
            WorkerWait::Off | WorkerWait::Refusing => pool.unserved.unwrap_or(now),
        };
        if pool.worker_wait == WorkerWait::Refusing {
            pool.refusal_interval = (pool.refusal_interval * 2).min(REFUSAL_EVENTS_MAX);
            pool.refusal_logged_at = now + pool.refusal_interval;
            let since = now - pool.refusing_since;
            return self.event(Event::StillRefusing { pool: id, unserved, since });
        }
        pool.worker_wait = WorkerWait::Refusing;
        pool.unserved = None;
        pool.refusing_since = now;
        pool.refusal_interval = wait.clamp(REFUSAL_EVENTS_MIN, REFUSAL_EVENTS_MAX);
        pool.refusal_logged_at = now + pool.refusal_interval;
        pool.lacking_since = lacking_since;
        let mut closed = 0;
        while let Some(conn) = self.ledger.pop(&mut self.pools[p].queued) {
            self.totals.queued -= 1;
            closed += 1;
            self.close(conn, CloseReason::NoWorker);
        }
        closed += self.refuse_awaiting(p);
        if unserved {
            closed += self.pools[p].untaken;
        }
        self.event(Event::Refusing { pool: id, closed, unserved });
        if unserved {
            self.take_all_back(now, p);
        }
    }

    /// Until when the pool's workers may take nothing without exceeding their usual times.
    fn usual_takes_until(&self, p: usize) -> Time {
        let settings = &self.pools[p].settings;
        let (timeout, longest) = (settings.handoff_timeout, settings.max_handoff_timeout);
        let workers = self.workers.iter().filter(|worker| worker.pool == p);
        let until = workers.filter_map(|worker| {
            if worker.is_busy() {
                let away = worker.threads.and_then(|threads| threads.turnaround);
                return Some(worker.trust.last_take + (3 * away.unwrap_or_default()).min(longest));
            }
            let (ticket, _) = worker.ring.connections().next()?;
            let since = worker.ring.sent_at(ticket).max(worker.trust.last_take);
            let usable = matches!(worker.state, State::Active | State::Suspect);
            usable.then(|| since + worker.trust.patience(timeout, longest, 0))
        });
        until.max().unwrap_or_default()
    }

    /// The pool is not served: untaken connections are revoked, and then closed.
    fn take_all_back(&mut self, now: Time, p: usize) {
        for w in 0..self.workers.len() {
            let worker = &self.workers[w];
            if worker.pool == p && worker.state != State::Gone && worker.untaken() > 0 {
                let oldest = worker.ring.connections().next();
                let sent = oldest.map_or(now, |(ticket, _)| worker.ring.sent_at(ticket));
                if !worker.is_busy() {
                    self.suspect(now, w, sent, now - sent);
                }
                self.begin_round(now, w, Round::Quiet);
            }
        }
    }

    /// A worker has taken a connection: the pool is served.
    pub(super) fn served(&mut self, p: usize) {
        let pool = &mut self.pools[p];
        pool.unserved = None;
        if pool.worker_wait == WorkerWait::Refusing && pool.usable > 0 {
            pool.worker_wait = WorkerWait::Off;
            self.event(Event::Served { pool: PoolId(p as u16) });
        }
    }
}
