//! Changes of the configuration while the core runs.
//!
//! Ids are positions. A removed pool or listener stays as a retired entry, so that connections and
//! workers that refer to it continue unchanged. Once nothing refers to it, the next addition reuses
//! the entry, so that neither memory nor the time of a turn grows with the number of changes. A
//! pool that is added again under its name before that is the same pool. A listener's pool never
//! changes: a listener for another pool is a new listener.

use std::collections::VecDeque;
use std::time::Duration;

use super::affinity::Memory;
use super::awaiting::Awaiting;
use super::discarded::Contents;
use super::effect::{Effect, Event};
use super::handoff::Shares;
use super::history::History;
use super::ledger::PoolQueue;
use super::policy::{Candidates, Member};
use super::proxy::Headers;
use super::snapshot::Counts;
use super::supervise::Processes;
use super::types::*;
use super::worker::Worker;
use super::{Core, Listener, Pool, Random, WorkerWait};
use crate::histogram::{self, Histogram};

impl Listener {
    /// A listener that is added after `joins` joins.
    pub(super) fn new(settings: ListenerSettings, joins: u64) -> Listener {
        Listener {
            pool: usize::from(settings.pool.0),
            accepted: 0,
            closed: [0; CloseReason::ALL.len()],
            access_control: None,
            headers: Headers::default(),
            retired: false,
            closed_for_good: false,
            named_for: (joins, u64::MAX),
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
        // A spawned pool starts its processes next, so it reports nothing.
        if settings.processes == 0 {
            effects.push_back(Effect::Event(Event::NoUsableWorker { pool: id }));
        }
        Pool {
            candidates: Candidates::new(settings.policy, &settings.scores, seeds.number()),
            history: History::new(settings.history, settings.history_candidates),
            sample_at: now,
            memory: settings.affinity.as_ref().map(|a| Memory::new(a, seeds.number())),
            awaiting: Awaiting::default(),
            queued: PoolQueue::default(),
            usable: 0,
            untaken: 0,
            shares: Shares::default(),
            trial_until: now,
            first_until: now,
            ticked: now,
            retrial_wait: None,
            idle_at: None,
            unserved: None,
            refusing_since: now,
            refusal_logged_at: now,
            refusal_interval: Duration::ZERO,
            worker_wait: WorkerWait::Since(now),
            pressure: false,
            pressure_reported: false,
            pressure_at: None,
            processes: Processes::new(
                id,
                settings.processes,
                settings.supervision.clone(),
                now,
                seeds.number(),
            ),
            unrecovered: 0,
            counts: Counts::default(),
            handoff: Histogram::new(histogram::HANDOFF),
            retired: false,
            lacking_since: now,
            released: false,
            settings,
        }
    }
}

impl Core {
    /// Adds a pool. A retired pool of this name is restored with the workers that it still has,
    /// because two pools of one name could not be distinguished. Otherwise the pool reuses a
    /// retired entry that nothing refers to, if there is one.
    pub fn add_pool(&mut self, now: Time, settings: PoolSettings, seed: u64) -> PoolId {
        let same = |pool: &Pool| pool.retired && pool.settings.name == settings.name;
        if let Some(p) = self.pools.iter().position(same) {
            return self.put_back(now, p, settings, seed);
        }
        let p = (0..self.pools.len()).find(|&p| self.is_free(p)).unwrap_or(self.pools.len());
        let id = PoolId(p as u16);
        let mut seeds = Random::new(seed);
        let pool = Pool::new(id, settings, now, &mut seeds, &mut self.effects);
        match self.pools.get_mut(p) {
            None => self.pools.push(pool),
            Some(entry) => {
                let old = std::mem::replace(entry, pool);
                self.retired_counts.taken += old.counts.taken;
                self.retired_counts.returned += old.counts.returned;
                self.retired_counts.steered += old.counts.steered;
            }
        }
        if self.host_drains() {
            self.pools[p].processes.set_held(true);
        }
        self.after(now, p);
        self.tick_processes(now, p);
        id
    }

    /// Whether nothing refers to a retired pool.
    fn is_free(&self, p: usize) -> bool {
        let pool = &self.pools[p];
        pool.retired
            && pool.candidates.len() == 0
            && pool.processes.is_idle()
            && !self.has_clients(p)
            // Includes workers that are gone with outcomes still pending.
            && !self.workers.iter().any(|worker| worker.pool == p && !worker.forgotten)
            && !self.listeners.iter().enumerate().any(|(at, listener)| {
                listener.pool == p && (!listener.closed_for_good || self.ledger.refers_to(at))
            })
    }

    /// Restores a retired pool. Workers that an operator drained stay draining; workers that
    /// drained because of the removal are resumed.
    fn put_back(&mut self, now: Time, p: usize, settings: PoolSettings, seed: u64) -> PoolId {
        let id = PoolId(p as u16);
        let pool = &mut self.pools[p];
        pool.retired = false;
        if pool.usable == 0 {
            pool.worker_wait = WorkerWait::Since(now);
            if settings.processes == 0 {
                self.event(Event::NoUsableWorker { pool: id });
            }
        }
        self.change_pool(now, id, settings, seed);
        id
    }

    /// Changes a pool's settings; its name stays. `max_untaken` applies to workers that join later,
    /// because the size of a scoreboard is fixed at the join; so do the accounts that may join: no
    /// worker is expelled. Whether the kernel chooses its workers stays while it has any.
    pub fn change_pool(&mut self, now: Time, pool: PoolId, settings: PoolSettings, seed: u64) {
        let p = usize::from(pool.0);
        let mut seeds = Random::new(seed);
        let Some(entry) = self.pools.get_mut(p) else { return };
        let name = entry.settings.name.clone();
        let steered = match entry.candidates.len() {
            0 => settings.steered,
            _ => entry.settings.steered,
        };
        let settings = PoolSettings { name, steered, ..settings };
        let old = std::mem::replace(&mut entry.settings, settings);
        let new = &entry.settings;
        let forgotten = entry.history.resize(new.history, new.history_candidates);
        let chooses = old.policy != new.policy || old.scores != new.scores;
        let remembers = old.affinity != new.affinity;
        let most = new.max_connections_per_worker;
        let slow_start = new.slow_start;
        let (timeout, longest) = (new.handoff_timeout, new.max_handoff_timeout);
        self.discard(Contents::Decisions(forgotten));
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
                worker.ring.hurry(|sent| sent + worker.trust.patience(timeout, longest, 0));
                worker.warm_up(now, slow_start);
                self.refresh(w);
            }
        }
        // First bytes that were awaited for the old key do not contain the new one.
        let most = if remembers { 0 } else { u64::from(self.pools[p].settings.peek.max_awaiting) };
        self.await_at_most(now, p, most);
        self.limit_awaited(now, p, u64::from(self.pools[p].settings.peek.max_awaiting));
        self.wait_again(now, p);
        self.after(now, p);
        self.change_processes(now, p);
        self.drain_surplus(now, p);
        self.resume_wanted(now, p);
    }

    /// A pool that refuses clients waits for a worker again, if `wait_for_worker` has become long
    /// enough.
    fn wait_again(&mut self, now: Time, p: usize) {
        let pool = &mut self.pools[p];
        let until = pool.lacking_since + pool.settings.wait_for_worker;
        if pool.worker_wait == WorkerWait::Refusing && !pool.retired && now < until {
            pool.worker_wait = match pool.usable {
                0 => WorkerWait::Since(pool.lacking_since),
                _ => WorkerWait::Off,
            };
        }
    }

    /// Builds the new policy's candidates from the same workers in the same order. The caller
    /// refreshes each worker afterwards.
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

    /// Replaces the affinity table: the old one has other keys or another time to live.
    fn change_memory(&mut self, p: usize, seed: u64) {
        let pool = &mut self.pools[p];
        let new = pool.settings.affinity.as_ref().map(|settings| Memory::new(settings, seed));
        if let Some(old) = std::mem::replace(&mut pool.memory, new) {
            self.discard(Contents::Memory(old));
        }
        let pool = &mut self.pools[p];
        let Some(memory) = &mut pool.memory else { return };
        let indices: Vec<u32> = pool.candidates.workers().collect();
        for index in indices {
            let workers = &self.workers;
            let name = &workers[index as usize].name;
            let binding = memory.bind(name, index, |w| workers[w as usize].is_usable());
            self.workers[index as usize].binding = binding;
        }
    }

    /// Sets the number of a pool's processes. Workers of surplus processes are drained; workers
    /// that drain for that reason and are not surplus any more are resumed.
    pub fn scale(&mut self, now: Time, pool: PoolId, processes: u32) {
        let p = usize::from(pool.0);
        let Some(entry) = self.pools.get_mut(p).filter(|entry| !entry.retired) else { return };
        entry.settings.processes = processes;
        self.after(now, p);
        self.change_processes(now, p);
        self.drain_surplus(now, p);
        self.resume_wanted(now, p);
    }

    /// Drains the workers of surplus processes. A process that is still starting is drained when it
    /// joins: see [`Core::join`].
    pub(super) fn drain_surplus(&mut self, now: Time, p: usize) {
        for w in 0..self.workers.len() {
            let worker = &self.workers[w];
            if worker.pool == p && self.is_surplus(w) {
                self.drain_unwanted(now, worker.id, None);
            }
        }
    }

    /// Retires a pool: no worker can join it and no process is started for it. Its workers are
    /// drained once its listeners are closed and all accepted connections are taken.
    pub fn retire_pool(&mut self, now: Time, pool: PoolId) {
        let p = usize::from(pool.0);
        let Some(entry) = self.pools.get_mut(p) else { return };
        entry.retired = true;
        entry.settings.processes = 0;
        self.after(now, p);
        self.change_processes(now, p);
        self.tick_retired(now, p);
    }

    /// Adds a listener, in a retired entry that nothing refers to, if there is one.
    pub fn add_listener(&mut self, settings: ListenerSettings) -> ListenerId {
        let free = (0..self.listeners.len()).find(|&at| self.is_listener_free(at, &settings));
        let at = free.unwrap_or(self.listeners.len());
        let mut new = Listener::new(settings, self.joins);
        match self.listeners.get_mut(at) {
            None => self.listeners.push(new),
            Some(entry) => {
                if entry.settings.name == new.settings.name {
                    // Workers that know the old listener by its name know the new one, too.
                    new.named_for.0 = new.named_for.0.min(entry.named_for.0);
                }
                let old = std::mem::replace(entry, new);
                self.retired_counts.accepted += old.accepted;
                self.retired_counts.closed += old.closed.iter().sum::<u64>();
            }
        }
        ListenerId(at as u16)
    }

    /// Whether a new listener can reuse a retired entry: nothing refers to it, or its workers have
    /// the right name for the id. Workers learn the names of listener ids when they join.
    fn is_listener_free(&self, at: usize, new: &ListenerSettings) -> bool {
        let old = &self.listeners[at];
        let same = old.settings.name == new.name && old.settings.pool == new.pool;
        let knows = |worker: &Worker| {
            let (after, until) = old.named_for;
            worker.pool == old.pool
                && worker.state != State::Gone
                && (after + 1..=until).contains(&worker.id.serial)
        };
        old.retired
            && old.closed_for_good
            && !self.ledger.refers_to(at)
            && (same || !self.workers.iter().any(knows))
    }

    /// Retires a listener. [`Core::accepting`] then returns [`Accepting::Finish`]: the connections
    /// in its queue are still accepted. The event loop then closes it and calls
    /// [`Core::listener_closed`].
    pub fn retire_listener(&mut self, listener: ListenerId) {
        let joins = self.joins;
        if let Some(entry) = self.listeners.get_mut(usize::from(listener.0))
            && !std::mem::replace(&mut entry.retired, true)
        {
            entry.named_for.1 = joins;
        }
    }

    /// The event loop has closed a listener, because it was retired or the dispatcher is stopping.
    pub fn listener_closed(&mut self, now: Time, listener: ListenerId) {
        let Some(entry) = self.listeners.get_mut(usize::from(listener.0)) else { return };
        entry.closed_for_good = true;
        if !entry.retired {
            return;
        }
        let p = entry.pool;
        self.drop_rules_without_clients(listener);
        self.after(now, p);
        self.tick_retired(now, p);
    }

    /// Whether a listener is retired.
    pub fn is_listener_retired(&self, listener: ListenerId) -> bool {
        self.listeners.get(usize::from(listener.0)).is_none_or(|entry| entry.retired)
    }

    /// Whether a pool is retired.
    pub fn is_pool_retired(&self, pool: PoolId) -> bool {
        self.pools.get(usize::from(pool.0)).is_none_or(|entry| entry.retired)
    }

    /// The listeners that are not retired, in the order of the status.
    pub fn listeners(&self) -> impl Iterator<Item = ListenerId> + '_ {
        (0u16..)
            .zip(&self.listeners)
            .filter(|(_, entry)| !entry.retired)
            .map(|(id, _)| ListenerId(id))
    }

    /// The pool of this name that workers can join.
    pub fn pool_named(&self, name: &str) -> Option<PoolId> {
        let found = self.pools.iter().position(|pool| !pool.retired && pool.settings.name == name);
        found.map(|p| PoolId(p as u16))
    }

    /// Whether a pool is in the status: a retired pool stays there while it has workers.
    pub(super) fn is_shown(&self, p: usize) -> bool {
        let pool = &self.pools[p];
        !pool.retired || pool.candidates.len() > 0
    }

    /// Drains the workers of a retired pool that gets no more connections, and frees its tables
    /// once the workers are gone.
    pub(super) fn tick_retired(&mut self, now: Time, p: usize) {
        let pool = &mut self.pools[p];
        if !pool.retired || self.stop.is_some() {
            return;
        }
        if pool.candidates.len() == 0 && pool.worker_wait == WorkerWait::Refusing {
            // No client can arrive any more, so later turns have nothing to do for this pool.
            let decisions = pool.history.resize(0, 1);
            self.discard(Contents::Decisions(decisions));
            let pool = &mut self.pools[p];
            if let Some(memory) = pool.memory.take() {
                pool.settings.affinity = None;
                self.discard(Contents::Memory(memory));
            }
            return;
        }
        if pool.held() > 0 {
            return;
        }
        if self.has_open_listeners(p) {
            return;
        }
        // A connection that a worker leaves untaken needs another worker of the pool.
        if self.workers.iter().any(|worker| worker.pool == p && worker.untaken() > 0) {
            return;
        }
        let of_pool = |worker: &&Worker| worker.pool == p && worker.is_usable();
        let ids: Vec<WorkerId> =
            self.workers.iter().filter(of_pool).map(|worker| worker.id).collect();
        for id in ids {
            self.drain_unwanted(now, id, None);
        }
        // A worker of the line protocol cannot be told. Without its stream it joins again, perhaps
        // another pool; its clients stay with it.
        let silent = |worker: &&Worker| {
            let line = worker.line.as_ref().filter(|line| line.unread() == 0);
            worker.pool == p && worker.state != State::Gone && line.is_some()
        };
        let ids: Vec<WorkerId> =
            self.workers.iter().filter(silent).map(|worker| worker.id).collect();
        for id in ids {
            if let Some(w) = self.find(id) {
                self.remove(now, w, Departure::Expelled("its pool was removed"));
            }
        }
        // No client waits for a worker.
        self.pools[p].worker_wait = WorkerWait::Refusing;
    }
}
