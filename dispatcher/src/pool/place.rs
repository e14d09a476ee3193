//! Placing connections: into a worker's hands, into the pool's queue, or closed.

use std::time::Duration;

use worker_sdk::wire::EntryFlags;

use super::affinity::Recall;
use super::ledger::{Conn, Place};
use super::policy::{Choice, Standing};
use super::ring::Item;
use super::types::*;
use super::{Clock, Core, Effect, Event, Pool};
use crate::affinity::Known;

/// Back-pressure of a pool is told at most this often.
const PRESSURE_EVENTS: Duration = Duration::from_secs(1);

impl Core {
    /// Finds a place for a connection that has none. `returned`: it was at a worker, so it goes before new ones.
    pub(super) fn put(&mut self, now: Time, pool: usize, conn: u32, returned: bool) {
        let over = self.stop.is_some_and(|stop| stop.over);
        if over {
            match self.choose_any(now, pool, conn) {
                Some(worker) => self.send(now, worker, conn),
                None => self.close(conn, CloseReason::Shutdown),
            }
        } else if self.pools[pool].clock == Clock::Refusing {
            self.close(conn, CloseReason::NoWorker);
        } else if !returned
            && self.pools[pool].held.is_empty()
            && let Some(worker) = self.choose(now, pool, conn)
        {
            self.send(now, worker, conn);
        } else {
            // Connections that come back are placed at the end of the mutator, when the worker they come from is sorted out.
            self.ledger.hold(&mut self.pools[pool].held, conn, returned);
            self.totals.held += 1;
        }
    }

    /// Places held connections while a worker is eligible.
    pub(super) fn place_held(&mut self, now: Time, pool: usize) {
        while let Some(conn) = self.pools[pool].held.first()
            && let Some(worker) = self.choose(now, pool, conn)
        {
            self.unhold(pool, conn);
            self.send(now, worker, conn);
        }
    }

    /// The worker for this connection; `None` if nobody may be chosen.
    fn choose(&mut self, now: Time, p: usize, conn: u32) -> Option<usize> {
        if self.choked.is_some() {
            return None;
        }
        let Conn { key, known, .. } = *self.ledger.get(conn);
        let (choice, recall) = self.pick(now, p, key, known)?;
        if self.pools[p].history.is_on() {
            self.record(now, p, conn, &choice);
        }
        let pool = &mut self.pools[p];
        let worker = pool.candidates.commit(choice) as usize;
        if let (Some(memory), Some(known)) = (&mut pool.memory, known) {
            memory.note(now, known.key, self.workers[worker].home, recall);
        }
        Some(worker)
    }

    /// Whom a client would be sent to: the worker that is remembered for it, or else the policy's choice.
    pub(super) fn pick(
        &self,
        now: Time,
        p: usize,
        key: Option<AffinityKey>,
        known: Option<Known>,
    ) -> Option<(Choice, Recall)> {
        let Pool { candidates, memory, .. } = &self.pools[p];
        if candidates.eligible() == 0 {
            return None;
        }
        let place = |worker: u32| self.workers[worker as usize].at;
        let recall = match (memory, known) {
            (Some(memory), Some(known)) => {
                memory.recall(now, known, |worker| candidates.is_available(place(worker)))
            }
            _ => Recall::New,
        };
        let choice = match recall {
            Recall::Routed(worker) | Recall::Here(worker) => {
                candidates.remembered(now, place(worker))
            }
            Recall::Away | Recall::New => candidates.pick(now, key)?,
        };
        Some((choice, recall))
    }

    /// At the end of a stop: whoever's channel may have room, trusted ones first.
    fn choose_any(&mut self, now: Time, pool: usize, conn: u32) -> Option<usize> {
        if self.choked.is_some() {
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
                    (worker.state == State::Suspect, worker.load())
                })
        })
    }

    fn send(&mut self, now: Time, w: usize, conn: u32) {
        let worker = &mut self.workers[w];
        let ticket = worker.ring.issue(now, Item::Conn(conn));
        worker.sent += 1;
        self.totals.custody += 1;
        let id = self.ledger.id(conn);
        let entry = self.ledger.get_mut(conn);
        entry.place = Place::Custody(worker.id.index);
        let flags = if entry.resent { EntryFlags::RESENT } else { EntryFlags::NONE };
        self.effects.push_back(Effect::Send {
            worker: worker.id,
            conn: id,
            ticket,
            listener: entry.listener,
            flags,
        });
        self.refresh(w);
    }

    /// Closes a connection that is in no queue and no custody.
    pub(super) fn close(&mut self, conn: u32, reason: CloseReason) {
        self.dequeue(conn);
        let entry = self.ledger.get_mut(conn);
        entry.place = Place::Leaving;
        self.listeners[usize::from(entry.listener.0)].closed[reason as usize] += 1;
        self.totals.closed[reason as usize] += 1;
        let shared = entry.resent;
        let conn = self.ledger.id(conn);
        self.effects.push_back(Effect::Close { conn, reason, shared });
    }

    pub(super) fn unhold(&mut self, pool: usize, conn: u32) {
        self.ledger.unhold(&mut self.pools[pool].held, conn);
        self.totals.held -= 1;
    }

    /// At the deadline of a stop: nothing stays held.
    pub(super) fn empty_queues(&mut self, now: Time) {
        for pool in 0..self.pools.len() {
            self.empty_awaiting(now, pool);
            while let Some(conn) = self.ledger.pop(&mut self.pools[pool].held) {
                self.totals.held -= 1;
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
        let worker = &self.workers[w];
        self.out[w] = worker.ring.len();
        self.live[w] = worker.load() > 0;
        if worker.state == State::Gone {
            return;
        }
        let standing = Standing {
            available: worker.is_eligible().then(|| (worker.load(), worker.effective_weight())),
            up: worker.is_up(),
            due: worker.due(self.handoff_timeout(worker.pool)),
        };
        self.pools[worker.pool].candidates.set(worker.at, standing);
    }

    /// `None` once handoffs may take forever because the dispatcher is about to end.
    pub(super) fn handoff_timeout(&self, pool: usize) -> Option<Duration> {
        match self.stop {
            Some(stop) if stop.over => None,
            _ => Some(self.pools[pool].settings.handoff_timeout),
        }
    }

    /// Tells of back-pressure that began or ended.
    pub(super) fn tell_pressure(&mut self, now: Time, p: usize) {
        let pool = &mut self.pools[p];
        let room = pool.candidates.eligible() > 0;
        let id = PoolId(p as u16);
        if pool.pressure_told && (room || pool.usable == 0) {
            pool.pressure_told = false;
            if room {
                self.event(Event::Relieved { pool: id });
            }
        } else if !pool.pressure_told
            && !room
            && pool.usable > 0
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
    }

    /// A usable worker is none any more.
    pub(super) fn remove_usable(&mut self, now: Time, p: usize) {
        let pool = &mut self.pools[p];
        pool.usable -= 1;
        if pool.usable == 0 {
            pool.clock = Clock::Since(now);
            // Of a pool that was taken out, or is done, nobody expects one.
            if pool.retired || pool.done {
                return;
            }
            self.event(Event::NoUsableWorker { pool: PoolId(p as u16) });
        }
    }

    /// Refuses clients once nobody has come for `wait_for_worker`.
    pub(super) fn tick_clock(&mut self, now: Time, p: usize) {
        let pool = &mut self.pools[p];
        let Clock::Since(since) = pool.clock else {
            return;
        };
        if now < since + pool.settings.wait_for_worker {
            return;
        }
        pool.clock = Clock::Refusing;
        pool.unserved = since;
        let mut closed = 0;
        while let Some(conn) = self.ledger.pop(&mut self.pools[p].held) {
            self.totals.held -= 1;
            closed += 1;
            self.close(conn, CloseReason::NoWorker);
        }
        closed += self.refuse_awaiting(p);
        self.event(Event::Refusing { pool: PoolId(p as u16), closed });
    }
}
