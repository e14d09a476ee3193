//! Pools with shared ports where the kernel's programs cannot be loaded (`fallback = "hash"`): the
//! kernel's own hash of the addresses spreads connections over the processes.
//!
//! There are no programs, maps or pins. The thread opens the listeners of each place of the pool,
//! and has a duplicate of each: so a process that replaces another one inherits the same queue, and
//! nothing in it is lost. While a place has no process, its clients wait for the next one, at most
//! `wait_for_worker`.
//!
//! Nothing tells that such a process accepts. So the first process of a place is a worker as soon
//! as it runs; one that replaces a process that still runs, when it has accepted a connection or
//! has run for a while. Its connections are counted by samples ([`sample`](super::sample)).

use std::collections::{BTreeMap, HashSet};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use dispatch_steer::{Error, MAX_WORKERS, PlainListener};
use dispatcher_core::{PoolId, SteerCounts};

use super::open::open;
use super::sample::{Sample, listens, sockets_of};
use super::shared::{BACKLOG, Inherits};
use super::thread::SteerThread;
use super::{Adopt, Holder, Opened, PoolSpec, Slot, SteerCommand, SteerEvent};

/// How often connections are counted, if that is cheap.
const INTERVAL: Duration = Duration::from_secs(1);

/// A count that takes long comes later: it is at most this part of the thread's time.
const PART: u32 = 50;

/// How long a process runs that replaces another one before it counts as one that serves, unless it
/// has accepted a connection before.
const SETTLED: Duration = Duration::from_secs(2);

/// The pools of the thread, and when their connections are counted next.
#[derive(Default)]
pub(super) struct HashedPools {
    pools: BTreeMap<PoolId, HashedPool>,
    next: Option<Instant>,
}

/// A pool.
struct HashedPool {
    spec: PoolSpec,
    /// The listeners of each place, by its number.
    sets: BTreeMap<u32, ListenerSet>,
    slots: BTreeMap<u32, HashedSlot>,
    /// The connections that waited in any queue at the last count.
    waiting: HashSet<u64>,
    failure: Option<String>,
}

/// The listeners of one place.
struct ListenerSet {
    listeners: Vec<(String, PlainListener)>,
    /// No process has them since then.
    left: Option<Instant>,
}

/// A process.
struct HashedSlot {
    /// Its place in the pool.
    place: u32,
    pid: Option<i32>,
    /// When its listeners were given to it.
    since: Instant,
    /// Another process of its place ran then.
    replaces: bool,
    /// The core was told that it listens.
    listens: bool,
    /// The connections that it had at the last count.
    had: HashSet<u64>,
    counts: SteerCounts,
    not_counted: Option<String>,
}

impl SteerThread {
    /// Attaches the programs of a pool. Where that is not possible, the kernel's hash chooses if
    /// the pool allows it.
    pub(super) fn open(&mut self, spec: PoolSpec) -> Result<Opened, String> {
        let id = spec.pool;
        let by_hash = spec.hash.then(|| spec.clone());
        let error = match (open(spec), by_hash) {
            (Ok((pool, opened)), _) => {
                self.pools.insert(id, pool);
                return Ok(opened);
            }
            (Err(error), None) => return Err(error),
            (Err(error), Some(spec)) => {
                let mut addresses = spec.publics.iter().map(|public| public.address);
                let possible = addresses.try_for_each(PlainListener::possible);
                possible.map_err(|other| format!("{error}; {other}"))?;
                self.hashed.pools.insert(id, HashedPool::new(spec));
                error
            }
        };
        Ok(Opened { hashed: Some(error), ..Opened::default() })
    }

    /// Obeys a command about a pool whose connections the kernel's hash spreads. Gives others back.
    pub(super) fn obey_hashed(&mut self, command: SteerCommand) -> Option<SteerCommand> {
        let id = match &command {
            SteerCommand::Open(_) | SteerCommand::End(..) => return Some(command),
            SteerCommand::Change(spec) => spec.pool,
            SteerCommand::Prepare { pool, .. } => *pool,
            SteerCommand::Sweep(pool) | SteerCommand::Close(pool) => *pool,
            SteerCommand::MoveQueue(slot)
            | SteerCommand::Connect(slot, _)
            | SteerCommand::Runs(slot, _)
            | SteerCommand::Free { slot, .. } => slot.pool,
        };
        let Some(pool) = self.hashed.pools.get_mut(&id) else { return Some(command) };
        match command {
            SteerCommand::Change(spec) => pool.change(*spec),
            SteerCommand::Prepare { holder, address, adopt, .. } => match pool
                .prepare(holder, adopt)
            {
                Ok(None) => self.outbox.report(SteerEvent::HasClosed(holder)),
                Ok(Some((number, address, listeners))) => {
                    let slot = Slot { pool: id, number };
                    self.outbox.report(SteerEvent::Prepared { holder, slot, address, listeners });
                    if adopt.is_some() {
                        self.outbox.report(SteerEvent::Listens(slot, SteerCounts::default()));
                    }
                }
                Err(error) => {
                    let error = error.to_string();
                    self.outbox.report(SteerEvent::NotPrepared { holder, address, error });
                }
            },
            SteerCommand::Runs(slot, pid) => {
                if let Some(event) = pool.runs(slot, pid) {
                    self.outbox.report(event);
                }
            }
            SteerCommand::Free { slot, returns } => pool.free(slot.number, returns),
            SteerCommand::Close(_) => drop(self.hashed.pools.remove(&id)),
            // There are no programs that could move a queue or choose a worker, and no pins.
            SteerCommand::MoveQueue(_)
            | SteerCommand::Connect(..)
            | SteerCommand::Sweep(_)
            | SteerCommand::Open(_)
            | SteerCommand::End(..) => {}
        }
        None
    }

    /// Counts connections, if it is time for that, and closes what has waited for too long.
    pub(super) fn watch_hashed(&mut self) {
        let now = Instant::now();
        let (mut events, hashed) = (Vec::new(), &mut self.hashed);
        for (&id, pool) in &mut hashed.pools {
            pool.close_late(now);
            pool.settle(id, now, &mut events);
        }
        let has_processes = hashed.pools.values().any(|pool| !pool.slots.is_empty());
        if has_processes && hashed.next.is_none_or(|next| next <= now) {
            let ports = |port| hashed.pools.values().any(|pool| pool.has_port(port));
            let sample = Sample::read(ports).map_err(|error| error.to_string());
            for (&id, pool) in &mut hashed.pools {
                pool.count(id, &sample, &mut events);
            }
            let pause = INTERVAL.max(now.elapsed() * PART);
            hashed.next = Some(Instant::now() + pause);
        }
        events.into_iter().for_each(|event| self.outbox.report(event));
    }
}

impl HashedPool {
    fn new(spec: PoolSpec) -> HashedPool {
        HashedPool {
            spec,
            sets: BTreeMap::new(),
            slots: BTreeMap::new(),
            waiting: HashSet::new(),
            failure: None,
        }
    }

    fn change(&mut self, spec: PoolSpec) {
        self.spec = spec;
        // At a stop: processes go on with their own duplicates until they end.
        if self.spec.publics.is_empty() {
            self.sets.clear();
        }
    }

    /// A slot, and what its process inherits. `None` if the process to adopt has closed the
    /// listeners that it inherited.
    fn prepare(&mut self, holder: Holder, adopt: Option<Adopt>) -> Result<Option<Inherits>, Error> {
        let invalid = |text: &str| Error::Invalid(text.to_owned());
        let Holder::Process(process) = holder else {
            return Err(invalid("only processes of the dispatcher inherit listeners"));
        };
        let public = self.spec.publics.first().map(|public| public.address);
        let address = public.ok_or_else(|| invalid("its pool has no listener"))?;
        let number = (0..MAX_WORKERS).find(|number| !self.slots.contains_key(number));
        let number = number.ok_or_else(|| invalid("its pool has too many processes"))?;
        if adopt.as_ref().is_some_and(|adopt| !self.may_listen(adopt.pid)) {
            return Ok(None);
        }
        let place = process.place;
        let replaces = self.slots.values().any(|slot| slot.place == place);
        // A process of an earlier dispatcher has listeners of which there is no duplicate here.
        let listeners = if adopt.is_some() { Vec::new() } else { self.inherit(place)? };
        let slot = HashedSlot {
            place,
            pid: adopt.map(|adopt| adopt.pid),
            since: Instant::now(),
            replaces,
            listens: adopt.is_some(),
            had: HashSet::new(),
            counts: SteerCounts::default(),
            not_counted: None,
        };
        self.slots.insert(number, slot);
        Ok(Some((number, address, listeners)))
    }

    /// Whether a process has a listener of the pool. What may not be looked at is taken for one.
    fn may_listen(&self, pid: i32) -> bool {
        let is_public = |address| self.spec.publics.iter().any(|it| it.address == address);
        sockets_of(pid).and_then(|sockets| listens(&sockets, is_public)).unwrap_or(true)
    }

    /// Duplicates of the listeners of a place: those that it has, those that wait for any process,
    /// or new ones.
    fn inherit(&mut self, place: u32) -> Result<Vec<(String, OwnedFd)>, Error> {
        if !self.sets.contains_key(&place) {
            let waiting = self.sets.iter().find(|(_, set)| set.left.is_some());
            let waiting = waiting.map(|(&place, _)| place);
            let set = match waiting.and_then(|place| self.sets.remove(&place)) {
                Some(set) => set,
                None => ListenerSet::open(&self.spec)?,
            };
            self.sets.insert(place, set);
        }
        let Some(set) = self.sets.get_mut(&place) else { return Ok(Vec::new()) };
        let duplicates = set.listeners.iter();
        let duplicates = duplicates.map(|(name, it)| Ok((name.clone(), it.duplicate()?)));
        let duplicates = duplicates.collect::<Result<_, Error>>()?;
        set.left = None;
        Ok(duplicates)
    }

    /// A process runs.
    fn runs(&mut self, slot: Slot, pid: i32) -> Option<SteerEvent> {
        let known = self.slots.get_mut(&slot.number)?;
        (known.pid, known.since) = (Some(pid), Instant::now());
        if known.replaces || std::mem::replace(&mut known.listens, true) {
            return None;
        }
        Some(SteerEvent::Listens(slot, known.counts))
    }

    /// Takes processes for workers that have run for a while.
    fn settle(&mut self, id: PoolId, now: Instant, events: &mut Vec<SteerEvent>) {
        let patience = SETTLED.min(self.spec.start_timeout / 2);
        for (&number, slot) in &mut self.slots {
            let accepts = !slot.had.is_empty();
            let settled = slot.pid.is_some() && now.duration_since(slot.since) >= patience;
            if !slot.listens && (settled || accepts) {
                slot.listens = true;
                events.push(SteerEvent::Listens(Slot { pool: id, number }, slot.counts));
            }
        }
    }

    /// A process has ended. `returns`: another one follows in its place.
    fn free(&mut self, number: u32, returns: bool) {
        let Some(ended) = self.slots.remove(&number) else { return };
        if self.slots.values().any(|slot| slot.place == ended.place) {
            return;
        }
        match self.sets.get_mut(&ended.place) {
            Some(set) if returns => set.left = Some(Instant::now()),
            Some(_) => drop(self.sets.remove(&ended.place)),
            None => {}
        }
    }

    /// Closes listeners for which no process came.
    fn close_late(&mut self, now: Instant) {
        let wait = self.spec.wait;
        let late = |since: Instant| now.duration_since(since) > wait;
        self.sets.retain(|_, set| !set.left.is_some_and(late));
    }

    fn has_port(&self, port: u16) -> bool {
        self.spec.publics.iter().any(|public| public.address.port() == port)
    }

    /// Whether clients of the pool are connected to this address.
    fn has_address(&self, local: SocketAddr) -> bool {
        self.spec.publics.iter().any(|public| {
            let ip = public.address.ip();
            let any = ip.is_unspecified() && (ip.is_ipv6() || local.is_ipv4());
            public.address.port() == local.port() && (any || ip == local.ip())
        })
    }

    /// Counts the connections of every process.
    fn count(&mut self, id: PoolId, sample: &Result<Sample, String>, events: &mut Vec<SteerEvent>) {
        let waiting = sample.as_ref().map(|sample| sample.waiting(|at| self.has_address(at)));
        let waiting: HashSet<u64> = waiting.unwrap_or_default();
        // Those that no process has accepted since the last count.
        let stay = waiting.intersection(&self.waiting).count() as u64;
        self.waiting = waiting;
        let queues: BTreeMap<u32, Result<u64, Error>> =
            self.sets.iter().map(|(&place, set)| (place, set.queue_len())).collect();
        let mut newest: BTreeMap<u32, (Instant, u32)> = BTreeMap::new();
        for (&number, slot) in &self.slots {
            let last = newest.entry(slot.place).or_insert((slot.since, number));
            *last = (*last).max((slot.since, number));
        }
        let mut failed = None;
        for (&number, slot) in &mut self.slots {
            let Some(pid) = slot.pid else { continue };
            let its_own = newest.get(&slot.place).is_some_and(|(_, newest)| *newest == number);
            let queued = match queues.get(&slot.place).filter(|_| its_own) {
                Some(Ok(queued)) => *queued,
                Some(Err(error)) => {
                    failed = Some(error.to_string());
                    slot.counts.queued
                }
                // Another process of the place has it.
                None => 0,
            };
            let has = sample.as_ref().map_err(Clone::clone).and_then(|sample| {
                let inodes = sockets_of(pid);
                let inodes = inodes.map_err(|error| format!("the sockets of {pid}: {error}"))?;
                Ok(sample.of(&inodes))
            });
            let at = Slot { pool: id, number };
            let not_counted = match has {
                Ok(has) => {
                    let counts = slot.counted(has, queued, stay);
                    let changed = std::mem::replace(&mut slot.counts, counts) != counts;
                    // While connections wait, the core looks at the time.
                    if slot.listens && (changed || queued > 0) {
                        events.push(SteerEvent::Counts(at, counts));
                    }
                    None
                }
                Err(error) => Some(error),
            };
            if slot.not_counted != not_counted {
                slot.not_counted.clone_from(&not_counted);
                events.push(SteerEvent::NotCounted(at, not_counted));
            }
        }
        if failed != self.failure {
            self.failure.clone_from(&failed);
            events.extend(failed.map(|error| SteerEvent::Failed(id, error)));
        }
    }
}

impl HashedSlot {
    /// What is known now of a process that has these connections, and with so many in its queue.
    ///
    /// Connections that begin and end between two counts are not seen. So the sum is the least that
    /// is possible: those that were not there before, and those in the queue that cannot be the
    /// ones of before, because only `stay` of all that waited still wait.
    fn counted(&mut self, has: HashSet<u64>, queued: u64, stay: u64) -> SteerCounts {
        let before = self.counts;
        let new = has.difference(&self.had).count() as u64;
        let accepted = (new + queued).saturating_sub(before.queued);
        let arrived = accepted.max(queued.saturating_sub(stay.min(before.queued)));
        let live = has.len() as u64 + queued;
        self.had = has;
        SteerCounts { live, queued, total: before.total + arrived, ..SteerCounts::default() }
    }
}

impl ListenerSet {
    fn open(spec: &PoolSpec) -> Result<ListenerSet, Error> {
        let open = |public: &super::Public| {
            Ok((public.name.clone(), PlainListener::open(public.address, BACKLOG)?))
        };
        let listeners = spec.publics.iter().map(open).collect::<Result<_, Error>>()?;
        Ok(ListenerSet { listeners, left: None })
    }

    fn queue_len(&self) -> Result<u64, Error> {
        self.listeners.iter().map(|(_, it)| it.queue_len().map(u64::from)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_is_the_least_that_is_possible() {
        let mut slot = HashedSlot {
            place: 0,
            pid: Some(1),
            since: Instant::now(),
            replaces: false,
            listens: true,
            had: HashSet::new(),
            counts: SteerCounts::default(),
            not_counted: None,
        };
        // What it has, its queue, and what of all queues was there before: then the sum.
        for (has, queued, stay, total) in [
            (&[1, 2][..], 1, 0, 3),
            // The one that waited was accepted.
            (&[1, 2, 3][..], 0, 0, 3),
            (&[3][..], 0, 0, 3),
            (&[3, 4][..], 2, 0, 6),
            // It hangs.
            (&[3, 4][..], 2, 2, 6),
            // It accepted two, which have ended, and two others wait.
            (&[3, 4][..], 2, 0, 8),
            (&[3, 4][..], 2, 1, 9),
            (&[][..], 0, 0, 9),
        ] {
            let counts = slot.counted(has.iter().copied().collect(), queued, stay);
            assert_eq!((counts.total, counts.live), (total, has.len() as u64 + queued));
            slot.counts = counts;
        }
    }
}
