//! Placing connections: into a worker's hands, into the pool's queue, or closed.

use std::time::Duration;

use dispatch_protocol::wire::EntryFlags;

use super::affinity::Recall;
use super::handoff::Shares;
use super::ledger::{Again, Conn, Place};
use super::policy::{By, Choice, NEVER, Standing};
use super::ring::Item;
use super::types::*;
use super::worker::{Round, Worker};
use super::{Clock, Core, Effect, Event, Pool};
use crate::affinity::key::Known;

/// Back-pressure of a pool is told at most this often.
const PRESSURE_EVENTS: Duration = Duration::from_secs(1);

/// That clients are refused is told again after this long at the least, then after twice as long each time, up to this.
const REFUSAL_EVENTS_MIN: Duration = Duration::from_secs(10);
const REFUSAL_EVENTS_MAX: Duration = Duration::from_secs(3600);

impl Core {
    /// Finds a place for a connection that has none. `returned`: it was at a worker, so it goes before new ones.
    pub(super) fn put(&mut self, now: Time, pool: usize, conn: u32, returned: bool) {
        let over = self.stop.is_some_and(|stop| stop.over);
        if over {
            match self.choose_last(now, pool, conn) {
                Some(worker) => self.send(now, worker, conn),
                None => self.close(conn, CloseReason::Shutdown),
            }
        } else if self.pools[pool].clock == Clock::Refusing {
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
            // Connections that come back are placed at the end of the mutator, when the worker they come from is sorted out.
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

    /// The worker for this connection; `None` if it is better off in the queue.
    fn choose(&mut self, now: Time, p: usize, conn: u32) -> Option<usize> {
        if self.out_of_resources.is_some() {
            return None;
        }
        let chosen = match self.ledger.get(conn).again {
            Again::New => self.choose_by_policy(now, p, conn),
            Again::Busy | Again::Idle | Again::Slow { .. } | Again::Failed { .. } => {
                self.choose_again(now, p, conn)
            }
        };
        chosen.or_else(|| self.choose_any(now, p, conn))
    }

    /// The worker that the client's key or the policy says.
    fn choose_by_policy(&mut self, now: Time, p: usize, conn: u32) -> Option<usize> {
        let Conn { key, known, .. } = *self.ledger.get(conn);
        let (choice, recall) = self.pick(now, p, key, known)?;
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
        if let (Some(memory), Some(known)) = (&mut pool.memory, known) {
            memory.note(now, known.key, self.workers[worker].binding, recall);
        }
        Some(worker)
    }

    /// Where a client would be sent to: the worker that is remembered for it, or else the policy's choice.
    pub(super) fn pick(
        &self,
        now: Time,
        p: usize,
        key: Option<AffinityKey>,
        known: Option<Known>,
    ) -> Option<(Choice, Recall)> {
        let pool = &self.pools[p];
        let Pool { candidates, memory, .. } = pool;
        if candidates.opens() == 0 {
            return None;
        }
        let recall = match (memory, known) {
            (Some(memory), Some(known)) => memory.recall(now, known, |worker| {
                let worker = &self.workers[worker as usize];
                // Its client waits for it even if it is busy.
                candidates.is_open(worker.at)
                    && (worker.state == State::Active || worker.is_trialable(pool.is_spaced()))
            }),
            _ => Recall::New,
        };
        let choice = match recall {
            Recall::Routed(worker) | Recall::Here(worker) => {
                candidates.choice(now, self.workers[worker as usize].at, By::Memory)
            }
            Recall::Away | Recall::New => candidates.pick(now, key)?,
        };
        Some((choice, recall))
    }

    /// While clients are refused: a worker that may be tested with this one.
    fn choose_tested(&mut self, now: Time, p: usize, conn: u32) -> Option<usize> {
        let pool = &self.pools[p];
        // One that comes back from a worker has waited long enough.
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

    /// At the end of a stop: whichever worker's channel may have room, trusted ones first.
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
        // Where threads are busy or idle, moves are the ordinary case.
        let tell = !matches!(self.ledger.get(conn).again, Again::Busy | Again::Idle);
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
            tell: tell && entry.resent,
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

    /// Brings what is cached about a worker up to date. After every change of one.
    pub(super) fn refresh(&mut self, w: usize) {
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

    /// Whether handoffs may not take forever: they may once the dispatcher is about to end.
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

    /// Tells of back-pressure that began or ended.
    pub(super) fn tell_pressure(&mut self, now: Time, p: usize) {
        let pressure = self.has_pressure(now, p);
        let pool = &mut self.pools[p];
        pool.pressure = pressure;
        let id = PoolId(p as u16);
        if pool.pressure_told && !pressure {
            pool.pressure_told = false;
            if pool.usable > 0 {
                self.event(Event::Relieved { pool: id });
            }
        } else if !pool.pressure_told
            && pressure
            && pool.pressure_at.is_none_or(|at| now - at >= PRESSURE_EVENTS)
        {
            pool.pressure_told = true;
            pool.pressure_at = Some(now);
            self.event(Event::BackPressure { pool: id });
        }
    }

    /// A worker became usable.
    pub(super) fn add_usable(&mut self, p: usize) {
        let pool = &mut self.pools[p];
        pool.usable += 1;
        pool.clock = Clock::Off;
        // It has its chance before the pool counts as not served.
        pool.unserved = None;
    }

    /// A usable worker is none any more.
    pub(super) fn remove_usable(&mut self, now: Time, p: usize) {
        let pool = &mut self.pools[p];
        pool.usable -= 1;
        if pool.usable == 0 {
            pool.clock = Clock::Since(now);
            // A removed or finished pool needs no process.
            if pool.retired || pool.done {
                return;
            }
            self.event(Event::NoUsableWorker { pool: PoolId(p as u16) });
        }
    }

    /// Says since when the pool's connections have waited without any being taken.
    pub(super) fn note_waiting(&mut self, now: Time, p: usize) {
        let pool = &mut self.pools[p];
        // If every worker is full, those that wait here wait like those in the kernel's queue.
        let waits = pool.untaken > 0 || (!pool.queued.is_empty() && pool.candidates.opens() > 0);
        match waits {
            true => _ = pool.unserved.get_or_insert(now),
            false => pool.unserved = None,
        }
    }

    /// When clients are refused, or the log is told again that they are.
    pub(super) fn refusal_due(&self, pool: &Pool) -> Time {
        if !self.has_timeouts() {
            return NEVER;
        }
        let wait = pool.settings.wait_for_worker;
        match pool.clock {
            Clock::Since(since) => since + wait,
            Clock::Off => pool.unserved.map_or(NEVER, |since| since + wait),
            // A pool that was taken out is not expected to serve.
            Clock::Refusing if pool.retired => NEVER,
            Clock::Refusing => pool.refusal_told_at,
        }
    }

    /// Refuses clients once no worker has come, or none has taken anything, for `wait_for_worker`.
    pub(super) fn tick_clock(&mut self, now: Time, p: usize) {
        if now < self.refusal_due(&self.pools[p]) {
            return;
        }
        let wait = self.pools[p].settings.wait_for_worker;
        let unserved = self.pools[p].usable > 0;
        if unserved && self.pools[p].clock == Clock::Off {
            let until = self.usual_takes_until(p);
            if now < until {
                self.pools[p].unserved = Some(Time(until.0.saturating_sub((Time(0) + wait).0)));
                return;
            }
        }
        let pool = &mut self.pools[p];
        let id = PoolId(p as u16);
        let lacking_since = match pool.clock {
            Clock::Since(since) => since,
            Clock::Off | Clock::Refusing => pool.unserved.unwrap_or(now),
        };
        if pool.clock == Clock::Refusing {
            pool.refusal_interval = (pool.refusal_interval * 2).min(REFUSAL_EVENTS_MAX);
            pool.refusal_told_at = now + pool.refusal_interval;
            let since = now - pool.refusing_since;
            return self.event(Event::StillRefusing { pool: id, unserved, since });
        }
        pool.clock = Clock::Refusing;
        pool.unserved = None;
        pool.refusing_since = now;
        pool.refusal_interval = wait.clamp(REFUSAL_EVENTS_MIN, REFUSAL_EVENTS_MAX);
        pool.refusal_told_at = now + pool.refusal_interval;
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

    /// Until when it would be usual for one of the pool's workers to take nothing.
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

    /// Nothing is served: what was sent is asked for back, and then closed.
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

    /// A worker has taken a connection: the pool is being served.
    pub(super) fn served(&mut self, p: usize) {
        let pool = &mut self.pools[p];
        pool.unserved = None;
        if pool.clock == Clock::Refusing && pool.usable > 0 {
            pool.clock = Clock::Off;
            self.event(Event::Served { pool: PoolId(p as u16) });
        }
    }
}
