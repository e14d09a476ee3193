//! The thread that has the programs and maps.
//!
//! It reads the counts of all workers ten times a second: the kernel decides with the counts
//! themselves, so only the view of operators, and the watch over workers that do not accept, are
//! that old.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender};
use std::time::{Duration, Instant};

use dispatch_steer::{
    Correction, Count, Error, MAX_WORKERS, Policy, Steering, WorkerCounts, WorkerSettings,
    listening, second,
};
use dispatcher_core::{PoolId, SteerCounts};

use super::super::peer_thread::Outbox;
use super::hashed::HashedPools;
use super::ports::{Ports, is_at, is_own};
use super::sample::has_closed;
use super::shared::{Directs, Inherits, Shared};
use super::{Adopt, PoolSpec, Public, Slot, SteerCommand, SteerEvent, SteerTotals};
use crate::background::logger::quoted;
use crate::background::restart;
use crate::wake::Wake;

/// How often the counts are read.
const TICK: Duration = Duration::from_millis(100);

/// How often listeners are compared with the kernel's list of them, in ticks.
const VERIFY: u32 = 10;

/// In so many ticks two comparisons have found the end of a listener.
const ENDS_SEEN: u32 = 2 * VERIFY + 5;

/// How often counts are compared with the kernel's list of all sockets, in ticks.
const RECONCILE: u32 = 300;

/// Most events that wait for the hot thread.
pub(super) const MAILBOX: usize = 256;

pub(super) struct SteerThread {
    commands: Receiver<SteerCommand>,
    pub(super) outbox: Outbox<SteerEvent>,
    pub(super) pools: BTreeMap<PoolId, PoolMaps>,
    pub(super) hashed: HashedPools,
    ports: Ports,
    ticks: u32,
    /// When the counts are read next.
    next: Instant,
}

/// A pool and its workers.
pub(super) struct PoolMaps {
    pub(super) spec: PoolSpec,
    pub(super) steering: Steering,
    /// The cgroup of its workers.
    pub(super) cgroup: PathBuf,
    pub(super) slots: BTreeMap<u32, Known>,
    /// Connections to certain workers, and what tells that one is over.
    pub(super) directs: Directs,
    totals: SteerTotals,
    /// The last failures that were reported: of reading and writing, and of comparisons.
    failure: Option<String>,
    not_compared: Option<String>,
}

/// A slot in use.
pub(super) struct Known {
    pub(super) address: SocketAddr,
    /// What the core was last told.
    pub(super) counts: SteerCounts,
    listens: bool,
    problem: Option<String>,
    /// Why the listener that it had before is not registered.
    not_adopted: Option<String>,
    /// How often in succession its registered listener was found closed.
    lost: u32,
    /// Nothing holds it: it is removed when it is free.
    pub(super) freed: bool,
    /// Its process shares its port.
    pub(super) shared: Option<Shared>,
}

impl SteerThread {
    pub(super) fn new(
        commands: Receiver<SteerCommand>,
        events: SyncSender<SteerEvent>,
        wake: Wake,
        seed: u32,
    ) -> SteerThread {
        SteerThread {
            commands,
            outbox: Outbox::new(events, wake),
            pools: BTreeMap::new(),
            hashed: HashedPools::default(),
            ports: Ports::new(seed),
            ticks: 0,
            next: Instant::now() + TICK,
        }
    }

    /// Runs until it is told to end, or the hot thread has ended. After a panic it goes on.
    pub(super) fn run(mut self) {
        restart::thread("steer", || {
            self.rounds();
            Ok(())
        });
    }

    fn rounds(&mut self) {
        loop {
            let left = self.next.saturating_duration_since(Instant::now());
            match self.commands.recv_timeout(left) {
                // Also if the hot thread reads no events any more.
                Ok(SteerCommand::End(kept, ended)) => {
                    self.end(&kept);
                    // The hot thread may not wait for it any more.
                    let _ = ended.send(());
                    return;
                }
                Ok(command) => self.obey(command),
                Err(RecvTimeoutError::Timeout) => {}
                // The dispatcher has ended without a word: what is pinned goes on.
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if self.next <= Instant::now() {
                self.next = Instant::now() + TICK;
                self.read_all();
                self.watch_hashed();
            }
            self.outbox.announce();
        }
    }

    fn end(&mut self, kept: &HashSet<PoolId>) {
        for (id, pool) in std::mem::take(&mut self.pools) {
            if !kept.contains(&id) {
                pool.detach();
            }
        }
    }

    fn obey(&mut self, command: SteerCommand) {
        let Some(command) = self.obey_hashed(command) else { return };
        match command {
            SteerCommand::Open(spec) => {
                let (id, opened) = (spec.pool, self.open(*spec));
                self.outbox.report(SteerEvent::Opened(id, opened));
            }
            SteerCommand::Change(spec) => {
                let id = spec.pool;
                let changed = self.pools.get_mut(&id).map(|pool| pool.change(*spec));
                self.note(id, changed.unwrap_or(Ok(())));
            }
            SteerCommand::Prepare { pool, holder, address, adopt } => {
                let event = match self.prepare(pool, address, adopt) {
                    Ok(Some((number, address, listeners))) => {
                        let slot = Slot { pool, number };
                        SteerEvent::Prepared { holder, slot, address, listeners }
                    }
                    Ok(None) => SteerEvent::HasClosed(holder),
                    Err(error) => SteerEvent::NotPrepared { holder, address, error },
                };
                self.outbox.report(event);
            }
            SteerCommand::Sweep(id) => {
                let swept = self.pools.get_mut(&id).map(PoolMaps::sweep);
                self.note(id, swept.unwrap_or(Ok(())));
            }
            SteerCommand::MoveQueue(slot) => {
                let moved = self.pools.get_mut(&slot.pool).map(|pool| pool.move_queue(slot.number));
                self.outbox.report(SteerEvent::QueueMoved(slot));
                self.note(slot.pool, moved.unwrap_or(Ok(())));
            }
            SteerCommand::Free { slot, .. } => {
                let freed = self.pools.get_mut(&slot.pool).map(|pool| pool.free(slot.number));
                self.note(slot.pool, freed.unwrap_or(Ok(())));
            }
            SteerCommand::Connect(slot, connected) => {
                if let Some(pool) = self.pools.get_mut(&slot.pool) {
                    pool.connect(slot.number, connected);
                }
            }
            SteerCommand::Close(id) => {
                if let Some(pool) = self.pools.remove(&id) {
                    pool.detach();
                }
            }
            SteerCommand::Runs(slot, pid) => {
                if let Some(pool) = self.pools.get_mut(&slot.pool) {
                    pool.runs(slot.number, pid);
                }
            }
            // `run` handles it.
            SteerCommand::End(..) => {}
        }
    }

    /// Finds a slot, and registers the address there. `None` if the process to adopt has closed its
    /// listeners.
    fn prepare(
        &mut self,
        id: PoolId,
        address: Option<SocketAddr>,
        adopt: Option<Adopt>,
    ) -> Result<Option<Inherits>, String> {
        if let Some(pool) = self.pools.get_mut(&id).filter(|pool| pool.spec.shared) {
            let prepared = match adopt {
                Some(Adopt { pid }) => pool.take_listeners(pid),
                None => pool.open_listeners().map(Some),
            };
            return prepared.map_err(|error| error.to_string());
        }
        let address = match address {
            Some(address) => address,
            None => {
                let ip = self.pools.get(&id).map(|pool| pool.spec.ip);
                let ip = ip.ok_or("its pool has no programs in the kernel")?;
                let used = self.pools.values().flat_map(|pool| pool.slots.values());
                let used: HashSet<u16> = used.map(|known| known.address.port()).collect();
                let free = self.ports.free(ip, |port| used.contains(&port));
                free.map_err(|error| format!("no address for it: {error}"))?
            }
        };
        let pool = self.pools.get_mut(&id).ok_or("its pool has no programs in the kernel")?;
        let publics = &pool.spec.publics;
        let is_public = |port| publics.iter().any(|public| public.address.port() == port);
        // Members have no process here.
        if let Some(Adopt { pid: pid @ 1.. }) = adopt
            && has_closed(pid, address, is_public)
        {
            return Ok(None);
        }
        let number = pool.register(address, adopt.is_some()).map_err(|error| error.to_string())?;
        Ok(Some((number, address, Vec::new())))
    }

    fn note(&mut self, id: PoolId, result: Result<(), Error>) {
        let Err(error) = result else { return };
        let error = error.to_string();
        let Some(pool) = self.pools.get_mut(&id) else { return };
        if pool.failure.as_ref() != Some(&error) {
            pool.failure = Some(error.clone());
            self.outbox.report(SteerEvent::Failed(id, error));
        }
    }

    /// Reads what the kernel counts, and reports what has changed.
    fn read_all(&mut self) {
        let ended = self.pools.iter_mut().map(|(id, pool)| (*id, pool.end_directs()));
        let ended: Vec<_> = ended.filter(|(_, result)| result.is_err()).collect();
        ended.into_iter().for_each(|(id, result)| self.note(id, result));
        if self.pools.values().all(|pool| pool.slots.is_empty()) {
            return;
        }
        let has_live = |pool: &PoolMaps| pool.slots.values().any(|known| known.counts.live > 0);
        // Without the list, the queues count as they were.
        let queues = match self.pools.values().any(has_live) {
            true => Queues::read().ok(),
            false => Some(Queues::default()),
        };
        self.ticks = self.ticks.wrapping_add(1);
        let ids: Vec<PoolId> = self.pools.keys().copied().collect();
        for id in ids {
            let Some(pool) = self.pools.get_mut(&id) else { continue };
            let mut events = Vec::new();
            if let Some(compared) = pool.compare(id, self.ticks, &mut events) {
                let failure = compared.err().map(|error| error.to_string());
                if let Some(error) = failure.clone().filter(|_| failure != pool.not_compared) {
                    events.push(SteerEvent::Failed(id, error));
                }
                pool.not_compared = failure;
            }
            let read = pool.read(id, queues.as_ref(), &mut events);
            if read.is_ok() && pool.failure.take().is_some() {
                // What does not work any more is over.
                events.push(SteerEvent::Totals(id, pool.totals));
            }
            events.into_iter().for_each(|event| self.outbox.report(event));
            self.note(id, read);
        }
    }
}

impl PoolMaps {
    pub(super) fn new(spec: PoolSpec, steering: Steering, cgroup: PathBuf) -> PoolMaps {
        PoolMaps {
            spec,
            steering,
            cgroup,
            slots: BTreeMap::new(),
            directs: Directs::new(),
            totals: SteerTotals::default(),
            failure: None,
            not_compared: None,
        }
    }

    /// Frees the slots that nothing has asked for.
    fn sweep(&mut self) -> Result<(), Error> {
        let freed = self.slots.iter().filter(|(_, known)| known.freed);
        let freed: Vec<u32> = freed.map(|(number, _)| *number).collect();
        freed.into_iter().try_for_each(|number| self.free(number))
    }

    pub(super) fn change(&mut self, spec: PoolSpec) -> Result<(), Error> {
        // An inherited listener stays: without an address of the pool its clients are refused.
        let refuses = spec.shared && spec.publics.is_empty();
        self.steering.set_wait(if refuses { Duration::ZERO } else { spec.wait })?;
        self.steering.set_policy(policy(spec.policy))?;
        for new in &spec.publics {
            match (spec.shared, new.ipv6_only) {
                (true, _) => self.steering.add_group(new.address)?,
                (false, true) => self.steering.add_public_ipv6(new.address)?,
                (false, false) => self.steering.add_public(new.address)?,
            }
        }
        // Addresses with inherited listeners stay as long as the pool.
        if !spec.shared {
            let stays = |old| spec.publics.iter().any(|new| includes(new, old));
            self.steering.retain_publics(stays)?;
        }
        self.spec = spec;
        Ok(())
    }

    fn register(&mut self, address: SocketAddr, adopt: bool) -> Result<u32, Error> {
        let same = |(_, known): &(&u32, &mut Known)| known.address == address;
        if let Some((number, known)) = self.slots.iter_mut().find(same) {
            // Another holder would share the counts.
            if !known.freed {
                return Err(Error::Invalid(format!("{address} is the address of another worker")));
            }
            *known = Known::new(address);
            let number = *number;
            self.adopt(number);
            return Ok(number);
        }
        let former = if adopt { self.former_number(address)? } else { None };
        let number = match former {
            Some(number) => number,
            None => self.free_number()?,
        };
        // It is no worker for the kernel before the core decides so.
        let settings = WorkerSettings { draining: 1, ..WorkerSettings::new(1) };
        match former {
            Some(_) => self.steering.set_former_worker(number, settings)?,
            None => self.steering.set_worker(number, settings)?,
        }
        match is_own(address.ip()) {
            true => self.steering.add_port(number, address.port())?,
            false => self.steering.add_address(number, address)?,
        }
        self.slots.insert(number, Known::new(address));
        if adopt {
            self.adopt(number);
        }
        Ok(number)
    }

    /// The number of the worker that was removed from here while it listened.
    fn former_number(&self, address: SocketAddr) -> Result<Option<u32>, Error> {
        let own =
            |local: SocketAddr| local.port() == address.port() && is_at(local.ip(), address.ip());
        let former = self.steering.former_worker(own)?;
        Ok(former.filter(|number| !self.slots.contains_key(number)))
    }

    /// A number that no worker has.
    pub(super) fn free_number(&self) -> Result<u32, Error> {
        for number in (0..MAX_WORKERS).filter(|number| !self.slots.contains_key(number)) {
            if self.steering.is_free(number)? {
                return Ok(number);
            }
        }
        Err(Error::Invalid(format!("the pool has {MAX_WORKERS} workers already")))
    }

    /// Registers listeners that the worker has already.
    fn adopt(&mut self, number: u32) {
        let adopted = self.steering.adopt_listeners(number, &self.cgroup);
        if let Some(known) = self.slots.get_mut(&number) {
            known.not_adopted = adopted.err().map(|error| error.to_string());
        }
    }

    /// Compares listeners and counts with the kernel's lists, if it is time for that.
    fn compare(
        &mut self,
        id: PoolId,
        ticks: u32,
        events: &mut Vec<SteerEvent>,
    ) -> Option<Result<(), Error>> {
        let compared = match ticks {
            ticks if ticks.is_multiple_of(RECONCILE) => self.steering.reconcile(),
            ticks if ticks.is_multiple_of(VERIFY) => self.steering.verify_listeners(),
            _ => return None,
        };
        // A worker could have detached the program; the kernel tells nothing of that.
        let attached = if self.spec.shared { self.steering.attach_again() } else { Ok(()) };
        let compared = compared.and_then(|corrections| attached.map(|()| corrections));
        let corrections = match compared {
            Ok(corrections) => corrections,
            Err(error) => return Some(Err(error)),
        };
        if !corrections.is_empty() {
            let text = |it: &Correction| {
                let count = match it.count {
                    Count::Live => "connections",
                    Count::ListenersV4 => "IPv4 listeners",
                    Count::ListenersV6 => "IPv6 listeners",
                };
                let known = self.slots.get(&it.worker);
                let removed = || "a removed worker".to_owned();
                let at = known.map_or_else(removed, |known| known.address.to_string());
                format!("{count} of {at} by {:+}", it.change)
            };
            let texts = corrections.iter().map(text).collect();
            events.push(SteerEvent::Corrected(id, texts));
        }
        Some(Ok(()))
    }

    fn free(&mut self, number: u32) -> Result<(), Error> {
        if self.spec.shared {
            return self.free_shared(number);
        }
        match self.slots.remove(&number) {
            Some(_) => self.steering.remove_worker(number),
            None => Ok(()),
        }
    }

    fn read(
        &mut self,
        id: PoolId,
        queues: Option<&Queues>,
        events: &mut Vec<SteerEvent>,
    ) -> Result<(), Error> {
        self.watch_shared()?;
        let now = second();
        let numbers: Vec<u32> = self.slots.keys().copied().collect();
        for number in numbers {
            let Some(known) = self.slots.get(&number).filter(|known| !known.freed) else {
                continue;
            };
            let slot = Slot { pool: id, number };
            let found = self.steering.counts(number)?;
            let accepts = known.shared.as_ref().is_none_or(|it| it.accepts && !it.closed);
            let listens = found.listeners != [0, 0] && accepts;
            let queued = match queues {
                _ if known.shared.is_some() => self.steering.queue_len(number)?.into(),
                _ if !listens => 0,
                Some(queues) => queues.of(known.address),
                None => known.counts.queued,
            };
            let counts = self.without_probe(number, counts(&found, now, queued));
            let Some(known) = self.slots.get_mut(&number) else { continue };
            let problem = known.problem_of(&found, listens);
            if problem != known.problem {
                known.problem = problem;
                events.push(SteerEvent::Problem(slot, known.problem.clone()));
            }
            let before = std::mem::replace(&mut known.counts, counts);
            match (std::mem::replace(&mut known.listens, listens), listens) {
                (false, true) => events.push(SteerEvent::Listens(slot, counts)),
                (true, false) => events.push(SteerEvent::Closed(slot, counts)),
                // While connections wait, the core looks at the time.
                _ if before != counts || counts.queued > 0 => {
                    events.push(SteerEvent::Counts(slot, counts));
                }
                _ => {}
            }
        }
        let totals = self.steering.totals()?;
        let totals = SteerTotals {
            chosen: totals.chosen,
            full: totals.full,
            waited: totals.waited,
            unserved: totals.unserved,
            failed: totals.failed,
        };
        if std::mem::replace(&mut self.totals, totals) != totals {
            events.push(SteerEvent::Totals(id, totals));
        }
        Ok(())
    }

    fn detach(self) {
        let pins = self.spec.pins.clone();
        if let Err(error) = self.steering.detach() {
            log::warn!("event=steer_not_detached pool={} error={}", self.spec.name, quoted(&error));
        }
        if let Some(pins) = pins {
            // Another pool of this dispatcher may have pins above.
            let _ = std::fs::remove_dir(&pins);
            let _ = pins.parent().map(std::fs::remove_dir);
        }
    }
}

impl Known {
    pub(super) fn new(address: SocketAddr) -> Known {
        Known {
            address,
            counts: SteerCounts::default(),
            listens: false,
            problem: None,
            not_adopted: None,
            lost: 0,
            freed: false,
            shared: None,
        }
    }

    /// Why it gets no connections. The end of an adopted listener is not reported, so it seems to
    /// be open until the comparisons have found its end.
    fn problem_of(&mut self, found: &WorkerCounts, listens: bool) -> Option<String> {
        let problem = found.problem();
        let is_lost = problem.is_some() && found.refused == 0;
        self.lost = if is_lost { self.lost.saturating_add(1) } else { 0 };
        let not_adopted = self.not_adopted.as_ref().filter(|_| !listens || is_lost);
        match not_adopted {
            Some(reason) => Some(reason.clone()),
            None => problem.filter(|_| !is_lost || self.lost > ENDS_SEEN),
        }
    }
}

fn policy(policy: dispatcher_core::Policy) -> Policy {
    use dispatcher_core::Policy as Core;
    match policy {
        // The configuration refuses the last one here.
        Core::LeastConnections | Core::LeastScore => Policy::LeastConnections,
        Core::RoundRobin => Policy::RoundRobin,
        Core::Random => Policy::Random,
        Core::TwoChoices => Policy::TwoChoices,
        Core::Hash => Policy::Hash,
        Core::Failover => Policy::Failover,
    }
}

/// Whether a public address stands for another one: `[::]:P` also for `0.0.0.0:P`.
fn includes(public: &Public, other: SocketAddr) -> bool {
    let &Public { address, ipv6_only, .. } = public;
    let any = |ip: IpAddr| ip.is_unspecified();
    let both = address.is_ipv6() && !ipv6_only && any(address.ip()) && any(other.ip());
    address == other || (both && address.port() == other.port())
}

fn counts(found: &WorkerCounts, second: u32, queued: u64) -> SteerCounts {
    SteerCounts {
        live: u64::try_from(found.live).unwrap_or(0),
        pending: found.pending(second),
        total: found.total,
        queued,
        moved_in: found.moved_in,
        moved_out: found.moved_out,
    }
}

/// The accept queues of listening sockets.
#[derive(Default)]
struct Queues(HashMap<u16, Vec<(IpAddr, u32)>>);

impl Queues {
    fn read() -> std::io::Result<Queues> {
        let mut queues: HashMap<u16, Vec<(IpAddr, u32)>> = HashMap::new();
        for socket in listening::list()? {
            let port = queues.entry(socket.address.port()).or_default();
            port.push((socket.address.ip(), socket.queued));
        }
        Ok(Queues(queues))
    }

    /// The connections that wait at the listeners of a worker.
    fn of(&self, address: SocketAddr) -> u64 {
        let own = |ip: &IpAddr| is_at(*ip, address.ip());
        let sockets = self.0.get(&address.port());
        sockets
            .into_iter()
            .flatten()
            .filter(|(ip, _)| own(ip))
            .map(|(_, queued)| u64::from(*queued))
            .sum()
    }
}
