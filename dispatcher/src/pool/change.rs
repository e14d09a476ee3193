//! Changing the configuration of a core that is at work.
//!
//! Ids are positions and are never used for something else: what is added comes at the end, what is removed stays as a
//! retired entry, so that connections and workers that refer to it go on as they were. A pool that comes back under its name is
//! the same pool again. A listener's pool never changes:
//! a listener that shall lead elsewhere is a new one.

use std::collections::VecDeque;

use super::affinity::Memory;
use super::awaiting::Awaiting;
use super::discarded::Kept;
use super::effect::{Effect, Event};
use super::history::History;
use super::ledger::Held;
use super::policy::{Candidates, Member};
use super::report::Counts;
use super::supervise::Processes;
use super::types::*;
use super::worker::Worker;
use super::{Clock, Core, Listener, Pool, Random};
use crate::measure::{self, Histogram};

impl Listener {
    pub(super) fn new(settings: ListenerSettings) -> Listener {
        Listener {
            pool: usize::from(settings.pool.0),
            accepted: 0,
            closed: [0; CloseReason::ALL.len()],
            screen: None,
            retired: None,
            settings,
        }
    }
}

impl Pool {
    pub(super) fn new(
        id: PoolId,
        settings: PoolSettings,
        now: Time,
        seeds: &mut Random,
        effects: &mut VecDeque<Effect>,
    ) -> Pool {
        // Where processes are about to be started, this is no news.
        if settings.processes == 0 {
            effects.push_back(Effect::Event(Event::NoUsableWorker { pool: id }));
        }
        Pool {
            candidates: Candidates::new(settings.policy, &settings.scores, seeds.number()),
            history: History::new(settings.history, settings.history_candidates),
            sample_at: now,
            memory: settings.affinity.as_ref().map(|a| Memory::new(a, seeds.number())),
            awaiting: Awaiting::default(),
            held: Held::default(),
            usable: 0,
            clock: Clock::Since(now),
            pressure_told: false,
            pressure_at: None,
            processes: Processes::new(id, settings.processes, effects),
            counts: Counts::default(),
            handoff: Histogram::new(measure::HANDOFF),
            retired: false,
            settings,
        }
    }
}

impl Core {
    /// Adds a pool. One of this name that was taken out is put back, with the workers it still has: two of one name could not
    /// be told apart.
    pub fn add_pool(&mut self, now: Time, settings: PoolSettings, seed: u64) -> PoolId {
        let same = |pool: &Pool| pool.retired && pool.settings.name == settings.name;
        if let Some(p) = self.pools.iter().position(same) {
            return self.put_back(now, p, settings, seed);
        }
        let id = PoolId(self.pools.len() as u16);
        let mut seeds = Random::new(seed);
        self.pools.push(Pool::new(id, settings, now, &mut seeds, &mut self.effects));
        self.after(now, usize::from(id.0));
        id
    }

    /// What was drained stays so; nobody else notices that the pool was gone for a while.
    fn put_back(&mut self, now: Time, p: usize, settings: PoolSettings, seed: u64) -> PoolId {
        let id = PoolId(p as u16);
        let pool = &mut self.pools[p];
        pool.retired = false;
        if pool.usable == 0 {
            pool.clock = Clock::Since(now);
            if settings.processes == 0 {
                self.event(Event::NoUsableWorker { pool: id });
            }
        }
        self.change_pool(now, id, settings, seed);
        id
    }

    /// Gives a pool other settings; its name stays. `max_untaken` counts for workers that join later, as the size of a
    /// scoreboard is settled then; who may join, too: nobody is turned out.
    pub fn change_pool(&mut self, now: Time, pool: PoolId, settings: PoolSettings, seed: u64) {
        let p = usize::from(pool.0);
        let mut seeds = Random::new(seed);
        let Some(entry) = self.pools.get_mut(p) else { return };
        let name = entry.settings.name.clone();
        let old = std::mem::replace(&mut entry.settings, PoolSettings { name, ..settings });
        let new = &entry.settings;
        entry.processes.resize(new.processes, &mut self.effects);
        let forgotten = entry.history.resize(new.history, new.history_candidates);
        let chooses = old.policy != new.policy || old.scores != new.scores;
        let remembers = old.affinity != new.affinity;
        let most = new.max_connections_per_worker;
        let slow_start = new.slow_start;
        self.discard(Kept::Decisions(forgotten));
        if chooses {
            self.change_policy(now, p, seeds.number());
        }
        if remembers {
            self.change_memory(p, seeds.number());
        }
        for w in 0..self.workers.len() {
            let worker = &mut self.workers[w];
            if worker.pool == p && worker.state != State::Gone {
                worker.max = worker.own_max.min(most);
                worker.warm_up(now, slow_start);
                self.refresh(w);
            }
        }
        // First bytes that were awaited for the old key say nothing about the new one.
        let most = if remembers { 0 } else { u64::from(self.pools[p].settings.peek.max_awaiting) };
        self.await_at_most(now, p, most);
        self.after(now, p);
        self.drain_surplus(now, p);
    }

    /// The same workers in the same places, seen by another policy. Each is refreshed afterwards.
    fn change_policy(&mut self, now: Time, p: usize, seed: u64) {
        let pool = &mut self.pools[p];
        let settings = &pool.settings;
        let new = Candidates::new(settings.policy, &settings.scores, seed);
        let old = std::mem::replace(&mut pool.candidates, new);
        pool.sample_at = now;
        for index in old.workers() {
            let worker = &mut self.workers[index as usize];
            let (node, priority) = (worker.node(), worker.priority);
            worker.at = pool.candidates.add(Member { worker: index, node, priority });
        }
    }

    /// What was remembered of clients is forgotten: it was by another key, or for another time.
    fn change_memory(&mut self, p: usize, seed: u64) {
        let pool = &mut self.pools[p];
        let new = pool.settings.affinity.as_ref().map(|settings| Memory::new(settings, seed));
        if let Some(old) = std::mem::replace(&mut pool.memory, new) {
            self.discard(Kept::Memory(old));
        }
        let pool = &mut self.pools[p];
        let Some(memory) = &mut pool.memory else { return };
        let indices: Vec<u32> = pool.candidates.workers().collect();
        for index in indices {
            let workers = &self.workers;
            let name = &workers[index as usize].name;
            let home = memory.move_in(name, index, |w| workers[w as usize].is_usable());
            self.workers[index as usize].home = home;
        }
    }

    /// Wants so many of a pool's processes from now on. Workers of those that are too many are drained.
    pub fn scale(&mut self, now: Time, pool: PoolId, processes: u32) {
        let p = usize::from(pool.0);
        let Some(entry) = self.pools.get_mut(p).filter(|entry| !entry.retired) else { return };
        entry.settings.processes = processes;
        entry.processes.resize(processes, &mut self.effects);
        self.after(now, p);
        self.drain_surplus(now, p);
    }

    /// Whether a worker's process is one of those that are too many.
    pub(super) fn is_surplus(&self, w: usize) -> bool {
        let Worker { pool, process, .. } = self.workers[w];
        let wanted = self.pools[pool].settings.processes;
        process.is_some_and(|p| usize::from(p.pool.0) == pool && p.number >= wanted)
    }

    /// Drains the workers of processes that are too many. Those that were starting come later: see [`Core::join`].
    pub(super) fn drain_surplus(&mut self, now: Time, p: usize) {
        for w in 0..self.workers.len() {
            let worker = &self.workers[w];
            if worker.pool == p && worker.is_usable() && self.is_surplus(w) {
                self.drain_worker(now, worker.id, None);
            }
        }
    }

    /// Takes a pool out: nobody joins it any more and no process is started for it. Once its listeners are closed and what
    /// they accepted is with workers, these are drained.
    pub fn retire_pool(&mut self, now: Time, pool: PoolId) {
        let p = usize::from(pool.0);
        let Some(entry) = self.pools.get_mut(p) else { return };
        entry.retired = true;
        entry.settings.processes = 0;
        entry.processes.resize(0, &mut self.effects);
        self.after(now, p);
        self.tick_retired(now, p);
    }

    /// Adds a listener.
    pub fn add_listener(&mut self, settings: ListenerSettings) -> ListenerId {
        let id = ListenerId(self.listeners.len() as u16);
        self.listeners.push(Listener::new(settings));
        id
    }

    /// Takes a listener out. [`Core::accepting`] then says [`Accepting::Finish`]: what is in its queue is still accepted.
    /// When the shell has closed it, it says so with [`Core::listener_closed`].
    pub fn retire_listener(&mut self, listener: ListenerId) {
        if let Some(entry) = self.listeners.get_mut(usize::from(listener.0)) {
            entry.retired.get_or_insert(false);
        }
    }

    /// A retired listener accepts nothing any more.
    pub fn listener_closed(&mut self, now: Time, listener: ListenerId) {
        if !self.is_listener_retired(listener) {
            return;
        }
        let Some(entry) = self.listeners.get_mut(usize::from(listener.0)) else { return };
        entry.retired = Some(true);
        let p = entry.pool;
        // Its table may be large, and nobody comes any more.
        self.set_screen(listener, None);
        self.after(now, p);
        self.tick_retired(now, p);
    }

    /// Whether a listener was taken out.
    pub fn is_listener_retired(&self, listener: ListenerId) -> bool {
        self.listeners.get(usize::from(listener.0)).is_none_or(|entry| entry.retired.is_some())
    }

    /// Whether a pool was taken out.
    pub fn is_pool_retired(&self, pool: PoolId) -> bool {
        self.pools.get(usize::from(pool.0)).is_none_or(|entry| entry.retired)
    }

    /// The listeners there are, in the order of the status.
    pub fn listeners(&self) -> impl Iterator<Item = ListenerId> + '_ {
        (0u16..)
            .zip(&self.listeners)
            .filter(|(_, entry)| entry.retired.is_none())
            .map(|(id, _)| ListenerId(id))
    }

    /// The pool of this name that workers can join.
    pub fn pool_named(&self, name: &str) -> Option<PoolId> {
        let found = self.pools.iter().position(|pool| !pool.retired && pool.settings.name == name);
        found.map(|p| PoolId(p as u16))
    }

    /// Whether a pool is in the status: one that was taken out stays there while it has workers.
    pub(super) fn is_shown(&self, p: usize) -> bool {
        let pool = &self.pools[p];
        !pool.retired || pool.candidates.len() > 0
    }

    /// Drains the workers of a retired pool that gets nothing more, and forgets what it remembers once they are gone.
    pub(super) fn tick_retired(&mut self, now: Time, p: usize) {
        let pool = &mut self.pools[p];
        if !pool.retired || self.stop.is_some() {
            return;
        }
        if pool.candidates.len() == 0 && pool.clock == Clock::Refusing {
            // Nobody can come any more: nothing is left to do, in any turn to come.
            let decisions = pool.history.resize(0, 1);
            self.discard(Kept::Decisions(decisions));
            let pool = &mut self.pools[p];
            if let Some(memory) = pool.memory.take() {
                pool.settings.affinity = None;
                self.discard(Kept::Memory(memory));
            }
            return;
        }
        if pool.held.len() + pool.awaiting.len() > 0 {
            return;
        }
        let open = |listener: &Listener| listener.pool == p && listener.retired != Some(true);
        if self.listeners.iter().any(open) {
            return;
        }
        // What a worker leaves untaken must find another.
        if self.workers.iter().any(|worker| worker.pool == p && worker.untaken() > 0) {
            return;
        }
        let of_pool = |worker: &&Worker| worker.pool == p && worker.is_usable();
        let ids: Vec<WorkerId> =
            self.workers.iter().filter(of_pool).map(|worker| worker.id).collect();
        for id in ids {
            self.drain_worker(now, id, None);
        }
        // Nobody waits for a worker.
        self.pools[p].clock = Clock::Refusing;
    }
}
