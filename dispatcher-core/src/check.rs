//! The invariants, by a full recount of everything. Called after every public mutator in debug
//! builds and tests.

use super::access_control::UNTRACKED;
use super::handoff::Shares;
use super::ledger::Place;
use super::ledger::Redispatch;
use super::policy::Available;
use super::ring::Item;
use super::trust::PROOF;
use super::types::*;
use super::worker::Worker;
use super::{Core, WorkerWait};

/// Entries that a check may examine per mutator on average. A small core is checked every time, a
/// large one less often.
#[cfg(any(test, debug_assertions))]
const CREDIT: usize = 256;

impl Core {
    /// [`Core::check`], as often as its cost allows.
    #[cfg(any(test, debug_assertions))]
    pub(super) fn check_sometimes(&mut self) {
        let memory: usize =
            self.pools.iter().flat_map(|pool| &pool.memory).map(|memory| memory.size()).sum();
        // Each pool looks at every listener and every worker.
        let tables = self.pools.len() * (self.listeners.len() + self.workers.len());
        let sockets = self.tracked.len();
        let cost = tables + self.workers.len() + self.ledger.entries().len() + memory + sockets;
        self.check_credit = (self.check_credit + CREDIT).min(2 * cost + CREDIT);
        if self.check_credit >= cost {
            self.check_credit -= cost;
            self.check();
        }
    }

    /// Panics if an invariant in the crate's description does not hold.
    pub fn check(&self) {
        assert!(self.totals.is_conserved(), "{:?}", self.totals);
        assert_eq!(self.residual(), 0, "{:?}", self.totals);
        let (mut queued, mut awaited) = (0, 0);
        for (p, pool) in self.pools.iter().enumerate() {
            let mut counted = 0;
            for conn in self.ledger.walk(&pool.queued) {
                let conn = self.ledger.get(conn);
                assert_eq!(conn.place, Place::Queued);
                assert_eq!(self.pool_of(conn.listener), p, "queued in its own pool");
                counted += 1;
            }
            assert_eq!(counted, pool.queued.len());
            queued += counted;
            awaited += self.check_awaiting(p);
            self.check_pool(p);
        }
        let unread = self.check_headers();
        assert_eq!(queued + awaited + unread, self.totals.queued);
        self.check_access_controls();
        self.check_lines();
        self.check_steered();

        let mut in_flight = 0;
        for p in 0..self.pools.len() {
            let top = self.top_priority(p);
            for (w, worker) in self.workers.iter().enumerate().filter(|(_, it)| it.pool == p) {
                in_flight += u64::from(worker.untaken());
                self.check_worker(w, top);
            }
        }
        assert_eq!(in_flight, self.totals.in_flight);

        let count = |f: fn(Place) -> bool| {
            let entries = self.ledger.entries().iter();
            entries.filter(|conn| f(conn.place)).count() as u64
        };
        assert_eq!(queued, count(|place| place == Place::Queued));
        assert_eq!(awaited, count(|place| place == Place::Awaiting));
        assert_eq!(unread, count(|place| place == Place::Header));
        assert_eq!(in_flight, count(|place| matches!(place, Place::InFlight(_))));
    }

    fn check_access_controls(&self) {
        for (position, listener) in self.listeners.iter().enumerate() {
            let Some(access_control) = &listener.access_control else { continue };
            access_control.check();
            let counted = self.ledger.entries().iter().filter(|conn| {
                usize::from(conn.listener.0) == position && conn.client != UNTRACKED
            });
            let mut count = 0;
            for conn in counted {
                assert!(
                    matches!(
                        conn.place,
                        Place::Queued | Place::Header | Place::Awaiting | Place::InFlight(_)
                    ),
                    "{conn:?}"
                );
                count += 1;
            }
            assert_eq!(count, access_control.queued());
        }
    }

    fn check_pool(&self, p: usize) {
        #[cfg(any(test, debug_assertions))]
        self.pools[p].processes.check();
        let pool = &self.pools[p];
        let of_pool = || {
            self.workers
                .iter()
                .filter(move |worker| worker.pool == p && worker.state != State::Gone)
        };
        assert_eq!(of_pool().count(), pool.candidates.len());
        let top = self.top_priority(p);
        let available = |worker: &&Worker| self.availability(worker, top).is_some();
        assert_eq!(of_pool().filter(available).count(), pool.candidates.eligible());
        let open = of_pool().filter(|worker| worker.is_open() && is_chosen(worker, top));
        assert_eq!(open.count(), pool.candidates.opens());
        if let Some(memory) = &pool.memory {
            memory.check();
        }
        let usable = of_pool().filter(|worker| worker.is_usable()).count();
        assert_eq!(usable, pool.usable as usize);
        assert!(usable == 0 || !self.host_drains(), "a draining host has no usable worker");
        match pool.worker_wait {
            WorkerWait::Off => assert!(usable > 0),
            WorkerWait::Since(_) => assert_eq!(usable, 0),
            // There is no usable worker, or none takes connections.
            WorkerWait::Refusing => {}
        }
        let fresh = pool
            .queued
            .first()
            .is_some_and(|conn| self.ledger.get(conn).redispatch == Redispatch::New);
        assert!(
            !fresh
                || pool.candidates.eligible() == 0
                || self.out_of_resources.is_some()
                || !of_pool().any(|worker| worker.trust.batches >= PROOF),
            "no new connection is queued while a worker is eligible"
        );
        let untaken: u32 = self.workers.iter().filter(|w| w.pool == p).map(Worker::untaken).sum();
        assert_eq!(untaken, pool.untaken);
        let waits = untaken > 0 || (!pool.queued.is_empty() && pool.candidates.opens() > 0);
        assert_eq!(waits, pool.unserved.is_some(), "it is known since when connections wait");
        let mut shares = Shares::default();
        for worker in of_pool() {
            let share = Shares::of(worker);
            assert_eq!(share, worker.shares);
            shares.reporter += share.reporter;
            shares.idle += share.idle;
            shares.crowded += share.crowded;
        }
        assert_eq!(shares, pool.shares);
        assert!(pool.queued.is_empty() || pool.worker_wait != WorkerWait::Refusing);
        assert!(pool.queued.is_empty() || self.stop.is_none_or(|stop| !stop.over));
    }

    /// The lowest priority that the pool's policy may choose.
    fn top_priority(&self, p: usize) -> Option<u16> {
        let spaced = self.pools[p].is_spaced();
        let up = self.workers.iter().filter(|worker| worker.pool == p && worker.is_up(spaced));
        match self.pools[p].settings.policy {
            Policy::Failover => up.map(|worker| worker.priority).max(),
            _ => None,
        }
    }

    fn check_worker(&self, w: usize, top: Option<u16>) {
        let worker = &self.workers[w];
        worker.ring.check();
        for ticket in worker.ring.tickets() {
            match worker.ring.item(ticket) {
                Some(Item::Conn(conn)) => {
                    assert_eq!(self.ledger.get(conn).place, Place::InFlight(w as u32));
                    assert_eq!(self.pool_of(self.ledger.get(conn).listener), worker.pool);
                }
                Some(Item::Probe | Item::Check) => {}
                Some(Item::Nothing) | None => panic!("a ticket that is out is for something"),
            }
        }
        assert_eq!(self.out[w], worker.ring.len());
        let silent = worker.threads.is_some_and(|threads| threads.idle == 0);
        assert_eq!(self.live[w], worker.load() > 0 || silent);
        assert_eq!(worker.sent, worker.taken + worker.revoked + u64::from(worker.untaken()));
        assert!(worker.finished <= worker.base.saturating_add(worker.taken));
        assert!(worker.load() >= u64::from(worker.untaken()));
        assert!(worker.round.is_some() || worker.ring.revoking() == 0);
        if worker.state == State::Gone {
            assert_eq!(worker.forgotten, worker.ring.len() == 0);
            return;
        }
        let pool = &self.pools[worker.pool];
        if let Some(memory) = pool.memory.as_ref().filter(|_| worker.is_usable()) {
            assert!(
                memory.is_bound_to(worker.binding, w as u32),
                "{} is bound elsewhere",
                worker.name
            );
        }
        let candidate = pool.candidates.get(worker.at);
        assert_eq!(candidate.worker as usize, w);
        assert_eq!(worker.id.index as usize, w);
        let expected = self.availability(worker, top).map(|available| {
            (super::policy::cost(available.load, available.trial), available.weight)
        });
        assert_eq!(
            expected.unwrap_or((super::policy::UNAVAILABLE, 1)),
            (candidate.cost, candidate.weight)
        );
        assert_eq!(pool.candidates.due(worker.at), worker.due(self.has_timeouts()));
    }

    fn availability(&self, worker: &Worker, top: Option<u16>) -> Option<Available> {
        let pool = &self.pools[worker.pool];
        let available = worker.availability(pool.is_keyed(), pool.is_spaced());
        available.filter(|_| is_chosen(worker, top))
    }
}

fn is_chosen(worker: &Worker, top: Option<u16>) -> bool {
    top.is_none_or(|top| worker.priority >= top)
}
